"""Options of a method: frozen dataclasses beside the mathematics, which recipes are validated into.

The range of an option is the metadata of its field, in pydantic's words, and is read by pydantic (a recipe) and here
(Python):

    dampening_frac: float = field(default=0.01, metadata={"ge": 0})

`ge`, `gt`, `le` and `lt` are bounds, `choices` a table of names, and `"strict": False` lets a tuple be given as a list.
What more than one option decides is checked in `__post_init__`, after that of `Options`, and raised as `OptionError`.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, fields
from typing import Any, ClassVar

from s2q.common.errors import InvalidInputError, nearest_names, short_repr

_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}


class OptionError(InvalidInputError, ValueError):
    """An option has a value that it cannot have, by itself or beside another: "GPTQ: block_size=0; expected …"."""

    @property
    def reason(self) -> str:
        """The message without the class; begins with the name of the option."""
        return str(self).partition(": ")[2]


class Options:
    """Base of a frozen dataclass of options; unknown keys are refused and values are not converted."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}

    def __post_init__(self) -> None:
        """Check the ranges."""
        for option in fields(self):  # type: ignore[arg-type]
            value = getattr(self, option.name)
            if value is not None and (problem := _problem(option, value)):
                raise self.invalid(f"{option.name}={short_repr(value)}; {problem}")

    @classmethod
    def invalid(cls, reason: str) -> OptionError:
        """Build (not raise) the error for a value; the reason begins with the name of the option."""
        return OptionError(f"{cls.__name__}: {reason}")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Let pydantic read the options from a mapping, which a strict dataclass refuses."""
        schema = handler(source)
        handler.resolve_ref_schema(schema)["strict"] = False
        return schema


def expected_one_of(value: Any, choices: Iterable[str]) -> str:
    """Return what was expected in place of a name that is not among the choices, with the nearest."""
    known = list(choices)
    near = nearest_names(value, known, count=1) if isinstance(value, str) else []
    return f"expected one of {', '.join(known)}{f'; the nearest is {near[0]}' if near else ''}"


def expected_range(metadata: Mapping[str, Any]) -> str:
    """Return what was expected in place of a number out of range: "expected at least 2, at most 8"."""
    return "expected " + ", ".join(
        f"{words} {metadata[kind]:g}" for kind, (_, words) in _BOUNDS.items() if kind in metadata
    )


def _problem(option: "Field[Any]", value: Any) -> str | None:
    choices = option.metadata.get("choices")
    if choices is not None and value not in choices:
        return expected_one_of(value, choices)
    if isinstance(value, float) and not math.isfinite(value):
        return "expected a finite number"
    for kind, (holds, _) in _BOUNDS.items():
        if kind in option.metadata and not (isinstance(value, int | float) and holds(value, option.metadata[kind])):
            return expected_range(option.metadata)
    return None
