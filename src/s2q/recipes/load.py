"""Find, read, override and validate recipes: YAML files of this package, or the user's own."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import ValidationError

from s2q.common.errors import (
    InvalidInputError,
    first_line,
    nearest_names,
    short_repr,
    unknown_name,
)
from s2q.common.options import OptionError, Options, expected_one_of, expected_range
from s2q.recipes.methods import merge, recipe_content, recipe_names
from s2q.recipes.schema import MAX_NAME, Recipe
from s2q.recipes.strict_yaml import MAX_BYTES, MAX_DEPTH, parse_yaml
from s2q.recipes.variants import SEPARATOR, VARIANTS, remarked, with_variant
from s2q.rounding import ROUNDINGS, RTN, Rounding

_FILE_SUFFIXES = (".yaml", ".yml", ".json")
_NOT_TAKEN_OVER = ("name", "description")
_EXAMPLE = "weights.num_bits=8"
_MAX_SAME = 3
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument", "invalid_key")
_OUT_OF_RANGE = ("greater_than_equal", "greater_than", "less_than_equal", "less_than")
_RETIRED = {
    ("rounding", "act_order"): True,
    ("rounding", "max_retries"): 4,
    ("clip", "start"): 4.0,
    ("distillation", "weight_decay"): 0.0,
}
"""Keys that recipes had up to 0.1, with what holds now."""


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, *, overrides: Sequence[str] = ()) -> Recipe:
    """Load and validate a recipe.

    The key `extends` names a recipe of the package that the others are changes to: keys of a group
    that are not given here keep its values; name and description are not inherited. The result has no such key.

    Args:
        recipe: Name of a recipe of the package, "+sds" or "+std" after it if wanted (`VARIANTS`), path of a YAML file,
            contents of one, or a validated recipe.
        overrides: Changes, each "key=value" with a dotted key and a YAML value: "weights.num_bits=8", "skip=[a, b]".

    Returns:
        The recipe.

    Raises:
        InvalidInputError: If the recipe is unknown, not YAML, or not valid; names the key and the nearest valid one.
    """
    overrides = checked_overrides(overrides)
    if isinstance(recipe, str) and SEPARATOR in recipe and not _is_path(recipe):
        recipe = _with_variants(recipe)
    if isinstance(recipe, Recipe):
        where, content = f"recipe {recipe.name}", recipe.resolved()
    elif isinstance(recipe, Mapping):
        name = recipe.get("name", "(unnamed)")
        where, content = (
            f"recipe {name if isinstance(name, str) and len(name) <= MAX_NAME else short_repr(name)}",
            dict(recipe),
        )
    elif isinstance(recipe, str | Path):
        where, content = _read(recipe)
    else:
        raise InvalidInputError(
            f"recipe: got {short_repr(recipe)}; expected a name, the path of a YAML file, a mapping or a Recipe"
        )
    content = _extended(where, content)
    for override in overrides:
        _apply(content, override)
    if overrides and isinstance(content.get("description"), str):
        content["description"] = remarked(content["description"], f"changed: {', '.join(overrides)}")
    try:
        return Recipe.model_validate(_without_retired(where, content))
    except ValidationError as error:
        raise InvalidInputError(f"{where}: {_explain(error)}") from error


def _read(recipe: str | Path) -> tuple[str, dict[str, Any]]:
    if not _is_path(recipe):
        return f"recipe {recipe}", recipe_content(str(recipe))
    path = Path(recipe).expanduser()
    content = parse_yaml(_file_text(path), where=str(path))
    if not isinstance(content, dict):
        raise InvalidInputError(f"{path}: got {short_repr(content)}; expected a mapping with the keys of a recipe")
    return str(path), content


def _file_text(path: Path) -> str:
    try:
        if not path.is_file():
            raise InvalidInputError(f"{path}: no such recipe file; built-in recipes: {', '.join(recipe_names())}")
        with path.open("rb") as file:
            return file.read(4 * MAX_BYTES).decode("utf-8-sig")  # more is refused in any case
    except (OSError, UnicodeError, ValueError) as error:
        raise InvalidInputError(
            f"{path}: cannot be read as UTF-8 text ({first_line(error)}); expected a YAML recipe"
        ) from error


def _is_path(recipe: str | Path) -> bool:
    text = str(recipe)
    return isinstance(recipe, Path) or "/" in text or text.endswith(_FILE_SUFFIXES)


def _with_variants(name: str) -> Recipe:
    base, *variants = name.split(SEPARATOR)
    for variant in variants:
        if variant not in VARIANTS:
            raise unknown_name(f"addition to recipe {base}", variant, VARIANTS)
    recipe = load_recipe(base)
    for variant in variants:
        recipe = with_variant(recipe, variant)
    return recipe


def _extended(where: str, content: dict[str, Any]) -> dict[str, Any]:
    """Put the content of a recipe over that of the one which it extends."""
    if "extends" not in content:
        return content
    changes = dict(content)
    name = changes.pop("extends")
    if not isinstance(name, str):
        raise InvalidInputError(
            f"{where}: extends={short_repr(name)}: expected a built-in recipe: {', '.join(recipe_names())}"
        )
    try:
        base = recipe_content(name)
    except InvalidInputError as error:
        raise InvalidInputError(f"{where}: extends: {error}") from error
    return merge({key: value for key, value in base.items() if key not in _NOT_TAKEN_OVER}, changes)


def checked_overrides(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return changes to a recipe as a tuple.

    Args:
        overrides: The changes, each "key=value".

    Raises:
        InvalidInputError: If they are no list, one is not "key=value", or one undoes an earlier one.
    """
    if isinstance(overrides, str | bytes | Mapping) or not isinstance(overrides, Iterable):
        raise InvalidInputError(
            f'overrides: got {short_repr(overrides)}; pass a list, each "key=value": ["weights.num_bits=8"]'
        )
    overrides = tuple(overrides)
    seen: list[str] = []
    for override in overrides:
        if not isinstance(override, str):
            raise InvalidInputError(f"override {short_repr(override)}: expected text, for example {_EXAMPLE}")
        key, separator, _ = override.partition("=")
        key = key.strip()
        if not separator or not all(key.split(".")):
            raise InvalidInputError(f"override {short_repr(override)}: expected key=value, for example {_EXAMPLE}")
        for earlier in seen:
            if f"{earlier}.".startswith(f"{key}."):
                raise InvalidInputError(
                    f"override {short_repr(override)}: {short_repr(earlier)} is set before it and would be "
                    "overwritten; remove one"
                )
        seen.append(key)
    return overrides


def _apply(content: dict[str, Any], override: str) -> None:
    where = f"override {short_repr(override)}"
    key, _, value = override.partition("=")
    path = key.strip().split(".")
    parsed = parse_yaml(value, where=where)
    if len(path) > MAX_DEPTH:
        raise InvalidInputError(f"{where}: unknown key; {_nearest(path)}")
    group = content
    for part in path[:-1]:
        inner = group.get(part)
        if inner is None:
            inner = {}
        elif not isinstance(inner, Mapping):
            raise InvalidInputError(f"{where}: {short_repr(part)} is not a group of keys; {_nearest(path)}")
        group[part] = group = dict(inner)
    group[path[-1]] = parsed


def _without_retired(where: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out keys of earlier versions, and of other roundings, that say what holds without them.

    Recipes of old checkpoints have them, and so does a recipe whose rounding is changed to another method.

    Raises:
        InvalidInputError: If a key of earlier versions says otherwise; names what holds.
    """
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in content.items()}
    rounding = result.get("rounding")
    if isinstance(rounding, dict):
        stored = "max_retries" in rounding  # every old recipe has it, with the keys of all methods
        method = rounding.get("method", RTN.method)
        used = _options_of(ROUNDINGS.get(method)) if isinstance(method, str) else {}
        for one in ROUNDINGS.values():
            for option in fields(one):  # type: ignore[arg-type]
                old = False if option.name == "allow_fallback" and stored else option.default
                if option.name not in used and rounding.get(option.name) in (old, option.default):
                    rounding.pop(option.name, None)
    for (group, key), constant in _RETIRED.items():
        options = result.get(group)
        if isinstance(options, dict) and key in options and (value := options.pop(key)) != constant:
            raise InvalidInputError(
                f"{where}: {group}.{key}={short_repr(value)}: no longer an option, always {constant}; remove it"
            )
    return result


def _explain(error: ValidationError) -> str:
    """The first problem, in one line: key, value, what would be valid. Unknown keys come before missing ones."""
    problems = error.errors(include_url=False)
    problem = min(problems, key=lambda one: one["type"] not in _UNKNOWN)
    path = _key_path(problem["loc"])
    key, kind, given = ".".join(path), problem["type"], problem.get("input")
    got = short_repr(given)
    if kind in _UNKNOWN:
        return f"unknown key {short_repr(key)}; {_nearest(path)}"
    if kind == "missing":
        return f"{key}: the list is too short" if path[-1].isdigit() else f"missing key {short_repr(key)}; add it"
    if kind in _OUT_OF_RANGE:
        return f"{key}={got}; {expected_range(_metadata_at(path))}"
    if kind == "literal_error":
        options = [option.strip("' ") for option in problem["ctx"]["expected"].replace(" or ", ",").split(",")]
        return f"{key}={got}; {expected_one_of(given, options)}"
    if kind == "value_error":
        reason = problem["ctx"]["error"]
        return f"{key}.{reason.reason}" if isinstance(reason, OptionError) else str(reason)
    if kind == "tuple_type":
        return f"{key}={got}: expected a list{f'; write [{got}]' if isinstance(given, str) else ''}"
    if kind in ("dataclass_type", "model_type"):
        keys = ", ".join(_options_of(_group_at(path)))
        return f"{key}={got}: expected a group of keys ({keys}), or null where the recipe can do without"
    messages = [one["msg"][0].lower() + one["msg"][1:] for one in problems if _key_path(one["loc"]) == path]
    return f"{key}={got}: {', or '.join(messages)}{_written(kind, given)}"


def _written(kind: str, given: Any) -> str:
    """The YAML of a value of the wrong type, if it is known."""
    if kind == "int_type" and isinstance(given, float) and given.is_integer():
        return f"; write {int(given)}"
    if kind == "bool_type":
        return "; write true or false"
    return ""


def _key_path(location: Sequence[str | int]) -> list[str]:
    """The keys and indices that lead to a problem, without the type that pydantic tried, of an option with several."""
    path: list[str] = []
    for part in location:
        if _group_at(path) is None and isinstance(part, str):
            break
        path.append(str(part))
    return path


def _options_of(group: Any) -> dict[str, Any]:
    """Type by key of a group, those of every method for the rounding; empty for what is no group."""
    if group is Recipe:
        return {name: info.annotation for name, info in Recipe.model_fields.items()}
    classes = ROUNDINGS.values() if group is Rounding else (group,)
    found: dict[str, Any] = {}
    for one in classes:
        if is_dataclass(one):
            types_of = get_type_hints(one)
            found |= {option.name: types_of[option.name] for option in fields(one)}
    return found


def _group_at(path: Sequence[str]) -> Any:
    """The group of keys that a path leads to; None if there is none."""
    group: Any = Recipe
    for part in path:
        group = _group_in(_options_of(group).get(part))
    return group


def _group_in(annotation: Any) -> Any:
    """The group that an option's type has, "Delta | None"; None if it has none."""
    candidates = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((one for one in candidates if isinstance(one, type) and issubclass(one, Options)), None)


def _metadata_at(path: Sequence[str]) -> Mapping[str, Any]:
    """The range of an option."""
    group = _group_at(path[:-1])
    classes = ROUNDINGS.values() if group is Rounding else (group,)
    return next(option.metadata for one in classes for option in fields(one) if option.name == path[-1])  # type: ignore[arg-type]


def _nearest(path: Sequence[str]) -> str:
    """The keys nearest to one that is unknown: those beside it, else those of that name anywhere."""
    if path[0] == "rounding" and (methods := [name for name, one in ROUNDINGS.items() if path[-1] in _options_of(one)]):
        return f"it is an option of rounding.method={' and '.join(methods)}; remove it"
    prefix = "".join(f"{part}." for part in path[:-1])
    beside = [prefix + name for name in _options_of(_group_at(path[:-1]))]
    known = list(_keys(Recipe))
    whole = ".".join(path)
    same = [one for one in known if one.rpartition(".")[2] == path[-1]]
    near = [*same[:_MAX_SAME], *(nearest_names(whole, beside) or nearest_names(whole, known))]
    near = near or nearest_names(path[-1], known)
    return f"nearest keys are {', '.join(near)}" if near else f"keys are {', '.join(beside or known)}"


def _keys(group: Any, prefix: str = "") -> Iterator[str]:
    for name, annotation in _options_of(group).items():
        inner = _group_in(annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from _keys(inner, f"{prefix}{name}.")
