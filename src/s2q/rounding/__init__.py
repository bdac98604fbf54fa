"""Floor 2: from a weight to its codes. A method is a function; `ROUNDINGS` names them for the recipes."""

from collections.abc import Callable

from s2q.core.qparams import RoundedWeight
from s2q.rounding.rtn import round_rtn

ROUNDINGS: dict[str, Callable[..., RoundedWeight]] = {"rtn": round_rtn}

__all__ = ["ROUNDINGS", "RoundedWeight", "round_rtn"]
