"""The input path of a packed linear: shift, transform, low-rank branch, clip ratio, estimator.

    x → u = (x - shift) · diag(scale) → (u - u V Vᵀ) · (left ⊗ right) → per-token codes, maximum times the clip ratio
                                      → u V, [M, r], in floating point → · Lᵀ, added to the output

Where the branch is taken from the weight, u is quantized whole and the codes of the weight are those of W - L Vᵀ. An
estimator (TQE) adds the dequantized input times α, a scale for the token's frame and β to the output.

Shapes: `I/O` in/out features; `n1`, `n2` orders of the factors, n1 · n2 = I; `r` rank; `F` frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from s2q.common.errors import InvalidInputError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

_BYTES = {"F32": 4, "BF16": 2}
_NEWER = ("deflates", "estimator", "estimator_frames")
PREFIX = "transform_"


@dataclass(frozen=True, kw_only=True)
class InputLayout:
    """Tensors that a packed linear stores beside codes, scale and bias; none by default.

    Attributes:
        shift: Whether something is subtracted from the input, [I].
        scale: Whether there is a scale, [I].
        left: Order n1 of the left factor; None if it is the identity.
        right: Order n2 of the right factor; None if it is the identity.
        low_rank: Rank r of the branch in floating point, V [I, r] and L [O, r]; None without one.
        deflates: Whether what goes through the branch is taken out of the input; if not, it is out of the weight.
        activation_clip: Whether there is a clip ratio, [1].
        estimator: Whether there is an estimator, α [I] and β [O].
        estimator_frames: For how many frames it has scales, [F]; None if it has none.

    Raises:
        InvalidInputError: If a value is not of its type, an order is not positive, or `deflates` is false without a
            branch.
    """

    shift: bool = False
    scale: bool = False
    left: int | None = None
    right: int | None = None
    low_rank: int | None = None
    deflates: bool = True
    activation_clip: bool = False
    estimator: bool = False
    estimator_frames: int | None = None

    def __post_init__(self) -> None:
        """Check types and ranges."""
        for name in ("shift", "scale", "deflates", "activation_clip", "estimator"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(f"input layout: {name}={getattr(self, name)!r}; expected true or false")
        for name in ("left", "right", "low_rank", "estimator_frames"):
            order = getattr(self, name)
            if order is not None and (isinstance(order, bool) or not isinstance(order, int) or order < 1):
                raise InvalidInputError(f"input layout: {name}={order!r}; expected a whole number from 1, or null")
        if self.low_rank is None and not self.deflates:
            raise InvalidInputError("input layout: deflates=false without a branch; expected low_rank with it")
        if self.estimator_frames is not None and not self.estimator:
            raise InvalidInputError("input layout: estimator_frames without estimator; expected both, or null")

    @property
    def transforms(self) -> bool:
        """Whether the input is transformed at all."""
        return self.scale or self.left is not None or self.right is not None

    @property
    def empty(self) -> bool:
        """Whether nothing is stored."""
        return not (self.shift or self.transforms or self.low_rank or self.activation_clip or self.estimator)

    @property
    def needs_grid(self) -> bool:
        """Whether a linear has to know where the video tokens lie."""
        return self.estimator_frames is not None

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each stored tensor by name: `input_shift`, `transform_scale`, …, `activation_clip`.

        Args:
            in_features: I.
            out_features: O.

        Raises:
            InvalidInputError: If n1 · n2 is not I, or the rank is above I or O.
        """
        if self.left is not None or self.right is not None:
            n1 = self.left or in_features // (self.right or 1)
            n2 = self.right or in_features // n1
            alone = self.left is None or self.right is None
            if n1 * n2 != in_features or (alone and in_features not in (self.left, self.right)):
                raise InvalidInputError(
                    f"input layout: factors of order {self.left} and {self.right}; expected a product of {in_features}"
                )
        if self.low_rank is not None and self.low_rank > min(in_features, out_features):
            raise InvalidInputError(
                f"input layout: rank {self.low_rank}; expected at most {min(in_features, out_features)} "
                f"between {in_features} and {out_features} features"
            )
        shapes: dict[str, tuple[int, ...]] = {}
        if self.shift:
            shapes["input_shift"] = (in_features,)
        if self.scale:
            shapes[f"{PREFIX}scale"] = (in_features,)
        for name in ("left", "right"):
            order = getattr(self, name)
            if order is not None:
                shapes[PREFIX + name] = (order, order)
        if self.low_rank is not None:
            shapes["low_rank_basis"] = (in_features, self.low_rank)
            shapes["low_rank_weight"] = (out_features, self.low_rank)
        if self.activation_clip:
            shapes["activation_clip"] = (1,)
        if self.estimator:
            shapes |= {"estimator_input": (in_features,), "estimator_output": (out_features,)}
        if self.estimator_frames is not None:
            shapes["estimator_frames"] = (self.estimator_frames,)
        return shapes

    def num_bytes(self, in_features: int, out_features: int) -> int:
        """Return the bytes of the stored tensors.

        Args:
            in_features: I.
            out_features: O.
        """
        shapes = self.shapes(in_features, out_features)
        return sum(_BYTES[TENSOR_DTYPES[name]] * math.prod(shape) for name, shape in shapes.items())

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], *, deflates: bool) -> InputLayout:
        """Return the layout that tensors have.

        Args:
            tensors: By their names in a packed linear.
            deflates: Whether a low-rank branch is taken out of the input.

        Raises:
            InvalidInputError: If a name is none of `TENSOR_DTYPES`.
        """
        for name in tensors:
            if name not in TENSOR_DTYPES:
                raise unknown_name("tensor of a packed linear", name, TENSOR_DTYPES)
        orders = {part: tensors[PREFIX + part].shape[0] for part in ("left", "right") if PREFIX + part in tensors}
        frames = tensors.get("estimator_frames")
        return cls(
            shift="input_shift" in tensors,
            scale=f"{PREFIX}scale" in tensors,
            activation_clip="activation_clip" in tensors,
            left=orders.get("left"),
            right=orders.get("right"),
            low_rank=tensors["low_rank_basis"].shape[1] if "low_rank_basis" in tensors else None,
            deflates=deflates,
            estimator="estimator_input" in tensors,
            estimator_frames=None if frames is None else len(frames),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without what older versions do not know where it is at its default."""
        newer = {field.name: field.default for field in fields(self) if field.name in _NEWER}
        return {name: value for name, value in asdict(self).items() if name not in newer or value != newer[name]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> InputLayout:
        """Read what `to_dict` wrote.

        Args:
            content: The fields; missing ones have their defaults.

        Raises:
            InvalidInputError: If a field is unknown or not valid.
        """
        if not isinstance(content, Mapping):
            raise InvalidInputError(f"input layout: got {type(content).__name__}; expected a mapping")
        names = [field.name for field in fields(cls)]
        for name in content:
            if name not in names:
                raise unknown_name("key of an input layout", str(name), names)
        return cls(**content)


TENSOR_DTYPES = {
    "input_shift": "F32",
    f"{PREFIX}scale": "F32",
    f"{PREFIX}left": "F32",
    f"{PREFIX}right": "F32",
    "low_rank_basis": "BF16",
    "low_rank_weight": "BF16",
    "activation_clip": "F32",
    "estimator_input": "F32",
    "estimator_output": "F32",
    "estimator_frames": "F32",
}
"""Every name that `InputLayout.shapes` may return, with its dtype as safetensors calls it."""
