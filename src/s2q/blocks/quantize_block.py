"""One block: from its full-precision weights to packed linears, a function of block, recipe and samples alone."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from s2q.blocks.data_free import fold_block
from s2q.blocks.reconstruct import reconstruct_block
from s2q.blocks.task import BlockTask
from s2q.common.devices import free_memory
from s2q.common.errors import ResourceError, S2QError, first_line, is_out_of_memory, located, memory_errors
from s2q.common.fingerprint import fingerprint
from s2q.common.progress import Tick
from s2q.common.run_folder import Artefact
from s2q.common.versions import package_versions
from s2q.nn import PackedLinear
from s2q.planning import LESS_MEMORY
from s2q.planning.resolve import LinearPlan

logger = logging.getLogger(__name__)

ARTEFACT_VERSION = 2
SMALL_PIECE = 1024
"""Tokens at a time, of what treats each token by itself, after a block has run out of memory."""


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """The result of quantizing a block.

    Attributes:
        layers: Packed linear, on the CPU, by full name.
        errors: ‖Ŵ − W‖² / ‖W‖² of each, by full name.
        relative_error: The same over all of them together.
        details: Measurements of `ReconstructedBlock`, without its layers; empty without calibration. After a retry,
            `memory_retry` has its reason and its settings.
    """

    layers: Mapping[str, PackedLinear]
    errors: Mapping[str, float]
    relative_error: float
    details: Mapping[str, Any] = field(default_factory=dict)


def quantize_block(task: BlockTask) -> BlockResult:
    """Quantize and pack the linears of one block; once more with less memory where that runs out.

    The retry checkpoints gradients and computes what treats each token by itself in pieces of `SMALL_PIECE` tokens.

    Raises:
        ResourceError: If the memory does not suffice for the retry either.
        S2QError: If a loss or a packed tensor is not finite, with the name of its block or layer.
    """
    ticks = _Ticks(task.progress)
    task = replace(task, progress=ticks)
    try:
        return _quantize(task)
    except ResourceError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    free_memory()  # here, where nothing refers to the first attempt any more
    small = replace(task, checkpointed=True, piece=min(task.piece, SMALL_PIECE))
    logger.warning(
        "%s: out of memory on %s (%s); again with gradient checkpointing, %d tokens at a time",
        *(task.name, task.device, reason, small.piece),
    )
    ticks.restart()
    doing = f"quantizing {task.name} on {task.device} with gradient checkpointing, {small.piece} tokens at a time"
    with memory_errors(doing, remedy=LESS_MEMORY):
        result = _quantize(small)
    retry = {"reason": reason, "gradient_checkpointing": True, "piece": small.piece}
    return replace(result, details={**result.details, "memory_retry": retry})


class _Ticks:
    """Progress that does not count what a retry repeats."""

    def __init__(self, progress: Tick) -> None:
        self.progress, self.done, self.repeated = progress, 0, 0

    def __call__(self) -> None:
        self.done += 1
        if self.done > self.repeated:
            self.progress()

    def restart(self) -> None:
        self.done, self.repeated = 0, self.done


def _quantize(task: BlockTask) -> BlockResult:
    with located(task.name):
        return _quantized(task)


def _quantized(task: BlockTask) -> BlockResult:
    details: dict[str, Any] = {}
    layers: Mapping[str, PackedLinear]
    if not task.linears:
        layers = {}
    elif task.recipe.calibrates:
        details = dict(vars(reconstruct_block(task)))
        layers = details.pop("layers")
    else:
        layers = fold_block(task)
    errors: dict[str, float] = {}
    noise, power = 0.0, 0.0
    for linear in task.linears:
        weight = task.block.get_submodule(linear.inner_name).weight.detach().to(task.device)
        deviation = layers[linear.inner_name].effective_weight(torch.float32).to(task.device).sub_(weight.float())
        linear_noise, linear_power = _square_sum(deviation), _square_sum(weight)
        _check_finite(linear.name, layers[linear.inner_name], error=linear_noise)
        errors[linear.name] = _ratio(linear_noise, linear_power)
        noise, power = noise + linear_noise, power + linear_power
    packed = {linear.name: layers[linear.inner_name] for linear in task.linears}
    return BlockResult(layers=packed, errors=errors, relative_error=_ratio(noise, power), details=details)


def _check_finite(name: str, layer: PackedLinear, *, error: float) -> None:
    """Refuse a packed linear that would return NaN or infinite values for any input."""
    for key, tensor in layer.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise S2QError(
                f"{name}: its {key} contains NaN or infinite values; check the model's weights and activations"
            )
    if not math.isfinite(error):
        raise S2QError(f"{name}: the error of its weight is {error}; check the model's weights")


def block_fingerprint(task: BlockTask, **inputs: Any) -> str:
    """Hash all that a block's result depends on: its tensors, the recipe, and `inputs`, plain data; not its index."""
    method, elsewhere = task.recipe.resolved(), ("name", "description", "skip", "attention")
    described = {
        "artefact_version": ARTEFACT_VERSION,
        "recipe": {key: value for key, value in method.items() if key not in elsewhere},
        "linears": {linear.name: [linear.scheme.to_dict(), linear.path.to_dict()] for linear in task.linears},
        "seed": task.seed,
        "mean_row": None if task.mean_row is None else task.mean_row.tolist(),
        "device": torch.device(task.device).type,
        "dtype": str(task.calibration_dtype),
        "versions": package_versions(),
        **inputs,
    }
    return fingerprint(described, [task.block])


def to_artefact(result: BlockResult, **stats: Any) -> Artefact:
    """Turn a block's result, and further figures as `stats`, into tensors and plain data for the run folder."""
    states = {name: layer.state_dict() for name, layer in result.layers.items()}
    tensors = {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}
    stats = {"weight_relative_error": result.relative_error, "layers": dict(result.errors), **result.details, **stats}
    return Artefact(tensors=tensors, stats=stats)


def from_artefact(artefact: Artefact, linears: Sequence[LinearPlan]) -> dict[str, PackedLinear]:
    """Build the packed linears of a block, by name inside it, from its artefact."""
    layers = {}
    for linear in linears:
        prefix, sizes = f"{linear.name}.", (linear.in_features, linear.out_features)
        layer = PackedLinear(*sizes, bias=linear.has_bias, scheme=linear.scheme, path=linear.path, device="meta")
        stored = artefact.tensors.items()
        tensors = {key.removeprefix(prefix): value for key, value in stored if key.startswith(prefix)}
        layer.load_state_dict(tensors, assign=True)
        layers[linear.inner_name] = layer.requires_grad_(False)
    return layers


def _square_sum(values: Tensor) -> float:
    return float(values.double().square().sum())


def _ratio(noise: float, power: float) -> float:
    return noise / power if power > 0 else 0.0
