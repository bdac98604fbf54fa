"""The transformers of a pipeline, by the names of its components.

Most pipelines have one. Where there are two (Wan 2.2 A14B), each denoises its own share of the timesteps. What is in
the first goes by its name there, "blocks.0.attn1.to_q"; what is in the second has the component's name in front,
"transformer_2.blocks.0.attn1.to_q".
"""

from typing import Any

from torch import nn

TRANSFORMERS = ("transformer", "transformer_2")
"""The components of a pipeline that may be transformers; every pipeline has the first."""


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the transformers that a pipeline has, by component.

    Args:
        pipe: A diffusers pipeline.
    """
    found = {component: getattr(pipe, component, None) for component in TRANSFORMERS}
    return {component: part for component, part in found.items() if isinstance(part, nn.Module)}


def full_name(component: str, name: str) -> str:
    """Return what something in a transformer is called among those of all transformers.

    Args:
        component: One of `TRANSFORMERS`.
        name: Its name in the transformer.
    """
    return name if component == TRANSFORMERS[0] else f"{component}.{name}"


def split_name(name: str) -> tuple[str, str]:
    """Return the component and the name in it that `full_name` was given.

    Args:
        name: What it returned.
    """
    component, _, inner = name.partition(".")
    return (component, inner) if component in TRANSFORMERS[1:] else (TRANSFORMERS[0], name)
