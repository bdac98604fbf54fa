"""From a weight to its codes. A method is a function; `ROUNDINGS` names those that need the weight alone.

GPTQ needs the Hessian of the layer's input besides, and reports what it did: `round_gptq`. What is learned with the
output of a block is a module while it is: `LearnedRounding`.
"""

from collections.abc import Callable

from s2q.core.qparams import RoundedWeight
from s2q.rounding.adaround import AdaRoundOptions, LearnedRounding, penalize, roundings_of, soft_rounding
from s2q.rounding.gptq import GPTQOptions, GPTQReport, round_gptq
from s2q.rounding.hessian import HessianAccumulator, hessian_error
from s2q.rounding.rtn import round_rtn

ROUNDINGS: dict[str, Callable[..., RoundedWeight]] = {"rtn": round_rtn}

__all__ = [
    "ROUNDINGS",
    "AdaRoundOptions",
    "GPTQOptions",
    "GPTQReport",
    "HessianAccumulator",
    "LearnedRounding",
    "RoundedWeight",
    "hessian_error",
    "penalize",
    "round_gptq",
    "round_rtn",
    "roundings_of",
    "soft_rounding",
]
