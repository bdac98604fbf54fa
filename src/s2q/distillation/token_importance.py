"""Token importance: the attention that each token receives in the full-precision block (S²Q-VDiT, eq. 11).

    S_j = Σ_h Σ_i A_hij,    λ_j = λ_min + (λ_max - λ_min) · (S_j - min S) / (max S - min S)

Queries and keys are those of `F.scaled_dot_product_attention`, as attention sees them (`nn.attention_calls`); which
attention module to listen to is the family's knowledge. In joint attention the text tokens have a λ like the video
tokens, in the order in which the module joins them.

Linear attention has no softmax. Its denominators normalize a map all the same, of φ = ReLU and without positions,

    A_hij = φ(q_hi) · φ(k_hj) / Σ_l φ(q_hi) · φ(k_hl),    S_j = Σ_h φ(k_hj) · Σ_i φ(q_hi) / z_hi

with z the denominator, whose sums need no N × N map.

Legend: `B` samples, `H` heads, `N` tokens, `D` head dim.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from s2q.common.errors import InvalidInputError
from s2q.nn.attention_calls import AttentionCall, SelfAttentionMode
from s2q.ops.attention_colsum import attention_colsum

_CONSTANT = 1e-5  # spread of S, relative to its largest value, below which it is rounding noise


class CapturedSums(SelfAttentionMode):
    """Captures column sums of `F.scaled_dot_product_attention` while the module of interest is running.

    Attributes:
        calls: fp32 [B, N] of each call, in order.
        depth: Calls of the module that are running; 0 outside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Tensor] = []
        self.depth = 0

    def joined(self) -> Tensor:
        """Return the sums of all calls as one batch, fp32 [ΣB, N]; models that attend sample by sample call often."""
        if not self.calls:
            raise InvalidInputError(
                "token importance: no self-attention was captured; the attention module must have run inside the "
                "context, through F.scaled_dot_product_attention with as many keys as queries"
            )
        lengths = sorted({call.shape[1] for call in self.calls})
        if len(lengths) > 1:
            raise InvalidInputError(f"token importance: captured attention over {lengths} tokens; expected one length")
        return torch.cat(self.calls)

    def attend(self, call: AttentionCall) -> None:
        """Capture the sums of a call inside the module."""
        if self.depth == 0:
            return
        if call.is_causal or call.dropout_p:
            raise InvalidInputError(
                f"token importance: got attention with is_causal={call.is_causal}, dropout_p={call.dropout_p}; "
                "expected neither (a video model in evaluation mode)"
            )
        query, key = call.query.detach(), call.key.detach()
        if call.enable_gqa:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        self.calls.append(attention_colsum(query, key, mask=call.attn_mask, scale=call.scale))


def linear_attention_colsum(query: Tensor, key: Tensor) -> Tensor:
    """Return the column sums of the map of linear attention, fp32 [B, N], of queries and keys [B, N, H, D].

    One token attends to two: with q = (1, 0), k_1 = (3, 0) and k_2 = (1, 5) the sums are 0.75 and 0.25.
    """
    query, key = query.float().relu(), key.float().relu()
    normalizer = torch.einsum("bnhd,bhd->bnh", query, key.sum(dim=1)).clamp_min(torch.finfo(torch.float32).tiny)
    total = (query / normalizer.unsqueeze(-1)).sum(dim=1)  # [B, H, D]
    return torch.einsum("bnhd,bhd->bn", key, total)


@contextmanager
def _capture_linear_sums(attention: nn.Module) -> Iterator[CapturedSums]:
    """Capture the sums of a module of linear attention from its normalized queries and keys."""
    captured, seen = CapturedSums(), dict[str, Tensor]()

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _args, output: seen.update({name: output.detach()})

    def leave(module: nn.Module, _args: Any, _output: Any) -> None:
        query, key = (seen.pop(name).unflatten(-1, (module.heads, -1)) for name in "qk")
        captured.calls.append(linear_attention_colsum(query, key))

    handles = [
        (getattr(attention, f"norm_{name}", None) or getattr(attention, f"to_{name}")).register_forward_hook(keep(name))
        for name in "qk"
    ]
    handles.append(attention.register_forward_hook(leave))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture_column_sums(attention: nn.Module, *, linear: bool = False) -> Iterator[CapturedSums]:
    """Listen to the attention calls inside one module, `block.attn1` for example; yield what has been captured.

    `linear` is for a module of linear attention, with `to_q`, `to_k`, maybe their norms, and `heads`.

    Outputs do not change. The N × N map is not formed; see `s2q.ops.attention_colsum`. The call itself raises
    InvalidInputError if it asks for causal attention or dropout.
    """
    if linear:
        with _capture_linear_sums(attention) as sums:
            yield sums
        return
    captured = CapturedSums()

    def enter(_module: nn.Module, _args: Any) -> None:
        captured.depth += 1

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        captured.depth -= 1

    handles = [attention.register_forward_pre_hook(enter), attention.register_forward_hook(leave, always_call=True)]
    try:
        with captured:
            yield captured
    finally:
        for handle in handles:
            handle.remove()


def token_weights(sums: Tensor, *, lambda_min: float = 0.5, lambda_max: float = 1.0) -> Tensor:
    """Turn column sums S, [B, N], into loss weights, fp32 [B, N] in [λ_min, λ_max], each sample by itself (eq. 11).

    A sample whose S is constant (to within rounding, 1e-5 of its largest value) gives no reason to prefer a token; all
    of its weights are λ_max, which is the unweighted loss where λ_max = 1. A sample of one token is such a case.

    Raises:
        InvalidInputError: If S is not [B, N] with at least one token, contains NaN or infinite values, or the range is
            not 0 ≤ λ_min ≤ λ_max, 0 < λ_max.
    """
    if not 0 <= lambda_min <= lambda_max < float("inf") or lambda_max == 0:
        raise InvalidInputError(
            f"token weights: got lambda_min={lambda_min}, lambda_max={lambda_max}; expected 0 <= min <= max, 0 < max"
        )
    if sums.ndim != 2 or sums.shape[1] == 0:
        raise InvalidInputError(f"token weights: got sums of shape {list(sums.shape)}; expected [B, N]")
    if not bool(sums.isfinite().all()):
        raise InvalidInputError("token weights: the sums contain NaN or infinite values; check the model's activations")
    values = sums.double()
    lowest, highest = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    spread = highest - lowest
    constant = spread <= _CONSTANT * highest.abs()
    position = torch.where(constant, 1.0, (values - lowest) / torch.where(constant, 1.0, spread))
    return (lambda_min + (lambda_max - lambda_min) * position).clamp(lambda_min, lambda_max).float()
