"""Prompts: a text and what else a video is made from, from Python or from a file.

A text file (UTF-8) has one prompt a line; blank lines and lines that start with `#` are skipped. A file `*.jsonl` has
one object a line with the keys `prompt`, `image`, `negative_prompt`, `seed`, and those of the videos that pipelines
take (`VIDEOS`); only `prompt` is required, and paths are relative to the file.

A line ends at a line feed, a carriage return, or both. Other separators of Unicode, which no editor shows as the end
of a line (`str.splitlines` cuts at eight of them), are part of the prompt.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s2q.common.arguments import MAX_PROMPT, MAX_SEED, items_of, path_argument, plain_text, whole_number
from s2q.common.errors import InvalidInputError, first_line, short_repr
from s2q.generation.videos import ConditioningVideo, conditioning_video
from s2q.models import FAMILIES

if TYPE_CHECKING:
    from PIL import Image

_LINE_END = re.compile(r"\r\n|\n|\r")
_MAX_BYTES, _PIECE_BYTES = 1 << 26, 1 << 20
VIDEOS = tuple(
    dict.fromkeys(
        name
        for family in FAMILIES.values()
        if family.image_to_video is not None
        for name in (*family.image_to_video.videos, *family.image_to_video.further_videos)
    )
)
"""Videos that some pipeline takes beside an image: keys of a JSONL file, arguments of the pipeline's call."""

_KEYS = ("prompt", "image", "negative_prompt", "seed", *VIDEOS)
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats of images that are decoded by PIL itself; EPS would start Ghostscript."""


@dataclass(frozen=True, kw_only=True)
class ConditioningImage:
    """An image that a video starts from.

    Attributes:
        name: The name of its file, or "an image" of one from memory.
        pixels: RGB, in the size of the file; the pipeline resizes it.
        sha256: Hash of size and pixels.
    """

    name: str
    pixels: Image.Image
    sha256: str


class Prompt(str):
    """A prompt: its text, and what else the pipeline is given with it.

    It is the text wherever only that counts, such as in messages and results; two are equal if their texts are.

    Attributes:
        image: The image to start from, or of who is in the video; None for text to video.
        videos: Videos that the pipeline is given beside the image, by argument.
        negative_prompt: In place of that of the generation settings; None takes theirs.
        seed: In place of the seeds of `generate`; None takes them.
    """

    image: ConditioningImage | None
    videos: Mapping[str, ConditioningVideo]
    negative_prompt: str | None
    seed: int | None

    def __new__(
        cls,
        text: str,
        *,
        image: ConditioningImage | None = None,
        negative_prompt: str | None = None,
        seed: int | None = None,
        videos: Mapping[str, ConditioningVideo] | None = None,
    ) -> Prompt:
        """Make a prompt of values that are checked; see `prompt_list`."""
        prompt = super().__new__(cls, text)
        prompt.image, prompt.negative_prompt, prompt.seed = image, negative_prompt, seed
        prompt.videos = dict(videos or {})
        return prompt

    @classmethod
    def of(cls, text: str) -> Prompt:
        """Return a prompt unchanged, and a text as a prompt of it alone."""
        return text if isinstance(text, cls) else cls(text)

    def __deepcopy__(self, _memo: dict[int, Any]) -> Prompt:
        return self


def prompt_record(text: str) -> Any:
    """Return a prompt as plain data for records and fingerprints: its text, or a dict if there is more than that."""
    prompt = Prompt.of(text)
    image = {} if prompt.image is None else {"image": prompt.image}
    files = {key: {"name": file.name, "sha256": file.sha256} for key, file in {**image, **prompt.videos}.items()}
    others = {**files, "negative_prompt": prompt.negative_prompt, "seed": prompt.seed}
    given = {name: value for name, value in others.items() if value is not None}
    return {"prompt": str(prompt), **given} if given else str(prompt)


def prompt_list(name: str, prompts: Iterable[Any], *, allow_none: bool = False) -> list[Prompt]:
    """Return prompts as a list; it may be empty with `allow_none`.

    An item is a text, a `Prompt`, or a mapping with the keys of a JSONL file; its image is a path or a PIL image, its
    videos are paths or lists of PIL images.

    Raises:
        InvalidInputError: With the number of the prompt that is not one.
    """
    items = items_of(name, prompts, of="prompts")
    if not (items or allow_none):
        raise InvalidInputError(f"{name}: got none; pass at least one prompt")
    singular, count = name.removesuffix("s"), len(items)
    return [_prompt(f"{singular} {index} of {count}", item) for index, item in enumerate(items, start=1)]


def _prompt(where: str, item: Any, *, folder: Path | None = None) -> Prompt:
    """Make a prompt of a text or of a mapping; `folder` is what paths are relative to."""
    if isinstance(item, Prompt):
        given = {"image": item.image, "negative_prompt": item.negative_prompt, "seed": item.seed}
        item = {"prompt": str(item), **given, **item.videos}
    if not isinstance(item, Mapping):
        return Prompt(_text(where, item))
    for key in item:
        if key not in _KEYS:
            raise InvalidInputError(f"{where}: unknown key {short_repr(key)}; expected some of {', '.join(_KEYS)}")
    if "prompt" not in item:
        raise InvalidInputError(f'{where}: has no "prompt"; add its text')
    given = {key: value for key, value in item.items() if value is not None or key == "prompt"}
    text = _text(where, given["prompt"])
    if "image" in given:
        given["image"] = _image(where, given["image"], folder)
    if "negative_prompt" in given:
        given["negative_prompt"] = plain_text(f"{where}: negative_prompt", given["negative_prompt"])
    if "seed" in given:
        given["seed"] = whole_number(f"{where}: seed", given["seed"], least=0, most=MAX_SEED)
    videos = {name: conditioning_video(f"{where}: {name}", given.pop(name), folder) for name in VIDEOS if name in given}
    del given["prompt"]
    return Prompt(text, **given, videos=videos)


def _text(where: str, text: Any) -> str:
    text = plain_text(where, text)
    if not text.strip():
        raise InvalidInputError(f"{where} is empty; describe the video")
    return text


def _image(where: str, given: Any, folder: Path | None) -> ConditioningImage:
    """Read an image, or take one from memory; other modes than RGB are converted."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(given, ConditioningImage):
        return given
    if isinstance(given, Image.Image):
        name, pixels = "an image", _rgb(where, given)
    else:
        if not isinstance(given, str | os.PathLike):
            raise InvalidInputError(f"{where}: image: got {short_repr(given)}; expected the path of an image")
        path = path_argument(f"{where}: image", given)
        name, path = path.name, path if folder is None else folder / path
        try:
            with Image.open(path, formats=_FORMATS) as opened:
                pixels = _rgb(f"{where}: image: {path}", ImageOps.exif_transpose(opened))
        except FileNotFoundError as error:
            raise InvalidInputError(f"{where}: image: {path}: no such file") from error
        except UnidentifiedImageError as error:
            formats = ", ".join(_FORMATS)
            raise InvalidInputError(f"{where}: image: {path}: is not an image; expected one of {formats}") from error
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise InvalidInputError(f"{where}: image: {path}: cannot be read: {reason}") from error
    digest = hashlib.sha256(f"{pixels.width}x{pixels.height}".encode() + pixels.tobytes()).hexdigest()
    return ConditioningImage(name=name, pixels=pixels, sha256=digest)


def _rgb(where: str, image: Image.Image) -> Image.Image:
    """Convert an image to RGB; levels of 16 bits are scaled to 8, which PIL would clip."""
    from PIL import Image

    if image.mode in ("I", "F"):
        raise InvalidInputError(f"{where}: has grey levels of 32 bits; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(levels.round().astype(np.uint8))
    return image.convert("RGB")


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts of a text or JSONL file, in order; of a text file without surrounding blanks.

    Raises:
        InvalidInputError: With the file and the number of the line that is wrong.
    """
    lines = _json_lines if path.suffix.lower() == ".jsonl" else _text_lines
    seen: dict[Prompt, int] = {}
    for number, prompt in lines(path, _read(path)):
        if prompt in seen:
            raise InvalidInputError(
                f"{path}: line {number} repeats the prompt of line {seen[prompt]}: {short_repr(prompt)}; remove one"
            )
        seen[prompt] = number
    if not seen:
        raise InvalidInputError(f"{path}: contains no prompt; write one per line")
    return list(seen)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            pieces = iter(lambda: file.read(_PIECE_BYTES), b"")  # `read(n)` allocates n bytes for a short file too
            content = b"".join(itertools.islice(pieces, _MAX_BYTES // _PIECE_BYTES + 1))
        if len(content) > _MAX_BYTES:
            raise InvalidInputError(f"{path}: longer than {_MAX_BYTES >> 20} MiB; expected one prompt per line")
        return content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InvalidInputError(f"{path}: no such prompts file") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path}: not UTF-8 text (byte {error.start}); save the prompts as UTF-8") from error
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}") from error


def _text_lines(path: Path, text: str) -> Iterator[tuple[int, Prompt]]:
    for number, line in enumerate(_LINE_END.split(text), start=1):
        prompt = line.strip()
        if not prompt or prompt.startswith("#"):
            continue
        if len(prompt) > MAX_PROMPT:
            raise InvalidInputError(
                f"{path}: line {number} has {len(prompt)} characters; expected a prompt of at most {MAX_PROMPT}"
            )
        yield number, Prompt(prompt)


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Prompt]]:
    for number, line in enumerate(_LINE_END.split(text), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(f"{where}: is not JSON: {first_line(error)}") from error
        if not isinstance(item, dict):
            raise InvalidInputError(
                f'{where}: got {short_repr(item)}; expected an object such as {{"prompt": "a cat"}}'
            )
        yield number, _prompt(where, item, folder=path.parent)


def check_distinct(prompts: Sequence[str]) -> None:
    """Check that no prompt appears twice: videos are told apart by prompt and seed."""
    seen: set[str] = set()
    for prompt in prompts:
        if prompt in seen:
            raise InvalidInputError(
                f"prompts: {short_repr(prompt)} appears twice; pass each prompt once and more seeds instead"
            )
        seen.add(prompt)
