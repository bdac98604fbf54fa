"""The packed linear: what a quantized model runs and what a checkpoint stores.

    y = (codes_x · codes_wᵀ) · Δ_x · Δ_w + b        integers inside, fp32 for the scales, then the dtype of x

Weight-only schemes (no activation part) multiply x by the dequantized weight instead, and simulated ones (inputs in
groups, or as differences from local means; levels that are not uniform) the dequantized x by the dequantized
weight. Before that, a shift may be subtracted from x, whose product with the weight is in the bias; x may
pass through a transform T = diag(v) · (A ⊗ B), whose inverse is in the weight; a few directions V of x diag(v) may be
taken out before A ⊗ B and multiplied in floating point, y + (x diag(v) V) Lᵀ, or be multiplied so and be taken out of
the weight; and the scale of x may be multiplied by a clip ratio. A learned estimator may add a correction of rank one
to the output (`nn.estimator`), as one more column of that branch.

Shapes: `M` tokens, `I` in features, `O` out features, `G` groups, `r` rank of the low-rank branch, `P` packed bytes
of a row (`core.packing`).
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2q.common.errors import InvalidInputError
from s2q.common.log import log_once
from s2q.common.torch_state import without_autocast
from s2q.core.codebook import levels_of
from s2q.core.input_path import InputLayout
from s2q.core.packing import pack_codes
from s2q.core.qparams import RoundedWeight, dequantize_weight, fake_quantize_input
from s2q.core.schemes import LinearScheme
from s2q.core.tokens import current_grid
from s2q.nn.dequantized import DequantizedCache, integer_backend, keeps_prepacked, runs_dequantized
from s2q.nn.estimator import scaled_by_frame
from s2q.nn.shared_input import SharedInput
from s2q.nn.stored import PACKED_DTYPES, StoredLinear, frozen
from s2q.ops.activation_path import activation_path, transform_input
from s2q.ops.kronecker import scaled_kronecker
from s2q.ops.rescaled_int_matmul import rescaled_int_matmul
from s2q.ops.weight_only_matmul import weight_only_matmul

logger = logging.getLogger(__name__)

_PIECE = 4096  # tokens


class PackedLinear(StoredLinear):
    """A linear with packed integer weights, for inference.

    It is an `nn.Linear`, so LoRA adapters attach to it; computing with its codes, merging into them for example, is
    refused (`nn.codes`). Everything it stores is a parameter without gradient (offloading moves parameters only). Codes
    and scales keep their dtype through `.to(dtype)`, `.bfloat16()` and the like; the bias follows. What is kept
    between calls is in `kept`. `torch.autocast` changes nothing: the output has the dtype of the input.

    Attributes:
        weight: `PackedCodes` uint8 [O, P].
        weight_scale: fp32 [O] (PerChannel) or [O, G] (PerGroup).
        bias: [O] in the compute dtype, or None.
        scheme: How weight and input are quantized.
        layout: Which of the further tensors there are: fp32 `input_shift` [I], `transform_scale` [I],
            `transform_left` [n1, n1], `transform_right` [n2, n2], `activation_clip` [1], `estimator_input` [I],
            `estimator_output` [O], `estimator_frames` [F], and bf16 `low_rank_basis` [I, r], `low_rank_weight` [O, r];
            None where not.
        name: Its name in the model, for messages; empty if not set.
        backend: How integers are computed: "auto", a backend of the ops ("reference", "cpu", "triton"), or "fastest",
            which is "auto" except for layers that are slower on integers than in full precision (`nn.dequantized`).
        shared_input: Where linears that read the same input keep its codes, see `share_inputs`; None for one alone.
        needs_grid: Whether it depends on where the video tokens of the call at hand are, see `follow_tokens`.

    Args:
        in_features: I.
        out_features: O.
        bias: Whether there is a bias.
        scheme: How weight and input are quantized.
        layout: See above; None stores nothing for the input.
        dtype: Of the bias; None is torch's default dtype.
        device: Where to put the (uninitialised) parameters; "meta" allocates nothing.

    Raises:
        InvalidInputError: If I is not a multiple of a group size, or the layout does not fit I.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        scheme: LinearScheme,
        layout: InputLayout | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, scheme=scheme, layout=layout, dtype=dtype, device=device)
        self.backend = "auto"
        self.kept = DequantizedCache()
        self.shared_input: SharedInput[tuple[Tensor, Tensor, Tensor | None]] | None = None
        self.needs_grid = scheme.needs_grid or self.layout.needs_grid

    @classmethod
    def from_rounded(
        cls,
        rounded: RoundedWeight,
        *,
        bias: Tensor | None,
        scheme: LinearScheme,
        inputs: Mapping[str, Tensor] | None = None,
        deflates: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Pack a rounded weight.

        Args:
            rounded: codes int8 [O, I] and scale fp32 [O] or [O, G], of `scheme.weight`.
            bias: [O] or None; copied.
            scheme: How weight and input are quantized.
            inputs: Tensors of the input by their names in the layer (see `layout`), fp32; the weight is that of the
                transformed input, W T⁻ᵀ.
            deflates: Whether a low-rank branch is taken out of the input; if not, the weight is W T⁻ᵀ without it.
            dtype: Of the bias; None keeps it.

        Returns:
            The layer, on the device of the codes.

        Raises:
            InvalidInputError: If shapes, dtypes or the range of the codes do not fit the scheme.
        """
        out_features, in_features = rounded.codes.shape
        inputs = inputs or {}
        layer = cls(
            in_features,
            out_features,
            bias=bias is not None,
            scheme=scheme,
            layout=InputLayout.of_tensors(inputs, deflates=deflates),
            dtype=dtype,
            device="meta",
        )
        expected = layer.weight_scale.shape
        if rounded.scale.shape != expected or rounded.scale.dtype != torch.float32:
            raise InvalidInputError(
                f"weight scale: got {rounded.scale.dtype} {list(rounded.scale.shape)}; "
                f"expected torch.float32 {list(expected)} for {scheme.name}"
            )
        layer.weight = frozen(pack_codes(rounded.codes, num_bits=scheme.weight.num_bits))
        layer.weight_scale = frozen(rounded.scale.detach().clone())
        if bias is not None:
            if bias.shape != (out_features,):
                raise InvalidInputError(f"bias: got {list(bias.shape)}; expected [{out_features}]")
            layer.bias = frozen(bias.detach().to(device=rounded.codes.device, dtype=dtype or bias.dtype, copy=True))
        for name, shape in layer.layout.shapes(in_features, out_features).items():
            tensor = inputs[name].detach().to(rounded.codes.device)
            if tuple(tensor.shape) != shape or tensor.dtype != PACKED_DTYPES[name]:
                raise InvalidInputError(
                    f"{name}: got {tensor.dtype} {list(tensor.shape)}; expected {PACKED_DTYPES[name]} {list(shape)}"
                )
            setattr(layer, name, frozen(tensor.clone()))
        return layer

    def dequantized_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight, for the transformed input.

        Args:
            dtype: Floating; the product of code and scale is rounded to it.

        Returns:
            [O, I].
        """
        return self._dequantized().to(dtype)

    def _dequantized(self) -> Tensor:
        levels = levels_of(self.scheme.weight, self.in_features, device=self.weight_scale.device)
        return dequantize_weight(self.codes(), self.weight_scale, levels=levels)

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight for the untransformed input: a full-precision linear with it needs no transform or branch.

        That is Ŵ Tᵀ; with a low-rank branch (Ŵ (A ⊗ B)ᵀ (1 - V Vᵀ) + L Vᵀ) diag(v), without 1 - V Vᵀ where the branch
        leaves the input whole. With an estimator, Ŵ has its correction in it; the scales of frames, which no weight
        can have, count as 1.

        Args:
            dtype: Floating; the result is rounded to it.

        Returns:
            [O, I].
        """
        weight = self._dequantized()
        if self.estimator_input is not None and self.estimator_output is not None:
            weight = weight.addr(self.estimator_output, self.estimator_input)
        if self.layout.transforms:
            left, right = (None if one is None else one.t() for one in (self.transform_left, self.transform_right))
            weight = scaled_kronecker(weight, left=left, right=right)
        if self.low_rank_basis is not None and self.low_rank_weight is not None:
            basis, branch = self.low_rank_basis.float(), self.low_rank_weight.float()
            weight = weight + (branch - weight @ basis if self.layout.deflates else branch) @ basis.t()
        if self.transform_scale is not None:
            weight = weight * self.transform_scale
        return weight.to(dtype)

    def effective_bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return the bias that belongs to `effective_weight`, b - Ŵ Tᵀ shift.

        Args:
            dtype: Floating; the result is rounded to it.

        Returns:
            [O], or None if there is none.
        """
        if self.bias is None or self.input_shift is None:
            return None if self.bias is None else self.bias.to(dtype)
        return (self.bias.float() - self.effective_weight(torch.float32) @ self.input_shift).to(dtype)

    def dequantized_linear(self, dtype: torch.dtype) -> nn.Linear:
        """Return the full-precision linear of `effective_weight` and `effective_bias`.

        Args:
            dtype: Floating, of both.
        """
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta", dtype=dtype)
        bias = self.effective_bias(dtype)
        linear.weight = frozen(self.effective_weight(dtype))
        linear.register_parameter("bias", None if bias is None else frozen(bias))
        return linear

    @without_autocast
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Linear)
        """Apply the layer.

        Towards the input, the gradient is that of a linear with `effective_weight`, straight through the rounding.

        Args:
            input: [..., I], floating.

        Returns:
            [..., O] in the dtype of the input.

        Raises:
            InvalidInputError: If the input is not floating, has another width, or is on another device.
        """
        self._check_input(input)
        if runs_dequantized(self):
            return F.linear(input, *self.kept.of(self, input.dtype))
        if torch.is_grad_enabled() and input.requires_grad:
            output_MO: Tensor = _StraightThrough.apply(input, self)  # type: ignore[no-untyped-call]
        else:
            output_MO = self._product(input)
        return output_MO.reshape(*input.shape[:-1], self.out_features)

    def _check_input(self, input: Tensor) -> None:  # noqa: A002
        place = self.weight_scale.device
        if input.shape[-1:] == (self.in_features,) and input.is_floating_point() and input.device == place:
            return
        raise InvalidInputError(
            f"packed {self.scheme.name} linear: got {input.dtype} {list(input.shape)} on {input.device}; expected "
            f"floating [..., {self.in_features}] on {place}; no backend, 'reference' included, converts or moves it"
        )

    def _product(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Linear)
        activation = self.scheme.activation
        if self.scheme.simulated:
            return self._simulated(input)
        if activation is None:
            return self._weight_only(input)
        if self.weight_scale.ndim == 2:
            _say_slow(self.scheme.name, "multiply group after group of their weights")
        if self.shared_input is None:
            split = self._quantized(input)
        else:
            split = self.shared_input.get(input, lambda: self._quantized(input))
        codes_MI, scale_M1, coefficients = split
        branch_input, branch_weight = self._with_estimate(
            coefficients, lambda alpha: scale_M1 * _product_in_pieces(codes_MI, alpha), input.shape[:-1]
        )
        return rescaled_int_matmul(
            codes_MI,
            scale_M1,
            self.kept.prepacked(self) if keeps_prepacked(self) else self.product_codes(),
            self.weight_scale,
            bias=self.bias,
            low_rank_input=branch_input,
            low_rank_weight=branch_weight,
            x_bits=activation.num_bits,
            w_bits=self.scheme.weight.num_bits,
            out_dtype=input.dtype,
            backend=integer_backend(self),
        )

    def _with_estimate(
        self, coefficients: Tensor | None, project: Callable[[Tensor], Tensor], rows: torch.Size
    ) -> tuple[Tensor | None, Tensor | None]:
        """Factors of the floating-point product: the low-rank branch with the estimator as an additional column.

        Args:
            coefficients: Of the branch, [M, r], or None.
            project: Returns what the quantized input is times α [I, 1], as fp32 [M, 1].
            rows: The leading dimensions of the input; their product is M.

        Returns:
            fp32 [M, r + 1] and [O, r + 1], or the two of the branch alone.
        """
        if self.estimator_input is None or self.estimator_output is None:
            return coefficients, None if coefficients is None else self.low_rank_weight
        own = project(self.estimator_input.unsqueeze(1)).reshape(*rows, 1)
        inputs = scaled_by_frame(own, self.estimator_frames).reshape(-1, 1)
        weights = self.estimator_output.unsqueeze(1)
        if coefficients is None or self.low_rank_weight is None:
            return inputs, weights
        both = torch.cat([self.low_rank_weight.float(), weights], dim=1)
        return torch.cat([coefficients.float(), inputs], dim=1), both

    def _quantized(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # noqa: A002
        """Codes int8 [M, I], scale fp32 [M, 1] and coefficients of the low-rank branch fp32 [M, r] of an input."""
        assert self.scheme.activation is not None
        return activation_path(
            input.reshape(-1, self.in_features),
            num_bits=self.scheme.activation.num_bits,
            shift=self.input_shift,
            scale=self.transform_scale,
            left=self.transform_left,
            right=self.transform_right,
            low_rank_basis=self.low_rank_basis,
            deflates=self.layout.deflates,
            clip_ratio=self.activation_clip,
            backend=integer_backend(self),
        )

    def _simulated(self, input: Tensor) -> Tensor:  # noqa: A002
        """The integer product simulated in fp32, for schemes without a kernel."""
        _say_slow(self.scheme.name, "are simulated in floating point")
        transformed, coefficients = self._transformed(input)
        quantized = transformed.float()
        if self.scheme.activation is not None:
            grid = current_grid() if self.scheme.needs_grid else None
            quantized = fake_quantize_input(
                quantized, self.scheme.activation, clip_ratio=self.activation_clip, grid=grid
            )
        bias = None if self.bias is None else self.bias.float()
        output = F.linear(quantized, self.dequantized_weight(torch.float32), bias).reshape(-1, self.out_features)
        return self._with_branch(output, coefficients, quantized, input.shape[:-1]).to(input.dtype)

    def _with_branch(self, output: Tensor, coefficients: Tensor | None, x: Tensor, rows: torch.Size) -> Tensor:
        """Add the low-rank branch and the estimator of an input x, [..., I], to an output, [M, O]; fp32 if any."""
        flat = None if coefficients is None else coefficients.reshape(len(output), -1).float()
        branch_input, branch_weight = self._with_estimate(
            flat, lambda alpha: x.reshape(len(output), -1).float() @ alpha, rows
        )
        if branch_input is None or branch_weight is None:
            return output
        return output.float() + F.linear(branch_input, branch_weight.float())

    def _transformed(self, input: Tensor) -> tuple[Tensor, Tensor | None]:  # noqa: A002
        return transform_input(
            input,
            shift=self.input_shift,
            scale=self.transform_scale,
            left=self.transform_left,
            right=self.transform_right,
            low_rank_basis=self.low_rank_basis,
            deflates=self.layout.deflates,
        )

    def _weight_only(self, input: Tensor) -> Tensor:  # noqa: A002
        transformed, coefficients = self._transformed(input)
        output_MO = weight_only_matmul(
            transformed.to(input.dtype).reshape(-1, self.in_features),
            self.product_codes(),
            self.weight_scale,
            bias=self.bias,
            w_bits=self.scheme.weight.num_bits,
            backend=integer_backend(self),
        )
        return self._with_branch(output_MO, coefficients, transformed, input.shape[:-1]).to(input.dtype)

    def _changes(self) -> None:
        self.kept.release()


class _StraightThrough(torch.autograd.Function):
    """The packed linear for training what lies before it, adapters for example."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer._product(x)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer: PackedLinear = ctx.layer
        (gradient,) = gradients
        towards_x = gradient @ layer.effective_weight(gradient.dtype)
        return towards_x.reshape(ctx.shape), None


def _product_in_pieces(codes: Tensor, vector: Tensor) -> Tensor:
    """Codes int8 [M, I] times fp32 [I, 1], [M, 1], without all of them in fp32 at once."""
    return torch.cat([one.float() @ vector for one in torch.split(codes, _PIECE)])


def _say_slow(scheme: str, how: str) -> None:
    if not torch.compiler.is_compiling():
        message = "%s linears %s, slower than full precision: no integer kernel takes them"
        log_once(logger, logging.WARNING, message, scheme, how)
