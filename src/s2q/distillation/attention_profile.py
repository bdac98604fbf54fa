"""Spread of a block's attention over tokens: mass on the most attended ones, and a map of the video (fig. 4).

    mass(p) = Σ_{j ∈ top p} S_j / Σ_j S_j

`S` is the attention that a token receives (eq. 11, `distillation.token_importance`). The mass is a mean over the
calibration samples; the map is that of the sample of the latest denoising step, where the video has the least noise.
A token weight λ is linear in S, so the map shows λ too.

Legend: `B` samples, `N` tokens, `f`, `h`, `w` frames, rows and columns of the video tokens.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s2q.core.tokens import TokenGrid

FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Fractions of the tokens at which the mass is recorded."""

MOST_FRAMES, MOST_ROWS = 6, 24
"""Most frames of a map, and most rows and columns; larger maps skip frames and average neighbours."""

_LEVELS = 255
_DIGITS = 6


def mass_on_top(sums: Tensor) -> Tensor:
    """Return the share of S, [B, N], on the most attended `FRACTIONS` of the tokens, fp64 [B, len(FRACTIONS)].

    Between whole numbers of tokens the share is interpolated: of S = (3, 1), the top 25 % of the tokens have
    0.5 · 3 / 4 = 0.375. Tokens without any attention at all have a share of 0.
    """
    values = sums.double().sort(dim=1, descending=True).values
    reached = F.pad(values.cumsum(dim=1), (1, 0))  # [B, N + 1]
    places = torch.tensor(FRACTIONS, dtype=torch.float64, device=sums.device) * values.shape[1]
    below = places.floor().long().clamp(max=values.shape[1] - 1)
    share = reached[:, below] + (places - below) * values[:, below]
    return share / reached[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True, kw_only=True)
class ImportanceMap:
    """S of the video tokens of one sample, over its mean, on fewer frames and cells.

    Attributes:
        grid: `f`, `h`, `w` of the video tokens.
        frames: Indices of the latent frames that are shown.
        values: fp32 [frames, rows, columns] on the CPU.
        sample: Name of the sample.
    """

    grid: tuple[int, int, int]
    frames: tuple[int, ...]
    values: Tensor
    sample: str

    @classmethod
    def of(cls, sums: Tensor, grid: TokenGrid, *, sample: str) -> "ImportanceMap":
        """Reduce the sums of the video tokens, [f · h · w]."""
        shape = grid.frames, grid.height, grid.width
        count = min(MOST_FRAMES, grid.frames)
        frames = [round(index * (grid.frames - 1) / max(1, count - 1)) for index in range(count)]
        relative = sums / sums.mean().clamp_min(torch.finfo(torch.float32).tiny)
        cells = relative.float().cpu().view(shape)[frames]
        rows, columns = (min(MOST_ROWS, size) for size in shape[1:])
        values = F.adaptive_avg_pool2d(cells[:, None], (rows, columns))[:, 0]
        return cls(grid=shape, frames=tuple(frames), values=values, sample=sample)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: the values as base64 of one byte each, 255 for `peak`."""
        peak = float(self.values.amax())
        levels = (self.values * (_LEVELS / peak if peak > 0 else 0.0)).round().to(torch.uint8)
        return {
            "sample": self.sample,
            "grid": list(self.grid),
            "frames": list(self.frames),
            "rows": self.values.shape[1],
            "columns": self.values.shape[2],
            "peak": peak,
            "levels": base64.b64encode(levels.numpy().tobytes()).decode("ascii"),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "ImportanceMap":
        """Read what `to_dict` wrote; ValueError, KeyError or TypeError where it does not fit."""
        data = base64.b64decode(content["levels"], validate=True)
        levels = torch.frombuffer(bytearray(data), dtype=torch.uint8).float()
        shape = len(content["frames"]), int(content["rows"]), int(content["columns"])
        if levels.numel() != shape[0] * shape[1] * shape[2]:
            raise ValueError(f"a map of {levels.numel()} values; expected {shape}")
        frames, height, width = map(int, content["grid"])
        return cls(
            grid=(frames, height, width),
            frames=tuple(map(int, content["frames"])),
            values=levels.view(shape) * (float(content["peak"]) / _LEVELS),
            sample=str(content["sample"]),
        )


@dataclass(kw_only=True)
class AttentionProfile:
    """The spread of attention in one block, collected sample by sample.

    Attributes:
        masses: fp64 [len(FRACTIONS)] of each sample.
        texts: Share of the attention on text tokens, of each sample.
        tokens: Most tokens that a sample's attention has seen.
        map: None if the positions of the video tokens are unknown.
    """

    masses: list[Tensor] = field(default_factory=list)
    texts: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    map: ImportanceMap | None = None

    def add(self, sums: Tensor, *, text: slice) -> None:
        """Add S of a sample, [1, N], and where in it text tokens are."""
        self.masses.append(mass_on_top(sums)[0])
        total = sums.double().sum().clamp_min(torch.finfo(torch.float64).tiny)
        self.texts.append(sums[:, text].double().sum() / total)
        self.tokens = max(self.tokens, sums.shape[1])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: means over the samples."""
        mass, text = torch.stack(self.masses).mean(dim=0), torch.stack(self.texts).mean()
        return {
            "samples": len(self.masses),
            "tokens": self.tokens,
            "fractions": list(FRACTIONS),
            "mass": [round(value, _DIGITS) for value in mass.tolist()],
            "text_share": round(float(text), _DIGITS),
            "map": None if self.map is None else self.map.to_dict(),
        }
