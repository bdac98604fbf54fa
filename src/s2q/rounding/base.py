"""Interface of a rounding: its options, and a function from folded weights to codes."""

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
        self,
        weights: Sequence[Tensor],
        scheme: QuantScheme,
        *,
        clip_ratios: Sequence[ClipRatio],
        hessian: Tensor | None = None,
    ) -> list[tuple[RoundedWeight, dict[str, Any]]]:
        """Round weights [O, I] that read one input: to nearest, where a subclass does nothing else.

        A clip ratio in (0, 1] broadcasts to the scale; `hessian` is [I, I] of the quantized input, if it is needed.
        Returns each rounded weight, and plain data for the report.
        """
        pairs = zip(weights, clip_ratios, strict=True)
        return [(round_rtn(weight, scheme, clip_ratio=ratio), {}) for weight, ratio in pairs]


@dataclass(frozen=True, kw_only=True)
class RTN(Rounding):
    """Rounding to nearest (`round_rtn`), which has no options."""

    method: Literal["rtn"] = "rtn"
