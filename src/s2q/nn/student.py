"""A linear while its block is distilled: transformed, clipped, fake-quantized; its weight is fixed.

    y = fake_quantize((x - m) T; ratio_x) · fake_quantize(W T⁻ᵀ; ratio_w)ᵀ + (b + W m)

With T = diag(v) · R and a low-rank branch V, u = (x - m) diag(v) is quantized as (u - u V Vᵀ) R, and (u V) Lᵀ with
L = W diag(1/v) V is added in floating point. A branch that is taken from the weight does not change u: quantized are
then u R and (W - L Vᵀ diag(v)) T⁻ᵀ. It may be taken from both, since (u - u V Vᵀ) V = 0. An estimator adds its
correction. Linears that read the same x share one `StudentInput`, so that they share m, T, V and ratio_x. What is
trained is in the parameters: of the transform, of the clips and of the estimator.

Shapes: `I` in features, `O` out features, `G` groups, `r` rank of the low-rank branch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2q.common.errors import InvalidInputError
from s2q.core.codebook import levels_of
from s2q.core.input_path import stored_tensors
from s2q.core.memo import checkpointed, memoize_for, memoize_step
from s2q.core.qparams import fake_quantize_weight, weight_scale
from s2q.core.schemes import UNIFORM, LinearScheme, PerGroup, num_groups
from s2q.core.stored_form import stored_values
from s2q.nn.clip import LearnableClip
from s2q.nn.input_path import Estimator, StudentInput, start_tensors
from s2q.nn.stored import StoredLinear
from s2q.ops.fake_quantize import fake_quantize_rows


class StudentLinear(nn.Module):
    """A linear under distillation.

    Attributes:
        weight: Buffer [O, I], the full-precision weight; not copied.
        bias: Buffer [O] or None; b + W m where the input is shifted.
        scheme: How weight and input are quantized.
        source: Transform and quantization of the input, shared by the linears that read it.
        recomputes: Whether the backward pass computes the quantized weight again, which takes less memory than keeping
            the way to it.
        weight_clip: Ratio of each output channel, (O,) per channel and (O, 1) per group, or None for 1.
        estimator: Returns a correction of the output for the quantized input, or None.
        tensors: Learned tensors of parts with `InputPart.apply` that are this linear's own, by stored name.
        rounding: Returns the quantized weight, [O, I], if its rounding is learned and transform and clip are
            fixed; None rounds to nearest.

    Args:
        linear: Full precision.
        learns_clip: Whether it has a `weight_clip`.

    Raises:
        InvalidInputError: If I is not a multiple of the group size, the source quantizes by another scheme, or it
            shifts the input of a linear without bias.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        *,
        scheme: LinearScheme,
        source: StudentInput,
        learns_clip: bool = False,
        estimator: Estimator | None = None,
    ) -> None:
        super().__init__()
        for side in (scheme.weight, scheme.activation):
            if side is not None:
                num_groups(side, linear.in_features)
        if source.scheme != scheme.activation:
            raise InvalidInputError(f"student: its input is quantized as {source.scheme}; expected {scheme.activation}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scheme = scheme
        self.source = source
        self.recomputes = False
        self.weight_clip: LearnableClip | None = None
        if learns_clip:
            grouped = isinstance(scheme.weight.granularity, PerGroup)
            shape = (linear.out_features, 1) if grouped else (linear.out_features,)
            self.weight_clip = LearnableClip(shape, device=linear.weight.device)
        self.estimator = estimator
        self.rounding: nn.Module | None = None
        self.register_buffer("weight", linear.weight.detach(), persistent=False)
        bias = None if linear.bias is None else linear.bias.detach()
        if source.shift is not None:
            if bias is None:
                raise InvalidInputError("student: its input is shifted; expected a linear with a bias to compensate")
            bias = bias.float() + linear.weight.detach().float() @ source.shift
        self.register_buffer("bias", bias, persistent=False)
        self.tensors = start_tensors(source.steps, self.folded_weight() if source.steps else None, of_linear=True)

    def folded_weight(self, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return W T⁻ᵀ, less a low-rank branch that is taken from the weight, to be quantized.

        It is fp32 [O, I], differentiable, and folded in `dtype`: fp64 for the final rounding, fp32 does while training.
        """
        transform, basis, weight = self.source.transform, self.source.low_rank_basis, self.weight
        if basis is not None and self.source.reduces_weights:
            rows = basis.to(dtype).t()  # scaled before the product, of which they are a small part
            rows = rows if transform is None else transform.scaled(rows)
            weight = torch.addmm(weight.to(dtype), self._removed(dtype), rows, alpha=-1)
        if transform is None:
            return weight.float()
        return transform.fold_inverse(weight, dtype=dtype).float()

    def low_rank_weight(self, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return L, what the low-rank branch multiplies its coefficients by; fp32 [O, r], differentiable.

        It is U = W diag(1/v) V. Where the branch is taken out of the weight, U is rounded to the stored dtype, so that
        the weight keeps what it loses; where it is taken out of the input too, L = U + U (1 - Vᵀ V), which corrects
        for the rounded V not being exactly orthonormal. It is computed in `dtype`.
        """
        product = self._removed(dtype)
        if self.source.reduces_weights and self.source.deflates:
            basis = self.source.low_rank_basis
            assert basis is not None
            basis = basis.to(dtype)
            product = 2 * product - product @ (basis.t() @ basis)
        return product.float()

    def _removed(self, dtype: torch.dtype) -> Tensor:
        """U = W diag(1/v) V, [O, r], rounded to the stored dtype where it is taken out of the weight."""
        basis, transform = self.source.low_rank_basis, self.source.transform
        assert basis is not None

        def compute() -> Tensor:
            rows = basis.to(dtype).t()
            rows = rows if transform is None else transform.unscaled(rows, dtype=dtype)
            product = F.linear(self.weight.to(dtype), rows)
            return stored_values("low_rank_weight", product).to(dtype) if self.source.reduces_weights else product

        return memoize_step(self, ("removed", dtype), compute)

    def clip_ratio(self) -> Tensor | None:
        """Return the weight's clipping ratios, fp32 [O] or [O, 1], or None for 1."""
        return None if self.weight_clip is None else self.weight_clip()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Linear)
        """Apply the layer to an input [..., I], floating; returns [..., O] in its dtype."""
        weight = memoize_step(self, "weight", lambda: checkpointed(self._quantized_weight, enabled=self.recomputes))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        quantized, coefficients = self.source(input)
        output = F.linear(quantized, weight.to(input.dtype), bias)
        if self.estimator is not None:
            output = output + self.estimator(quantized)
        if coefficients is None:
            return output
        branch = memoize_step(self, "branch_weight", self._branch_weight)
        return output + F.linear(coefficients, branch).to(output.dtype)

    def _branch_weight(self) -> Tensor:
        """The columns of the low-rank branch and then of other parts, [O, r]."""
        columns = [] if self.source.low_rank_basis is None else [self.low_rank_weight(dtype=torch.float32)]
        columns += list(self._step_tensors(dtype=torch.float32).values())
        return torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """Return what a packed linear stores beside codes, scale and bias, by name."""
        tensors = self.source.stored()
        if self.source.low_rank_basis is not None:
            tensors["low_rank_weight"] = stored_values("low_rank_weight", self.low_rank_weight())
        if self.estimator is not None:
            tensors |= self.estimator.stored()
        return tensors | {name: stored_values(name, tensor) for name, tensor in self._step_tensors().items()}

    def _step_tensors(self, *, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """This linear's own tensors of parts with `apply`, fp32, by stored name."""
        tensors: dict[str, Tensor] = {}
        for part in self.source.steps:
            for name in part.linear_names:
                start = part.tensors[name].start
                assert start is not None
                learned = name in self.tensors
                tensors[name] = self.tensors[name] if learned else start(self.folded_weight(dtype=dtype))
        return tensors

    def _quantized_weight(self) -> Tensor:
        """The weight rounded to nearest; to even levels of its groups in place of tables, which would be searched."""
        if self.rounding is not None:
            return self.rounding()  # type: ignore[no-any-return]
        weight, scheme = self.folded_weight(dtype=torch.float32), self.scheme.weight
        if scheme.levels == UNIFORM or scheme.has_table:
            rows, ratio = weight.view(len(weight), num_groups(scheme, self.in_features), -1), self.clip_ratio()
            ratio = None if ratio is None else ratio.view(-1, 1, 1)
            return fake_quantize_rows(rows, num_bits=scheme.num_bits, clip_ratio=ratio, of_weight=True).flatten(1)
        scale = weight_scale(weight, scheme, clip_ratio=self.clip_ratio())
        levels = levels_of(scheme, self.in_features, device=weight.device)
        return fake_quantize_weight(weight, scale, num_bits=scheme.num_bits, levels=levels)

    extra_repr = StoredLinear.extra_repr


class StudentRows(nn.Module):
    """One of several linears that read the same input and are one student: rows of its weight.

    They have one transformed weight, one product and one fake quantization, in place of one each. Where the linears
    are called with the same tensor within `memoization`, the student is called once.

    Attributes:
        joint: The student, [ΣO, I].
        sizes: O of each linear.
        index: Of this linear among them.
    """

    def __init__(self, joint: StudentLinear, sizes: Sequence[int], index: int) -> None:
        super().__init__()
        self.joint, self.sizes, self.index = joint, sizes, index
        end = sum(sizes[: index + 1])
        self.rows = slice(end - sizes[index], end)

    @classmethod
    def of(
        cls, linears: Sequence[nn.Linear], *, scheme: LinearScheme, source: StudentInput, learns_clip: bool
    ) -> "list[StudentRows]":
        """Return the students of linears that read one input; all of them have a bias, or none has."""
        first, sizes = linears[0], [linear.out_features for linear in linears]
        stacked = nn.Linear(first.in_features, sum(sizes), bias=first.bias is not None, device="meta")
        stacked.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]), requires_grad=False)
        if first.bias is not None:
            stacked.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]), requires_grad=False)
        joint = StudentLinear(stacked, scheme=scheme, source=source, learns_clip=learns_clip)
        return [cls(joint, sizes, index) for index in range(len(sizes))]

    @property
    def source(self) -> StudentInput:
        """Transform and quantization of the input."""
        return self.joint.source

    @property
    def bias(self) -> Tensor | None:
        """Bias [O] or None; see `StudentLinear`."""
        return None if self.joint.bias is None else self.joint.bias[self.rows]

    def folded_weight(self) -> Tensor:
        """Return the weight to be quantized, fp32 [O, I]; see `StudentLinear.folded_weight`."""
        return memoize_step(self.joint, "folded", self.joint.folded_weight)[self.rows]

    def clip_ratio(self) -> Tensor | None:
        """Return the weight's clipping ratios, fp32 [O] or [O, 1], or None for 1."""
        ratio = self.joint.clip_ratio()
        return None if ratio is None else ratio[self.rows]

    def stored(self) -> dict[str, Tensor]:
        """Return what a packed linear stores beside codes, scale and bias, by name."""
        known = stored_tensors()
        tensors = memoize_step(self.joint, "stored", self.joint.stored)
        return {name: value[self.rows] if known[name].of_linear else value for name, value in tensors.items()}

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Linear)
        """Apply the layer to an input [..., I], floating; returns [..., O] in its dtype."""
        # Not views of one tensor for autograd: an attention may write rotated queries in place.
        outputs: Sequence[Tensor] = memoize_for(
            self.joint, input, lambda: torch.unsafe_split_with_sizes(self.joint(input), self.sizes, dim=-1)
        )
        return outputs[self.index]
