"""Differences between two records of plain data, in words: "seed 0 → 1", "recipe: weights.num_bits 4 → 8"."""

from collections.abc import Iterator, Mapping
from typing import Any

from s2q.common.errors import short_repr


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Iterate over what differs, in the order of the names; of lists the first entry only."""
    for name in sorted(before.keys() | after.keys()):
        yield from _differences(name, before.get(name), after.get(name), separator=": ")


def _differences(name: str, before: Any, after: Any, *, separator: str = ".") -> Iterator[str]:
    if before == after:
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in sorted(before.keys() | after.keys()):
            yield from _differences(f"{name}{separator}{key}", before.get(key), after.get(key))
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{name} differ ({len(before)} → {len(after)})"
        else:
            index = next(i for i, (first, second) in enumerate(zip(before, after, strict=True)) if first != second)
            yield f"{name} differ (number {index + 1}: {short_repr(before[index])} → {short_repr(after[index])})"
    elif any(isinstance(value, Mapping | list) for value in (before, after)):
        yield f"{name} differ"
    else:
        yield f"{name} {_plain(before)} → {_plain(after)}"


def _plain(value: Any) -> str:
    """Return a word or version without quotes."""
    return value if isinstance(value, str) and value and len(value.split()) == 1 else short_repr(value)
