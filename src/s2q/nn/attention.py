"""Attention modules of a transformer run with int8 queries and keys (`ops.int8_attention`).

A call of `F.scaled_dot_product_attention` inside such a module is replaced if it has as many keys as queries. Other
calls, and those that the op does not take (`_obstacle`, logged once), run in full precision.

A quantized module is of a subclass of its class, which runs each call inside a mode; `torch.nn.utils.parametrize` does
the same. A call that fails or is interrupted leaves the mode, whatever other libraries put in place of `forward`
(accelerate, group offloading) runs inside it, and copies, pickles and torch.compile find it.
"""

import functools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from s2q.common.log import log_once
from s2q.nn.attention_calls import AttentionCall, SelfAttentionMode
from s2q.nn.dequantized import FASTEST
from s2q.ops.dispatch import backend_obstacle
from s2q.ops.int8_attention import BACKENDS, MAX_HEAD_DIM, int8_attention

logger = logging.getLogger(__name__)

_NO_EFFECT = (
    "int8 attention has no effect: the attention backend of diffusers that is set does not call "
    "F.scaled_dot_product_attention; call reset_attention_backend() of the transformer"
)


class Int8AttentionMode(SelfAttentionMode):
    """Replaces the calls that the op takes.

    Attributes:
        backend: As `set_backend` takes it; those that the op does not have are "auto".
    """

    def __init__(self) -> None:
        super().__init__()
        self.backend = "auto"

    def attend(self, call: AttentionCall) -> Tensor | None:
        """Return the output with int8 queries and keys; None where the call runs in full precision."""
        if self._runs_plain(call.query):
            return None
        call = _autocast(call)
        obstacle = _obstacle(call)
        if obstacle is None:
            backend = self.backend if self.backend in BACKENDS else "auto"
            return int8_attention(call.query, call.key, call.value, call.attn_mask, scale=call.scale, backend=backend)
        if not torch.compiler.is_compiling():
            log_once(logger, logging.WARNING, "int8 attention runs in full precision: got %s", obstacle)
        return None

    def _runs_plain(self, query: Tensor) -> bool:
        """Whether backend "fastest" is to run in full precision, since there is no kernel."""
        return self.backend == FASTEST and (not query.is_cuda or backend_obstacle("triton", query) is not None)


def _autocast(call: AttentionCall) -> AttentionCall:
    """Cast the tensors of a call as autocast does for PyTorch's attention."""
    device = call.query.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return call
    dtype = torch.get_autocast_dtype(device)
    return call._replace(query=call.query.to(dtype), key=call.key.to(dtype), value=call.value.to(dtype))


def _obstacle(call: AttentionCall) -> str | None:
    """Say in a few words why the op does not take a call; None if it does."""
    query, key, value = call.query, call.key, call.value
    if call.dropout_p:
        return "dropout"
    if call.is_causal:
        return "a causal mask"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "a call that needs gradients"
    if not query.dtype == key.dtype == value.dtype:
        return "queries, keys and values of different dtypes"
    if query.ndim != 4:
        return f"queries with {query.ndim} dimensions"
    if not query.shape == key.shape == value.shape:
        return "queries, keys and values of different shapes"
    return f"heads of {query.shape[-1]} features" if query.shape[-1] > MAX_HEAD_DIM else None


class _Quantized(nn.Module):
    """Makes a subclass of a module's class run inside `int8_attention`."""

    int8_attention: Int8AttentionMode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mode = self.int8_attention
        with mode:
            output = super().__call__(*args, **kwargs)
        if not torch.compiler.is_compiling() and not mode.reached:
            log_once(logger, logging.WARNING, _NO_EFFECT)
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        return _new, (_plain_class(type(self)),), *reduced[2:]


@functools.cache
def _quantized_class(plain: type) -> type[_Quantized]:
    """The subclass of a module's class. It has the same names, by which other libraries look modules up."""
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (_Quantized, plain), names)


def _plain_class(quantized: type) -> type:
    return quantized.__bases__[1]


def _new(plain: Any) -> nn.Module:
    """An empty quantized module, for copies and pickles to fill."""
    quantized = _quantized_class(plain)
    return quantized.__new__(quantized)


def quantize_attention(model: nn.Module, names: Iterable[str]) -> None:
    """Run the attention modules of a model that have these names in int8, in place; a second time changes nothing."""
    modules = dict(model.named_modules())
    restore_attention(model)
    for name in dict.fromkeys(names):
        modules[name].int8_attention = Int8AttentionMode()
        plain: Any = type(modules[name])
        modules[name].__class__ = _quantized_class(plain)


def restore_attention(model: nn.Module) -> None:
    """Undo `quantize_attention`, in place, if it was called."""
    for module in model.modules():
        if isinstance(module, _Quantized):
            module.__class__ = _plain_class(type(module))
            del module.int8_attention


def attention_modes(model: nn.Module) -> Iterator[Int8AttentionMode]:
    """The quantized attention of a model."""
    for module in model.modules():
        if isinstance(module, _Quantized):
            yield module.int8_attention
