"""An analytic detector: which shape, colour, motion and background a video shows. Nothing in it is learned.

1. Background: the median colour of the frame's border. 2. Object colour: the pixels that differ most from it.
3. Coverage: each pixel projected onto the line from background to object colour, in ``[0, 1]``. 4. Motion: the slope
of the coverage's centroid over time. 5. Shape: the template (equal area, same centroid, drawn by the scene renderer)
that explains the coverage best, over all frames.

Legend of shapes: ``F`` frames, ``H`` height, ``W`` width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from s2q.shapes.scenes import BACKGROUNDS, COLOURS, SHAPES, SceneLabels, shape_coverage

MIN_CONTRAST = 0.15  # of the object against the background, in RGB distance
MIN_AREA_FRACTION, MAX_AREA_FRACTION = 0.015, 0.40  # of the frame
STILL_TRAVEL_FRACTION = 0.08  # of the frame's side over the whole clip: below, the object stands still
_NOISE_FLOOR = 0.2  # coverage below this is not counted as object


@dataclass(frozen=True, kw_only=True)
class _Object:
    """An object that is seen in at least half of the frames: its colour [3]; of frames with it, coverage and number.

    The coverage is [F', H, W], the number [F'], floating point.
    """

    colour: Tensor
    coverage: Tensor
    frame: Tensor


@dataclass(frozen=True, kw_only=True)
class DetectedScene:
    """Labels of a video and the motion of its object.

    Attributes:
        travel: How far the object travels from the first to the last frame, in pixels to the right and down; None, as
            shape, colour and motion of the labels, where no object is seen in at least half of the frames.
    """

    labels: SceneLabels
    travel: tuple[float, float] | None


DetectScene = Callable[[Tensor], DetectedScene]
"""`detect_scene`, or what remembers its answers."""


def detect_scene(frames: Tensor) -> DetectedScene:
    """Name and measure what a video shows, ``[F, 3, H, W]`` floating point in ``[0, 1]`` or ``[F, H, W, 3]`` uint8."""
    video = _as_float(frames)
    background = _background(video)
    name = _nearest(background, BACKGROUNDS)
    seen = _object(video, background)
    if seen is None:
        labels = SceneLabels(shape=None, colour=None, motion=None, background=name)
        return DetectedScene(labels=labels, travel=None)
    travel = _travel(seen, length=len(video))
    labels = SceneLabels(
        shape=_shape(seen.coverage),
        colour=_nearest(seen.colour, COLOURS),
        motion=_direction(travel, side=max(video.shape[-2:])),
        background=name,
    )
    return DetectedScene(labels=labels, travel=travel)


def detect(frames: Tensor) -> SceneLabels:
    """Name what a video shows; see `detect_scene`."""
    return detect_scene(frames).labels


def is_still(distance: tuple[float, float], *, side: int) -> bool:
    """Whether so small a distance, in pixels, is no motion in frames with a longer side of ``side``."""
    return math.hypot(*distance) < STILL_TRAVEL_FRACTION * side


def _as_float(frames: Tensor) -> Tensor:
    return frames.permute(0, 3, 1, 2).float() / 255 if frames.dtype == torch.uint8 else frames.float()


def _object(video: Tensor, background: Tensor) -> _Object | None:
    difference = video - background[None, :, None, None]
    distance = difference.norm(dim=1)  # [F, H, W]
    if float(distance.amax()) < MIN_CONTRAST:
        return None
    core = distance > 0.7 * distance.amax()
    colour = video.permute(0, 2, 3, 1)[core].median(dim=0).values
    axis = colour - background
    coverage = torch.einsum("fchw,c->fhw", difference, axis) / axis.dot(axis).clamp_min(1e-6)
    coverage = coverage.clamp(0, 1)
    coverage = torch.where(coverage < _NOISE_FLOOR, torch.zeros_like(coverage), coverage)
    pixels = coverage.shape[-1] * coverage.shape[-2]
    area = coverage.sum(dim=(1, 2))
    seen = (area > MIN_AREA_FRACTION * pixels) & (area < MAX_AREA_FRACTION * pixels)
    if int(seen.sum()) * 2 < len(seen):
        return None
    return _Object(colour=colour, coverage=coverage[seen], frame=torch.arange(len(seen), dtype=torch.float32)[seen])


def _background(video: Tensor) -> Tensor:
    sides = (video[..., :2, :], video[..., -2:, :], video[..., :2], video[..., -2:])
    border = torch.cat([side.flatten(2) for side in sides], dim=-1)
    return border.permute(1, 0, 2).flatten(1).median(dim=1).values


def _nearest(colour: Tensor, palette: dict[str, tuple[float, float, float]]) -> str:
    return min(palette, key=lambda name: float((colour - torch.tensor(palette[name])).norm()))


def _centroids(coverage: Tensor) -> tuple[Tensor, Tensor]:
    """Centroid of the coverage in each frame, in pixels: two tensors ``[F]``."""
    height, width = coverage.shape[-2:]
    total = coverage.sum(dim=(1, 2)).clamp_min(1e-6)
    x = (coverage.sum(dim=1) * (torch.arange(width) + 0.5)).sum(dim=1) / total
    y = (coverage.sum(dim=2) * (torch.arange(height) + 0.5)).sum(dim=1) / total
    return x, y


def _travel(seen: _Object, *, length: int) -> tuple[float, float]:
    """The slope of the centroid over the frames, times the steps of a clip of ``length`` frames."""
    frame = seen.frame - seen.frame.mean()
    spread = frame.square().sum().clamp_min(1e-6)
    x, y = (float((frame * centre).sum() / spread) * (length - 1) for centre in _centroids(seen.coverage))
    return x, y


def _direction(distance: tuple[float, float], *, side: int) -> str:
    x, y = distance
    if is_still(distance, side=side):
        return "still"
    if abs(x) >= abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def _shape(coverage: Tensor) -> str:
    height, width = coverage.shape[-2:]
    area, (x, y) = coverage.sum(dim=(1, 2)), _centroids(coverage)
    offset_x = torch.arange(width)[None, None, :] + 0.5 - x[:, None, None]
    offset_y = torch.arange(height)[None, :, None] + 0.5 - y[:, None, None]
    radius = (area / math.pi).sqrt()[:, None, None]
    errors = {
        shape: float((coverage - shape_coverage(shape, x=offset_x, y=offset_y, radius=radius)).square().sum())
        for shape in SHAPES
    }
    return min(errors, key=lambda shape: errors[shape])
