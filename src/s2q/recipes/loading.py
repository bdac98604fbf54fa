"""Find, read, override and validate recipes: YAML files of this package, or the user's own."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from s2q.core.errors import InvalidInputError, first_line, nearest_names, unknown_name
from s2q.recipes.schema import Recipe
from s2q.recipes.variants import SEPARATOR, VARIANTS, remarked, with_variant

_SUFFIX = ".yaml"
_FILE_SUFFIXES = (".yaml", ".yml", ".json")
_NOT_TAKEN_OVER = ("name", "description")


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
    if isinstance(recipe, str) and SEPARATOR in recipe and not _is_path(recipe):
        recipe = _with_variants(recipe)
    if isinstance(recipe, Recipe):
        where, content = f"recipe {recipe.name}", recipe.resolved()
    elif isinstance(recipe, Mapping):
        where, content = f"recipe {recipe.get('name', '(unnamed)')}", dict(recipe)
    else:
        where, content = _read(recipe)
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
        where = str(path)
        if not path.is_file():
            raise InvalidInputError(f"{path}: no such recipe file; recipes of the package: {', '.join(recipe_names())}")
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(f"{path}: cannot be read as text ({error}); expected a YAML recipe") from error
    elif text in (names := recipe_names()):
        where = f"recipe {text}"
        source = resources.files("s2q.recipes").joinpath(text + _SUFFIX).read_text(encoding="utf-8")
    else:
        raise unknown_name("recipe", text, names)
    try:
        content = yaml.safe_load(source)
    except yaml.YAMLError as error:
        raise InvalidInputError(
            f"{where}: not valid YAML ({first_line(error)}); expected the keys of a recipe"
        ) from error
    if not isinstance(content, dict):
        raise InvalidInputError(f"{where}: got {type(content).__name__}; expected a mapping with the keys of a recipe")
    return where, content


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
    if name not in names:
        near = nearest_names(str(name), names)
        hint = f"nearest names are {', '.join(near)}; " if near else ""
        raise InvalidInputError(f"{where}: extends={name!r}: {hint}recipes of the package: {', '.join(names)}")
    result = {key: value for key, value in _extended(*_read(name)).items() if key not in _NOT_TAKEN_OVER}
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = result[key] | value if both else value
    return result


def _apply(content: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise InvalidInputError(f"override {override!r}: expected key=value, for example weights.num_bits=8")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InvalidInputError(f"override {override!r}: {value!r} is not a YAML value") from error
    group = content
    for part in path[:-1]:
        inner = group.get(part)
        if inner is None:
            inner = {}
        elif not isinstance(inner, dict):
            raise InvalidInputError(f"override {override!r}: {part!r} is not a group of keys; {_nearest_key(key)}")
        else:
            inner = dict(inner)
        group[part] = inner
        group = inner
    group[path[-1]] = parsed


def _explain(error: ValidationError) -> str:
    """The first problem, in one line: key, value, what would be valid."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    got = problem.get("input")
    kind = problem["type"]
    if kind == "extra_forbidden":
        return f"unknown key {key!r}; {_nearest_key(key)}"
    if kind == "missing":
        return f"missing key {key!r}; add it"
    if kind == "greater_than_equal" and isinstance(got, int):
        return f"{key}={got} is too small; the nearest valid value is {problem['ctx']['ge']}"
    if kind == "less_than_equal" and isinstance(got, int):
        return f"{key}={got} is too large; the nearest valid value is {problem['ctx']['le']}"
    if kind == "literal_error":
        options = [option.strip("' ") for option in problem["ctx"]["expected"].replace(" or ", ",").split(",")]
        near = nearest_names(str(got), options, count=1)
        hint = f"; the nearest is {near[0]}" if near else ""
        return f"{key}={got!r}; expected one of {', '.join(options)}{hint}"
    if kind == "value_error":
        return f"{key + ': ' if key else ''}{problem['ctx']['error']}"
    return f"{key}={got!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _nearest_key(key: str) -> str:
    known = list(_keys(Recipe))
    near = nearest_names(key, known) or nearest_names(key.rpartition(".")[2], known)
    return f"nearest keys are {', '.join(near)}" if near else f"keys are {', '.join(known)}"


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        annotation = info.annotation
        candidates = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        groups = [one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)]
        if groups:
            yield from _keys(groups[0], f"{prefix}{name}.")
        else:
            yield prefix + name
