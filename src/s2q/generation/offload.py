"""Components of a pipeline on a device while they are called, for devices that do not hold all of them (offload).

    none     all components are on the device for the whole time
    model    one at a time: text encoders, transformers and autoencoder come when they are called and go when another is
    group    the same, and of a transformer or a text encoder one block at a time; the next one is copied meanwhile

Results do not depend on it. Unlike `enable_model_cpu_offload` and group offloading of diffusers, which make copies of
the weights in host memory, it reads them where they are, mapped from the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from s2q.common.components import text_encoders_of, transformers_of
from s2q.common.devices import device_memory_bytes
from s2q.common.errors import InvalidInputError
from s2q.common.memory import Offload, on_device, outside, paged, tensors_of, to_device
from s2q.models import block_names, family_of

_ROOM = 0.3
"""Of a device's memory, for activations of a video whose size is not known yet."""


def model_parts(pipe: Any) -> dict[str, nn.Module]:
    """Return the components of a pipeline that have weights, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def pages_of(pipe: Any) -> dict[str, list[nn.Module]]:
    """Return the blocks that group offload copies one at a time, by component: of transformers and text encoders."""
    pages = {
        name: [transformer.get_submodule(block) for block in block_names(transformer, family_of(transformer))]
        for name, transformer in transformers_of(pipe).items()
    }
    return pages | {name: layers_of(encoder) for name, encoder in text_encoders_of(pipe).items()}


def layers_of(encoder: nn.Module) -> list[nn.Module]:
    """Return the layers of a text encoder: the members of its outermost lists."""
    lists = [name for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [layer for name in outer for layer in encoder.get_submodule(name).children()]


def fitting_offload(pipe: Any, device: str, *, sharing: int = 1) -> Offload:
    """Return the first way to have a pipeline on a device that leaves `_ROOM` of its memory to what is computed.

    As many processes as `sharing` says have one there, each with its part of the memory.
    """
    memory = None if torch.device(device).type == "cpu" else device_memory_bytes(device)
    sizes = [sum(tensor.nbytes for tensor in tensors_of(part)) for part in model_parts(pipe).values()]
    limit = None if memory is None else (1 - _ROOM) * memory / sharing
    if limit is None or sum(sizes) <= limit:
        return "none"
    return "model" if max(sizes) <= limit else "group"


@contextmanager
def pipeline_on_device(pipe: Any, device: str, *, offload: Offload, mapped: bool = False) -> Iterator[None]:
    """Have the components of a pipeline on a device for a while, together or in turn; none is changed.

    Args:
        mapped: Whether the weights are mapped from files, so that they need not stay in host memory beside copies.
    """
    parts = model_parts(pipe)
    if offload == "none":
        modules = (module for part in parts.values() for module in part.modules())
        with on_device(modules, device, offload=mapped):
            yield
        return
    turns = offload_pipeline(pipe, device, offload=offload)
    try:
        yield
    finally:
        turns.leave()
        for part in parts.values():
            remove_hook_from_module(part)


def offload_pipeline(pipe: Any, device: str, *, offload: Offload) -> Turns:
    """Have the components of a pipeline come to a device in turn from now on, by "model" or by "group" offload.

    Raises:
        InvalidInputError: If diffusers or accelerate offloads it already.
    """
    parts = model_parts(pipe)
    for name, part in parts.items():
        if any(hasattr(module, "_hf_hook") for module in part.modules()):
            raise InvalidInputError(
                f"{type(pipe).__name__}: its {name} is offloaded by diffusers; load the pipeline without offloading"
            )
    turns = Turns(device, pages_of(pipe) if offload == "group" else {})
    for name, part in parts.items():
        add_hook_to_module(part, _Arrival(turns, name))
    return turns


def is_offloaded(pipe: Any) -> bool:
    """Tell whether the components of a pipeline come to a device in turn (`offload_pipeline`)."""
    return any(isinstance(getattr(part, "_hf_hook", None), _Arrival) for part in model_parts(pipe).values())


@contextmanager
def leaving_device(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Take from the device, in the end, what the pipelines of components have there, if they are offloaded."""
    try:
        yield
    finally:
        for part in parts:
            hook = getattr(part, "_hf_hook", None)
            if isinstance(hook, _Arrival):
                hook.turns.leave()


class Turns:
    """The component of a pipeline that is on a device.

    Args:
        pages: Blocks to copy one at a time, by component.
    """

    def __init__(self, device: str, pages: Mapping[str, list[nn.Module]]) -> None:
        self.device, self._pages = device, pages
        self._present: str | None = None
        self._copies = ExitStack()

    def enter(self, name: str, part: nn.Module) -> None:
        """Have a component on the device, in place of the one that is there."""
        if name == self._present:
            return
        self.leave()
        blocks = self._pages.get(name, [])
        with ExitStack() as stack:
            stack.enter_context(on_device(outside(part, blocks), self.device))
            stack.enter_context(paged(blocks, self.device))
            self._copies = stack.pop_all()
        self._present = name

    def leave(self) -> None:
        """Take the component from the device."""
        self._present = None
        self._copies.close()


class _Arrival(ModelHook):  # type: ignore[misc]
    """Hook of a component: when a pipeline calls it, it comes to the device with its arguments."""

    def __init__(self, turns: Turns, name: str) -> None:
        self.turns, self.name = turns, name
        self.execution_device = torch.device(turns.device)  # where the pipeline makes its tensors

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.turns.enter(self.name, module)
        return to_device((args, kwargs), self.turns.device)
