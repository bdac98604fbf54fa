"""The packed linear: what a quantized model runs and what a checkpoint stores.

    y = (codes_x · codes_wᵀ) · Δ_x · Δ_w + b        integers inside, fp32 for the scales, then the dtype of x

With deltas (`core.cubes`), codes_x are those of the differences, and the product of each cube's mean is added.
Weight-only schemes (no activation part) multiply x by the dequantized weight instead, and simulated ones
(`nn.simulated`) the dequantized x by the dequantized weight. Before that, x takes its path (`core.input_path`): the
product of its shift with the weight is in the bias, and the inverse of its transform T = diag(v) · (A ⊗ B) in the
weight. What the path leaves in floating point is added to y (`nn.branch`).

Shapes: `M` tokens, `I` in features, `O` out features, `G` groups, `r` rank of the low-rank branch, `P` packed bytes
of a row (`core.packing`).
"""

import functools
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.common.torch_state import without_autocast
from s2q.core.codebook import level_unit, levels_of
from s2q.core.cubes import QuantizedMeans, cube_means, cube_rows
from s2q.core.input_path import InputPath
from s2q.core.packing import pack_codes
from s2q.core.qparams import RoundedWeight
from s2q.core.schemes import Delta, LinearScheme, QuantScheme
from s2q.core.stored_form import packed_dtypes, stored_values
from s2q.core.tokens import current_grid
from s2q.nn.branch import float_branch, with_float_branch
from s2q.nn.dequantized import integer_backend, keeps_prepacked, runs_dequantized
from s2q.nn.fp4 import fp4_product, has_fp4
from s2q.nn.simulated import simulated_product, warn_slow
from s2q.nn.stored import QuantizedInput, StoredLinear, frozen
from s2q.ops.activation_path import activation_path, transform_input
from s2q.ops.dispatch import FP4
from s2q.ops.rescaled_int_matmul import rescaled_int_matmul
from s2q.ops.token_levels import token_levels
from s2q.ops.weight_only_matmul import weight_only_matmul


class PackedLinear(StoredLinear):
    """A linear with packed integer weights, for inference.

    It is an `nn.Linear`, so LoRA adapters attach to it; computing with its codes, merging into them for example, is
    refused (`nn.codes`). Everything it stores is a parameter without gradient (offloading moves parameters only). Codes
    and scales keep their dtype through `.to(dtype)`, `.bfloat16()` and the like; the bias follows. What is kept
    between calls is in `kept`. `torch.autocast` changes nothing: the output has the dtype of the input.

    Attributes:
        weight: `PackedCodes` uint8 [O, P].
        weight_scale: fp32 [O] (PerChannel, or a table) or [O, G] (PerGroup).
        weight_group_scale: int8 [O, G] of a table; None without.
        bias: [O] in the compute dtype, or None.
        scheme: How weight and input are quantized.
        path: Which parts its input path has (`core.input_path.PARTS` names their tensors); the tensors of others are
            None.
        name: Its name in the model, for messages; empty if not set.
        backend: How integers are computed: "auto", a backend of the ops ("reference", "cpu", "triton"), or "fastest",
            which is "auto" except for layers that are slower on integers than in full precision (`nn.dequantized`);
            "fp4" for NVFP4 on tensor cores (`nn.fp4`).
        simulated: Whether no integer kernel takes its scheme or its input path.
        shared_input: Returns the codes of an input, computed once for the linears that read it (`nn.sharing`), or None.
        needs_grid: Whether it depends on where the video tokens of the call at hand are, see `follow_tokens`.

    Args:
        dtype: Of the bias; None is torch's default dtype.
        device: Of the uninitialised parameters; "meta" allocates nothing.

    Raises:
        InvalidInputError: If I is not a multiple of a group size, or the input path does not fit I.
    """

    @classmethod
    def from_rounded(
        cls,
        rounded: RoundedWeight,
        *,
        bias: Tensor | None,
        scheme: LinearScheme,
        inputs: Mapping[str, Tensor] | None = None,
        path: InputPath | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Pack a rounded weight.

        Args:
            rounded: codes int8 [O, I] and scales of `scheme.weight`, the fp32 ones rounded to bfloat16.
            bias: [O] or None; copied.
            inputs: Tensors of the input by their names in the layer (see `path`), fp32; the weight is that of the
                transformed input, W T⁻ᵀ.
            path: Parts of the input path, whose tensors `inputs` are; None takes it from them. Where a low-rank branch
                is not taken out of the input (`deflates`), the weight is W T⁻ᵀ without it.
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
            path=InputPath.of_tensors(inputs) if path is None else path,
            dtype=dtype,
            device="meta",
        )
        expected = layer.weight_scale.shape
        if rounded.scale.shape != expected or rounded.scale.dtype != torch.float32:
            raise InvalidInputError(
                f"weight scale: got {rounded.scale.dtype} {list(rounded.scale.shape)}; "
                f"expected torch.float32 {list(expected)} for {scheme.name}"
            )
        if layer.weight_group_scale is not None:
            grouped = rounded.group_scale
            if grouped is None or grouped.shape != layer.weight_group_scale.shape or grouped.dtype != torch.int8:
                got = "none" if grouped is None else f"{grouped.dtype} {list(grouped.shape)}"
                raise InvalidInputError(
                    f"weight group scale: got {got}; expected torch.int8 {list(layer.weight_group_scale.shape)} for "
                    f"{scheme.name}"
                )
            layer.weight_group_scale = frozen(grouped.detach().clone())
        layer.weight = frozen(pack_codes(rounded.codes, num_bits=scheme.weight.num_bits))
        layer.weight_scale = frozen(stored_values("weight_scale", rounded.scale.detach()))
        if bias is not None:
            if bias.shape != (out_features,):
                raise InvalidInputError(f"bias: got {list(bias.shape)}; expected [{out_features}]")
            layer.bias = frozen(bias.detach().to(device=rounded.codes.device, dtype=dtype or bias.dtype, copy=True))
        dtypes = packed_dtypes()
        shapes = layer.path.shapes(in_features, out_features)
        if set(inputs) != set(shapes):
            raise InvalidInputError(
                f"tensors of the input: got {sorted(inputs)}; expected {sorted(shapes)} for {layer.path}"
            )
        for name, shape in shapes.items():
            tensor = inputs[name].detach().to(rounded.codes.device)
            if tuple(tensor.shape) != shape or tensor.dtype != dtypes[name]:
                raise InvalidInputError(
                    f"{name}: got {tensor.dtype} {list(tensor.shape)}; expected {dtypes[name]} {list(shape)}"
                )
            setattr(layer, name, frozen(stored_values(name, tensor).clone()))
        return layer

    @without_autocast
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Linear)
        """Apply the layer to an input [..., I], floating; returns [..., O] in its dtype.

        Towards the input, the gradient is that of a linear with `effective_weight`, straight through the rounding.

        Raises:
            InvalidInputError: If the input is not floating, has another width, or is on another device.
        """
        self._check_input(input)
        if runs_dequantized(self):
            return F.linear(input, *self.kept.dequantized(self, input.dtype))
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
        if self.backend == FP4 and has_fp4(self):
            return fp4_product(self, input)
        if self.simulated:
            return simulated_product(self, input)
        if activation is None:
            return self._weight_only(input)
        if self.weight_scale.ndim == 2:
            warn_slow(self.scheme.name, "multiply group after group of their weights")
        if self.shared_input is None:
            quantized = self._quantized(input, activation)
        else:
            quantized = self.shared_input(input, lambda: self._quantized(input, activation))
        branch_input, branch_weight = float_branch(self, quantized.coefficients, quantized.project, input.shape[:-1])
        w_codes, levels, group_scale = self._multiplied(twice=quantized.means is not None)
        multiply = functools.partial(
            rescaled_int_matmul,
            w_codes=w_codes,
            levels=levels,
            group_scale=group_scale,
            w_scale=self.weight_scale,
            w_bits=self.scheme.weight.product_bits,
            backend=integer_backend(self),
        )
        means, of_means = quantized.means, None
        if means is not None:
            assert activation.delta is not None
            of_means = multiply(means.codes, means.scale, x_bits=activation.delta.mean_bits, out_dtype=torch.float32)
        return multiply(
            quantized.codes,
            quantized.scale,
            bias=self.bias,
            low_rank_input=branch_input,
            low_rank_weight=branch_weight,
            shared_output=of_means,
            shared_rows=None if means is None else means.rows,
            x_bits=activation.product_bits,
            out_dtype=input.dtype,
        )

    def _multiplied(self, *, twice: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Codes, levels and bytes of groups for `rescaled_int_matmul`; values, if it would look levels up twice."""
        if keeps_prepacked(self):
            return self.kept.prepacked(self), None, None
        levels = None if twice else self.product_levels()
        if levels is None:
            return self.product_codes(), None, None
        return self.packed_weight, levels, self.weight_group_scale

    def _quantized(self, input: Tensor, activation: QuantScheme) -> QuantizedInput:  # noqa: A002
        means = None if activation.delta is None else self._quantized_means(input, activation.delta)
        path, backend, size = self.input_tensors(), integer_backend(self), self.in_features
        rows = input.reshape(-1, size)
        if not activation.has_int8_levels:
            quantized = activation_path(rows, path, num_bits=activation.num_bits, means=means, backend=backend)
            return QuantizedInput(*quantized, means)
        transformed, coefficients = transform_input(rows, path)
        if means is not None:
            transformed = means.difference(transformed)
        levels, unit = levels_of(activation, size, device=rows.device), level_unit(activation, size)
        assert levels is not None
        codes, scale = token_levels(transformed, levels, path.clip_ratio, unit=unit, backend=backend)
        return QuantizedInput(codes, scale, coefficients, means)

    def _quantized_means(self, input: Tensor, delta: Delta) -> QuantizedMeans | None:  # noqa: A002
        """The means of the cubes of an input [..., N, I], on its path; None if the token grid is unknown.

        The path is linear, so that of a mean is the mean of the paths, except in parts with `apply`, where it differs
        by what the differences make up for.
        """
        grid = current_grid()
        offset = None if grid is None or input.ndim == 2 else grid.offset(input.shape[-2])
        if grid is None or offset is None:
            return None
        sizes = (grid.frames, grid.height, grid.width)
        video = input.narrow(-2, offset, grid.tokens).reshape(-1, *sizes, self.in_features)
        means = cube_means(video, delta.cube).to(input.dtype).reshape(-1, self.in_features)
        path = self.input_tensors()._replace(clip_ratio=None)
        codes, scale, _ = activation_path(means, path, num_bits=delta.mean_bits, backend=integer_backend(self))
        after = input.shape[-2] - offset - grid.tokens
        rows = cube_rows(sizes, delta.cube, before=offset, after=after, samples=len(video), device=input.device)
        codes, scale = F.pad(codes, (0, 0, 0, 1)), F.pad(scale, (0, 0, 0, 1), value=1.0)
        return QuantizedMeans(codes, scale, rows)

    def _weight_only(self, input: Tensor) -> Tensor:  # noqa: A002
        transformed, coefficients = transform_input(input, self.input_tensors())
        output_MO = weight_only_matmul(
            transformed.to(input.dtype).reshape(-1, self.in_features),
            self.product_codes(),
            self.weight_scale,
            bias=self.bias,
            w_bits=self.scheme.weight.product_bits,
            backend=integer_backend(self),
        )
        return with_float_branch(self, output_MO, coefficients, transformed, input.shape[:-1]).to(input.dtype)


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
