"""Videos that a pipeline is given with a prompt, such as the poses that a character takes: files, or lists of frames.

A file is kept as its bytes and decoded when a call needs its frames: it travels to other processes and machines with
its prompt, and a prompt stays as small as its files.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2q.common.arguments import path_argument
from s2q.common.errors import InvalidInputError, first_line, short_repr
from s2q.common.temporaries import scratch_folder

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {"AVI": "avi", "GIF": "gif", "Matroska": "matroska", "MP4": "mp4", "QuickTime": "mov", "WebM": "webm"}
"""Containers that are read, with the names that ffmpeg has for them; a playlist could name other files."""

_MAX_BYTES, _MAX_FRAMES = 1 << 28, 10_000


@dataclass(frozen=True, kw_only=True)
class ConditioningVideo:
    """A video that a pipeline is given.

    Attributes:
        name: The name of its file, or "a video" of one from memory.
        count: Its frames; None of a still, which has as many as are asked for.
        sha256: Hash of the file, or of the frames.
        source: The file's bytes, or RGB frames.
    """

    name: str
    count: int | None
    sha256: str
    source: bytes | tuple[Image.Image, ...] = field(repr=False)

    def frames(self, count: int) -> list[Image.Image]:
        """Return the first frames, RGB in the size of the file; a video has at least so many."""
        if self.count is None:
            assert isinstance(self.source, tuple)
            return list(self.source) * count
        assert count <= self.count, "check_prompts refuses a video that is too short"
        if isinstance(self.source, tuple):
            return list(self.source[:count])
        return [_image(size, frame) for size, frame in itertools.islice(_decoded(self.source), count)]


def still(image: Image.Image) -> ConditioningVideo:
    """Return a video that shows one RGB image, however long it has to be."""
    return ConditioningVideo(name="a still", count=None, sha256=_digest([image]), source=(image,))


def conditioning_video(where: str, given: Any, folder: Path | None) -> ConditioningVideo:
    """Read a video of a file, relative to `folder`, or take the frames from memory.

    Raises:
        InvalidInputError: If it is no video that can be decoded; the message begins with `where`.
    """
    if isinstance(given, ConditioningVideo):
        return given
    if isinstance(given, list | tuple):
        return _of_images(where, given)
    if not isinstance(given, str | os.PathLike):
        raise InvalidInputError(f"{where}: got {short_repr(given)}; expected the path of a video or a list of images")
    path = path_argument(where, given)
    name, path = path.name, path if folder is None else folder / path
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise InvalidInputError(f"{where}: {path}: {size >> 20} MiB; expected at most {_MAX_BYTES >> 20} MiB")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InvalidInputError(f"{where}: {path}: no such file") from error
    except OSError as error:
        raise InvalidInputError(f"{where}: {path}: cannot be read: {error.strerror or first_line(error)}") from error
    count = _count(content)
    if not count:
        raise InvalidInputError(f"{where}: {path}: is not a video; expected one of {', '.join(FORMATS)}")
    return ConditioningVideo(name=name, count=count, sha256=hashlib.sha256(content).hexdigest(), source=content)


def _of_images(where: str, given: list[Any] | tuple[Any, ...]) -> ConditioningVideo:
    from PIL import Image

    if not given or not all(isinstance(frame, Image.Image) for frame in given):
        raise InvalidInputError(f"{where}: got {short_repr(given)}; expected the frames as PIL images, at least one")
    frames = tuple(frame.convert("RGB") for frame in given)
    if len({frame.size for frame in frames}) > 1:
        raise InvalidInputError(f"{where}: got frames of several sizes; expected one size")
    return ConditioningVideo(name="a video", count=len(frames), sha256=_digest(frames), source=frames)


def _digest(frames: Any) -> str:
    digest = hashlib.sha256()
    for frame in frames:
        digest.update(f"{frame.width}x{frame.height}".encode() + frame.tobytes())
    return digest.hexdigest()


def _count(content: bytes) -> int:
    """Count the frames of a file, up to a limit; 0 if it is no video."""
    return sum(1 for _ in itertools.islice(_decoded(content), _MAX_FRAMES))


def _image(size: tuple[int, int], frame: bytes) -> Image.Image:
    from PIL import Image

    return Image.frombytes("RGB", size, frame)


def _decoded(content: bytes) -> Iterator[tuple[tuple[int, int], bytes]]:
    """Decode a file frame by frame, each as width and height and its RGB bytes; nothing of one that is no video."""
    import imageio_ffmpeg

    formats = ",".join(FORMATS.values())
    with scratch_folder("conditioning") as folder:
        path = folder / "video"
        path.write_bytes(content)
        reader = imageio_ffmpeg.read_frames(
            str(path), input_params=["-protocol_whitelist", "file", "-format_whitelist", formats]
        )
        try:
            size = next(reader)["size"]
            for frame in reader:
                yield size, frame
        except (OSError, RuntimeError, IndexError, ValueError, KeyError):
            return
        finally:
            reader.close()
