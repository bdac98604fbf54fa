"""The report of a run, report.json, and the sources of its figures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """Report of one block.

    Attributes:
        index: Index of the block, over all block lists and transformers.
        weight_relative_error: ‖Ŵ − W‖² / ‖W‖² over the block's quantized weights; 0 if it has none.
        layers: The same for each of its quantized linears, by full name.
        peak_memory_bytes: Highest resident memory of the process (on a GPU: allocated there) in the run until then.
        resumed: Whether it is from an interrupted run; its figures are those of that run.
        loss: Mean loss over the calibration samples as `ReconstructedBlock` has it: `rtn`, `initial`, `distilled`,
            `final`; empty for recipes that do not calibrate.
        rounding: The report of GPTQ or of learned rounding by full name; empty without.
        memory_retry: Reason and settings of the second attempt, where the memory did not suffice for the first; None
            where it did.
        attention: How the attention of the full-precision block is spread over tokens (`AttentionProfile`): mean
            `mass` on the most attended `fractions` of the `tokens`, `text_share`, and a `map` of one sample; None for
            recipes that do not weight tokens by it.
    """

    index: int
    name: str
    weight_relative_error: float
    layers: Mapping[str, float]
    seconds: float
    peak_memory_bytes: int
    resumed: bool
    loss: Mapping[str, float] = field(default_factory=dict)
    distillation: Mapping[str, Any] | None = None
    refinement: Mapping[str, Any] | None = None
    rounding: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    memory_retry: Mapping[str, Any] | None = None
    attention: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """Report of a run, stored as s2q/report.json in the checkpoint.

    Attributes:
        source_revision: Its commit, for a model on the Hub; else None.
        source_variant: Variant of its weights, "fp16"; None is none.
        output: Name of the checkpoint's folder.
        dtype: Compute dtype of the model.
        n_prompts: Number of calibration prompts given; those that were used, for recipes that calibrate.
        selection: Which samples were taken and of how many candidates, for both transformers where there are two; None
            for recipes that do not calibrate. Every candidate with its scores is in s2q/selection.json, those of a
            second transformer in s2q/transformer_2.selection.json.
        storage: Bytes of the whole transformer, of both where there are two, as in the plan: `full_precision_bytes`,
            `quantized_bytes`, `ratio`.
        layers: Every block linear as in the plan: name, shape, scheme, bytes.
        simulated: Whether some of them are computed in floating point, for want of an integer kernel.
        allocation: What was allocated to linears one by one, as in the plan; None for recipes that do not. What each of
            them could have had is in s2q/allocation.json.
        stages: Seconds and peak memory of each stage, in order.
        seconds: Time from the start until the checkpoint was ready to be written.
        peak_memory_bytes: Highest resident memory of the process (on a GPU: allocated there).
        loras: Adapters that were fused into the source: `file`, `sha256`, `scale` and `component` of each.
        retries: Tasks that were given to another worker because theirs died: `task`, an index, and `cause`.
        generation: Settings besides sizes that the recipe calibrates with, by the names of `GenerationSettings`:
            the checkpoint is generated and judged with them by default.
        text_encoders: Those that the recipe quantizes, as in the plan.
        offload: How calibration videos were generated, as in the plan.
        calibration_dtype: That blocks were calibrated in, as in the plan; None for recipes that do not.
    """

    schema_version: int
    source: str
    source_revision: str | None
    source_variant: str | None
    recipe: str
    output: str
    seed: int
    device: str
    dtype: str
    n_prompts: int
    selection: Mapping[str, Any] | None
    storage: Mapping[str, int | float]
    layers: Sequence[Mapping[str, Any]]
    simulated: bool
    allocation: Mapping[str, Any] | None
    blocks: Sequence[BlockReport]
    stages: Sequence[Mapping[str, Any]]
    seconds: float
    peak_memory_bytes: int
    versions: Mapping[str, str] = field(repr=False)
    retries: Sequence[Mapping[str, Any]] = ()
    loras: Sequence[Mapping[str, Any]] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    text_encoders: Sequence[Mapping[str, Any]] = ()
    offload: str | None = None
    calibration_dtype: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> QuantizationReport:
        """Return the report of a report.json."""
        return cls(**{**content, "blocks": tuple(BlockReport(**block) for block in content["blocks"])})


def log_block(report: BlockReport, *, total: int) -> None:
    """Log what the run did to a block in one line."""
    loss = ""
    if report.loss:
        loss = f"loss {report.loss['rtn']:.4g} (rounding) → {report.loss['final']:.4g}, "
    logger.info(
        "block %d/%d: %d linears, %sweight error %.3g, %.1f s, peak %.0f MiB%s",
        report.index + 1,
        total,
        len(report.layers),
        loss,
        report.weight_relative_error,
        report.seconds,
        report.peak_memory_bytes / 2**20,
        ", resumed" if report.resumed else "",
    )
