"""A packed linear while it is refined: its codes are fixed, scales and corrections are learned.

    y = fake_quantize((x - m) T; ratio_x) · (codes ⊙ Δ eᵟ)ᵀ + (b + σ β) + c (L + τ Λ)ᵀ

δ, β and Λ start at zero and are in units of what they change: δ is relative, σ is the root mean square of the rows'
norms of the dequantized weight, τ that of the entries of L. The clip ratio of x is learned along, where there is one.
Parts with `InputPart.apply` add their columns to c and L; these are not changed.
What comes out has the tensors of the packed linear that went in, so that it is stored and run the same.

Shapes: `I` in features, `O` out features, `G` groups, `r` rank of the low-rank branch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2q.core.fp4 import round_row_scale
from s2q.core.memo import checkpointed, memoize_step
from s2q.core.qparams import RoundedWeight, dequantize_weight
from s2q.core.schemes import NVFP4
from s2q.core.stored_form import stored_values
from s2q.nn.branch import branch_weight
from s2q.nn.fp4 import split_scale
from s2q.nn.input_path import StudentInput
from s2q.nn.packed import PackedLinear


class RefinedLinear(nn.Module):
    """A packed linear with learnable scales, bias and low-rank weight.

    Attributes:
        packed: Where it starts; not changed.
        source: Transform and quantization of the input, shared by the linears that read it.
        units: Buffer [O, I], the levels of the codes in units of their scale.
        recomputes: Whether the backward pass computes the scaled weight again, which takes less memory than keeping it.
        scale_change: Parameter of the shape of the weight's scale, δ; one a row where scales are 8-bit floating point.
        bias_change: Parameter [O], β, or None without a bias.
        branch_change: Parameter [O, r], Λ, or None without a low-rank branch.

    Args:
        source: Of the student that it was packed from; its clip may be learnable, nothing else should be.
    """

    def __init__(self, packed: PackedLinear, *, source: StudentInput) -> None:
        super().__init__()
        self.source = source
        self.recomputes = False
        vars(self)["packed"] = packed  # not a submodule: its parameters are not this one's
        self.register_buffer("units", packed.unit_weight(), persistent=False)
        scale = packed.weight_scale[:, :1] if packed.scheme.weight.is_fp4 else packed.weight_scale
        self.scale_change = nn.Parameter(torch.zeros_like(scale))
        self.bias_change: nn.Parameter | None = None
        self.branch_change: nn.Parameter | None = None
        weight = packed.dequantized_weight(torch.float32)
        self._bias_unit = float(weight.square().sum(dim=1).mean().sqrt())
        self._branch_unit = 0.0
        if packed.bias is not None:
            self.bias_change = nn.Parameter(torch.zeros_like(packed.bias, dtype=torch.float32))
        if packed.low_rank_weight is not None:
            branch = packed.low_rank_weight.float()
            self.branch_change = nn.Parameter(torch.zeros_like(branch))
            self._branch_unit = float(branch.square().mean().sqrt())

    packed: PackedLinear
    units: Tensor

    def weight_scale(self) -> Tensor:
        """Return the learned scale of the weight, rounded to the stored dtype, fp32 [O] or [O, G].

        Of NVFP4, Δ is rounded to four significant bits, so that the scales of groups are still known from the product.
        """
        scale, change = self.packed.weight_scale, self.scale_change.exp()
        if self.packed.scheme.weight.levels != NVFP4:
            return stored_values("weight_scale", scale * change)
        of_groups, row = split_scale(scale)
        return stored_values("weight_scale", of_groups.float() * round_row_scale(row * change))

    def bias(self) -> Tensor | None:
        """Return the learned bias, fp32 [O], or None if there is none."""
        if self.packed.bias is None or self.bias_change is None:
            return None
        return self.packed.bias.float() + self._bias_unit * self.bias_change

    def low_rank_weight(self) -> Tensor | None:
        """Return the learned weight of the branch, rounded to the stored dtype, fp32 [O, r]; None without a branch."""
        if self.packed.low_rank_weight is None or self.branch_change is None:
            return None
        learned = self.packed.low_rank_weight.float() + self._branch_unit * self.branch_change
        return stored_values("low_rank_weight", learned).float()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Linear)
        """Apply the layer to an input [..., I], floating; returns [..., O] in its dtype."""
        weight = memoize_step(self, "weight", lambda: checkpointed(self._scaled_weight, enabled=self.recomputes))
        bias = self.bias()
        quantized, coefficients = self.source(input)
        output = F.linear(quantized, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))
        branch = branch_weight(self.packed, self.low_rank_weight())
        if coefficients is None or branch is None:
            return output
        return output + F.linear(coefficients, branch).to(output.dtype)

    def _scaled_weight(self) -> Tensor:
        return dequantize_weight(self.units, self.weight_scale())

    @torch.no_grad()
    def repacked(self) -> PackedLinear:
        """Return the packed linear with the learned values; codes, input path and the dtype of the bias are kept."""
        packed = self.packed
        inputs = {name: getattr(packed, name) for name in packed.path.shapes(packed.in_features, packed.out_features)}
        if self.source.clip is not None:
            inputs["activation_clip"] = self.source.clip().reshape(1)
        branch = self.low_rank_weight()
        if branch is not None:
            inputs["low_rank_weight"] = stored_values("low_rank_weight", branch)
        return PackedLinear.from_rounded(
            RoundedWeight(codes=packed.codes(), scale=self.weight_scale(), group_scale=packed.weight_group_scale),
            bias=self.bias(),
            scheme=packed.scheme,
            inputs=inputs,
            path=packed.path,
            dtype=None if packed.bias is None else packed.bias.dtype,
        )
