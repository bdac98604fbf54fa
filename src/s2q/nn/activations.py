"""The tanh-GELU of a quantized model, looked up on the CPU (`ops.gelu`).

It stands between quantized linears, whose products are fast enough for it to take a fifth of their time.
"""

from torch import nn

from s2q.nn.stored import StoredLinear
from s2q.ops.gelu import gelu_tanh

_OF_DIFFUSERS = "diffusers.models.activations"


def look_up_activations(model: nn.Module) -> int:
    """Let the modules of tanh-GELU in a model with packed linears look values up, in place; return how many do.

    They are PyTorch's module, and that of diffusers, which applies a linear first: the linear, and an adapter on it,
    are called as before. Modules with a hook of accelerate stay.
    """
    if not any(isinstance(module, StoredLinear) for module in model.modules()):
        return 0
    count = 0
    for module in model.modules():
        if (name := _function_of(module)) is not None and not hasattr(module, "_hf_hook"):
            setattr(module, name, gelu_tanh)
            count += 1
    return count


def restore_activations(model: nn.Module) -> None:
    """Undo `look_up_activations`."""
    for module in model.modules():
        for name in ("forward", "gelu"):
            if vars(module).get(name) is gelu_tanh:
                delattr(module, name)


def _function_of(module: nn.Module) -> str | None:
    """The method of a module that is tanh-GELU and nothing else; None if it has none."""
    if getattr(module, "approximate", None) != "tanh":
        return None
    if type(module) is nn.GELU:
        return "forward"
    is_of_diffusers = type(module).__name__ == "GELU" and type(module).__module__ == _OF_DIFFUSERS
    return "gelu" if is_of_diffusers else None
