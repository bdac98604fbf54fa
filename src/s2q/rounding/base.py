"""Interface of a rounding: its options, and a function from a folded weight to codes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from s2q.common.options import Options
from s2q.core.qparams import ClipRatio, RoundedWeight
from s2q.core.schemes import QuantScheme
from s2q.rounding.rtn import round_rtn


class Rounding(Options):
    """Base of the options of a rounding; a subclass is a frozen dataclass and is in `ROUNDINGS` under its method.

    Attributes:
        needs_hessian: Whether it rounds by the Hessian of the linear's input, and so needs calibration samples.
        learned: Whether distillation learns the rounding (`LearnedRounding`).
    """

    needs_hessian: ClassVar[bool] = False
    learned: ClassVar[bool] = False

    method: str

    def round(
        self, weight: Tensor, scheme: QuantScheme, *, clip_ratio: ClipRatio = None, hessian: Tensor | None = None
    ) -> tuple[RoundedWeight, dict[str, Any]]:
        """Round a weight [O, I]: to nearest, where a subclass does nothing else.

        The clip ratio in (0, 1] broadcasts to the scale; `hessian` is [I, I] of the quantized input, if it is needed.
        Returns the rounded weight, and plain data for the report.
        """
        return round_rtn(weight, scheme, clip_ratio=clip_ratio), {}

    def round_group(
        self,
        weights: Sequence[Tensor],
        scheme: QuantScheme,
        *,
        clip_ratios: Sequence[ClipRatio],
        hessian: Tensor | None = None,
    ) -> list[tuple[RoundedWeight, dict[str, Any]]]:
        """Round weights that read one input, each with its clip ratio: by `round`, unless a subclass shares work."""
        pairs = zip(weights, clip_ratios, strict=True)
        return [self.round(weight, scheme, clip_ratio=ratio, hessian=hessian) for weight, ratio in pairs]


@dataclass(frozen=True, kw_only=True)
class RTN(Rounding):
    """Rounding to nearest (`round_rtn`), which has no options."""

    method: Literal["rtn"] = "rtn"
