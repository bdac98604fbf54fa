"""A strict reader of YAML: the plain data that a recipe needs, and no surprises.

Scalars are those of YAML 1.2's core schema: `1e-3` is a number; `1:20`, `yes`, `on` and dates are strings. Refused,
with the line: a key that is given twice, numbers with leading zeros, anchors and aliases (a few hundred bytes of them
can expand to gigabytes), tags, further documents, nesting and size beyond what a recipe can need.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from s2q.common.errors import InvalidInputError, first_line, short_repr

MAX_BYTES = 1 << 17
MAX_DEPTH = 16
_MAX_DIGITS = 40
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"(?P<sign>[-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_ALIASES = "anchors and aliases (&name, *name) are not read; quote the text, or write it out"
_ENDS = (yaml.MappingEndEvent, yaml.SequenceEndEvent)


def parse_yaml(text: str, *, where: str) -> Any:
    """Read a YAML document; `where` is what messages call it: a path, "recipe mine"."""
    if len(text) > MAX_BYTES:
        raise InvalidInputError(f"{where}: longer than {MAX_BYTES // 1024} KiB; a recipe has a few")
    try:
        return _Reader(text, where).document()
    except yaml.MarkedYAMLError as error:
        raise InvalidInputError(f"{where}: {_explain(error)}") from error
    except yaml.YAMLError as error:
        raise InvalidInputError(f"{where}: not valid YAML ({first_line(error)}); write plain text") from error


class _Reader:
    """Builds a value from the parser's events; nothing is computed for what is refused."""

    def __init__(self, text: str, where: str) -> None:
        self._where = where
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._depth = 0

    def document(self) -> Any:
        value, documents = None, 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._refused(event, "a second document starts here; use one")
            elif not isinstance(event, (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentEndEvent)):
                value = self._value(event, "")
        return value

    def _value(self, event: yaml.Event, path: str) -> Any:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise self._refused(event, _ALIASES)
        if getattr(event, "tag", None) not in (None, "!"):
            raise self._refused(event, f"the tag {short_repr(event.tag)} is not supported; write the plain value")
        if isinstance(event, yaml.ScalarEvent):
            return event.value if event.style in ("'", '"', "|", ">") else self._scalar(event)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._refused(event, f"nested deeper than {MAX_DEPTH} levels; a recipe has at most four")
        is_mapping = isinstance(event, yaml.MappingStartEvent)
        value = self._mapping(path) if is_mapping else [self._value(item, path) for item in self._items()]
        self._depth -= 1
        return value

    def _mapping(self, path: str) -> dict[str, Any]:
        content: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for event in self._items():
            if not isinstance(event, yaml.ScalarEvent):
                raise self._refused(event, "a key must be a name, not a list or a group")
            name, line = event.value, event.start_mark.line + 1
            full = f"{path}.{name}" if path else name
            if name in content:
                raise self._refused(event, f"duplicate key {short_repr(full)}, first in line {lines[name]}; remove one")
            self._value(event, path)  # refuses anchors and tags
            content[name], lines[name] = self._value(next(self._events), full), line
        return content

    def _items(self) -> Iterator[yaml.Event]:
        for event in self._events:
            if isinstance(event, _ENDS):
                return
            yield event

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        text: str = event.value
        if text in _NULL:
            return None
        if text in _BOOL:
            return _BOOL[text]
        if _LEADING_ZERO.fullmatch(text):
            sign = "-" if text.startswith("-") else ""
            plain = short_repr(sign + (text.lstrip("+-0") or "0")).strip("'")
            raise self._refused(event, f"{short_repr(text)} has leading zeros; write {plain}, or quote it")
        if len(text) <= _MAX_DIGITS:
            if _INT.fullmatch(text):
                return int(text)
            if _FLOAT.fullmatch(text):
                return float(text)
        if special := _SPECIAL.fullmatch(text):
            return float(f"{special['sign'] or ''}{'nan' if 'n' in text[-1].lower() else 'inf'}")
        return text

    def _refused(self, event: yaml.Event, reason: str) -> InvalidInputError:
        return InvalidInputError(f"{self._where}: line {event.start_mark.line + 1}: {reason}")


def _explain(error: yaml.MarkedYAMLError) -> str:
    """The place and the cause of a syntax error, in one line."""
    mark = error.problem_mark or error.context_mark
    problem = " ".join(str(error.problem or error.context or "not valid YAML").split())
    if "'\\t'" in problem:
        problem = "a tab, where YAML takes spaces only; replace it by spaces"
    elif error.context in ("while scanning an alias", "while scanning an anchor"):
        problem = _ALIASES
    place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return f"{place}not valid YAML: {problem}"
