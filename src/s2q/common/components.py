"""The transformers of a pipeline, by the names of its components.

Most pipelines have one. Where there are two (Wan 2.2 A14B), each denoises its own share of the timesteps. What is in
the first goes by its name there, "blocks.0.attn1.to_q"; what is in the second has the component's name in front,
"transformer_2.blocks.0.attn1.to_q".
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from s2q.common.errors import InvalidInputError

TRANSFORMERS = ("transformer", "transformer_2")
"""The components of a pipeline that may be transformers; every pipeline has the first."""


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the transformers that a pipeline has, by component."""
    parts = {component: getattr(pipe, component, None) for component in TRANSFORMERS}
    return {component: part for component, part in parts.items() if isinstance(part, nn.Module)}


TEXT_ENCODER = "text_encoder"
"""Beginning of the names of a pipeline's text encoders, "text_encoder" and "text_encoder_2"."""


def text_encoders_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the text encoders of a pipeline that are models of transformers, by component."""
    return {
        component: part
        for component, part in pipe.components.items()
        if component.startswith(TEXT_ENCODER) and isinstance(part, nn.Module) and hasattr(part, "config_class")
    }


def encoder_state(encoder: Any) -> dict[str, Tensor]:
    """Return the tensors of a text encoder that its files have, by name: its state less tied duplicates."""
    absent = {*encoder.all_tied_weights_keys, *(encoder._keys_to_ignore_on_save or ())}
    return {name: tensor for name, tensor in encoder.state_dict().items() if name not in absent}


ADAPTED = "base_layer"
"""Attribute under which an adapter (peft) keeps the layer that it wraps."""

_ADAPTER_MARKS = (f".{ADAPTED}.", ".lora_A.", ".lora_B.", ".lora_magnitude_vector.")


def has_adapter(model: nn.Module) -> bool:
    """Tell whether an adapter is attached to a model, fused or not."""
    return any(ADAPTED in name.split(".") for name, _ in model.named_modules())


def adapter_tensor(names: Iterable[str]) -> str | None:
    """Return the first tensor that belongs to an adapter, or to a layer that one wraps; None if there is none."""
    return next((name for name in names if any(mark in f".{name}" for mark in _ADAPTER_MARKS)), None)


def check_no_adapter(folder: Path, names: Iterable[str]) -> None:
    """Refuse the weights of a transformer that was saved with an adapter attached, which no loader reads."""
    if (adapted := adapter_tensor(names)) is not None:
        raise InvalidInputError(
            f"{folder}: was saved with an adapter attached (has {adapted}), which no loader reads; call fuse_lora() "
            "and unload_lora_weights() on the pipeline before saving it"
        )


def pattern_of(name: str) -> str:
    """Return the name of a linear in any block: "blocks.*.attn1.to_q" of "blocks.3.attn1.to_q"."""
    component, rest = split_name(name)
    parts = ("*" if part.isdigit() and index == 1 else part for index, part in enumerate(rest.split(".")))
    return full_name(component, ".".join(parts))


def full_name(component: str, name: str) -> str:
    """Return what something in a transformer is called among those of all transformers."""
    return name if component == TRANSFORMERS[0] else f"{component}.{name}"


def split_name(name: str) -> tuple[str, str]:
    """Return the component and the name in it that `full_name` was given."""
    component, _, inner = name.partition(".")
    return (component, inner) if component in TRANSFORMERS[1:] else (TRANSFORMERS[0], name)
