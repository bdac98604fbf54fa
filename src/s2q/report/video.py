"""Videos and contact sheets as files: H.264 that any browser plays, PNG that any viewer shows.

Small frames are enlarged by a whole factor without smoothing, so that a pixel stays a square. H.264 with 4:2:0 chroma
halves the colour resolution, which costs nothing once every pixel is at least two by two.

Legend: `F` frames, `H`, `W` height and width in pixels.
"""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from s2q.common.errors import InvalidInputError, S2QError
from s2q.common.files import atomic_write_bytes, failed_write
from s2q.common.temporaries import scratch_folder

DISPLAY_PIXELS = 256
DIFFERENCE_GAIN = 4
FRAMES_PER_SECOND = 8
BT709, BT601 = "bt709", "smpte170m"
"""Colour matrices by ffmpeg's names: browsers take what the file says, OpenCV takes every file for the second."""
PAGE_BYTES = 15_000_000
"""Most bytes of a page with its videos."""
_QUALITY_CRF = 12
_LOWER_CRF = (12, 18, 24, 30)
_PAGE_PIXELS = (512, 384, 256, 128)
_SHEET_CELL = 96
_GAP = 4
_BLOCK = 16  # of H.264
_LABEL_SIZE = 14


def enlarged(frames: np.ndarray, *, target: int = DISPLAY_PIXELS) -> np.ndarray:
    """Repeat pixels of `[F, H, W, 3]` by a whole factor until the longer side is about `target`, if it is less."""
    _check(frames)
    factor = max(1, target // max(frames.shape[1:3]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def reduced(frames: np.ndarray, *, longest: int) -> np.ndarray:
    """Shrink `[F, H, W, 3]` uint8 until its longer side is at most `longest`, averaging pixels."""
    _check(frames)
    height, width = frames.shape[1:3]
    scale = longest / max(height, width)
    if scale >= 1:
        return frames
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames])


def tiled(videos: Sequence[np.ndarray], *, columns: int) -> np.ndarray:
    """Put videos side by side, row by row, each on whole blocks of 16 pixels so that an encoder keeps them apart.

    From at least one `[F, H, W, 3]`, uint8, all of one shape, to `[F, rows · ⌈H⌉₁₆, columns · ⌈W⌉₁₆, 3]`.
    """
    for video in videos:
        _check(video)
    frames, height, width, channels = videos[0].shape
    tall, wide = whole_blocks(height), whole_blocks(width)
    canvas = np.zeros((frames, -(-len(videos) // columns) * tall, columns * wide, channels), np.uint8)
    for index, video in enumerate(videos):
        top, left = index // columns * tall, index % columns * wide
        padded = np.pad(video, ((0, 0), (0, tall - height), (0, wide - width), (0, 0)), mode="edge")
        canvas[:, top : top + tall, left : left + wide] = padded
    return canvas


def whole_blocks(pixels: int) -> int:
    """Return a size rounded up to whole blocks of the encoder, ⌈·⌉₁₆."""
    return pixels + -pixels % _BLOCK


def difference(frames: np.ndarray, reference: np.ndarray, *, gain: int = DIFFERENCE_GAIN) -> np.ndarray:
    """Return the absolute difference of two `[F, H, W, 3]` uint8 videos times `gain`, saturated at 255."""
    _check(frames)
    _check(reference)
    apart = np.abs(frames.astype(np.int16) - reference.astype(np.int16)) * gain
    return np.clip(apart, 0, 255).astype(np.uint8)


def encode_within(
    drawn: Callable[[int], np.ndarray], *, most_bytes: float, most_pixels: int = _PAGE_PIXELS[0], fps: int
) -> tuple[bytes, int]:
    """Encode a video for a page: as large, then as good as `most_bytes` allow, or the least of all.

    Args:
        drawn: Returns the video `[F, H, W, 3]`, uint8, whose scenes are at most so many pixels long.

    Returns:
        The mp4, and the argument of `drawn` that it is of.
    """
    for pixels in (size for size in _PAGE_PIXELS if size <= most_pixels):
        frames = drawn(pixels)
        for quality in _LOWER_CRF:
            data = encode_mp4(frames, fps=fps, quality=quality)
            if len(data) <= most_bytes:
                return data, pixels
    return data, pixels


def video_bytes(*, videos: int, other_bytes: int) -> float:
    """Return the most bytes of each video of a page whose other pictures take so many; base64 takes 4 for 3."""
    text = PAGE_BYTES / 10
    return max(0.0, 0.75 * (PAGE_BYTES - text) - other_bytes) / max(1, videos)


def encode_mp4(
    frames: np.ndarray, *, fps: int = FRAMES_PER_SECOND, matrix: str = BT709, quality: int = _QUALITY_CRF
) -> bytes:
    """Encode `[F, H, W, 3]`, uint8, as H.264 (yuv420p; `quality` is the constant rate factor) in an mp4 container.

    An odd height or width is padded by repeating the last line. The colour matrix is `BT709` to be looked at, or
    `BT601` to be read by OpenCV. The bytes are the same for the same input and encoder.
    """
    import imageio_ffmpeg

    _check(frames)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    height, width = frames.shape[1:3]
    with scratch_folder("video") as folder:
        path = folder / "video.mp4"
        writer = imageio_ffmpeg.write_frames(
            str(path),
            (width, height),
            fps=fps,
            codec="libx264",
            pix_fmt_in="rgb24",
            pix_fmt_out="yuv420p",
            quality=None,
            macro_block_size=1,
            ffmpeg_log_level="error",
            output_params=[
                *("-crf", str(quality), "-preset", "medium", "-threads", "1", "-g", "1"),
                *("-vf", f"scale=out_color_matrix={matrix}:out_range=tv", "-colorspace", matrix),
                *("-color_primaries", "bt709", "-color_trc", "bt709", "-movflags", "+faststart"),
                *("-fflags", "+bitexact", "-flags:v", "+bitexact"),
            ],
        )
        try:
            writer.send(None)
            for frame in frames:
                writer.send(np.ascontiguousarray(frame))
            writer.close()
            data = path.read_bytes()
        except OSError as error:
            if failed_write(error) is not None:
                raise
            raise S2QError(f"encoding a {width}x{height} video failed: {error}") from error
    if not data:
        raise S2QError(f"encoding a {width}x{height} video gave an empty file")
    return data


def write_mp4(path: Path, frames: np.ndarray, *, fps: int = FRAMES_PER_SECOND) -> None:
    """Encode a video `[F, H, W, 3]`, uint8, enlarged for display, and write it atomically."""
    atomic_write_bytes(path, encode_mp4(enlarged(frames), fps=fps))


def contact_sheet(rows: Sequence[tuple[str, np.ndarray]], *, columns: int = 9) -> bytes:
    """Draw labelled videos `[F, H, W, 3]` uint8 as rows of a PNG, each of at most `columns` frames spread over it."""
    if not rows:
        raise InvalidInputError("contact sheet: got no video; expected at least one row")
    strips = [(label, _strip(frames, columns)) for label, frames in rows]
    font = ImageFont.load_default(size=_LABEL_SIZE)
    label_height = _LABEL_SIZE + 2 * _GAP
    width = max(strip.width for _, strip in strips) + 2 * _GAP
    height = sum(strip.height + label_height for _, strip in strips) + _GAP
    sheet = Image.new("RGB", (width, height), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    top = 0
    for label, strip in strips:
        draw.text((_GAP, top + _GAP), _shortened(label, font, width - 2 * _GAP), fill=(30, 30, 30), font=font)
        sheet.paste(strip, (_GAP, top + label_height))
        top += label_height + strip.height
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _strip(frames: np.ndarray, columns: int) -> Image.Image:
    _check(frames)
    count = min(columns, len(frames))
    picked = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    longest = max(frames.shape[1:3])
    if longest < _SHEET_CELL:
        picked = enlarged(picked, target=_SHEET_CELL)
    cells = [Image.fromarray(frame) for frame in picked]
    if longest > 2 * _SHEET_CELL:
        scale = 2 * _SHEET_CELL / longest
        size = (math.ceil(frames.shape[2] * scale), math.ceil(frames.shape[1] * scale))
        cells = [cell.resize(size, Image.Resampling.LANCZOS) for cell in cells]
    width, height = cells[0].size
    strip = Image.new("RGB", (count * width + (count - 1) * _GAP, height), (250, 250, 250))
    for index, cell in enumerate(cells):
        strip.paste(cell, (index * (width + _GAP), 0))
    return strip


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _check(frames: np.ndarray) -> None:
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        got = f"{getattr(frames, 'dtype', type(frames).__name__)} {tuple(getattr(frames, 'shape', ()))}"
        raise InvalidInputError(f"video: got {got}; expected a uint8 array [F, H, W, 3]")
