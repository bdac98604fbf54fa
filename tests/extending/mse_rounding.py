"""Rounding to nearest with the clipping ratio of the smallest squared error, searched for each scale.

    ratio = argmin_r ‖W - Δ(r) · codes(W, Δ(r))‖²,    Δ(r) = r · max|W| / (2^(N-1) - 1)

Shapes: `O/I` out/in features, `G` groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from s2q.core.qparams import ClipRatio, RoundedWeight, dequantize_weight
from s2q.core.schemes import QuantScheme
from s2q.rounding import Rounding, round_rtn


@dataclass(frozen=True, kw_only=True)
class MSE(Rounding):
    """Options of the search.

    Attributes:
        steps: Ratios that are tried, evenly from 1 down to `lowest`.
        lowest: The smallest ratio.
    """

    method: Literal["mse"] = "mse"
    steps: int = field(default=16, metadata={"ge": 2, "le": 100})
    lowest: float = field(default=0.6, metadata={"gt": 0, "lt": 1})

    @torch.no_grad()
    def round(
        self,
        weights: Sequence[Tensor],
        scheme: QuantScheme,
        *,
        clip_ratios: Sequence[ClipRatio],
        hessian: Tensor | None = None,
    ) -> list[tuple[RoundedWeight, dict[str, Any]]]:
        """Round weights [O, I] that read one input, with the best ratio of each scale."""
        pairs = zip(weights, clip_ratios, strict=True)
        return [self._rounded(weight, scheme, clip_ratio) for weight, clip_ratio in pairs]

    def _rounded(
        self, weight: Tensor, scheme: QuantScheme, clip_ratio: ClipRatio
    ) -> tuple[RoundedWeight, dict[str, Any]]:
        best, report = None, {}
        for step in range(self.steps):
            ratio = 1 - step / (self.steps - 1) * (1 - self.lowest)
            rounded = round_rtn(weight, scheme, clip_ratio=ratio if clip_ratio is None else ratio * clip_ratio)
            deviation = dequantize_weight(rounded.codes, rounded.scale) - weight.float()
            error = deviation.square().reshape(*rounded.scale.shape, -1).sum(dim=-1)  # [O] or [O, G]
            if best is None:
                best, smallest = rounded, error
                report["squared_error_rtn"] = float(error.sum())
                continue
            better = error < smallest
            of_codes = better.unsqueeze(-1).expand(*better.shape, weight.numel() // better.numel())
            codes = torch.where(of_codes.reshape(weight.shape), rounded.codes, best.codes)
            best = RoundedWeight(codes=codes, scale=torch.where(better, rounded.scale, best.scale))
            smallest = torch.minimum(error, smallest)
        return best, report | {"squared_error": float(smallest.sum())}
