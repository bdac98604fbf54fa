"""How much attention each token receives, without the attention map."""

from s2q.ops.attention_colsum.reference import attention_colsum

__all__ = ["attention_colsum"]
