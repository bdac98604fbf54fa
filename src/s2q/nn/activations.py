"""Activations of a quantized model, looked up on the CPU (`ops.bf16_table`).

They stand between quantized linears, whose products are fast enough for an activation to take a tenth of their time.
"""

import functools

from torch import nn

from s2q.nn.stored import StoredLinear
from s2q.ops.bf16_table import looked_up


def look_up_activations(model: nn.Module) -> int:
    """Let the GELU and SiLU modules of a model with packed linears look values up, in place; return how many do.

    They are PyTorch's modules, and those of diffusers that apply a linear and then GELU: a layer inside of these, an
    adapter say, is called as before.
    """
    if not any(isinstance(module, StoredLinear) for module in model.modules()):
        return 0
    count = 0
    for module in model.modules():
        if type(module) is nn.SiLU and not module.inplace:
            module.forward = functools.partial(looked_up, "silu")  # type: ignore[method-assign]
        elif type(module) is nn.GELU:
            module.forward = functools.partial(looked_up, _gelu(module.approximate))  # type: ignore[method-assign]
        elif type(module).__name__ == "GELU" and isinstance(getattr(module, "proj", None), nn.Linear):
            module.gelu = functools.partial(looked_up, _gelu(str(module.approximate)))  # type: ignore[assignment]
        else:
            continue
        count += 1
    return count


def _gelu(approximate: str) -> str:
    return "gelu tanh" if approximate == "tanh" else "gelu"
