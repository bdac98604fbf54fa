"""Attention of a quantized model, as inline SVG: its mass on the top tokens and a map over frames (paper, figure 4).

Both are of the full-precision blocks on the calibration samples, as `distillation.attention_profile` recorded them.

Legend: `F` frames, `H`, `W` height and width in pixels.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from s2q.distillation.attention_profile import ImportanceMap
from s2q.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, data_url, label_text, svg
from s2q.report.video import DISPLAY_PIXELS, reduced

MOST_BLOCKS = 6
"""Most blocks whose maps are shown; of more, evenly spaced ones."""

_TOP = 0.1
_TICKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_COLOUR = (222, 108, 22)
_GREY = 0.55
_LABEL, _GAP, _HEADER = 76, 7, 40
_TILE = 120
_STORED = 1024


def recorded(blocks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the blocks of `report.json` that have a record of their attention."""
    return [block for block in blocks if block.get("attention")]


def mass_chart(blocks: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw the share of attention on the most attended tokens: a line for each block, and their mean; empty without.

    Args:
        blocks: `blocks` of `report.json`.
    """
    shown = recorded(blocks)
    if not shown:
        return Markup("")

    def point(fraction: float, mass: float) -> str:
        across = LEFT + (WIDTH - LEFT - RIGHT - 12) * fraction
        return f"{across:.1f},{TOP + (HEIGHT - TOP - BOTTOM) * (1 - mass):.1f}"

    parts = []
    for tick in _TICKS:
        x, y = point(tick, tick).split(",")
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT - 12}" y1="{y}" y2="{y}"/>')
        parts.append(label_text(LEFT - 8, float(y) + 5, f"{tick:.0%}".replace("%", " %"), "end"))
        parts.append(label_text(float(x), HEIGHT - BOTTOM + 18, f"{tick:.0%}".replace("%", " %")))
    parts.append(f'<polyline class="line uniform" points="{point(0, 0)} {point(1, 1)}"/>')
    for block in shown:
        record = block["attention"]
        line = " ".join(map(point, record["fractions"], record["mass"]))
        tip = f"{block['name']}: {_top_mass(record):.0%} of the attention on the top {_TOP:.0%} of the tokens"
        parts.append(f'<polyline class="line each" points="{line}"><title>{escape(tip)}</title></polyline>')
    fractions, mean = mean_mass(shown)
    parts.append(f'<polyline class="line" points="{" ".join(map(point, fractions, mean))}"/>')
    parts += [
        f'<circle class="dot" cx="{x}" cy="{y}" r="3.5"><title>top {fraction:.0%}: {mass:.1%}</title></circle>'
        for fraction, mass in zip(fractions, mean, strict=True)
        if 0 < fraction < 1
        for x, y in [point(fraction, mass).split(",")]
    ]
    parts.append(label_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "most attended tokens"))
    return svg(f"Share of attention on the most attended tokens, mean of {len(shown)} blocks", HEIGHT, parts)


def mean_mass(blocks: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Return the fractions of tokens and the mean mass on them, of blocks with a record."""
    masses = [block["attention"]["mass"] for block in blocks]
    mean = [sum(values) / len(values) for values in zip(*masses, strict=True)]
    return list(blocks[0]["attention"]["fractions"]), mean


def mass_summary(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Return what the chart shows in a sentence; empty without a record."""
    shown = recorded(blocks)
    if not shown:
        return ""
    tops = [_top_mass(block["attention"]) for block in shown]
    text = sum(block["attention"]["text_share"] for block in shown) / len(shown)
    on_text = f", text tokens {text:.0%}" if text else ""
    mean, lowest, highest = sum(tops) / len(tops), min(tops), max(tops)
    return (
        f"The most attended {_TOP:.0%} of the tokens receive {mean:.0%} of the attention ({lowest:.0%} to "
        f"{highest:.0%} by block){on_text}; uniform attention would give them {_TOP:.0%}"
    ).replace("%", " %")


def _top_mass(record: Mapping[str, Any]) -> float:
    mass: float = np.interp(_TOP, record["fractions"], record["mass"])
    return float(mass)


def map_chart(blocks: Sequence[Mapping[str, Any]], frames: np.ndarray | None = None) -> Markup:
    """Draw the attention that each video token receives, a column for each block and a row for each latent frame.

    A fuller colour is more attention; the fullest is the largest value of the block. Empty without a map.

    Args:
        blocks: `blocks` of `report.json`.
        frames: The sample's video, `[F, H, W, 3]` uint8, shown beside the maps and, in grey, beneath their colours.
    """
    maps = [(block["name"], ImportanceMap.from_dict(block["attention"]["map"])) for block in mapped(blocks)]
    if not maps:
        return Markup("")
    first = maps[0][1]
    pictures = [] if frames is None else _pictures(frames, first)
    columns = len(maps) + bool(pictures)
    wide = min(float(_TILE), (WIDTH - _LABEL - _GAP * (columns - 1)) / columns)
    tall = wide * first.grid[1] / first.grid[2]
    parts = [
        label_text(_LABEL - 10, _HEADER + row * (tall + _GAP) + tall / 2 + 5, f"frame {index}", "end")
        for row, index in enumerate(first.frames)
    ]

    def column(index: int, heads: Sequence[str], tiles: Sequence[tuple[Image.Image, ...]], tip: str) -> None:
        x = _LABEL + index * (wide + _GAP)
        parts.extend(label_text(x + wide / 2, 13 + 17 * line, text) for line, text in enumerate(heads))
        for row, layers in enumerate(tiles):
            box = f'x="{x:.1f}" y="{_HEADER + row * (tall + _GAP):.1f}" width="{wide:.1f}" height="{tall:.1f}"'
            parts.extend(
                f'<image class="tile" {box} preserveAspectRatio="none" href="{_png(layer)}"/>' for layer in layers
            )
            parts.append(f'<rect class="frame" {box}><title>{escape(tip)}</title></rect>')

    if pictures:
        column(0, ["video"], [(picture,) for picture in pictures], "full-precision video of the sample")
    greys = [(_grey(picture),) for picture in pictures] or [()] * len(first.frames)
    for index, (name, shown) in enumerate(maps, start=bool(pictures)):
        peak = float(shown.values.max())
        tip = f"{name}: up to {peak:.1f} times the mean attention of a video token"
        tiles = [(*grey, _heat(values, peak)) for grey, values in zip(greys, shown.values.numpy(), strict=False)]
        column(index, [_short(name), f"≤ {peak:.1f}×"], tiles, tip)
    label = f"Attention that video tokens receive in {len(maps)} blocks, over {len(first.frames)} latent frames"
    return svg(label, _HEADER + len(first.frames) * (tall + _GAP), parts)


def mapped(blocks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the blocks whose maps are shown: at most `MOST_BLOCKS`, evenly spaced, first and last included.

    All are of the sample of the first: a second transformer has samples of its own.
    """
    with_map = [block for block in recorded(blocks) if block["attention"]["map"]]
    samples = [block["attention"]["map"]["sample"] for block in with_map]
    found = [block for block, sample in zip(with_map, samples, strict=True) if sample == samples[0]]
    count = min(MOST_BLOCKS, len(found))
    return [found[round(index * (len(found) - 1) / max(1, count - 1))] for index in range(count)]


def map_sample(blocks: Sequence[Mapping[str, Any]]) -> tuple[int, int, int] | None:
    """Return prompt, step and branch of the sample of the maps, by index; None without a map."""
    shown = mapped(blocks)
    name = shown[0]["attention"]["map"]["sample"] if shown else ""
    match = re.fullmatch(r"prompt (\d+), step (\d+), branch (-?\d+)", name)
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]))


def _pictures(frames: np.ndarray, shown: ImportanceMap) -> list[Image.Image]:
    """Frames of a video at the times of latent frames, small."""
    last = max(1, shown.grid[0] - 1)
    places = [round(index / last * (len(frames) - 1)) for index in shown.frames]
    return [Image.fromarray(frame) for frame in reduced(frames[places], longest=DISPLAY_PIXELS // 2)]


def _grey(picture: Image.Image) -> Image.Image:
    """A picture without colour and with little contrast, for colours above it."""
    grey = np.asarray(picture.convert("L"), dtype=np.float32)
    return Image.fromarray((255 - _GREY * (255 - grey)).astype(np.uint8))


def _heat(values: np.ndarray, peak: float) -> Image.Image:
    """One colour, as opaque as a value is of the peak."""
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = _COLOUR
    pixels[..., 3] = (255 * values / (peak or 1.0)).round()
    return Image.fromarray(pixels, "RGBA")


def _png(picture: Image.Image) -> str:
    """A PNG; small ones are not compressed, so their bytes do not depend on the version of zlib."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=0 if picture.width * picture.height <= _STORED else 9)
    return data_url("image/png", buffer.getvalue())


def _short(name: str) -> str:
    """The place of a block in its list: "transformer_blocks.3" is "block 3"."""
    parent, _, index = name.rpartition(".")
    return f"{'single ' if 'single' in parent else ''}block {index}" if index.isdigit() else name
