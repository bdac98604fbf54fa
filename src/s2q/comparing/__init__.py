"""Comparing recipes and checkpoints with full precision and with each other: quantize, evaluate, rank, show."""

from s2q.comparing.run import compare
from s2q.comparing.setup import CompareOptions

__all__ = ["CompareOptions", "compare"]
