"""Learnable clipping ratios: how much of the largest magnitude a scale covers (S²Q-VDiT, section 2.1; FlatQuant).

    Δ = sigmoid(θ) · max|x| / (2^(N-1) - 1),    θ₀ = 4: sigmoid(4) ≈ 0.982

The quantizers are symmetric, so that one ratio does and not one each for minimum and maximum. Weights have a ratio per
output channel, activations one per linear input (per token scales, one ratio for all of them).

Shapes: `O` out features.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from s2q.common.options import Options

_START = 4.0  # θ₀


@dataclass(frozen=True, kw_only=True)
class Clip(Options):
    """Options of clipping ratios.

    Attributes:
        weights: Whether a ratio for each output channel is learned.
        activations: Whether a ratio for each input of linears is learned.
        constant: A ratio of activations that is not learned.
    """

    weights: bool = False
    activations: bool = False
    constant: float | None = field(default=None, metadata={"gt": 0, "le": 1})

    def __post_init__(self) -> None:
        """Check that activations have one ratio."""
        super().__post_init__()
        if self.activations and self.constant is not None:
            raise self.invalid(f"constant={self.constant} excludes clip.activations=true; remove one of them")


class LearnableClip(nn.Module):
    """A tensor of ratios in (0, 1).

    Attributes:
        theta: Parameter fp32, the logits.

    Args:
        shape: () for an activation, (O,) for a weight per channel, (O, 1) for one per group: it broadcasts to the
            scale.
    """

    def __init__(self, shape: tuple[int, ...] = (), *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.full(shape, _START, dtype=torch.float32, device=device))

    def forward(self) -> Tensor:
        """Return the ratios, fp32, of the shape given; differentiable."""
        return torch.sigmoid(self.theta)
