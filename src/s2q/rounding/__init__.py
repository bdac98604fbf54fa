"""Floor 2: from a weight to its codes. A method is a function; `ROUNDINGS` names those that need the weight alone.

GPTQ needs the Hessian of the layer's input besides, and reports what it did: `round_gptq`.
"""

from collections.abc import Callable

from s2q.core.qparams import RoundedWeight
from s2q.rounding.gptq import GPTQOptions, GPTQReport, round_gptq
from s2q.rounding.hessian import HessianAccumulator, hessian_error
from s2q.rounding.rtn import round_rtn

ROUNDINGS: dict[str, Callable[..., RoundedWeight]] = {"rtn": round_rtn}

__all__ = [
    "ROUNDINGS",
    "GPTQOptions",
    "GPTQReport",
    "HessianAccumulator",
    "RoundedWeight",
    "hessian_error",
    "round_gptq",
    "round_rtn",
]
