"""Parts of a model that stay in fp32 in whatever dtype it is loaded: those that its class in diffusers names."""

from collections.abc import Set as AbstractSet

import torch
from torch import nn


def kept_in_fp32(model: nn.Module | type[nn.Module]) -> frozenset[str]:
    """Return the names of modules that a model, or its class, keeps in fp32: "norm1", "scale_shift_table"."""
    return frozenset(getattr(model, "_keep_in_fp32_modules", None) or ())


def is_within(name: str, kept: AbstractSet[str]) -> bool:
    """Whether a dotted name of a module or tensor is one of the named modules or lies in one."""
    return not kept.isdisjoint(name.split("."))


def convert(module: nn.Module, dtype: torch.dtype, *, kept: AbstractSet[str]) -> None:
    """Bring the parameters of a module to a dtype, in place; those within the named modules to fp32."""
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if is_within(name, kept) else dtype)
