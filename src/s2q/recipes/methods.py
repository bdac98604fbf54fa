"""The recipes of the package: `methods/` has one YAML a method, and "s2q-w4a6" is the method s2q at the width w4a6.

The width w4a6 sets 4 bits for the weights of block and adaLN linears, 8 for those outside the blocks unless the method
has `outer` (w8a8 leaves them alone), and 6 bits for activations; a16 leaves activations in floating point. `widths`
lists the widths of a method, each with what differs there, if anything does. `extends` names a method whose groups are
changed.
"""

import fnmatch
import functools
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from s2q.common.errors import InvalidInputError, nearest_names, short_repr, unknown_name
from s2q.recipes.strict_yaml import parse_yaml

ALL = "all"
_SUFFIX = ".yaml"
_WIDTH = re.compile(r"w(\d+)a(\d+)")
_UNQUANTIZED, _OUTER_BITS = 16, 8
_ORIGINAL = ("s2q-", "table-")  # the paper's method and what this package adds; the others are rivals
_FOR_EXPORT = ("s2q-export-", "convrot-")


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package, sorted."""
    return sorted(f"{method}-{width}" for method, content in methods().items() for width in content["widths"])


def matching_recipes(text: str) -> list[str] | None:
    """Return the recipes of the package for "all" or a pattern such as "s2q-*"; None for a plain name or a path.

    Raises:
        InvalidInputError: If a pattern matches none.
    """
    names = recipe_names()
    if text == ALL:
        return names
    if not re.search(r"[*?\[]", text) or Path(text).exists():
        return None
    matches = fnmatch.filter(names, text)
    if not matches:
        near = nearest_names(re.sub(r"[*?\[\]]", "", text), names)
        hint = f"nearest names are {', '.join(near)}; " if near else ""
        raise InvalidInputError(f"no recipe matches {text!r}: {hint}all: {', '.join(names)}")
    return matches


@functools.cache
def methods() -> Mapping[str, Mapping[str, Any]]:
    """Return the contents of the files by method."""
    files = resources.files("s2q.recipes").joinpath("methods").iterdir()
    texts = {file.name: file.read_text(encoding="utf-8") for file in files if file.name.endswith(_SUFFIX)}
    return {name.removesuffix(_SUFFIX): parse_yaml(text, where=name) for name, text in texts.items()}


def is_rival(name: str) -> bool:
    """Whether a name is that of a recipe of the package for somebody else's method."""
    method = name.rpartition("-")[0]
    return method in methods() and not name.startswith(_ORIGINAL)


def is_for_export(name: str) -> bool:
    """Whether a name is that of a recipe of the package for files of other programs (`s2q export`)."""
    return name.startswith(_FOR_EXPORT) and name.rpartition("-")[0] in methods()


def unknown_recipe(name: str) -> InvalidInputError:
    """Build (not raise) the error for a recipe that the package lacks; it lists the widths of a known method."""
    method = name.rpartition("-")[0]
    if name in methods():
        return InvalidInputError(
            f"unknown recipe {short_repr(name)}: names a method without a bit width; add {_widths(name)}"
        )
    if method in methods():
        return InvalidInputError(f"unknown recipe {short_repr(name)}: {method} has the widths {_widths(method)}")
    return unknown_name("recipe", name, recipe_names())


def recipe_content(name: str) -> dict[str, Any]:
    """Return the content of a recipe of the package, not validated."""
    method, _, width = name.rpartition("-")
    if width not in methods().get(method, {}).get("widths", ()):
        raise unknown_recipe(name)
    bits = _WIDTH.fullmatch(width)
    assert bits is not None, f"methods/{method}.yaml: width {width}; expected w4a6, say"
    weights, activations = int(bits[1]), int(bits[2])
    sides = {
        "weights": {"num_bits": weights},
        "activations": None if activations == _UNQUANTIZED else {"num_bits": activations},
        "modulation": {"num_bits": weights},
    }
    outer = {"outer": {"num_bits": _OUTER_BITS} if weights < _OUTER_BITS else None}
    content = merge(merge(merge(outer, _method_content(method)), sides), methods()[method]["widths"][width] or {})
    description = content.pop("description")
    for side, number in (("weights", weights), ("activations", activations)):
        description = description.replace(f"{{{side}}}", str(number))
    return {"name": name, "description": description, **content}


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return content with changes: of a group that both have, the keys of the changes; everything else is replaced."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = {**result[key], **value} if both else value
    return result


def _method_content(method: str) -> dict[str, Any]:
    content = {key: value for key, value in methods()[method].items() if key not in ("extends", "widths")}
    base = methods()[method].get("extends")
    return content if base is None else merge(_method_content(base), content)


def _widths(method: str) -> str:
    return ", ".join(sorted(methods()[method]["widths"]))
