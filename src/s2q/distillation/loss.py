"""The loss of block distillation, weighted by token (S²Q-VDiT, eq. 10).

    L = (1/n) Σ_j λ_j · ‖θ_f(x_j) - θ_q(x_j)‖²

A block may return several streams, video and text; n counts the tokens of all of them, so that a token weighs the same
whichever stream it is in. Normalisation: the squared norm is a *sum* over channels, the mean is over tokens (not
divided by Σ λ_j, so that a lower λ_min lowers the loss), and over the samples of the batch.

Example: one sample, d = 2, two video tokens off by [1, 1] and [0, 2], one text token off by [3, 0], λ = 1, ½, 1 gives
L = (1 · 2 + ½ · 4 + 1 · 9) / 3 = 13/3.

Legend: `B` samples, `N_k` tokens of stream k, `d` channels, `n` = Σ N_k.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.common.options import Options


@dataclass(frozen=True, kw_only=True)
class Loss(Options):
    """Token weights of distillation (eq. 10 and 11), and its temporal loss.

    Attributes:
        weighting: "attention" weights a token by how much attention it gets.
        lambda_min: Weight of the token that gets the least.
        lambda_max: Weight of the one that gets the most.
        temporal: Weight of the loss on the similarities of frames (`s2q.distillation.temporal`); 0 for none.
    """

    weighting: Literal["uniform", "attention"] = "uniform"
    lambda_min: float = field(default=0.5, metadata={"ge": 0})
    lambda_max: float = field(default=1.0, metadata={"gt": 0})
    temporal: float = field(default=0.0, metadata={"ge": 0})

    def __post_init__(self) -> None:
        """Check that the weights are in order."""
        super().__post_init__()
        if self.lambda_min > self.lambda_max:
            raise self.invalid(f"lambda_min={self.lambda_min} is above lambda_max={self.lambda_max}; lower it")


def weighted_token_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, weights: Sequence[Tensor] | None = None
) -> Tensor:
    """Compute eq. 10 over all streams that a block returns, in fp32; return a scalar.

    Args:
        student: θ_q, [B, N_k, d] for each stream; differentiable.
        teacher: θ_f, the same shapes; no gradient goes there.
        weights: λ, [B, N_k] for each stream; None weights every token with 1.

    Raises:
        InvalidInputError: If the streams differ in number or shape, or there is none.
    """
    if not student or len(student) != len(teacher) or (weights is not None and len(weights) != len(student)):
        count = "no" if weights is None else len(weights)
        raise InvalidInputError(
            f"token loss: got {len(student)} student and {len(teacher)} teacher streams with {count} weights; "
            "expected as many of each"
        )
    total = torch.zeros((), dtype=torch.float32, device=student[0].device)
    tokens = 0
    for index, (output, target) in enumerate(zip(student, teacher, strict=True)):
        _check_stream(index, output, target, None if weights is None else weights[index])
        squared = (output.float() - target.detach().float()).square().sum(dim=-1)
        if weights is not None:
            squared = squared * weights[index].to(squared)
        total = total + squared.sum()
        tokens += squared.numel()
    return total / tokens


def _check_stream(index: int, student: Tensor, teacher: Tensor, weights: Tensor | None) -> None:
    if student.shape != teacher.shape or student.ndim != 3 or student.numel() == 0:
        raise InvalidInputError(
            f"token loss, stream {index}: got {list(student.shape)} and {list(teacher.shape)}; expected [B, N, d] twice"
        )
    if weights is not None and weights.shape != student.shape[:2]:
        raise InvalidInputError(
            f"token loss, stream {index}: got weights {list(weights.shape)}; expected {list(student.shape[:2])}"
        )
