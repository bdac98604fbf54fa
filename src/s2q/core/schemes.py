"""Quantization schemes: number of bits, granularity, levels. Frozen value objects without tensors.

Every quantizer of the project is symmetric: codes in [-2^(N-1), 2^(N-1) - 1], no zero point. A code represents itself
times the scale (S²Q-VDiT, eq. 1) or, with levels that are not uniform, an entry of a codebook times the scale
(`core.codebook`). Levels that are int8 values run on the integer kernels: a look-up turns codes into values of 8 bits.
Shapes: `O` out features, `I` in features, `G` groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from s2q.common.errors import InvalidInputError, short_repr, unknown_name
from s2q.common.options import Options
from s2q.core.tokens import is_triple, is_whole

MIN_BITS = 2
MAX_BITS = 8
UNIFORM = "uniform"
LLOYD_MAX_INT8 = "lloyd_max_int8"
TABLE, FP8_TABLE = "table", "fp8_table"
TABLES = (TABLE, FP8_TABLE)
"""Levels of groups that have a byte each (`core.codebook`)."""
NVFP4, MXFP4 = "nvfp4", "mxfp4"
FP4_GROUPS = {NVFP4: 16, MXFP4: 32}
"""Group size of the block formats of 4-bit floating point (`core.fp4`)."""
LEVELS = (UNIFORM, "lloyd_max", LLOYD_MAX_INT8, *TABLES, *FP4_GROUPS)
INT8_LEVELS = (LLOYD_MAX_INT8, *TABLES)
"""Levels that are whole numbers of 8 bits."""
MAX_LOOKED_UP_BITS = 4
"""Width of the codes of such levels: two a byte, at most."""
ATTENTION_BITS = 8
"""Width of quantized queries and keys."""
_BITS = {"ge": MIN_BITS, "le": MAX_BITS}


@dataclass(frozen=True, kw_only=True)
class PerChannel:
    """One scale per output channel: weight [O, I] -> scale [O]."""


@dataclass(frozen=True, kw_only=True)
class PerGroup:
    """One scale per `group_size` neighbouring input channels: weight [O, I] -> scale [O, G], activation -> [..., G]."""

    group_size: int

    def __post_init__(self) -> None:
        """Refuse anything but a positive whole number."""
        if not is_whole(self.group_size) or self.group_size < 1:
            raise InvalidInputError(
                f"PerGroup: group_size={short_repr(self.group_size)}; expected a whole number of at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class PerToken:
    """One scale per token: activation [..., I] -> scale [..., 1]."""


Granularity = PerChannel | PerGroup | PerToken

_UNGROUPED: dict[str, PerChannel | PerToken] = {"per_channel": PerChannel(), "per_token": PerToken()}
_GRANULARITY_NAMES: dict[type, str] = {type(kind): name for name, kind in _UNGROUPED.items()} | {PerGroup: "per_group"}


@dataclass(frozen=True, kw_only=True)
class Delta(Options):
    """Quantize video tokens as differences from the mean token of their cube; other tokens without.

    Attributes:
        cube: Tokens of a cube along frames, rows and columns.
        mean_bits: Width of the codes of the mean tokens, which have a scale each.
    """

    cube: tuple[int, int, int] = field(default=(2, 2, 2), metadata={"strict": False})
    mean_bits: int = field(default=MAX_BITS, metadata=_BITS)

    def __post_init__(self) -> None:
        """Check both fields."""
        super().__post_init__()
        if not is_triple(self.cube):
            raise self.invalid(f"cube={short_repr(self.cube)}; expected three whole numbers from 1")
        _check_bits("mean_bits", self.mean_bits)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict for JSON."""
        return {"cube": list(self.cube), "mean_bits": self.mean_bits}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Delta":
        """Read what `to_dict` wrote; InvalidInputError if a key is unknown or missing, or a value is not allowed."""
        _check_keys("delta", fields, required=("cube", "mean_bits"))
        cube = fields["cube"]
        return cls(cube=tuple(cube) if isinstance(cube, list) else cube, mean_bits=fields["mean_bits"])


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """Scheme of one tensor; always symmetric.

    Attributes:
        num_bits: Width of a code, 2 to 8.
        granularity: Which values share a scale.
        dynamic: Whether the scale is computed from the tensor at run time (activations) or stored (weights).
        levels: "uniform", scaled by the largest magnitude; those of `core.codebook`: "lloyd_max", by the root mean
            square, "lloyd_max_int8", the same as int8 values, and "table", int8 values for weights in groups, each
            with a byte for one of four tables and a signed scale, or "fp8_table", the same with one table and scales
            that 8-bit floating point has; "nvfp4" or "mxfp4" of `core.fp4`.
        delta: Split of video tokens into cube mean and difference; None for whole tokens. For activations.
    """

    num_bits: int
    granularity: Granularity
    dynamic: bool = False
    levels: str = UNIFORM
    delta: Delta | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        _check_bits("num_bits", self.num_bits)
        if type(self.granularity) not in _GRANULARITY_NAMES:
            raise InvalidInputError(
                f"granularity={short_repr(self.granularity)}; expected an instance of PerChannel, PerGroup or PerToken"
            )
        if not isinstance(self.dynamic, bool):
            raise InvalidInputError(f"dynamic={short_repr(self.dynamic)}; expected true or false")
        if self.levels not in LEVELS:
            raise unknown_name("levels", str(self.levels), LEVELS)
        if self.is_fp4 and (self.num_bits, self.granularity) != (4, PerGroup(group_size=FP4_GROUPS[self.levels])):
            raise InvalidInputError(
                f"levels={self.levels} with num_bits={self.num_bits} and {self.granularity}; expected num_bits=4, "
                f"granularity=per_group and group_size={FP4_GROUPS[self.levels]}"
            )
        if self.has_int8_levels and self.num_bits > MAX_LOOKED_UP_BITS:
            raise InvalidInputError(
                f"levels={self.levels} with num_bits={self.num_bits}; expected at most {MAX_LOOKED_UP_BITS}, or "
                f"levels={UNIFORM}"
            )
        if self.has_table and (self.dynamic or self.num_bits != 4 or not isinstance(self.granularity, PerGroup)):
            raise InvalidInputError(
                f"levels={self.levels} with num_bits={self.num_bits}, {_GRANULARITY_NAMES[type(self.granularity)]}; "
                "expected weights of 4 bits in groups: num_bits=4, granularity=per_group, group_size=16"
            )
        if self.delta is not None and not (isinstance(self.delta, Delta) and self.dynamic):
            raise InvalidInputError(f"delta={short_repr(self.delta)}; expected a Delta in a dynamic scheme, or None")

    @property
    def has_int8_levels(self) -> bool:
        """Whether a code represents a whole number of 8 bits, which is not the code."""
        return self.levels in INT8_LEVELS

    @property
    def has_table(self) -> bool:
        """Whether it has the levels and the two scales of a table."""
        return self.levels in TABLES

    @property
    def product_bits(self) -> int:
        """Width of what integer kernels multiply: the codes, or the int8 values of their levels."""
        return MAX_BITS if self.has_int8_levels else self.num_bits

    @property
    def is_fp4(self) -> bool:
        """Whether it is a block format of 4-bit floating point (`core.fp4`)."""
        return self.levels in FP4_GROUPS

    @property
    def widest(self) -> int:
        """Width of the widest values that integer kernels multiply: those of means or of differences."""
        return self.product_bits if self.delta is None else max(self.product_bits, self.delta.mean_bits)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict for JSON; `group_size`, `levels` and `delta` are there only where they are not usual."""
        fields: dict[str, Any] = {"num_bits": self.num_bits, "granularity": _GRANULARITY_NAMES[type(self.granularity)]}
        if isinstance(self.granularity, PerGroup):
            fields["group_size"] = self.granularity.group_size
        fields["dynamic"] = self.dynamic
        if self.levels != UNIFORM:
            fields["levels"] = self.levels
        if self.delta is not None:
            fields["delta"] = self.delta.to_dict()
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "QuantScheme":
        """Read what `to_dict` wrote; InvalidInputError if a key is unknown or missing, or a value is not allowed."""
        _check_keys(
            "scheme",
            fields,
            required=("num_bits", "granularity"),
            optional=("group_size", "dynamic", "levels", "delta"),
        )
        name = fields["granularity"]
        if name not in _GRANULARITY_NAMES.values():
            raise unknown_name("granularity", str(name), _GRANULARITY_NAMES.values())
        granularity: Granularity
        if name == "per_group":
            if "group_size" not in fields:
                raise InvalidInputError("scheme: granularity per_group without group_size; add it, 64 for example")
            granularity = PerGroup(group_size=fields["group_size"])
        else:
            if fields.get("group_size") is not None:
                raise InvalidInputError(f"scheme: group_size given with granularity {name}; remove it or use per_group")
            granularity = _UNGROUPED[name]
        delta = fields.get("delta")
        return cls(
            num_bits=fields["num_bits"],
            granularity=granularity,
            dynamic=fields.get("dynamic", False),
            levels=fields.get("levels", UNIFORM),
            delta=None if delta is None else Delta.from_dict(delta),
        )


@dataclass(frozen=True, kw_only=True)
class LinearScheme:
    """Scheme of one linear.

    Attributes:
        weight: Static, per channel or per group.
        activation: Dynamic, per token, or per group of each token; None for floating point (weight-only).
    """

    weight: QuantScheme
    activation: QuantScheme | None

    def __post_init__(self) -> None:
        """Check that the linears of the project can carry this scheme out."""
        if self.weight.dynamic or not isinstance(self.weight.granularity, PerChannel | PerGroup):
            raise InvalidInputError(f"weight scheme {self.weight}; expected static, PerChannel or PerGroup")
        activation = self.activation
        if activation is not None and not (
            activation.dynamic and isinstance(activation.granularity, PerToken | PerGroup)
        ):
            raise InvalidInputError(f"activation scheme {activation}; expected dynamic, PerToken or PerGroup, or None")

    @property
    def name(self) -> str:
        """Short name: "w4a6", "w4a16" for weight-only, "w4g64a6g64" with groups of 64, "w4ca4c" with codebooks.

        "w4ia8" has codebooks of int8 values, "w4tg16a8" the table with groups of 16.
        "w4a4d222" has differences from the means of cubes of 2 x 2 x 2 tokens, "w4a4d222m6" with means of 6 bits.
        """
        activation = "16" if self.activation is None else _short_name(self.activation)
        return f"w{_short_name(self.weight)}a{activation}"

    @property
    def simulated(self) -> bool:
        """Whether no integer kernel takes this scheme, so that it is computed in floating point, slower than none."""
        schemes = [scheme for scheme in (self.weight, self.activation) if scheme is not None]
        grouped = self.activation is not None and isinstance(self.activation.granularity, PerGroup)
        return grouped or any(scheme.levels not in (UNIFORM, *INT8_LEVELS) for scheme in schemes)

    @property
    def needs_grid(self) -> bool:
        """Whether a linear has to know where the video tokens lie."""
        return self.activation is not None and self.activation.delta is not None

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict for JSON; `activation` is None for weight-only."""
        return {
            "weight": self.weight.to_dict(),
            "activation": None if self.activation is None else self.activation.to_dict(),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LinearScheme":
        """Read what `to_dict` wrote; InvalidInputError if a key is unknown or missing, or a value is not allowed."""
        _check_keys("linear scheme", fields, required=("weight", "activation"))
        activation = fields["activation"]
        return cls(
            weight=QuantScheme.from_dict(fields["weight"]),
            activation=None if activation is None else QuantScheme.from_dict(activation),
        )


@dataclass(frozen=True, kw_only=True)
class SchemeOptions(Options):
    """Options of the scheme of a tensor; always symmetric.

    Attributes:
        num_bits: Width of a code.
        granularity: Which values share a scale.
        group_size: Input channels of a group; with `per_group` only.
        levels: "uniform", or "lloyd_max", a codebook for values of a normal distribution, as a rotation makes them (see
            `s2q.core.codebook`); no integer kernel takes it, so it is simulated in floating point. "lloyd_max_int8"
            rounds that codebook to int8 values, which the kernels multiply, of weights and of inputs. "table", for
            weights in groups, has 16 int8 levels of one of four tables and a signed scale for each group, in a byte.
            "fp8_table" is what ComfyUI's files store of it: one table, positive scales of 8-bit floating point.
            "nvfp4" and "mxfp4" are 4-bit floating point in groups of 16 and 32 (see `s2q.core.fp4`), simulated.
    """

    num_bits: int = field(metadata=_BITS)
    granularity: str
    group_size: int | None = field(default=None, metadata={"ge": 1})
    levels: str = field(default=UNIFORM, metadata={"choices": LEVELS})

    def __post_init__(self) -> None:
        """Check that the group size fits the granularity."""
        super().__post_init__()
        if self.granularity == "per_group" and self.group_size is None:
            sizes = "16" if self.levels in TABLES else "64, 128 or 256"
            raise self.invalid(f"granularity=per_group needs a group_size; use {sizes}")
        if self.granularity != "per_group" and self.group_size is not None:
            raise self.invalid(f"group_size={self.group_size} needs granularity=per_group; got {self.granularity}")

    def scheme(self) -> QuantScheme:
        """Return the scheme."""
        granularity = _UNGROUPED[self.granularity] if self.group_size is None else PerGroup(group_size=self.group_size)
        return QuantScheme(num_bits=self.num_bits, granularity=granularity, levels=self.levels)


@dataclass(frozen=True, kw_only=True)
class WeightOptions(SchemeOptions):
    """Options of the weights: static scales."""

    granularity: Literal["per_channel", "per_group"] = "per_channel"


@dataclass(frozen=True, kw_only=True)
class ActivationOptions(SchemeOptions):
    """Options of the inputs of linears: dynamic scales, per token or per group of its channels.

    Attributes:
        delta: How a video token is split into the mean of its cube and the difference from it; None quantizes tokens
            whole. No integer kernel takes groups, which are simulated in floating point.
    """

    granularity: Literal["per_token", "per_group"] = "per_token"
    delta: Delta | None = None

    def scheme(self, *, of_text: bool = False) -> QuantScheme:
        """Return the scheme; text tokens alone are in no cubes."""
        delta = None if of_text else self.delta
        return replace(super().scheme(), dynamic=True, delta=delta)


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(Options):
    """Options of the attention of the blocks; a recipe without them has attention in full precision.

    Attributes:
        num_bits: Of queries and keys: 8 (`ops.int8_attention`).
    """

    num_bits: int = ATTENTION_BITS

    def __post_init__(self) -> None:
        """Check the width."""
        if self.num_bits != ATTENTION_BITS:
            raise self.invalid(
                f"num_bits={short_repr(self.num_bits)}; expected {ATTENTION_BITS}, or attention=null for full precision"
            )


def num_groups(scheme: QuantScheme, in_features: int) -> int:
    """Return how many scales an output channel, or a token, has: I / group_size for PerGroup, else 1.

    Raises:
        InvalidInputError: If in_features is not a multiple of group_size; names the group sizes that would do.
    """
    if not isinstance(scheme.granularity, PerGroup):
        return 1
    group_size = scheme.granularity.group_size
    if in_features % group_size:
        fits = [size for size in (256, 128, 64, 32, 16, 8) if in_features % size == 0][:3]
        remedy = f"use {', '.join(map(str, sorted(fits)))}" if fits else "use per_channel"
        raise InvalidInputError(f"in_features={in_features} is not divisible by group_size={group_size}; {remedy}")
    return in_features // group_size


def _check_keys(what: str, fields: object, *, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    if not isinstance(fields, Mapping):
        raise InvalidInputError(f"{what}: got {type(fields).__name__}; expected a mapping with {', '.join(required)}")
    for key in fields:
        if key not in (*required, *optional):
            raise unknown_name(f"key in {what}", str(key), (*required, *optional))
    missing = [key for key in required if key not in fields]
    if missing:
        raise InvalidInputError(f"{what}: missing {', '.join(missing)}; expected {', '.join(required)}")


_LEVEL_NAMES = {UNIFORM: "", LLOYD_MAX_INT8: "i", TABLE: "t", FP8_TABLE: "ft", NVFP4: "nv", MXFP4: "mx"}


def _short_name(scheme: QuantScheme) -> str:
    group = f"g{scheme.granularity.group_size}" if isinstance(scheme.granularity, PerGroup) else ""
    delta = "" if scheme.delta is None else _delta_name(scheme.delta)
    return f"{scheme.num_bits}{_LEVEL_NAMES.get(scheme.levels, 'c')}{group}{delta}"


def _delta_name(delta: Delta) -> str:
    separator = "" if max(delta.cube) < 10 else "x"
    cube = separator.join(map(str, delta.cube))
    return f"d{cube}" + ("" if delta.mean_bits == MAX_BITS else f"m{delta.mean_bits}")


def _check_bits(name: str, value: object) -> None:
    if not (is_whole(value) and MIN_BITS <= value <= MAX_BITS):
        raise InvalidInputError(f"{name}={short_repr(value)}; expected a whole number, {MIN_BITS} to {MAX_BITS}")
