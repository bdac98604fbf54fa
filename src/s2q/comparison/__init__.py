"""Comparing recipes and checkpoints with full precision and with each other: quantize, evaluate, rank, show."""
