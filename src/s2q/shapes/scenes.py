"""Procedural scenes of one moving shape, their captions and their pixels: anti-aliased edges, sub-pixel positions.

The same state of the ``torch.Generator`` gives the same scene and caption.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product

import torch
from torch import Tensor

SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.12),
    "green": (0.10, 0.68, 0.20),
    "blue": (0.15, 0.38, 0.95),
    "yellow": (0.98, 0.86, 0.10),
    "purple": (0.60, 0.15, 0.75),
    "orange": (1.00, 0.50, 0.05),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.04, 0.04, 0.04),
    "white": (0.95, 0.95, 0.95),
    "grey": (0.50, 0.50, 0.50),
    "navy": (0.05, 0.08, 0.30),
    "tan": (0.80, 0.68, 0.50),
}
MOTIONS: dict[str, tuple[int, int]] = {  # (dx, dy), y grows downwards
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
}
SIZES: dict[str, tuple[float, float]] = {"small": (5.4, 6.0), "medium": (6.3, 6.9), "big": (7.2, 7.8)}
"""Radius in pixels of the circle of equal area, at 32x32."""
SPEEDS: dict[str, tuple[float, float]] = {"slow": (0.60, 0.75), "normal": (0.95, 1.10), "fast": (1.30, 1.50)}
"""Pixels a frame, at 32x32."""

SIZE_WORDS = {"small": "small ", "medium": "", "big": "big "}
SPEED_WORDS = {"slow": " slowly", "normal": "", "fast": " quickly"}
MOVING_PHRASES = (
    "a {size}{colour} {shape} moving {motion}{speed} on a {background} background",
    "a {size}{colour} {shape} moves{speed} {motion} over a {background} background",
    "the {size}{colour} {shape} slides{speed} {motion}, {background} background",
    "on a {background} background a {size}{colour} {shape} drifts{speed} {motion}",
)
STILL_PHRASES = (
    "a {size}{colour} {shape} standing still on a {background} background",
    "a {size}{colour} {shape} stays still over a {background} background",
    "the {size}{colour} {shape} is still, {background} background",
    "on a {background} background a {size}{colour} {shape} rests still",
)


@dataclass(frozen=True, kw_only=True)
class SceneLabels:
    """Labels of a caption or of the detector, whose fields are ``None`` where it detected nothing."""

    shape: str | None
    colour: str | None
    motion: str | None
    background: str | None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One scene: its labels and its continuous parameters, in pixels of a 32x32 frame."""

    labels: SceneLabels
    size: str
    speed: str
    radius: float
    pixels_per_frame: float
    start_x: float
    start_y: float
    colour_rgb: tuple[float, float, float]
    background_rgb: tuple[float, float, float]
    background_slope: float


def all_combinations() -> list[SceneLabels]:
    """Every (shape, colour, motion, background), in a fixed order."""
    return [
        SceneLabels(shape=s, colour=c, motion=m, background=b)
        for s, c, m, b in product(SHAPES, COLOURS, MOTIONS, BACKGROUNDS)
    ]


def is_held_out(labels: SceneLabels) -> bool:
    """Whether this combination is kept from training: one in five, by a Latin square, so balanced in each label."""
    index = (
        SHAPES.index(str(labels.shape))
        + list(COLOURS).index(str(labels.colour))
        + 2 * list(MOTIONS).index(str(labels.motion))
        + 3 * list(BACKGROUNDS).index(str(labels.background))
    )
    return index % len(BACKGROUNDS) == 0


def combinations(*, held_out: bool) -> list[SceneLabels]:
    """The combinations of the training split, or those never trained on."""
    return [labels for labels in all_combinations() if is_held_out(labels) == held_out]


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _choice(options: Sequence[str], generator: torch.Generator) -> str:
    return options[int(torch.randint(len(options), (), generator=generator))]


def _extent(shape: str, radius: float) -> tuple[float, float, float]:
    """Half width, height above and height below the centroid of a shape whose area is ``pi * radius**2``."""
    if shape == "circle":
        return radius, radius, radius
    if shape == "square":
        half = radius * math.sqrt(math.pi) / 2
        return half, half, half
    side = radius * math.sqrt(4 * math.pi / math.sqrt(3))
    return side / 2, side / math.sqrt(3), side / (2 * math.sqrt(3))


def sample_scene(labels: SceneLabels, *, num_frames: int = 9, size: int = 32, generator: torch.Generator) -> Scene:
    """Draw the continuous parameters of a scene: the shape stays inside the frame from the first frame to the last."""
    size_name = _choice(tuple(SIZES), generator)
    speed_name = _choice(tuple(SPEEDS), generator)
    radius = _uniform(*SIZES[size_name], generator)
    speed = _uniform(*SPEEDS[speed_name], generator)
    dx, dy = MOTIONS[str(labels.motion)]
    travel_x, travel_y = (speed * (num_frames - 1) * d for d in (dx, dy))
    half, above, below = _extent(str(labels.shape), radius)
    margin, unit = 0.5, size / 32
    start_x = _uniform(half + margin + max(0.0, -travel_x), 32 - half - margin - max(0.0, travel_x), generator)
    start_y = _uniform(above + margin + max(0.0, -travel_y), 32 - below - margin - max(0.0, travel_y), generator)
    jitter = ((torch.rand(6, generator=generator) - 0.5) * 0.05).tolist()
    colour = COLOURS[str(labels.colour)]
    background = BACKGROUNDS[str(labels.background)]
    return Scene(
        labels=labels,
        size=size_name,
        speed=speed_name,
        radius=radius * unit,
        pixels_per_frame=speed * unit,
        start_x=start_x * unit,
        start_y=start_y * unit,
        colour_rgb=(colour[0] + jitter[0], colour[1] + jitter[1], colour[2] + jitter[2]),
        background_rgb=(background[0] + jitter[3], background[1] + jitter[4], background[2] + jitter[5]),
        background_slope=_uniform(-0.04, 0.04, generator),
    )


def caption(scene: Scene, *, generator: torch.Generator) -> str:
    """A caption of the scene in one of several phrasings; size and speed are named unless they are the middle ones."""
    phrase = _choice(STILL_PHRASES if scene.labels.motion == "still" else MOVING_PHRASES, generator)
    text = phrase.format(size=SIZE_WORDS[scene.size], speed=SPEED_WORDS[scene.speed], **asdict(scene.labels))
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def parse_caption(text: str) -> SceneLabels | None:
    """The labels that a prompt names, or ``None`` unless it names exactly one of each kind.

    >>> parse_caption("A red circle moving left on a grey background")
    SceneLabels(shape='circle', colour='red', motion='left', background='grey')
    """
    words = _words(text)
    named = [[name for name in kind if name in words] for kind in (SHAPES, COLOURS, MOTIONS, BACKGROUNDS)]
    if any(len(names) != 1 for names in named):
        return None
    (shape,), (colour,), (motion,), (background,) = named
    return SceneLabels(shape=shape, colour=colour, motion=motion, background=background)


def scene_of(text: str, *, size: int = 32, generator: torch.Generator) -> Scene | None:
    """Draw a scene that a caption describes, size and speed included; ``None`` where `parse_caption` has no labels."""
    labels, words = parse_caption(text), _words(text)
    if labels is None:
        return None
    size_name = next((name for name, word in SIZE_WORDS.items() if word.strip() in words), "medium")
    speed_name = next((name for name, word in SPEED_WORDS.items() if word.strip() in words), "normal")
    while True:
        scene = sample_scene(labels, size=size, generator=generator)
        if scene.size == size_name and (scene.speed == speed_name or labels.motion == "still"):
            return scene


def _words(text: str) -> set[str]:
    return set(text.lower().replace(",", " ").replace(".", " ").split())


def shape_coverage(shape: str, *, x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    """Fraction of each pixel that the shape covers, in ``[0, 1]``, by its signed distance.

    ``x`` and ``y`` are the distances of the pixel centre from the centroid (to the right, downwards), ``radius`` is
    that of the circle of equal area; all in pixels, and they broadcast.
    """
    if shape == "circle":
        distance = torch.sqrt(x * x + y * y) - radius
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - radius * (math.sqrt(math.pi) / 2)
    else:
        inradius = radius * (math.sqrt(4 * math.pi / math.sqrt(3)) / (2 * math.sqrt(3)))
        slanted = x.abs() * (math.sqrt(3) / 2) - y * 0.5  # the two slanted sides, folded onto one by symmetry
        distance = torch.maximum(slanted, y + torch.zeros_like(x)) - inradius
    return (0.5 - distance).clamp(0, 1)


def render(scene: Scene, *, num_frames: int = 9, size: int = 32) -> Tensor:
    """Draw a scene, ``[F, 3, H, W]`` float32 in ``[0, 1]``, with ``H = W = size``."""
    dx, dy = MOTIONS[str(scene.labels.motion)]
    frame = torch.arange(num_frames, dtype=torch.float32)
    centre_x = (scene.start_x + dx * scene.pixels_per_frame * frame)[:, None, None]
    centre_y = (scene.start_y + dy * scene.pixels_per_frame * frame)[:, None, None]
    pixel = torch.arange(size, dtype=torch.float32) + 0.5
    coverage = shape_coverage(
        str(scene.labels.shape),
        x=pixel[None, None, :] - centre_x,
        y=pixel[None, :, None] - centre_y,
        radius=scene.radius,
    )[:, None]
    shade = scene.background_slope * (pixel / size * 2 - 1)
    background = torch.tensor(scene.background_rgb)[:, None, None] + shade[None, :, None]
    colour = torch.tensor(scene.colour_rgb)[:, None, None]
    return (coverage * colour + (1 - coverage) * background).clamp(0, 1)
