"""Functions of one bf16 number on the CPU by a table of all 65,536 of them, with PyTorch's bits.

PyTorch computes GELU and SiLU of bf16 in fp32: 2 ns a value and thread, a tenth of the product before it. A bf16 number
has 65,536 values, so PyTorch itself makes the table, once; the values of an activation are near each other, and their
part of it stays in the first cache.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from s2q.common.torch_state import in_fresh_torch_state
from s2q.ops.fused import passes

LEAST = 1 << 16
"""Values of a tensor that is looked up, at least."""

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
"""Functions that have a table, by name."""


def looked_up(name: str, x: Tensor) -> Tensor:
    """Apply a function of `FUNCTIONS` to a tensor: by its table where that is faster, else by PyTorch."""
    is_plain = type(x) is Tensor and x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() >= LEAST
    if is_plain and not torch.compiler.is_compiling() and not (torch.is_grad_enabled() and x.requires_grad):
        fused = passes()
        if fused is not None:
            given = x.contiguous()
            out = torch.empty_like(given)
            columns = x.shape[-1]
            fused.look_up(given.view(-1, columns), _table(name), out=out.view(-1, columns))
            return out
    return FUNCTIONS[name](x)


@functools.cache
@in_fresh_torch_state
@torch.no_grad()
def _table(name: str) -> Tensor:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device="cpu").to(torch.int16)
    values = FUNCTIONS[name](bits.view(torch.bfloat16))
    return values.roll(1 << 15)  # by bits without a sign: 0 to 65,535
