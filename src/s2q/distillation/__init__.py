"""Sparse token distillation: which tokens matter (from the teacher's attention), and the loss that weights them."""

from s2q.distillation.loss import split_weights, weighted_token_loss
from s2q.distillation.token_importance import CapturedSums, capture_column_sums, token_weights

__all__ = ["CapturedSums", "capture_column_sums", "split_weights", "token_weights", "weighted_token_loss"]
