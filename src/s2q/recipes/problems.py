"""Problems of a recipe, each in one line: the key, the value, what was expected, the nearest key."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from pydantic import ValidationError

from s2q.common.errors import nearest_names, short_repr
from s2q.common.options import OptionError, Options, expected_one_of, expected_range
from s2q.recipes.schema import Recipe
from s2q.rounding import ROUNDINGS, Rounding

_MAX_SAME = 3
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument", "invalid_key")
_OUT_OF_RANGE = ("greater_than_equal", "greater_than", "less_than_equal", "less_than")


def explain(error: ValidationError) -> str:
    """Return the first problem of a recipe; unknown keys come before missing ones."""
    schema = dict(_schema())
    problems = error.errors(include_url=False)
    problem = min(problems, key=lambda candidate: candidate["type"] not in _UNKNOWN)
    key = _key(problem["loc"], schema)
    kind, given, got = problem["type"], problem["input"], short_repr(problem["input"])
    if kind in _UNKNOWN:
        return f"unknown key {short_repr(key)}; {nearest_keys(key)}"
    if kind == "missing":
        return f"missing key {short_repr(key)}; add it" if key in schema else f"{key}: the list is too short"
    if kind in _OUT_OF_RANGE:
        return f"{key}={got}; {expected_range(schema[key] or {})}"
    if kind == "literal_error":
        choices = [choice.strip("' ") for choice in problem["ctx"]["expected"].replace(" or ", ",").split(",")]
        return f"{key}={got}; {expected_one_of(given, choices)}"
    if kind == "value_error":
        reason = problem["ctx"]["error"]
        return f"{key}.{reason.reason}" if isinstance(reason, OptionError) else str(reason)
    if kind == "tuple_type":
        return f"{key}={got}: expected a list{f'; write [{got}]' if isinstance(given, str) else ''}"
    if kind in ("dataclass_type", "model_type"):
        inside = ", ".join(name.rpartition(".")[2] for name in _beside(f"{key}.", schema))
        return f"{key}={got}: expected a group of keys ({inside}), or null where the recipe can do without"
    messages = [same["msg"][0].lower() + same["msg"][1:] for same in problems if _key(same["loc"], schema) == key]
    remedy = "; write true or false" if kind == "bool_type" else ""
    if kind == "int_type" and isinstance(given, float) and given.is_integer():
        remedy = f"; write {int(given)}"
    return f"{key}={got}: {', or '.join(messages)}{remedy}"


def nearest_keys(key: str) -> str:
    """Return the keys nearest to one that does not exist: those beside it, else those of that name anywhere."""
    group, _, name = key.rpartition(".")
    methods = [method for method, options in ROUNDINGS.items() if name in {option.name for option in _fields(options)}]
    if group == "rounding" and methods:
        return f"it is an option of rounding.method={' and '.join(methods)}; set that method, or remove the key"
    schema = dict(_schema())
    beside = _beside(f"{group}." if group else "", schema)
    known = [path for path, metadata in schema.items() if metadata is not None]
    same = [path for path in known if path.rpartition(".")[2] == name]
    near = [*same[:_MAX_SAME], *(nearest_names(key, beside) or nearest_names(key, known))]
    near = near or nearest_names(name, known)
    return f"nearest keys are {', '.join(near)}" if near else f"keys are {', '.join(beside or known)}"


def _schema(group: Any = Recipe, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    """Every key with its groups, and the range of an option; None for a group."""
    options: list[tuple[str, Any, Mapping[str, Any]]]
    if group is Recipe:
        options = [(name, info.annotation, {}) for name, info in Recipe.model_fields.items()]
    else:
        classes = ROUNDINGS.values() if group is Rounding else (group,)
        hints = [(option, get_type_hints(part)[option.name]) for part in classes for option in _fields(part)]
        options = [(option.name, hint, option.metadata) for option, hint in hints]
    for name, annotation, metadata in options:
        parts = (part for part in get_args(annotation) or (annotation,) if isinstance(part, type))
        inner = next((part for part in parts if issubclass(part, Options)), None)
        yield prefix + name, metadata if inner is None else None
        if inner is not None:
            yield from _schema(inner, f"{prefix}{name}.")


def _fields(options: Any) -> Sequence[Any]:
    return fields(options) if is_dataclass(options) else ()


def _beside(prefix: str, schema: Mapping[str, Any]) -> list[str]:
    return [path for path in schema if path.startswith(prefix) and "." not in path[len(prefix) :]]


def _key(location: Sequence[str | int], schema: Mapping[str, Any]) -> str:
    """The key of a problem, without the type that pydantic tried last, of an option with several."""
    key = ""
    for part in location:
        if isinstance(part, str) and schema.get(key) is not None:
            break
        key = f"{key}.{part}" if key else str(part)
    return key
