"""From a weight to its codes. `ROUNDINGS` has the options of each method by name.

What is learned with the output of a block is a module meanwhile: `LearnedRounding`.
"""

from s2q.rounding.adaround import AdaRound, LearnedRounding, penalize, roundings_of, soft_rounding
from s2q.rounding.base import RTN, Rounding
from s2q.rounding.gptq import GPTQ
from s2q.rounding.hessian import HessianAccumulator
from s2q.rounding.rtn import round_rtn
from s2q.rounding.table import round_table

ROUNDINGS: dict[str, type[Rounding]] = {"rtn": RTN, "gptq": GPTQ, "adaround": AdaRound}

__all__ = [
    "GPTQ",
    "ROUNDINGS",
    "RTN",
    "AdaRound",
    "HessianAccumulator",
    "LearnedRounding",
    "Rounding",
    "penalize",
    "round_rtn",
    "round_table",
    "roundings_of",
    "soft_rounding",
]
