"""Statistics of the input of a linear: mean and range of its channels; second moments and rows if requested.

Shapes: `I` in features, `T` timesteps.
"""

import torch
from torch import Tensor

from s2q.rounding import HessianAccumulator


class InputStatistics:
    """Mean of the channels of an input over the samples, their range in each timestep; second moments if asked for.

    `kept` is the number of rows of each call to keep, evenly spaced.
    """

    def __init__(self, in_features: int, device: torch.device, *, moments: bool, kept: int = 0) -> None:
        self.ranges: dict[int, tuple[Tensor, Tensor]] = {}
        self.total = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.count = 0
        self.products = HessianAccumulator(in_features, device=device) if moments else None
        self.kept = kept
        self._rows: list[Tensor] = []

    def add(self, x: Tensor, *, timestep: int) -> None:
        """Take in the input of one call, [..., I], in a timestep."""
        rows = x.reshape(-1, x.shape[-1])
        low, high = rows.amin(dim=0), rows.amax(dim=0)
        lowest, highest = self.ranges.get(timestep, (low, high))
        self.ranges[timestep] = torch.minimum(low, lowest), torch.maximum(high, highest)
        self.total += rows.sum(dim=0, dtype=torch.float32)  # in the dtype of bf16 rows, the sum would lose the mean
        self.count += len(rows)
        if self.products is not None:
            self.products.add(rows)
        if self.kept > 0:
            places = torch.linspace(0, len(rows) - 1, min(self.kept, len(rows)), device=rows.device)
            self._rows.append(rows[places.round().long()])

    def rows(self) -> Tensor:
        """Return the rows that were kept, [n, I] in the dtype of the input."""
        return torch.cat(self._rows)

    def release(self) -> None:
        """Let go of what is large: the sums of products and the rows that were kept."""
        self.products = None
        self._rows.clear()

    def mean(self) -> Tensor:
        """Return the mean of each channel, fp32 [I]."""
        return (self.total / self.count).float()

    def amax(self, shift: Tensor | None) -> Tensor:
        """Return the largest magnitude of each channel in each timestep once the shift is subtracted, [T, I]."""
        centre = torch.zeros_like(self.total, dtype=torch.float32) if shift is None else shift
        ordered = [self.ranges[timestep] for timestep in sorted(self.ranges)]
        return torch.stack([torch.maximum(high - centre, centre - low) for low, high in ordered])

    def second_moment(self, shift: Tensor | None) -> Tensor:
        """Return E[xᵀ x] once the shift, the mean or near it, is subtracted; fp64 [I, I]."""
        assert self.products is not None
        moment = self.products.hessian().double() / (2 * self.count)
        if shift is None:
            return moment
        mean = self.total / self.count
        left = mean - shift
        return moment - torch.outer(mean, mean) + torch.outer(left, left)
