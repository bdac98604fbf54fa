"""Sparse token distillation: which tokens matter (from the teacher's attention), their loss, one block."""

from s2q.distillation.block import (
    PIECE,
    BlockSample,
    DistillationOptions,
    DistillationReport,
    Samples,
    block_loss,
    checkpointed,
    distil,
    evaluations,
)
from s2q.distillation.loss import split_weights, weighted_token_loss
from s2q.distillation.temporal import temporal_loss
from s2q.distillation.token_importance import CapturedSums, capture_column_sums, token_weights

__all__ = [
    "PIECE",
    "BlockSample",
    "CapturedSums",
    "DistillationOptions",
    "DistillationReport",
    "Samples",
    "block_loss",
    "capture_column_sums",
    "checkpointed",
    "distil",
    "evaluations",
    "split_weights",
    "temporal_loss",
    "token_weights",
    "weighted_token_loss",
]
