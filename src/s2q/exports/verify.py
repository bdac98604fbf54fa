"""Checks of an export before it gets its name: what was written, as readers dequantize it, is what s2q computes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from s2q.common.errors import S2QError
from s2q.exports.target import LinearForm, Target


def verify_written(
    read: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    model: nn.Module,
    forms: Sequence[LinearForm],
    target: Target,
) -> float:
    """Compare tensors read from an export with those of the checkpoint's transformer.

    Returns:
        The largest difference of a dequantized weight, relative to the largest magnitude of its linear.

    Raises:
        S2QError: If a tensor is missing, added or changed, or a weight differs by more than the target's tolerance.
    """
    if read.keys() != written.keys():
        first = sorted(read.keys() ^ written.keys())[0]
        raise S2QError(f"{first}: in the written file or in the checkpoint alone; nothing was exported")
    for name, tensor in written.items():
        if read[name].dtype != tensor.dtype or not torch.equal(read[name], tensor):
            raise S2QError(f"{name}: was read back with other values; nothing was exported, check the disk")
    return max((_difference(read, model, form, target) for form in forms), default=0.0)


def _difference(read: Mapping[str, Tensor], model: nn.Module, form: LinearForm, target: Target) -> float:
    prefix = f"{form.name}."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in read.items() if name.startswith(prefix)}
    expected = model.get_submodule(form.name).effective_weight(torch.float32)  # type: ignore[operator]
    largest = float(expected.abs().max())
    difference = float((target.decode(tensors, form) - expected).abs().max()) / (largest or 1.0)
    if not difference <= target.tolerance:
        raise S2QError(
            f"{form.name}: as {target.name} reads it, its weight differs by {difference:.1e} of its largest magnitude; "
            f"expected at most {target.tolerance:.1e}; nothing was exported"
        )
    return difference
