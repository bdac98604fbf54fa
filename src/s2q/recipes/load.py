"""Find, read, override and validate recipes: YAML files of this package, or the user's own."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from s2q.common.errors import (
    InvalidInputError,
    first_line,
    nearest_names,
    short_repr,
    unknown_name,
)
from s2q.recipes.schema import MAX_NAME, Recipe
from s2q.recipes.strict_yaml import MAX_BYTES, MAX_DEPTH, parse_yaml
from s2q.recipes.variants import SEPARATOR, VARIANTS, remarked, with_variant

_SUFFIX = ".yaml"
_FILE_SUFFIXES = (".yaml", ".yml", ".json")
_NOT_TAKEN_OVER = ("name", "description")
_EXAMPLE = "weights.num_bits=8"
_MAX_SAME = 3


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package, sorted."""
    files = resources.files("s2q.recipes").iterdir()
    return sorted(file.name.removesuffix(_SUFFIX) for file in files if file.name.endswith(_SUFFIX))


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, *, overrides: Sequence[str] = ()) -> Recipe:
    """Load and validate a recipe.

    The key `extends` names a recipe of the package that the others are changes to: a group is taken over but for the
    keys given here, name and description are not taken over. The result has no such key.

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
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InvalidInputError(f"{where}: {_explain(error)}") from error


def _read(recipe: str | Path) -> tuple[str, dict[str, Any]]:
    text = str(recipe)
    if _is_path(recipe):
        path = Path(recipe).expanduser()
        where, source = str(path), _file_text(path)
    elif text in (names := recipe_names()):
        where = f"recipe {text}"
        source = resources.files("s2q.recipes").joinpath(text + _SUFFIX).read_text(encoding="utf-8")
    else:
        raise unknown_name("recipe", text, names)
    content = parse_yaml(source, where=where)
    if not isinstance(content, dict):
        raise InvalidInputError(f"{where}: got {short_repr(content)}; expected a mapping with the keys of a recipe")
    return where, content


def _file_text(path: Path) -> str:
    try:
        if not path.is_file():
            raise InvalidInputError(f"{path}: no such recipe file; recipes of the package: {', '.join(recipe_names())}")
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
    own = {key: value for key, value in content.items() if key != "extends"}
    name, names = content["extends"], recipe_names()
    if not isinstance(name, str) or name not in names:
        near = nearest_names(name, names) if isinstance(name, str) else ()
        hint = f"nearest names are {', '.join(near)}; " if near else ""
        raise InvalidInputError(
            f"{where}: extends={short_repr(name)}: {hint}expected a recipe of the package: {', '.join(names)}"
        )
    result = {key: value for key, value in _extended(*_read(name)).items() if key not in _NOT_TAKEN_OVER}
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = result[key] | value if both else value
    return result


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
                    f"override {short_repr(override)}: {short_repr(earlier)} is set before it, and would be lost; "
                    "leave one out"
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


def _explain(error: ValidationError) -> str:
    """The first problem, in one line: key, value, what would be valid. Unknown keys come before missing ones."""
    problems = error.errors(include_url=False)
    problem = min(problems, key=lambda one: one["type"] != "extra_forbidden")
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    kind, given = problem["type"], problem.get("input")
    got = short_repr(given)
    if kind == "extra_forbidden":
        return f"unknown key {short_repr(key)}; {_nearest(path)}"
    if kind == "missing":
        return f"missing key {short_repr(key)}; add it"
    if kind == "greater_than_equal" and isinstance(given, int):
        return f"{key}={got} is too small; the nearest valid value is {problem['ctx']['ge']}"
    if kind == "less_than_equal" and isinstance(given, int):
        return f"{key}={got} is too large; the nearest valid value is {problem['ctx']['le']}"
    if kind == "literal_error":
        options = [option.strip("' ") for option in problem["ctx"]["expected"].replace(" or ", ",").split(",")]
        near = nearest_names(given, options, count=1) if isinstance(given, str) else ()
        hint = f"; the nearest is {near[0]}" if near else ""
        return f"{key}={got}; expected one of {', '.join(options)}{hint}"
    if kind == "value_error":
        return f"{key + ': ' if key else ''}{problem['ctx']['error']}"
    if kind == "tuple_type":
        return f"{key}={got}: expected a list{f'; write [{got}]' if isinstance(given, str) else ''}"
    if kind == "model_type":
        group = _group_at(path)
        keys = f" ({', '.join(group.model_fields)})" if group is not None else ""
        return f"{key}={got}: expected a group of keys{keys}, or null where the recipe can do without"
    return f"{key}={got}: {problem['msg'][0].lower()}{problem['msg'][1:]}{_written(kind, given)}"


def _written(kind: str, given: Any) -> str:
    """How a value of the wrong type is written, where it can be told."""
    if kind == "int_type" and isinstance(given, float) and given.is_integer():
        return f"; write {int(given)}"
    if kind == "bool_type":
        return "; write true or false"
    return ""


def _group_at(path: Sequence[str]) -> type[BaseModel] | None:
    """The group of keys that a path leads to; None if there is none."""
    group: type[BaseModel] | None = Recipe
    for part in path:
        info = None if group is None else group.model_fields.get(part)
        group = None if info is None else _model_of(info.annotation)
    return group


def _model_of(annotation: Any) -> type[BaseModel] | None:
    candidates = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _nearest(path: Sequence[str]) -> str:
    """The keys nearest to one that is unknown: those beside it, else those of that name anywhere."""
    prefix = "".join(f"{part}." for part in path[:-1])
    group = _group_at(path[:-1])
    beside = [prefix + name for name in group.model_fields] if group is not None else []
    known = list(_keys(Recipe))
    whole = ".".join(path)
    same = [one for one in known if one.rpartition(".")[2] == path[-1]]
    near = [*same[:_MAX_SAME], *(nearest_names(whole, beside) or nearest_names(whole, known))]
    near = near or nearest_names(path[-1], known)
    return f"nearest keys are {', '.join(near)}" if near else f"keys are {', '.join(beside or known)}"


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        group = _model_of(info.annotation)
        if group is not None:
            yield from _keys(group, f"{prefix}{name}.")
        else:
            yield prefix + name
