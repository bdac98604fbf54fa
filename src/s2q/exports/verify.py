"""Checks of an export before it gets its name: what was written, as readers dequantize it, is what s2q computes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from s2q.common.components import TRANSFORMERS, full_name
from s2q.common.errors import S2QError
from s2q.exports.target import LinearForm, Target


def check_read(read: Mapping[str, Tensor], written: Mapping[str, Tensor], *, component: str, done: str) -> None:
    """Compare tensors that were read back with those that were written: names, dtypes, shapes and all bits.

    Args:
        component: Component of the pipeline that has them.
        done: What the command does, "exported".

    Raises:
        S2QError: If a tensor is missing, added or changed.
    """
    if read.keys() != written.keys():
        first = full_name(component, sorted(read.keys() ^ written.keys())[0])
        raise S2QError(f"{first}: in the written file or in the checkpoint alone; nothing was {done}")
    for name, tensor in written.items():
        if (read[name].dtype, read[name].shape) != (tensor.dtype, tensor.shape) or not _same_bits(read[name], tensor):
            first = full_name(component, name)
            raise S2QError(f"{first}: was read back with other values; nothing was {done}, check the disk")


def verify_written(
    read: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    model: nn.Module,
    forms: Sequence[LinearForm],
    target: Target,
    *,
    component: str = TRANSFORMERS[0],
) -> float:
    """Compare tensors read from an export with those of the checkpoint's transformer.

    Returns:
        The largest difference of a dequantized weight or a bias, relative to its largest magnitude.

    Raises:
        S2QError: If a tensor is missing, added or changed, or a weight or bias differs by more than the
            tolerance of the target. A loaded checkpoint has no NaN.
    """
    check_read(read, written, component=component, done="exported")
    stored: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read.items():
        module, _, last = name.rpartition(".")
        stored.setdefault(module, {})[last] = tensor
    return max((_difference(stored[form.name], model, form, target) for form in forms), default=0.0)


def _same_bits(read: Tensor, written: Tensor) -> bool:
    first, second = (tensor.detach().reshape(-1).contiguous().view(torch.uint8) for tensor in (read, written))
    return torch.equal(first, second)


def _difference(tensors: Mapping[str, Tensor], model: nn.Module, form: LinearForm, target: Target) -> float:
    weight, bias = model.get_submodule(form.name).effective_parameters(torch.float32)  # type: ignore[operator]
    if (bias is None) != ("bias" not in tensors):
        raise S2QError(f"{form.name}: its bias is in the written file or in the checkpoint alone; nothing was exported")
    differences = {"weight": _relative(target.decode(tensors, form), weight)}
    if bias is not None:
        differences["bias"] = _relative(tensors["bias"].float(), bias)
    for name, difference in differences.items():
        if not difference <= target.tolerance(form):
            raise S2QError(
                f"{form.name}: as {target.name} reads it, its {name} differs by {difference:.1e} of its largest "
                f"magnitude; expected at most {target.tolerance(form):.1e}; nothing was exported"
            )
    return max(differences.values())


def _relative(value: Tensor, expected: Tensor) -> float:
    largest = float(expected.abs().max())
    return float((value - expected).abs().max()) / (largest or 1.0)
