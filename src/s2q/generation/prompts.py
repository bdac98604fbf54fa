"""Prompts from a file: UTF-8 text, one prompt a line; blank lines and lines that start with `#` are skipped.

A line ends at a line feed, a carriage return, or both. Other separators of Unicode, which no editor shows as the end
of a line (`str.splitlines` cuts at eight of them), are part of the prompt.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from s2q.common.arguments import MAX_PROMPT
from s2q.common.errors import InvalidInputError, short_repr

_LINE_END = re.compile(r"\r\n|\n|\r")
_MAX_BYTES, _PIECE_BYTES = 1 << 26, 1 << 20


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file, in order, without surrounding blanks."""
    try:
        with path.open("rb") as file:
            pieces = iter(lambda: file.read(_PIECE_BYTES), b"")  # `read(n)` allocates n bytes for a short file too
            content = b"".join(itertools.islice(pieces, _MAX_BYTES // _PIECE_BYTES + 1))
        if len(content) > _MAX_BYTES:
            raise InvalidInputError(f"{path}: longer than {_MAX_BYTES >> 20} MiB; expected one prompt per line")
        text = content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InvalidInputError(f"{path}: no such prompts file") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path}: not UTF-8 text (byte {error.start}); save the prompts as UTF-8") from error
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}") from error
    seen: dict[str, int] = {}
    for number, line in enumerate(_LINE_END.split(text), start=1):
        prompt = line.strip()
        if not prompt or prompt.startswith("#"):
            continue
        if len(prompt) > MAX_PROMPT:
            raise InvalidInputError(
                f"{path}: line {number} has {len(prompt)} characters; expected a prompt of at most {MAX_PROMPT}"
            )
        if prompt in seen:
            raise InvalidInputError(
                f"{path}: line {number} repeats the prompt of line {seen[prompt]}: {short_repr(prompt)}; remove one"
            )
        seen[prompt] = number
    if not seen:
        raise InvalidInputError(f"{path}: contains no prompt; write one per line")
    return list(seen)


def check_distinct(prompts: Sequence[str]) -> None:
    """Check that no prompt appears twice: videos are told apart by prompt and seed."""
    seen: set[str] = set()
    for prompt in prompts:
        if prompt in seen:
            raise InvalidInputError(
                f"prompts: {short_repr(prompt)} appears twice; pass each prompt once and more seeds instead"
            )
        seen.add(prompt)
