"""Learned rounding: whether each weight goes down or up is found by what it does to a block's output.

AdaRound (Nagel et al., 2020, eq. 21 to 24), over the output of a whole block as in BRECQ (Li et al., 2021):

    W_q = Δ · clip(floor(W / Δ) + h(V), -2^(N-1), 2^(N-1) - 1),    h(V) = clip(1.2 · sigmoid(V) - 0.1, 0, 1)

V starts where h(V) = W / Δ - floor(W / Δ), so that W_q is W itself, and is learned together with a penalty
λ · (1/n) Σ (1 - |2 h(V) - 1|^β) that draws h to 0 or 1. After a warm-up without it, β goes down from 20, where only
what is almost decided is drawn, to 2. In the end h counts as 1 from ½ on.

The paper sums the penalty; here it is the mean over all weights that are learned together, because the loss it is
added to is divided by its own value (`s2q.blocks.distil`).

Example: W / Δ = 2.3 has floor 2, and h = 0.3 at sigmoid(V) = 0.4 / 1.2, V = log(0.5) = -0.693; untouched, it would be
rounded to 2.

Shapes: `I` in features, `O` out features, `G` groups.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from s2q.core.qparams import RoundedWeight, align_scale, code_range, dequantize_weight, weight_scale
from s2q.core.schemes import QuantScheme
from s2q.rounding.base import Rounding

_LOW, _HIGH = -0.1, 1.1  # γ and ζ: sigmoid is stretched to them, so that 0 and 1 are reached


@dataclass(frozen=True, kw_only=True)
class AdaRound(Rounding):
    """Options of learned rounding: those of its penalty.

    Attributes:
        penalty: λ, its size beside a loss of 1.
        warmup: Share of the steps, at the beginning, without it.
        beta_start: β after the warm-up.
        beta_end: β at the end; falls linearly.
    """

    learned: ClassVar[bool] = True

    method: Literal["adaround"] = "adaround"
    penalty: float = field(default=1000.0, metadata={"ge": 0})
    warmup: float = field(default=0.2, metadata={"ge": 0, "lt": 1})
    beta_start: float = field(default=20.0, metadata={"gt": 1})
    beta_end: float = field(default=2.0, metadata={"gt": 1})

    def __post_init__(self) -> None:
        """Check that β does not rise."""
        super().__post_init__()
        if self.beta_end > self.beta_start:
            raise self.invalid(f"beta_end={self.beta_end} is above beta_start={self.beta_start}; lower it")

    def beta(self, progress: float) -> float | None:
        """Return β at a share of the steps, 0 to 1, or None where there is no penalty."""
        if progress < self.warmup:
            return None
        left = 1 - (progress - self.warmup) / (1 - self.warmup)
        return self.beta_end + (self.beta_start - self.beta_end) * max(0.0, left)


class LearnedRounding(nn.Module):
    """A weight [O, I] whose rounding is learned; its scale is not.

    Attributes:
        logits: Parameter fp32 [O, I], V.
        floor: Buffer int8 [O, I], the codes below W / Δ.
        scale: Buffer fp32 [O] or [O, G], Δ.
        soft: Whether the weight is that of h(V), which has a gradient, and not that of its decision.
    """

    floor: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scheme: QuantScheme) -> None:
        super().__init__()
        self.num_bits, self.soft = scheme.num_bits, False
        scale = weight_scale(weight.detach(), scheme)
        grouped, spread = align_scale(weight.detach().float(), scale)
        ratio = grouped / spread
        floor = ratio.floor().clamp(*code_range(scheme.num_bits))
        stretched = ((ratio - floor).clamp(0, 1) - _LOW) / (_HIGH - _LOW)
        self.register_buffer("floor", floor.reshape(weight.shape).to(torch.int8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.logits = nn.Parameter(stretched.logit().reshape(weight.shape))

    def share(self) -> Tensor:
        """Return h(V), fp32 [O, I], 0 to 1; differentiable."""
        return (torch.sigmoid(self.logits) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def forward(self) -> Tensor:
        """Return the quantized weight, fp32 [O, I]; differentiable where it is soft."""
        if not self.soft:
            rounded = self.rounded()
            return dequantize_weight(rounded.codes, rounded.scale)
        codes = (self.floor + self.share()).clamp(*code_range(self.num_bits))
        return dequantize_weight(codes, self.scale)

    @torch.no_grad()
    def rounded(self) -> RoundedWeight:
        """Return codes and scale as decided: up where h(V) ≥ ½."""
        up = (self.logits >= 0).to(torch.int8)
        return RoundedWeight(codes=(self.floor + up).clamp(*code_range(self.num_bits)), scale=self.scale)

    @torch.no_grad()
    def undecided(self) -> float:
        """Return the share of weights whose h(V) is neither 0 nor 1."""
        share = self.share()
        return float(((share > 0) & (share < 1)).double().mean())


def roundings_of(module: nn.Module) -> list[LearnedRounding]:
    """Return the learned roundings inside a module, such as a student."""
    return [child for child in module.modules() if isinstance(child, LearnedRounding)]


@contextmanager
def soft_rounding(roundings: Sequence[LearnedRounding]) -> Iterator[None]:
    """Have roundings compute with h(V), to learn from it; with its decision again afterwards."""
    for rounding in roundings:
        rounding.soft = True
    try:
        yield
    finally:
        for rounding in roundings:
            rounding.soft = False


def rounding_penalty(share: Tensor, beta: float) -> Tensor:
    """Compute Σ (1 - |2h - 1|^β), h in [0, 1], β above 1: 0 where every h is 0 or 1; differentiable."""
    return (1 - (2 * share - 1).abs().pow(beta)).sum()


def penalize(roundings: Sequence[LearnedRounding], progress: float, *, options: AdaRound) -> None:
    """Add the gradient of the penalty to that of every V, one weight after another."""
    beta = options.beta(progress)
    if beta is None:
        return
    count = sum(rounding.logits.numel() for rounding in roundings)
    for rounding in roundings:
        (options.penalty / count * rounding_penalty(rounding.share(), beta)).backward()  # type: ignore[no-untyped-call]
