"""Attention modules of a transformer run with int8 queries and keys (`ops.int8_attention`).

Every model family ends in `F.scaled_dot_product_attention`, so one listener there serves all of them: hooks of an
attention module replace the calls that are made inside it. They survive copies, offloading and torch.compile.

The rule: a call is replaced if it has as many keys as queries (self-attention, and joint attention with the text).
Cross-attention has a short text for keys, hence little to gain, and stays in full precision, as do calls that the op
does not take (`_obstacle`), which are logged once.

Legend: `B` samples, `H` heads, `N` queries, `M` keys, `D` head dim.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from s2q.common.errors import InvalidInputError
from s2q.common.log import log_once
from s2q.nn.dequantized import FASTEST
from s2q.ops.dispatch import backend_obstacle
from s2q.ops.int8_attention import BACKENDS, MAX_HEAD_DIM, int8_attention

logger = logging.getLogger(__name__)


class _Int8Attention(TorchFunctionMode):
    """Replaces `F.scaled_dot_product_attention` while its module runs.

    Attributes:
        backend: As `set_backend` takes it; those that the op does not have are "auto".
        reached: Whether the module has ever called `F.scaled_dot_product_attention`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backend = "auto"
        self.reached = False
        self.frame: FrameType | None = None  # of the call that it was entered for

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is Tensor.unflatten:  # torch.compile cannot trace that inside a mode
            func = torch.unflatten
        return func(*args, **kwargs)

    def _attend(
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
    ) -> Tensor:
        if not torch.compiler.is_compiling():
            self.reached = True
            if not self.is_running():
                return F.scaled_dot_product_attention(
                    query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
                )
        if query.shape[-2] == key.shape[-2] and not self._runs_plain(query):
            obstacle = "dropout" if dropout_p else "a causal mask" if is_causal else _obstacle(query, key, value)
            if obstacle is None:
                backend = self.backend if self.backend in BACKENDS else "auto"
                return int8_attention(query, key, value, attn_mask, scale=scale, backend=backend)
            if not torch.compiler.is_compiling():
                log_once(logger, logging.WARNING, "int8 attention runs in full precision: got %s", obstacle)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def is_running(self) -> bool:
        """Whether the call that it was entered for runs; an interrupt (Ctrl-C) ends that without the hook after it."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        if frame is None:
            self.frame = None  # with the tensors of that call
        return frame is not None

    def _runs_plain(self, query: Tensor) -> bool:
        """Whether backend "fastest" is to run in full precision, since there is no kernel."""
        return self.backend == FASTEST and (not query.is_cuda or backend_obstacle("triton", query) is not None)


def _obstacle(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Say in a few words why the op does not take a call; None if it does."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "a call that needs gradients"
    if not query.dtype == key.dtype == value.dtype:
        return "queries, keys and values of different dtypes"
    if query.ndim != 4 or not query.shape == key.shape == value.shape:
        return "queries, keys and values of different shapes"
    return f"heads of {query.shape[-1]} features" if query.shape[-1] > MAX_HEAD_DIM else None


class _Enter:
    """The hook before a call of the module."""

    def __init__(self, mode: _Int8Attention) -> None:
        self.mode = mode

    def __call__(self, _module: nn.Module, _args: Any) -> None:
        if not torch.compiler.is_compiling():
            _leave_interrupted()
            self.mode.frame = sys._getframe(1)
        self.mode.__enter__()  # type: ignore[no-untyped-call]


class _Leave:
    """The hook after a call, also of one that failed."""

    def __init__(self, mode: _Int8Attention) -> None:
        self.mode = mode

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        elif _get_current_function_mode() is self.mode:  # type: ignore[no-untyped-call]  # else an earlier hook failed
            self.mode.__exit__(None, None, None)
            self.mode.frame = None
            if not self.mode.reached and output is not None:
                log_once(
                    logger,
                    logging.WARNING,
                    "int8 attention has no effect: the attention backend of diffusers that is set does not call "
                    "F.scaled_dot_product_attention; call reset_attention_backend() of the transformer",
                )


def _leave_interrupted() -> None:
    """Take modes off the stack whose calls were interrupted."""
    while isinstance(mode := _get_current_function_mode(), _Int8Attention) and not mode.is_running():  # type: ignore[no-untyped-call]
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def quantize_attention(model: nn.Module, names: Iterable[str]) -> None:
    """Run the attention modules of a model that have these names in int8, in place; a second time changes nothing.

    Raises:
        InvalidInputError: If there is no module of a name.
    """
    modules = dict(model.named_modules())
    restore_attention(model)
    for name in names:
        if name not in modules:
            raise InvalidInputError(f"{type(model).__name__} has no attention module {name!r}")
        mode = _Int8Attention()
        modules[name].register_forward_pre_hook(_Enter(mode))
        modules[name].register_forward_hook(_Leave(mode), always_call=True)


def restore_attention(model: nn.Module) -> None:
    """Undo `quantize_attention`, in place, if it was called."""
    for module in model.modules():
        hooks = (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called)
        ours = (_Enter, _Leave)
        keys = [key for by_key in hooks[:2] for key, hook in by_key.items() if isinstance(hook, ours)]
        for key in keys:
            for by_key in hooks:
                by_key.pop(key, None)


def attention_modes(model: nn.Module) -> Iterator[_Int8Attention]:
    """The quantized attention of a model."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _Enter):
                yield hook.mode
