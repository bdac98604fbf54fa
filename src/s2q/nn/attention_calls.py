"""Calls of `F.scaled_dot_product_attention`, in which the attention of every model family ends.

The rule: only calls with as many keys as queries count (self-attention, and joint attention with the text).
Cross-attention has a short text for keys and is ignored.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AttentionCall(NamedTuple):
    """The arguments of a call, in the order and with the defaults of `F.scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class SelfAttentionMode(TorchFunctionMode):
    """Passes the calls that count to `attend`.

    Attributes:
        reached: Whether `F.scaled_dot_product_attention` has been called at all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reached = False

    def attend(self, call: AttentionCall) -> Tensor | None:
        """Return what replaces the output of a call; None to run it."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            if not torch.compiler.is_compiling():
                self.reached = True
            call = AttentionCall(*args, **kwargs)
            output = self.attend(call) if call.query.shape[-2] == call.key.shape[-2] else None
            if output is not None:
                return output
        if func is Tensor.unflatten:  # torch.compile cannot trace that inside a mode
            func = torch.unflatten
        return func(*args, **kwargs)
