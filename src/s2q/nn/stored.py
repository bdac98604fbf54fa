"""Parameters of a packed linear: codes, scales, the tensors of its input; which changes of them are allowed.

Shapes: `I` in features, `O` out features, `G` groups, `P` packed bytes of a row (`core.packing`).
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from s2q.common.errors import UsageError
from s2q.core.codebook import levels_of, nibble_levels
from s2q.core.cubes import QuantizedMeans
from s2q.core.input_path import InputPath, InputTensors, stored_tensors
from s2q.core.packing import packed_width, unpack_codes
from s2q.core.qparams import dequantize_weight
from s2q.core.schemes import LinearScheme, PerGroup, num_groups
from s2q.core.stored_form import packed_dtypes
from s2q.nn.codes import PackedCodes, reads_as_weight, refusal
from s2q.nn.dequantized import WeightCache, integer_backend
from s2q.ops.kronecker import scaled_kronecker
from s2q.ops.level_values import level_values

_PIECE = 4096  # tokens


class QuantizedInput(NamedTuple):
    """An input as integer products take it.

    Attributes:
        codes: int8 [M, I].
        scale: fp32 [M, 1].
        coefficients: Of the low-rank branch, fp32 [M, r], or None without one.
        means: What is subtracted from tokens before they are quantized, or None.
    """

    codes: Tensor
    scale: Tensor
    coefficients: Tensor | None
    means: QuantizedMeans | None

    def project(self, vector: Tensor) -> Tensor:
        """Multiply the dequantized input by fp32 [I, 1]; returns [M, 1]."""
        product = self.scale * _product_in_pieces(self.codes, vector)
        if self.means is None:
            return product
        return product + self.means.spread_products(self.means.scale * _product_in_pieces(self.means.codes, vector))


class StoredLinear(nn.Linear):
    """The parameters of a packed linear and its dequantized weight; see `PackedLinear`."""

    weight_scale: nn.Parameter
    weight_group_scale: nn.Parameter | None
    input_shift: nn.Parameter | None
    transform_scale: nn.Parameter | None
    transform_left: nn.Parameter | None
    transform_right: nn.Parameter | None
    low_rank_basis: nn.Parameter | None
    low_rank_weight: nn.Parameter | None
    activation_clip: nn.Parameter | None
    estimator_input: nn.Parameter | None
    estimator_output: nn.Parameter | None
    estimator_frames: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        scheme: LinearScheme,
        path: InputPath | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a floating point weight
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self._name = ""
        self.path = path or InputPath()
        width = packed_width(scheme.weight.num_bits, in_features)
        groups = num_groups(scheme.weight, in_features)
        if scheme.activation is not None:
            num_groups(scheme.activation, in_features)
        grouped, group_scale = (out_features, groups), None
        if scheme.weight.has_table:
            group_scale = frozen(torch.empty(grouped, dtype=torch.int8, device=device))
        per_group = isinstance(scheme.weight.granularity, PerGroup) and group_scale is None
        # first, because diffusers takes the dtype of a layer from its first floating parameter
        self.register_parameter("bias", frozen(torch.empty(out_features, dtype=dtype, device=device)) if bias else None)
        self.register_parameter("weight", frozen(torch.empty(out_features, width, dtype=torch.uint8, device=device)))
        scale = torch.empty(grouped if per_group else (out_features,), dtype=torch.float32, device=device)
        self.weight_scale = frozen(scale)
        self.register_parameter("weight_group_scale", group_scale)
        dtypes = packed_dtypes()
        shapes = self.path.shapes(in_features, out_features)
        for name in stored_tensors():
            shape = shapes.get(name)
            value = None if shape is None else frozen(torch.empty(shape, dtype=dtypes[name], device=device))
            self.register_parameter(name, value)
        self.backend = "auto"
        self.kept = WeightCache()
        self.simulated = scheme.simulated or self.path.simulated
        self.needs_grid = scheme.needs_grid or self.path.needs_grid
        self.shared_input: Callable[[Tensor, Callable[[], QuantizedInput]], QuantizedInput] | None = None

    def codes(self) -> Tensor:
        """Return the unpacked codes of the weight, int8 [O, I]."""
        return unpack_codes(self.packed_weight, num_bits=self.scheme.weight.num_bits, in_features=self.in_features)

    @property
    def packed_weight(self) -> Tensor:
        """`weight` as a plain tensor, for s2q's own use; others are refused to compute with `weight`."""
        codes = self._parameters["weight"]
        return getattr(codes, "plain", codes)  # type: ignore[return-value]

    def product_levels(self) -> Tensor | None:
        """Return the int8 levels that integers multiply, by nibble, as `level_values` takes them; None without."""
        if not self.scheme.weight.has_int8_levels:
            return None
        return nibble_levels(self.scheme.weight, self.in_features, device=self.packed_weight.device)

    def product_codes(self) -> Tensor:
        """Return what is multiplied by integers, as `rescaled_int_matmul` takes it.

        Codes, uint8 [O, P] up to 4 bits, int8 [O, I] above; or the values of int8 levels, int8 [O, I].
        """
        packed, levels = self.packed_weight, self.product_levels()
        if levels is not None:
            backend = integer_backend(self)
            return level_values(levels, packed, self.weight_group_scale, in_features=self.in_features, backend=backend)
        return packed if self.scheme.weight.num_bits <= 4 else packed.view(torch.int8)

    def input_tensors(self) -> InputTensors:
        """Return the tensors that act on the input."""
        return InputTensors.of(self._parameters, self.path)

    def unit_weight(self) -> Tensor:
        """Return the dequantized weight [O, I] in units of `weight_scale`, fp32."""
        codes, levels = self._values()
        return codes.float() if levels is None else levels[codes.int() + len(levels) // 2]

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dequantized weight [O, I] for the transformed input, rounded to `dtype`."""
        codes, levels = self._values()
        return dequantize_weight(codes, self.weight_scale, levels=levels).to(dtype)

    def _values(self) -> tuple[Tensor, Tensor | None]:
        """Codes int8 [O, I] and their levels, or None where codes (or the values of int8 levels) are in units of Δ."""
        if self.scheme.weight.has_int8_levels:
            return self.product_codes(), None
        return self.codes(), levels_of(self.scheme.weight, self.in_features, device=self.weight_scale.device)

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight for the untransformed input: a full-precision linear with it needs no transform or branch.

        That is Ŵ Tᵀ; with a low-rank branch (Ŵ (A ⊗ B)ᵀ (1 - V Vᵀ) + L Vᵀ) diag(v), without 1 - V Vᵀ where the branch
        leaves the input whole. With an estimator, Ŵ has its correction in it; the scales of frames, which no weight
        can have, count as 1; parts with `apply` count as nothing, since what they add makes up for what they take.

        Returns:
            [O, I], rounded to `dtype`.
        """
        weight = self.dequantized_weight()
        if self.estimator_input is not None and self.estimator_output is not None:
            weight = weight.addr(self.estimator_output, self.estimator_input)
        if self.path.transforms:
            factors = (self.transform_left, self.transform_right)
            left, right = (None if factor is None else factor.t() for factor in factors)
            weight = scaled_kronecker(weight, left=left, right=right)
        if self.low_rank_basis is not None and self.low_rank_weight is not None:
            basis, branch = self.low_rank_basis.float(), self.low_rank_weight.float()
            weight = weight + (branch - weight @ basis if self.path.deflates else branch) @ basis.t()
        if self.transform_scale is not None:
            weight = weight * self.transform_scale
        return weight.to(dtype)

    def effective_parameters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return `effective_weight` and the bias that belongs to it, b - Ŵ Tᵀ shift: [O] in `dtype`, or None."""
        weight = self.effective_weight(torch.float32)
        bias: Tensor | None = self.bias
        if bias is not None and self.input_shift is not None:
            bias = bias.float() - weight @ self.input_shift
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def dequantized_linear(self, dtype: torch.dtype) -> nn.Linear:
        """Return the full-precision linear of `effective_parameters`."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta", dtype=dtype)
        weight, bias = self.effective_parameters(dtype)
        linear.weight = frozen(weight)
        linear.register_parameter("bias", None if bias is None else frozen(bias))
        return linear

    def extra_repr(self) -> str:
        """Return what `print` shows of the layer."""
        has_bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, {self.scheme.name}"

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            if reads_as_weight(sys._getframe(1)):
                raise refusal(self._owner())
            codes = self.__dict__.get("_parameters", {}).get("weight")
            if isinstance(codes, PackedCodes):
                codes.owner = self._owner()
        return super().__getattr__(name)

    @property
    def name(self) -> str:
        """Name in the model, for messages; empty if not set."""
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        self._name = name
        getattr(self, "weight")  # noqa: B009 (tells the codes)

    def _owner(self) -> str:
        return f"{self._name or 'a quantized linear'} ({self.scheme.name})"

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register "bias" or one of `packed_dtypes`; refuse (UsageError) others, with which a weight is computed."""
        if name != "bias" and name not in packed_dtypes():
            raise refusal(self._owner())
        if name == "weight" and param is not None:
            param = PackedCodes(param, param.requires_grad, owner=self._owner())
        super().register_parameter(name, param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._guard_codes()

    def _guard_codes(self) -> None:
        """Make `PackedCodes` again of a plain parameter that pickling or torch has put in their place."""
        if not isinstance(self._parameters["weight"], PackedCodes):
            self.register_parameter("weight", self._parameters["weight"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        stored = {id(self._parameters.get(name)) for name in packed_dtypes()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            tensor = tensor.plain if isinstance(tensor, PackedCodes) else tensor
            moved = fn(tensor)
            if id(tensor) in stored or tensor.dtype == torch.uint8:
                return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
            if moved.is_floating_point() and moved.dtype.itemsize < 2:
                raise UsageError(
                    f"a packed {self.scheme.name} linear cannot be cast to {moved.dtype}: it is already quantized; "
                    "exclude it from layerwise casting through skip_modules_classes=(PackedLinear,)"
                )
            return moved

        self.kept.release()
        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        self._guard_codes()
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.kept.release()
        for name, dtype in packed_dtypes().items():
            tensor = state_dict.get(prefix + name)
            if tensor is None:
                continue
            if tensor.dtype != dtype:  # copying would convert it silently
                error_msgs.append(f"{prefix}{name}: got {tensor.dtype}; expected {dtype}, packed as {self.scheme.name}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _product_in_pieces(codes: Tensor, vector: Tensor) -> Tensor:
    """Codes int8 [M, I] times fp32 [I, 1], [M, 1], without all of them in fp32 at once."""
    return torch.cat([piece.float() @ vector for piece in torch.split(codes, _PIECE)])


def frozen(tensor: Tensor) -> nn.Parameter:
    """Return a parameter without gradient."""
    return nn.Parameter(tensor, requires_grad=False)
