"""Benchmarks: single operations, denoising steps and calibration, each against bf16 in the same run."""
