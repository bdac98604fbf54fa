"""Backends of a model's packed linears, and groups that share the codes of their input."""

import logging

from torch import Tensor, nn

from s2q.common.errors import unknown_name
from s2q.nn.dequantized import FASTEST, runs_dequantized
from s2q.nn.packed import PackedLinear
from s2q.nn.shared_input import SharedInput, same_tensors
from s2q.ops.rescaled_int_matmul import BACKENDS

logger = logging.getLogger(__name__)

_OF_INPUT = ("input_shift", "transform_scale", "transform_left", "transform_right", "low_rank_basis", "activation_clip")


def set_backend(model: nn.Module, backend: str) -> None:
    """Choose how the packed linears of a model are computed.

    Args:
        model: Anything with packed linears, a transformer for example; may have none.
        backend: "auto", "reference", "cpu", "triton" or "fastest" (`nn.dequantized`: other results than
            those that were judged, closer to full precision, and memory for what is dequantized).

    Raises:
        InvalidInputError: If there is no such backend. Whether it can run is found at the first call.
    """
    check_backend(backend)
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for linear in linears:
        linear.backend = backend
        linear.kept.release()
    dequantized = sum(runs_dequantized(linear) for linear in linears)
    if dequantized:
        logger.info("backend 'fastest': %d of %d quantized linears run dequantized", dequantized, len(linears))


def check_backend(backend: str) -> None:
    """Check the name of a backend.

    Args:
        backend: See `set_backend`.

    Raises:
        InvalidInputError: If there is no such backend.
    """
    names = ("auto", *BACKENDS, FASTEST)
    if backend not in names:
        raise unknown_name("backend", backend, names)


def share_inputs(model: nn.Module) -> int:
    """Let sibling linears with the same transform and quantization share the codes of their input, in place.

    Siblings are the packed linears of one parent module, such as to_q, to_k and to_v of an attention. Whether they do
    read the same tensor is seen at every call (`SharedInput`), so that a wrong guess costs nothing but a comparison.

    Args:
        model: A module with packed linears.

    Returns:
        How many linears share.
    """
    count = 0
    for parent in model.modules():
        siblings = [one for one in parent.children() if isinstance(one, PackedLinear) and _on_integers(one)]
        for one in siblings:
            one.shared_input = None
        for group in _groups(siblings):
            shared: SharedInput[tuple[Tensor, Tensor, Tensor | None]] = SharedInput(len(group))
            for one in group:
                one.shared_input = shared
            count += len(group)
    return count


def _on_integers(linear: PackedLinear) -> bool:
    return linear.scheme.activation is not None and not linear.scheme.simulated


def _groups(linears: list[PackedLinear]) -> list[list[PackedLinear]]:
    """Those that would compute the same from the same input, at least two each."""
    groups: list[list[PackedLinear]] = []
    for one in linears:
        for group in groups:
            if _alike(group[0], one):
                group.append(one)
                break
        else:
            groups.append([one])
    return [group for group in groups if len(group) > 1]


def _alike(one: PackedLinear, other: PackedLinear) -> bool:
    same = (one.in_features, one.scheme.activation, one.layout) == (
        other.in_features,
        other.scheme.activation,
        other.layout,
    )
    return same and same_tensors(*([getattr(linear, name) for name in _OF_INPUT] for linear in (one, other)))
