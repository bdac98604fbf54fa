"""Fidelity of one video to another: latents and pixels. Pure functions of tensors.

Pixels are compared as uint8 frames before any video encoding: an mp4 at the usual quality costs 8 dB by itself. PSNR of
identical videos is infinite, which JSON cannot hold, so that every PSNR is capped at `PSNR_CAP_DB`.

Legend: `frames` `[F, H, W, 3]`, uint8, red, green, blue; final `latents` of any shape; `reference` is that of full
precision, of the same shape and dtype, else InvalidInputError is raised.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from s2q.common.errors import InvalidInputError

PSNR_CAP_DB = 100.0
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
STILL_LEVELS = 0.5
"""Mean rms change of a frame, in levels of 255, below which a video is nearly still."""
BLACK_LEVEL = 16
BLACK_SHARE = 0.99
_LUMA = (0.299, 0.587, 0.114)


def latent_relative_l2(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Return `‖latents − reference‖₂ / ‖reference‖₂`, dimensionless; the reference may not be all zero."""
    difference, base = _pair(latents, reference)
    norm = float(base.norm())
    if norm == 0.0:
        raise InvalidInputError("latent_relative_l2: the reference latents are all zero")
    return float((difference - base).norm()) / norm


def latent_cosine(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the cosine between two latents, in -1..1; 0 if one of them is all zero."""
    first, second = _pair(latents, reference)
    norms = float(first.norm()) * float(second.norm())
    if norms == 0.0:
        return 0.0
    return max(-1.0, min(1.0, float((first * second).sum()) / norms))


def psnr_frame_mean_db(frames: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the PSNR of each frame, averaged over the frames, in dB."""
    errors = _squared_error(frames, reference).flatten(1).mean(dim=1)
    return sum(_psnr_db(float(error)) for error in errors) / len(errors)


def psnr_pooled_db(frames: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the PSNR of the squared error pooled over all frames, in dB."""
    return _psnr_db(float(_squared_error(frames, reference).mean()))


def ssim(frames: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the structural similarity of the luma, averaged over windows and frames (Wang et al. 2004)."""
    _check_frames(frames, reference)
    x, y = _luma(frames), _luma(reference)
    window = min(SSIM_WINDOW, x.shape[-1], x.shape[-2])
    window -= 1 - window % 2
    mean_x, mean_y = _blur(x, window), _blur(y, window)
    variance_x = _blur(x * x, window) - mean_x**2
    variance_y = _blur(y * y, window) - mean_y**2
    covariance = _blur(x * y, window) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float((luminance * structure).mean())


def flicker_rms(frames: torch.Tensor, reference: torch.Tensor) -> float | None:
    """Return how much the error changes from frame to frame: flicker that full precision does not have.

    Returns:
        `(1/(F−1)) Σ_t rms((x_{t+1} − y_{t+1}) − (x_t − y_t))` in levels of 0..255, with x the frames and y the
        reference's; None for videos of one frame.

    Example:
        An error of one level that comes and goes in every pixel:

        >>> frames = torch.zeros(3, 2, 2, 3, dtype=torch.uint8)
        >>> flicker_rms(frames + torch.tensor([0, 1, 0], dtype=torch.uint8).view(3, 1, 1, 1), frames)
        1.0
    """
    _check_frames(frames, reference)
    if len(frames) < 2:
        return None
    changes = (frames.double() - reference.double()).diff(dim=0)
    return float(changes.square().flatten(1).mean(dim=1).sqrt().mean())


def motion_ratio(frames: torch.Tensor, reference: torch.Tensor) -> float | None:
    """Return how much the frames change from one to the next, relative to full precision.

    Below 1, motion is slower or smaller than in full precision; noise that changes with the frame raises it.

    Returns:
        `Σ_t rms(x_{t+1} − x_t) / Σ_t rms(y_{t+1} − y_t)`, dimensionless, with x the frames and y the reference's; None
        for videos of one frame, and where the reference is nearly still, with a mean rms below 0.5 levels: flicker
        alone would be many times that.

    Example:
        A ramp of brightness at half of the reference's speed:

        >>> ramp = torch.arange(0, 60, 10, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 2, 2, 3)
        >>> motion_ratio(ramp // 2, ramp)
        0.5
    """
    _check_frames(frames, reference)
    energy, base = _motion(frames), _motion(reference)
    return energy / base if base >= STILL_LEVELS else None


def first_frame_psnr_db(frames: torch.Tensor, image: torch.Tensor) -> float:
    """Return the PSNR of the first frame against the image that the video starts from, `[H, W, 3]`, uint8, in dB."""
    return psnr_pooled_db(frames[:1], image[None])


def black_frames(frames: torch.Tensor) -> float:
    """Return the share of black frames in 0..1: 99 % of the pixels have a luma of at most 16 of 255."""
    dark = (_luma(frames) <= BLACK_LEVEL).flatten(1).double().mean(dim=1)
    return float((dark >= BLACK_SHARE).double().mean())


LATENT_METRICS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], float]] = {
    "latent_relative_l2": latent_relative_l2,
    "latent_cosine": latent_cosine,
}
"""Metrics of (latents, reference latents)."""

FRAME_METRICS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], float | None]] = {
    "psnr_frame_mean_db": psnr_frame_mean_db,
    "psnr_pooled_db": psnr_pooled_db,
    "ssim": ssim,
    "flicker_rms": flicker_rms,
    "motion_ratio": motion_ratio,
}
"""Metrics of (frames, reference frames); None where one does not apply."""


def _pair(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if first.shape != second.shape:
        raise InvalidInputError(f"latents: got shape {tuple(first.shape)}, the reference has {tuple(second.shape)}")
    return first.double().flatten(), second.double().flatten()


def _check_frames(frames: torch.Tensor, reference: torch.Tensor) -> None:
    for name, video in (("frames", frames), ("reference", reference)):
        if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[-1] != 3:
            raise InvalidInputError(f"{name}: got {video.dtype} {tuple(video.shape)}; expected uint8 [F, H, W, 3]")
    if frames.shape != reference.shape:
        raise InvalidInputError(f"frames: got shape {tuple(frames.shape)}, the reference has {tuple(reference.shape)}")


def _motion(frames: torch.Tensor) -> float:
    """Mean over consecutive frames of the root mean square of their difference, in levels; 0 for one frame."""
    changes = frames.double().diff(dim=0).square().flatten(1).mean(dim=1).sqrt()
    return float(changes.sum()) / max(len(changes), 1)


def _squared_error(frames: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    _check_frames(frames, reference)
    return (frames.double() - reference.double()) ** 2


def _psnr_db(mean_squared_error: float) -> float:
    if mean_squared_error == 0.0:
        return PSNR_CAP_DB
    return min(PSNR_CAP_DB, 10 * math.log10(255.0**2 / mean_squared_error))


def _luma(frames: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(_LUMA, dtype=torch.float64, device=frames.device)
    return (frames.double() @ weights).unsqueeze(1)


def _blur(x: torch.Tensor, window: int) -> torch.Tensor:
    offsets = torch.arange(window, dtype=x.dtype, device=x.device) - (window - 1) / 2
    kernel = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    kernel = kernel / kernel.sum()
    return F.conv2d(F.conv2d(x, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
