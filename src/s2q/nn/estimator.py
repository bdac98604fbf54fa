"""A learned correction of rank one, with a scale for each frame: Q-VDiT's token-aware quantization estimator (TQE).

    X Wᵀ ≈ Q(X) Q(W)ᵀ + Δ̂ βᵀ,    Δ̂ = M_i · Q(X) α        in the rows of frame i; in those of text M is 1

(Feng et al., "Q-VDiT: Towards Accurate Quantization and Distillation of Video-Generation Diffusion Transformers", 2025,
section 3.2.) Q(X) is the quantized input, after the transforms of the linear.

Example, I = O = 1, α = 2, β = 0.5, M = [1, 3], a token a frame: Q(X) = [4, 5] is corrected by [4, 15].

Shapes: `I/O` in/out features, `N` tokens, `F` frames that there are scales for, `f` frames of the call at hand.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2q.core.tokens import TokenGrid, current_grid


class Estimator(nn.Module):
    """The correction while it is learned; it starts as zero.

    Attributes:
        alpha: Parameter fp32 [I].
        beta: Parameter fp32 [O].
        frames: Parameter fp32 [F], M; None where the linear sees no video.
        needs_grid: Whether it depends on where the video tokens of the call at hand are.

    Args:
        in_features: I.
        out_features: O.
        frames: F, or None.
        seed: Of α, which is uniform within 1 / √I.
    """

    def __init__(self, in_features: int, out_features: int, *, frames: int | None, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        start = (2 * torch.rand(in_features, generator=generator) - 1) / math.sqrt(in_features)
        self.alpha = nn.Parameter(start)
        self.beta = nn.Parameter(torch.zeros(out_features))
        self.frames = None if frames is None else nn.Parameter(torch.ones(frames))
        self.needs_grid = frames is not None

    def forward(self, quantized: Tensor) -> Tensor:
        """Return the correction.

        Args:
            quantized: [..., N, I], floating.

        Returns:
            [..., N, O], dtype of the input.
        """
        coefficients = scaled_by_frame((quantized.float() @ self.alpha).unsqueeze(-1), self.frames)
        return (coefficients * self.beta).to(quantized.dtype)


def scaled_by_frame(coefficients: Tensor, frames: Tensor | None) -> Tensor:
    """Multiply what belongs to the tokens of a frame by its scale; text tokens are unchanged.

    A call of another number of frames has the scales between, drawn straight through those there are; one whose grid
    (`core.tokens`) is not known, or is not that of the coefficients, has none.

    Args:
        coefficients: [..., N, r].
        frames: fp32 [F], or None for 1.

    Returns:
        [..., N, r].
    """
    grid = None if frames is None else current_grid()
    if frames is None or grid is None or coefficients.ndim < 3:
        return coefficients
    factors = _factors(frames, grid, coefficients.shape[-2])
    return coefficients if factors is None else coefficients * factors.unsqueeze(-1)


def _factors(frames: Tensor, grid: TokenGrid, length: int) -> Tensor | None:
    offset = grid.offset(length)
    if offset is None:
        return None
    if len(frames) != grid.frames:
        frames = F.interpolate(frames.view(1, 1, -1), size=grid.frames, mode="linear", align_corners=True).view(-1)
    of_video = frames.repeat_interleave(grid.height * grid.width)
    return F.pad(of_video, (offset, length - offset - grid.tokens), value=1.0)
