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
        The largest difference of a dequantized weight or a bias, relative to its largest magnitude.

    Raises:
        S2QError: If a tensor is missing, added or changed, or a weight or bias differs by more than the
            tolerance of the target. A loaded checkpoint has no NaN.
    """
    if read.keys() != written.keys():
        first = sorted(read.keys() ^ written.keys())[0]
        raise S2QError(f"{first}: in the written file or in the checkpoint alone; nothing was exported")
    for name, tensor in written.items():
        if read[name].dtype != tensor.dtype or not torch.equal(read[name], tensor):
            raise S2QError(f"{name}: was read back with other values; nothing was exported, check the disk")
    stored: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read.items():
        module, _, last = name.rpartition(".")
        stored.setdefault(module, {})[last] = tensor
    return max((_difference(stored[form.name], model, form, target) for form in forms), default=0.0)


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
