"""Dynamic quantization of activations, one scale per token."""

from s2q.ops.quantize_per_token.reference import quantize_per_token

__all__ = ["quantize_per_token"]
