"""Benchmarks: single operations, denoising steps and calibration, each against bf16 in the same run."""

from s2q.benchmark.bench import (
    DEFAULT_MODEL,
    check_backends,
    check_names,
    make_cases,
    missing_cases,
    open_results,
    run_cases,
)
from s2q.benchmark.case import BACKENDS, OPS, Settings
from s2q.benchmark.timing import TimingOptions

__all__ = [
    "BACKENDS",
    "DEFAULT_MODEL",
    "OPS",
    "Settings",
    "TimingOptions",
    "check_backends",
    "check_names",
    "make_cases",
    "missing_cases",
    "open_results",
    "run_cases",
]
