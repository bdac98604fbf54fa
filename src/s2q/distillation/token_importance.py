"""Token importance: the attention that each token receives in the full-precision block (S²Q-VDiT, eq. 11).

    S_j = Σ_h Σ_i A_hij,    λ_j = λ_min + (λ_max - λ_min) · (S_j - min S) / (max S - min S)

Every model family ends in `F.scaled_dot_product_attention` with queries and keys as attention sees them, so one
listener there serves all of them; which attention module to listen to is the family's knowledge. Only calls with as
many keys as queries count (self-attention and joint attention); a cross-attention inside the same module is passed
over. In joint attention the text tokens have a λ like the video tokens, in the order in which the module joins them.

Legend: `B` samples, `H` heads, `N` tokens, `D` head dim.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from s2q.common.errors import InvalidInputError
from s2q.ops.attention_colsum import attention_colsum

_CONSTANT = 1e-5  # spread of S, relative to its largest value, below which it is rounding noise


class CapturedSums(TorchFunctionMode):
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

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.depth > 0 and func is F.scaled_dot_product_attention:
            self._capture(*args, **kwargs)
        return func(*args, **kwargs)

    def _capture(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if query.shape[-2] != key.shape[-2]:
            return
        if is_causal or dropout_p:
            raise InvalidInputError(
                f"token importance: got attention with is_causal={is_causal}, dropout_p={dropout_p}; "
                "expected neither (a video model in evaluation mode)"
            )
        if enable_gqa:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        self.calls.append(attention_colsum(query.detach(), key.detach(), mask=attn_mask, scale=scale))


@contextmanager
def capture_column_sums(attention: nn.Module) -> Iterator[CapturedSums]:
    """Listen to the attention calls inside one module, `block.attn1` for example; yield what has been captured.

    Outputs do not change. The N × N map is not formed; see `s2q.ops.attention_colsum`. The call itself raises
    InvalidInputError if it asks for causal attention or dropout.
    """
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
