"""Find, read, override and validate recipes: YAML files of this package, or the user's own."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from s2q.common.errors import InvalidInputError, first_line, short_repr, unknown_name
from s2q.recipes.methods import merge, recipe_content, recipe_names
from s2q.recipes.problems import explain, nearest_keys
from s2q.recipes.schema import MAX_NAME, Recipe
from s2q.recipes.strict_yaml import MAX_BYTES, MAX_DEPTH, parse_yaml
from s2q.recipes.variants import SEPARATOR, VARIANTS, remarked, with_variant
from s2q.rounding import ROUNDINGS, RTN

FILE_SUFFIXES = (".yaml", ".yml", ".json")
_NOT_TAKEN_OVER = ("name", "description")
_EXAMPLE = "weights.num_bits=8"
_RETIRED = {
    ("rounding", "act_order"): True,
    ("rounding", "max_retries"): 4,
    ("clip", "start"): 4.0,
    ("distillation", "weight_decay"): 0.0,
}
"""Keys of earlier recipes, with what holds now."""


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, *, overrides: Sequence[str] = ()) -> Recipe:
    """Load and validate a recipe.

    The key `extends` names a recipe of the package that the others are changes to: keys of a group
    that are not given here keep its values; name and description are not inherited. The result has no such key.

    Args:
        recipe: Name of a recipe of the package, "+sds" or "+std" after it if wanted (`VARIANTS`), path of a YAML file,
            contents of one, or a validated recipe.
        overrides: Changes, each "key=value" with a dotted key and a YAML value: "weights.num_bits=8", "skip=[a, b]".
    """
    overrides = checked_overrides(overrides)
    if isinstance(recipe, str) and SEPARATOR in recipe and not _is_path(recipe):
        recipe = _with_variants(recipe)
    if isinstance(recipe, Recipe):
        where, content = f"recipe {recipe.name}", recipe.resolved()
    elif isinstance(recipe, Mapping):
        name, content = recipe.get("name", "(unnamed)"), dict(recipe)
        where = f"recipe {name if isinstance(name, str) and len(name) <= MAX_NAME else short_repr(name)}"
    elif isinstance(recipe, str | Path):
        where, content = _read(recipe)
    else:
        raise InvalidInputError(
            f"recipe: got {short_repr(recipe)}; expected a name, the path of a YAML file, a mapping or a Recipe"
        )
    content = _extended(where, content)
    overridden = {_apply(content, override) for override in overrides}
    if overrides and isinstance(content.get("description"), str):
        content["description"] = remarked(content["description"], f"changed: {', '.join(overrides)}")
    try:
        return Recipe.model_validate(_without_retired(where, content, overridden=overridden))
    except ValidationError as error:
        raise InvalidInputError(f"{where}: {explain(error)}") from error


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
    return isinstance(recipe, Path) or "/" in text or text.endswith(FILE_SUFFIXES)


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
    """Return overrides of a recipe as a tuple."""
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


def _apply(content: dict[str, Any], override: str) -> str:
    """Change the content of a recipe by an override; return the dotted key."""
    where = f"override {short_repr(override)}"
    key, _, value = override.partition("=")
    path = (key := key.strip()).split(".")
    parsed = parse_yaml(value, where=where)
    if len(path) > MAX_DEPTH:
        raise InvalidInputError(f"{where}: unknown key; {nearest_keys(key)}")
    group = content
    for part in path[:-1]:
        inner = group.get(part)
        if inner is None:
            inner = {}
        elif not isinstance(inner, Mapping):
            raise InvalidInputError(f"{where}: {short_repr(part)} is not a group of keys; {nearest_keys(key)}")
        group[part] = group = dict(inner)
    group[path[-1]] = parsed
    return key


def _without_retired(where: str, content: Mapping[str, Any], *, overridden: Collection[str]) -> dict[str, Any]:
    """Leave out keys of earlier recipes, and of other roundings, that say what holds without them.

    Recipes of old checkpoints have them, and so does a recipe whose rounding is changed to another method. Overridden
    keys stay, so that those of another rounding are refused.
    """
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in content.items()}
    rounding = result.get("rounding")
    method = rounding.get("method", RTN.method) if isinstance(rounding, dict) else None
    if isinstance(rounding, dict) and isinstance(method, str) and method in ROUNDINGS and "rounding" not in overridden:
        used = {option.name for option in fields(ROUNDINGS[method])}  # type: ignore[arg-type]
        is_old = "max_retries" in rounding  # every old recipe has this and either value of allow_fallback
        for option in [option for options in ROUNDINGS.values() for option in fields(options)]:  # type: ignore[arg-type]
            name = option.name
            is_default = rounding.get(name) == option.default or (is_old and name == "allow_fallback")
            if is_default and name not in used and f"rounding.{name}" not in overridden:
                rounding.pop(name, None)
    for (group, key), constant in _RETIRED.items():
        options = result.get(group)
        if isinstance(options, dict) and key in options and (value := options.pop(key)) != constant:
            raise InvalidInputError(
                f"{where}: {group}.{key}={short_repr(value)}: no longer an option, always {constant}; remove it"
            )
    return result
