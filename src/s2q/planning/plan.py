"""Plan of a run before any compute: every block linear, its scheme, its bytes on disk; totals; stages.

Everything is computed on the meta device. The bytes are those of the tensors in the safetensors files, exactly.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s2q.common.arguments import device_name, model_argument, offload_name, optional, parse_dtype, word
from s2q.common.components import TRANSFORMERS, full_name
from s2q.common.device_names import is_device_name, kind_of_device
from s2q.common.devices import default_dtype
from s2q.common.errors import InvalidInputError, ResourceError, memory_errors
from s2q.common.fp32_modules import is_within, kept_in_fp32
from s2q.common.log import log_once
from s2q.common.memory import Offload
from s2q.common.records import PLAN_VERSION
from s2q.common.torch_state import in_fresh_torch_state
from s2q.core.storage import BF16_BYTES, EncoderStorage, LinearStorage, parse_bytes
from s2q.models import BlockLinear, ModelSource, family_of, resolve_model
from s2q.models.source import check_full_precision
from s2q.models.synthetic import SYNTHETIC_PREFIX, synthetic_model
from s2q.planning.allocation import PlannedAllocation, reduced, with_allocation
from s2q.planning.cost import (
    BlockShape,
    CalibrationCost,
    Machine,
    Workload,
    block_shapes,
    calibration_cost,
    this_machine,
)
from s2q.planning.estimate import TimeEstimate, stage_work, time_estimate
from s2q.planning.flop import Work
from s2q.planning.gpus import Rates, gpu
from s2q.planning.peaks import fitting_tokens, stage_peaks, transformer_parts
from s2q.planning.resolve import LinearPlan, quantized_attention, recipe_linears, resolve
from s2q.planning.text_encoders import plan_encoders
from s2q.planning.widths import PlannedWidths, device_products, planned_widths
from s2q.planning.workload import workload_of_source, workload_of_synthetic
from s2q.recipes.load import load_recipe
from s2q.recipes.schema import Recipe

_SMALLER = "calibrate on smaller videos (calibration.num_frames, calibration.height, calibration.width of the recipe)"
LESS_MEMORY = f"{_SMALLER} or in bf16 (calibration.precision=bfloat16), or use a larger device"
"""Remedy for lack of memory while calibrating."""

_DTYPE_SCHEMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One stage of the run.

    Attributes:
        peak_memory_bytes: Most that the run has taken of the device's memory by the end of the stage; in host memory,
            the whole process counts. None if unknown.
        seconds: How long it takes, measured on a slice of the run or estimated for a GPU; None if it is neither.
        flop: FLOP that it takes, counted; None if they are not.
        traffic_bytes: Bytes that its elementwise operations move, likewise.
    """

    name: str
    peak_memory_bytes: int | None
    seconds: float | None
    flop: float | None = None
    traffic_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class PlannedAttention:
    """Attention that the checkpoint will compute with quantized queries and keys; blocks are calibrated without.

    Attributes:
        modules: How many attention modules.
        quantized_flop: Of a call of all transformers for the calibration videos, at the rate of these bits: products of
            queries and keys. None for recipes that do not calibrate.
        flop: Of all attention in such a call, likewise.
    """

    num_bits: int
    modules: int
    quantized_flop: float | None
    flop: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run.

    Attributes:
        storage: Bytes of the whole transformer, of both where there are two: `full_precision_bytes` (in bf16),
            `quantized_bytes` (on disk; before an allocation the most that its budget allows), `ratio`.
        layers: Every linear of the blocks in order; names of those in a second transformer begin with "transformer_2.".
            What will be allocated in the run is "≤ w8a4", with the bytes of the largest candidate.
        simulated: Whether some of them will be computed in floating point, for want of an integer kernel.
        device: Where the run is planned for, and its memory in bytes, None if that is not known.
        calibration: What calibrating blocks takes; None for recipes that do not calibrate, or if it is not known.
        allocation: What the run allocates; None for recipes that do not.
        attention: What the recipe quantizes of the attention; None if nothing.
        estimate: Its time, if it is planned for a GPU by name; None otherwise.
        widths: The recipe's width among those that the device multiplies; None if these are not known.
        text_encoders: Those that the recipe quantizes, with their bytes; `storage` does not count them.
        offload: How the calibration videos are generated, "none", "model" or "group" (`generation.offload`); None as
            for `calibration`.
        fitting_tokens: Where the run does not fit the device, the most video tokens that would; None if none do.
        generation: How the calibration videos are generated: sizes, steps, scheduler and its shift, guidance and its
            `branches`, what else is set; None as for `calibration`.
    """

    schema_version: int
    model: str
    recipe: str
    storage: Mapping[str, int | float]
    stages: tuple[PlannedStage, ...]
    layers: tuple[LinearStorage, ...]
    simulated: bool
    device: Mapping[str, str | int | None]
    calibration: CalibrationCost | None
    allocation: PlannedAllocation | None
    attention: PlannedAttention | None = None
    estimate: TimeEstimate | None = None
    widths: PlannedWidths | None = None
    generation: Mapping[str, Any] | None = None
    text_encoders: tuple[EncoderStorage, ...] = ()
    offload: Offload | None = None
    fitting_tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


@memory_errors("planning", remedy="free some")
@in_fresh_torch_state
def plan(
    model: str | Path | ModelSource,
    *,
    recipe: str | Path | Mapping[str, Any] | Recipe = "s2q-w4a6",
    overrides: Sequence[str] = (),
    device: str | torch.device | int = "cpu",
    device_memory: int | str | None = None,
    memory_budget: int | str | None = None,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    offload: str = "auto",
) -> Plan:
    """Plan a run without loading weights.

    Args:
        model: Embedded name, folder, Hub id ("organisation/name@revision"), a resolved source, or the dimensions of a
            published model without its weights, "synthetic:cogvideox-5b".
        recipe: Name, file, contents, or a validated recipe.
        overrides: Changes to the recipe, "key=value" each.
        device: "cpu", "cuda", "cuda:N"; or the name of a GPU that need not be here, "h100", whose time is estimated.
        device_memory: Memory of a device that need not be here, "24GB"; None takes that of this machine's.
        memory_budget: Host memory for the activations of calibration; see `s2q.quantize`.
        dtype: Compute dtype; None is the stored one, or float32 where the device emulates that.
        variant: Variant of the weights, "fp16".
        offload: How calibration videos are generated on a device that is too small; see `s2q.quantize`.

    Returns:
        Layers, storage, memory and stages of the run.

    Raises:
        InvalidInputError: If the model, recipe or device is unknown, model and recipe do not fit, or the model is
            already quantized.
        ResourceError: If the device is not there.
    """
    rates = None
    if isinstance(device, str) and not is_device_name(device) and kind_of_device(device) is None:
        rates = gpu(device)
        device, device_memory = "cuda", rates.memory_bytes if device_memory is None else device_memory
    memory = None if device_memory is None else parse_bytes(device_memory, option="device_memory")
    device = device_name(device, check=memory is None)
    machine = this_machine(
        device,
        memory_bytes=memory,
        memory_budget=None if memory_budget is None else parse_bytes(memory_budget, option="memory_budget"),
        offload=offload_name(offload, device=device),
    )
    validated = load_recipe(recipe, overrides=overrides)
    return plan_model(model, validated, machine=machine, dtype=dtype, variant=variant, rates=rates)


@in_fresh_torch_state
def plan_model(
    model: str | Path | ModelSource,
    recipe: Recipe,
    *,
    machine: Machine,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    rates: Rates | None = None,
) -> Plan:
    """Plan a run on a machine that is already described; see `plan`."""
    model, dtype, variant = model_argument("model", model), parse_dtype(dtype), optional(word, "variant", variant)
    text_encoders: tuple[EncoderStorage, ...] = ()
    if isinstance(model, str) and model.startswith(SYNTHETIC_PREFIX):
        synthetic = synthetic_model(model)
        name, stored = synthetic.label, dtype or torch.bfloat16
        transformers = dict.fromkeys(TRANSFORMERS[: synthetic.transformers], _synthetic_transformer(synthetic.name))
        workload = workload_of_synthetic(synthetic, recipe)
        if recipe.text_encoder is not None:
            log_once(
                logger, logging.WARNING, "%s has no text encoder; text_encoder of the recipe is not counted", model
            )
    else:
        source = resolve_model(model, variant=variant)
        check_full_precision(source)
        for config in source.transformer_configs.values():
            family_of(config["_class_name"])  # a clear error before the class is looked up
        name, stored = source.name, dtype or source.weights_dtype() or torch.bfloat16
        transformers = source.meta_transformers()
        workload = workload_of_source(source, recipe, transformers=transformers)
        if recipe.text_encoder is not None:
            text_encoders = plan_encoders(recipe, source.meta_text_encoders(), dtype=stored)
    linears = recipe_linears(recipe, transformers)
    return plan_transformers(
        transformers,
        recipe,
        resolve(recipe, linears, frames=None if workload is None else workload.frames),
        model=name,
        sizes=tensor_sizes(transformers, stored),
        dtype=stored,
        compute_dtype=default_dtype(stored, machine.device) if dtype is None and recipe.calibrates else None,
        workload=workload,
        machine=machine,
        rates=rates,
        attention=quantized_attention(recipe, transformers),
        text_encoders=text_encoders,
    )


@functools.cache
def _synthetic_transformer(name: str) -> nn.Module:
    """On the meta device, without memory of its own; comparisons and tables plan one again and again."""
    return synthetic_model(name).meta_transformer()


def plan_transformers(
    transformers: Mapping[str, nn.Module],
    recipe: Recipe,
    linears: Sequence[LinearPlan],
    *,
    model: str,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
    workload: Workload | None = None,
    machine: Machine | None = None,
    rates: Rates | None = None,
    attention: Sequence[str] = (),
    text_encoders: tuple[EncoderStorage, ...] = (),
) -> Plan:
    """Plan a run on the transformers of a pipeline.

    Args:
        linears: What `resolve` makes of their linears.
        sizes: Bytes of each tensor of their state dicts as the checkpoint will store it, by full name.
        dtype: Dtype of their block linears there.
        compute_dtype: Dtype that they are loaded in for the run; None is the same.
        machine: Where the run is to be; None is the CPU of this machine.
        rates: Of the GPU that its time is estimated for; None estimates none.
        attention: Full names of the attention modules that the recipe quantizes, `quantized_attention`.
        text_encoders: What `plan_encoders` returned.
    """
    if recipe.calibrates and recipe.calibration.trajectory_2 == "quantized" and len(transformers) == 1:
        raise InvalidInputError(
            f"{model}: calibration.trajectory_2=quantized needs two transformers (Wan 2.2 A14B), got one; omit it"
        )
    layers = _planned_layers(recipe, transformers, linears, sizes=sizes, dtype=dtype)
    compute_dtype, machine = compute_dtype or dtype, machine or this_machine("cpu")
    now = sizes if compute_dtype == dtype else tensor_sizes(transformers, compute_dtype)
    parts = list(transformer_parts(transformers, now).values())
    layers, storage, allocation = with_allocation(recipe, linears, layers, _storage(transformers, layers, sizes))
    shapes, cost = [], None
    if recipe.calibrates and workload is not None:
        shapes = block_shapes(transformers, linears, workload)
        cost = calibration_cost(shapes, recipe, workload=workload, machine=machine, dtype=compute_dtype)
    peaks = stage_peaks(
        recipe, shapes, cost, layers, transformers=parts, workload=workload, machine=machine, dtype=compute_dtype
    )
    fitting = None
    if workload is not None and not peaks.fit(machine):
        fitting = fitting_tokens(
            recipe, transformers, linears, parts=parts, workload=workload, machine=machine, dtype=compute_dtype
        )
    work = stage_work(
        recipe,
        linears,
        shapes,
        cost,
        workload=workload,
        dtype=compute_dtype,
        transformers=tuple(transformers),
        chained=all(family_of(transformer).chained for transformer in transformers.values()),
        paged_bytes=sum(part.whole for part in parts) // len(parts) if peaks.offload == "group" else 0,
    )
    products = device_products(machine.device, capability=None if rates is None else rates.capability)
    return Plan(
        schema_version=PLAN_VERSION,
        model=model,
        recipe=recipe.name,
        storage=storage,
        stages=tuple(_stage(name, peak, work.get(name), rates) for name, peak in peaks.stages.items()),
        layers=layers,
        simulated=any(linear.simulated for linear in linears),
        device={"name": machine.device if rates is None else rates.name, "memory_bytes": machine.memory_bytes},
        calibration=cost,
        allocation=allocation,
        attention=_planned_attention(recipe, attention, shapes, workload),
        estimate=None if rates is None or not work else time_estimate(work, rates),
        widths=None if products is None else planned_widths(recipe, products),
        generation=None if workload is None else {**workload.generation, "branches": workload.branches},
        text_encoders=text_encoders,
        offload=peaks.offload,
        fitting_tokens=fitting,
    )


def _planned_layers(
    recipe: Recipe,
    transformers: Mapping[str, nn.Module],
    linears: Sequence[LinearPlan],
    *,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
) -> tuple[LinearStorage, ...]:
    quantized = {linear.name: linear for linear in linears}
    every = recipe_linears(recipe, transformers)
    return tuple(_planned_layer(quantized.get(linear.name, linear), sizes=sizes, dtype=dtype) for linear in every)


def _storage(
    transformers: Mapping[str, nn.Module], layers: Sequence[LinearStorage], sizes: Mapping[str, int]
) -> dict[str, int | float]:
    inside = {f"{layer.name}.{tensor}" for layer in layers for tensor in ("weight", "bias")}
    quantized = sum(layer.bytes for layer in layers) + sum(size for name, size in sizes.items() if name not in inside)
    states = [transformer.state_dict() for transformer in transformers.values()]
    full = sum(tensor.numel() for state in states for tensor in state.values()) * BF16_BYTES
    return {"full_precision_bytes": full, "quantized_bytes": quantized, "ratio": full / quantized}


def _planned_attention(
    recipe: Recipe, names: Sequence[str], shapes: Sequence[BlockShape], workload: Workload | None
) -> PlannedAttention | None:
    if recipe.attention is None or not names:
        return None
    quantized = flop = None
    if workload is not None and shapes:
        sizes = [size for shape in shapes for size in shape.attention]
        flop = workload.rows * sum(4.0 * queries * keys * width for queries, keys, width in sizes)
        alike = [2.0 * queries * keys * width for queries, keys, width in sizes if queries == keys]
        quantized = workload.rows * sum(alike) * len(names) / len(alike)
    return PlannedAttention(num_bits=recipe.attention.num_bits, modules=len(names), quantized_flop=quantized, flop=flop)


def plan_allocated(planned: Plan, before: Sequence[LinearPlan], after: Sequence[LinearPlan]) -> Plan:
    """Return a plan with what the run has allocated: the bytes of these layers and of the whole, exactly."""
    assert planned.allocation is not None
    allocated = {new.name: (old, new) for old, new in zip(before, after, strict=True) if new.role == "linear"}
    layers = list(planned.layers)
    for index, layer in enumerate(layers):
        if layer.name in allocated:
            old, new = allocated[layer.name]
            num_bytes = layer.bytes - old.weight_bytes + new.weight_bytes
            layers[index] = replace(layer, scheme=new.scheme.name, bytes=num_bytes)
    taken = sum(new.weight_bytes for _, new in allocated.values())
    return replace(
        planned,
        layers=tuple(layers),
        storage=reduced(planned.storage, planned.allocation.most_bytes - taken),
        allocation=replace(planned.allocation, bytes=taken),
    )


def _stage(name: str, peak: int | None, work: Work | None, rates: Rates | None) -> PlannedStage:
    if work is None:
        return PlannedStage(name=name, peak_memory_bytes=peak, seconds=None)
    seconds = None if rates is None else rates.seconds(work)
    return PlannedStage(name=name, peak_memory_bytes=peak, seconds=seconds, flop=work.flop, traffic_bytes=work.traffic)


def check_memory(planned: Plan, *, workers: int = 1) -> None:
    """Refuse a run that cannot fit: each of so many workers on one device takes what the plan says."""
    device, there = planned.device["name"], planned.device["memory_bytes"]
    for stage in planned.stages:
        sharing = workers if stage.name in ("collect", "allocate", "blocks") else 1
        needed = None if stage.peak_memory_bytes is None else sharing * stage.peak_memory_bytes
        if needed is not None and isinstance(there, int) and needed > there:
            side_by_side = f" in {sharing} workers" if sharing > 1 else ""
            remedies = ["take fewer (--workers)"] if sharing > 1 else []
            if stage.name == "collect" and planned.offload in ("none", "model") and device != "cpu":
                remedies.append("offload more (--offload group, offload=)")
            if planned.fitting_tokens is not None:
                remedies.append(f"set calibration.max_tokens={planned.fitting_tokens}, which fits")
            narrow = planned.calibration is not None and planned.calibration.dtype != "float32"
            remedies.append(f"{_SMALLER}, or use a larger device" if narrow else LESS_MEMORY)
            raise ResourceError(
                f"{planned.model}: stage {stage.name}{side_by_side} needs about {needed / 1e9:.1f} GB on {device}, "
                f"which has {there / 1e9:.1f} GB; {'; '.join(remedies)}"
            )


def workers_that_fit(planned: Plan) -> int | None:
    """Return how many workers can quantize blocks on the device side by side; None if that is not known."""
    peaks = [stage.peak_memory_bytes for stage in planned.stages if stage.name == "blocks"]
    there = planned.device["memory_bytes"]
    if not isinstance(there, int) or not peaks or peaks[0] is None:
        return None
    return max(1, there // peaks[0])


def tensor_sizes(transformers: Mapping[str, nn.Module], dtype: torch.dtype | None = None) -> dict[str, int]:
    """Return the bytes of each tensor of state dicts, by full name.

    With a dtype, those of the tensors once loaded in it, in fp32 where their class keeps that.
    """
    sizes = {}
    for component, transformer in transformers.items():
        kept = kept_in_fp32(transformer)
        for name, tensor in transformer.state_dict().items():
            itemsize = tensor.itemsize
            if dtype is not None and tensor.is_floating_point():
                itemsize = (torch.float32 if is_within(name, kept) else dtype).itemsize
            sizes[full_name(component, name)] = tensor.numel() * itemsize
    return sizes


def _planned_layer(linear: BlockLinear, *, sizes: Mapping[str, int], dtype: torch.dtype) -> LinearStorage:
    bias = sizes[f"{linear.name}.bias"] if linear.has_bias else 0
    if isinstance(linear, LinearPlan):
        name = linear.scheme.name
        num_bytes = linear.weight_bytes + linear.path.num_bytes(linear.in_features, linear.out_features)
    else:
        name, num_bytes = _DTYPE_SCHEMES.get(dtype, str(dtype)), sizes[f"{linear.name}.weight"]
    shape = (linear.out_features, linear.in_features)
    return LinearStorage(name=linear.name, shape=shape, scheme=name, bytes=num_bytes + bias)
