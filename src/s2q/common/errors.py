"""Exceptions that a user may see, each with the exit code of the command line, and help for misspelt names.

A message says where, what was found, what was expected, and what to do about it.
"""

import contextlib
import difflib
import errno
import re
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MAX_QUOTED = 200
_MAX_VALUE = 80
_MAX_MESSAGE = 4000
_MAX_COMPARED = 100
_MAX_DIGITS = 4000  # beyond this many, Python refuses to write an int


def printable(text: str) -> str:
    """Return a text with escapes for what controls a terminal or the direction of writing; line feeds stay."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class S2QError(Exception):
    """Base of every error that the project raises on purpose; ends a command with exit code 1.

    A message is at most 4,000 characters long and has no control characters, whatever it quotes.
    """

    exit_code: int = 1

    def __init__(self, message: object = "") -> None:
        text = printable(str(message)[: _MAX_MESSAGE + 1])
        super().__init__(text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "…")


class UsageError(S2QError):
    """The command line or the call itself is wrong (flag, combination of flags); exit code 2."""

    exit_code = 2


class InvalidInputError(S2QError):
    """A model, checkpoint, recipe, prompt or file is not what it should be; exit code 3."""

    exit_code = 3


class ResourceError(S2QError):
    """Memory, disk space or a device does not suffice; exit code 4."""

    exit_code = 4


class DiskFullError(ResourceError):
    """There is no room on the disk; nothing else that writes there would do better."""


class BusyError(S2QError):
    """Another process holds the run folder or the output; exit code 5."""

    exit_code = 5


_NO_MEMORY = re.compile(
    r"out of memory|cannot allocate memory|can't allocate memory|not enough memory|std::bad_alloc|os error 12\b"
    r"|failed to map segment|ALLOC_FAILED|can't start new thread|out_of_memory"
    r"|could not create a primitive$",  # oneDNN; where it has none for the operation, "primitive descriptor"
    re.IGNORECASE,
)


def causes(error: BaseException) -> Iterator[BaseException]:
    """Iterate over an exception and those that it was raised from."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error, or one that it was raised from, means out of memory.

    Libraries raise MemoryError, `torch.OutOfMemoryError`, RuntimeError ("DefaultCPUAllocator: can't allocate
    memory"), OSError (ENOMEM, of `mmap` as well), SafetensorError, or ImportError, and raise errors about damaged files
    from them.
    """
    for cause in causes(error):
        if isinstance(cause, MemoryError) or getattr(cause, "errno", None) == errno.ENOMEM:
            return True
        is_named = type(cause).__name__ == "OutOfMemoryError" or _NO_MEMORY.search(str(cause))
        if is_named and not isinstance(cause, S2QError):
            return True
    return False


@contextlib.contextmanager
def memory_errors(doing: str, *, remedy: str) -> Iterator[None]:
    """Raise every out-of-memory error as one line with exit code 4. Also a decorator."""
    try:
        yield
    except ResourceError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(f"out of memory while {doing}; {remedy}") from error


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Begin the messages of errors with the name of a layer or a block, unless they begin with it."""
    try:
        yield
    except S2QError as error:
        if str(error).startswith(where):
            raise
        raise type(error)(f"{where}: {error}") from error


def nearest_names(name: str, options: Iterable[str], *, count: int = 3) -> list[str]:
    """Return up to `count` of the `options` that look most like `name`, best first; empty if none is close.

    Names are compared without regard to case, `_` and `-` being equal.
    """
    if len(name) > _MAX_COMPARED:
        return []
    folded: dict[str, str] = {}
    for option in options:
        folded.setdefault(_fold(option), option)
    close = difflib.get_close_matches(_fold(name), folded, n=count, cutoff=0.5)
    return [folded[match] for match in close]


def unknown_name(kind: str, name: object, options: Iterable[str]) -> InvalidInputError:
    """Build (not raise) the error for a name that does not exist; it lists the nearest names, and all of them."""
    known = sorted(options)
    near = nearest_names(name, known) if isinstance(name, str) else []
    hint = f"nearest names are {', '.join(near)}; " if near else ""
    return InvalidInputError(f"unknown {kind} {short_repr(name)}: {hint}all: {', '.join(known) or 'none'}")


class _ShortRepr(reprlib.Repr):
    """`repr` whose work and result are bounded, however large or deep the value is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxother = 3, 4, _MAX_VALUE
        self.maxstring = self.maxlong = _MAX_VALUE - 2

    def repr_int(self, x: int, level: int) -> str:
        bits = x.bit_length()
        return super().repr_int(x, level) if bits < 3 * _MAX_DIGITS else f"<int of {bits} bits>"

    def repr_instance(self, x: Any, level: int) -> str:
        try:
            return super().repr_instance(x, level)
        except RecursionError:
            return f"<{type(x).__name__}>"


def short_repr(value: Any) -> str:
    """Return the `repr` of a value for a message, at most 80 characters, computed without expanding the whole value."""
    text = _ShortRepr().repr(str(value) if isinstance(value, str) else value)
    return text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 1] + "…"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, "1 video" or "2 videos"; nouns whose plural has an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, cut at 200 characters; its class name if it has none."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0] if len(lines[0]) <= _MAX_QUOTED else lines[0][:_MAX_QUOTED] + "…"


def _fold(name: str) -> str:
    return name.casefold().replace("_", "-")
