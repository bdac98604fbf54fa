"""The path of an input into a quantized linear: one table of its parts, which says what a packed linear stores.

    x → u = (x - shift) · diag(scale) → (u - u V Vᵀ) · (left ⊗ right) → per-token codes, maximum times the clip ratio
                                      → u V, [M, r], in floating point → · Lᵀ, added to the output

Where the low-rank branch is taken from the weight (`deflates` is false), u is quantized whole and the codes of the
weight are those of W - L Vᵀ. An estimator (TQE) adds the dequantized input times α, a scale for the token's frame
and β to the output.

A part with `apply` needs no kernel: it runs last before quantization, after the rotation, for every backend. Example,
a bias per token (the mean of a token is not quantized, and is multiplied by the sums of the weight's rows):

    PARTS["token_mean"] = InputPart(
        tensors={
            "row_sums": StoredTensor(
                lambda i, o, size: (o, 1), of_linear=True, start=lambda weight: weight.sum(1, keepdim=True)
            )
        },
        apply=lambda y: (y - y.mean(-1, keepdim=True), y.mean(-1, keepdim=True)),
    )

Shapes: `M` tokens, `I/O` in/out features; `n1`, `n2` orders of the factors, n1 · n2 = I; `r` rank; `F` frames.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from s2q.common.errors import InvalidInputError, short_repr, unknown_name
from s2q.common.headers import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "transform_"
"""Of the tensors that a transform of `s2q.transforms` names itself: scale, left, right."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that a packed linear stores for a part of its input path.

    Attributes:
        shape: From I, O and the size of the part.
        dtype: As safetensors calls it.
        file_dtype: The same of files: a narrower one has the values, which are rounded to it (`core.stored_form`).
        of_linear: Whether each linear has its own; linears that read the same input share the others.
        start: For parts with `apply`: its value from the weight [O, I], the folded one where it is `of_linear`.
        learned: Whether it starts there and is learned; otherwise it follows the weight.
    """

    shape: Callable[[int, int, int], tuple[int, ...]]
    dtype: str = "F32"
    file_dtype: str = ""
    of_linear: bool = False
    start: Callable[[Tensor], Tensor] | None = None
    learned: bool = False

    def __post_init__(self) -> None:
        """Default to one dtype."""
        object.__setattr__(self, "file_dtype", self.file_dtype or self.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class InputPart:
    """A part of an input path; equal to itself only, and hashable, so that what follows from parts can be cached.

    Attributes:
        tensors: What is stored for it, by name.
        default: The value of a path that does not name it: a flag, or None where the value is a size, from 1.
        needs: The part without which it must have its default.
        always_written: Whether JSON has it at its default too, as all versions of checkpoints know it.
        apply: Takes y [..., I], transformed, and the tensors of the part that belong to the input; returns what is
            quantized instead [..., I], and coefficients [..., k] of columns of the low-rank branch, which the part's
            `of_linear` tensor [O, k] multiplies, or None. Parts without it are computed by the backends.
        restore: Undoes a part of `apply` that is not linear: takes the dequantized input, [..., I], and the same
            tensors. A linear with it is simulated.
    """

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    default: bool | None = False
    needs: str | None = None
    always_written: bool = False
    apply: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    restore: Callable[..., Tensor] | None = None

    @property
    def is_sized(self) -> bool:
        """Whether its value is a size or None, not a flag."""
        return self.default is None

    @property
    def input_names(self) -> list[str]:
        """Names of the tensors that belong to the input."""
        return [name for name, stored in self.tensors.items() if not stored.of_linear]

    @property
    def linear_names(self) -> list[str]:
        """Names of the tensors that belong to the linear."""
        return [name for name, stored in self.tensors.items() if stored.of_linear]


PARTS: dict[str, InputPart] = {
    "shift": InputPart(
        tensors={"input_shift": StoredTensor(lambda i, o, size: (i,), file_dtype="BF16")}, always_written=True
    ),
    "scale": InputPart(
        tensors={f"{PREFIX}scale": StoredTensor(lambda i, o, size: (i,), file_dtype="BF16")}, always_written=True
    ),
    "left": InputPart(
        tensors={f"{PREFIX}left": StoredTensor(lambda i, o, n1: (n1, n1), file_dtype="BF16")},
        default=None,
        always_written=True,
    ),
    "right": InputPart(
        tensors={f"{PREFIX}right": StoredTensor(lambda i, o, n2: (n2, n2), file_dtype="BF16")},
        default=None,
        always_written=True,
    ),
    "low_rank": InputPart(
        tensors={
            "low_rank_basis": StoredTensor(lambda i, o, rank: (i, rank), "BF16", file_dtype="F8_E4M3"),
            "low_rank_weight": StoredTensor(lambda i, o, rank: (o, rank), "BF16", of_linear=True),
        },
        default=None,
        always_written=True,
    ),
    "deflates": InputPart(default=True, needs="low_rank"),
    "activation_clip": InputPart(
        tensors={"activation_clip": StoredTensor(lambda i, o, size: (1,))}, always_written=True
    ),
    "estimator": InputPart(
        tensors={
            "estimator_input": StoredTensor(lambda i, o, size: (i,), of_linear=True),
            "estimator_output": StoredTensor(lambda i, o, size: (o,), of_linear=True),
        }
    ),
    "estimator_frames": InputPart(
        tensors={"estimator_frames": StoredTensor(lambda i, o, frames: (frames,), of_linear=True)},
        default=None,
        needs="estimator",
    ),
}
"""By name in `quantization_config`; the order is that of JSON and of a packed linear's parameters."""


def stored_tensors() -> Mapping[str, StoredTensor]:
    """Return every tensor that a part may store, by name."""
    return tensors_of(tuple(PARTS.values()))


@functools.lru_cache(maxsize=2)  # parts may be added at any time
def tensors_of(parts: tuple[InputPart, ...]) -> Mapping[str, StoredTensor]:
    """Return every tensor that some parts may store, by name."""
    return MappingProxyType({name: tensor for part in parts for name, tensor in part.tensors.items()})


class InputPath:
    """Parts of the path of a linear's input; immutable.

    `path.low_rank` is the value of the part of that name in `PARTS`: a flag, or a size or None.

    Attributes:
        steps: Its parts with `apply`, in the order of the table.

    Args:
        **parts: Values by name in `PARTS`; the others have their defaults.

    Raises:
        InvalidInputError: If there is no such part, a value is not a flag or not a whole number from 1, or a part is
            without the one that it needs.
    """

    def __init__(self, **parts: bool | int | None) -> None:
        for name, value in parts.items():
            if name not in PARTS:
                raise unknown_name("key of an input path", name, PARTS)
            if not PARTS[name].is_sized and not isinstance(value, bool):
                raise InvalidInputError(f"input path: {name}={short_repr(value)}; expected true or false")
            if PARTS[name].is_sized and value is not None and (type(value) is not int or value < 1):
                raise InvalidInputError(
                    f"input path: {name}={short_repr(value)}; expected a whole number from 1, or null"
                )
        values = {name: parts.get(name, part.default) for name, part in PARTS.items()}
        vars(self).update(values)  # read in every call of a linear
        self._values = {name: value for name, value in values.items() if value != PARTS[name].default}
        self.steps = tuple(PARTS[name] for name in self._values if PARTS[name].apply is not None)
        for name, value in self._values.items():
            needs = PARTS[name].needs
            if needs is not None and needs not in self._values:
                raise InvalidInputError(
                    f"input path: {name}={json.dumps(value)} without {needs}; expected {needs} with it"
                )

    def __getattr__(self, name: str) -> Any:  # of parts that came to the table later
        if name not in PARTS:
            raise AttributeError(f"an input path has no part {name!r}")
        return PARTS[name].default

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InputPath) and self._values == other._values

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return f"InputPath({', '.join(f'{name}={value}' for name, value in self._values.items())})"

    def __reduce__(self) -> tuple[Any, ...]:  # its steps hold functions, which need not be picklable
        return functools.partial(InputPath, **self._values), ()

    def replace(self, **parts: bool | int | None) -> InputPath:
        """Return the path with other values of some parts."""
        return InputPath(**{**self._values, **parts})

    @property
    def transforms(self) -> bool:
        """Whether there is a scale or a rotation."""
        return self.scale or self.left is not None or self.right is not None

    @property
    def empty(self) -> bool:
        """Whether there is no part."""
        return not self._values

    @property
    def needs_grid(self) -> bool:
        """Whether a linear has to know where the video tokens lie."""
        return self.estimator_frames is not None

    @property
    def simulated(self) -> bool:
        """Whether a part is restored after quantization, which no integer kernel does."""
        return any(part.restore is not None for part in self.steps)

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each stored tensor by name: `input_shift`, `transform_scale`, …, `activation_clip`.

        Raises:
            InvalidInputError: If n1 · n2 is not I, or the rank is above I or O.
        """
        if self.left is not None or self.right is not None:
            n1 = self.left or in_features // self.right
            n2 = self.right or 1
            if n1 * n2 != in_features:
                raise InvalidInputError(
                    f"input path: factors of order {self.left} and {self.right}; expected a product of {in_features}"
                )
        if self.low_rank is not None and self.low_rank > min(in_features, out_features):
            raise InvalidInputError(
                f"input path: rank {self.low_rank}; expected at most {min(in_features, out_features)} "
                f"between {in_features} and {out_features} features"
            )
        return {
            name: tensor.shape(in_features, out_features, int(value or 0))
            for part, value in self._values.items()
            for name, tensor in PARTS[part].tensors.items()
        }

    def num_bytes(self, in_features: int, out_features: int) -> int:
        """Return the bytes of the stored tensors, in files."""
        stored = stored_tensors()
        shapes = self.shapes(in_features, out_features)
        return sum(DTYPES[stored[name].file_dtype].itemsize * math.prod(shape) for name, shape in shapes.items())

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> InputPath:
        """Return the path of tensors by their names in a packed linear; parts without tensors have their defaults.

        The size of a part is the last dimension of its first tensor. InvalidInputError if no part has such a tensor.
        """
        known = stored_tensors()
        for name in tensors:
            if name not in known:
                raise unknown_name("tensor of a packed linear", name, known)
        parts: dict[str, bool | int | None] = {}
        for name, part in PARTS.items():
            first = next((tensors[tensor] for tensor in part.tensors if tensor in tensors), None)
            if first is not None:
                parts[name] = first.shape[-1] if part.is_sized else True
        return cls(**parts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without what older versions do not know where it is at its default."""
        return {
            name: getattr(self, name) for name, part in PARTS.items() if part.always_written or name in self._values
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> InputPath:
        """Read what `to_dict` wrote; missing parts have their defaults; see `InputPath` for what is refused."""
        if not isinstance(content, Mapping):
            raise InvalidInputError(f"input path: got {type(content).__name__}; expected a mapping")
        return cls(**content)


Steps = tuple[tuple[InputPart, tuple["Tensor", ...]], ...]


def with_tensors(parts: Sequence[InputPart], stored: Mapping[str, Any]) -> Steps:
    """Return parts with `apply`, each with those of the stored tensors that belong to the input."""
    return tuple((part, tuple(stored[name] for name in part.input_names)) for part in parts)


class InputTensors(NamedTuple):
    """The tensors of an input path that act before and during quantization: an argument of the ops.

    Attributes:
        shift: [I], fp32, subtracted first.
        scale: v, [I], fp32.
        left: A, [n1, n1], fp32; None is the identity that makes n1 · n2 = I.
        right: B, [n2, n2], fp32; None is the identity that makes n1 · n2 = I.
        low_rank_basis: V, [I, r], floating, with orthonormal columns.
        clip_ratio: Factor in (0, 1] on a token's largest magnitude; broadcasts to [M, 1], fp32.
        deflates: Whether what goes through the low-rank branch is taken out of what is quantized.
        steps: Parts with `apply`, each with its tensors.
    """

    shift: Tensor | None = None
    scale: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    low_rank_basis: Tensor | None = None
    clip_ratio: Tensor | None = None
    deflates: bool = True
    steps: Steps = ()

    @classmethod
    def of(cls, stored: Mapping[str, Any], path: InputPath) -> InputTensors:
        """Pick them from the tensors of a packed linear, by their stored names."""
        steps = path.steps and with_tensors(path.steps, stored)
        return cls._make([*[stored.get(name) for name in BACKEND_TENSORS], path.deflates, steps])


BACKEND_TENSORS = tuple(name for part in PARTS.values() if part.apply is None for name in part.input_names)
"""Stored names of the first fields of `InputTensors`, in their order."""
