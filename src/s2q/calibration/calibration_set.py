"""Selecting: the candidates that the blocks of each transformer are calibrated on.

Each transformer has candidates of its own, the steps in which it is called, and its own samples among them, as many as
the recipe says; scores are compared within them. `calibration_stream` carries what was taken through the blocks of one.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from s2q.calibration.candidates import CalibrationCall, CalibrationInputs, call_inputs
from s2q.calibration.stream import HostMemory, TeacherStream
from s2q.calibration.teacher import Teacher, TeacherTransformer
from s2q.common.components import full_name
from s2q.common.files import canonical_json
from s2q.common.run_folder import ArtefactFolder
from s2q.common.seeds import derive_seed
from s2q.planning import Machine, activation_memory
from s2q.recipes.schema import Recipe
from s2q.selection.options import Calibration
from s2q.selection.scores import CandidatePool
from s2q.selection.selection import SELECTIONS

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """What the blocks of one transformer are calibrated on.

    Attributes:
        calls: The samples.
        timesteps: One conditional call for each timestep that the transformer sees, of one prompt after another.
        record: The content of selection.json: every candidate with its scores and whether it was taken.
    """

    calls: tuple[CalibrationCall, ...]
    timesteps: tuple[CalibrationCall, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class CalibrationSets:
    """What all blocks are calibrated on.

    Attributes:
        inputs: What the candidates were collected from.
        samples: Those of each transformer, by component.
    """

    inputs: CalibrationInputs
    samples: Mapping[str, CalibrationSet]

    def fingerprint(self, component: str) -> str:
        """Hash what the blocks of a transformer are calibrated on: the candidates of all prompts, and which were taken.

        Args:
            component: Which transformer.
        """
        prompts = [self.inputs.prompt_fingerprint(prompt) for prompt in range(len(self.inputs.prompts))]
        content = {"prompts": prompts, "calls": [asdict(call) for call in self.samples[component].calls]}
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()

    @property
    def count(self) -> int:
        """Number of samples, over all transformers."""
        return sum(len(one.calls) for one in self.samples.values())

    @property
    def files(self) -> dict[str, bytes]:
        """The files of s2q/ that show the selection, by name."""
        found = {}
        for component, one in self.samples.items():
            found[full_name(component, "selection.json")] = canonical_json(dict(one.record)).encode()
            found[full_name(component, "selection.png")] = selection_plot(one.record)
        return found

    def summary(self) -> dict[str, Any]:
        """Return what the report says: of all transformers together, calls of a second one by full name."""
        records = [one.record for one in self.samples.values()]
        calls = {
            component: [f"{call.prompt}/{call.step}/{call.branch}" for call in one.calls]
            for component, one in self.samples.items()
        }
        return {key: records[0][key] for key in ("selection", "branches", "settings")} | {
            "samples": sum(record["samples"] for record in records),
            "candidates": sum(len(record["candidates"]) for record in records),
            "calls": [full_name(component, call) for component, own in calls.items() for call in own],
        }


def select(
    pools: Mapping[str, CandidatePool], inputs: CalibrationInputs, group: Calibration, *, branches: int
) -> CalibrationSets:
    """Take samples for each transformer, as many as the recipe says of each.

    Args:
        pools: The candidates of each, by component.
        inputs: What they were collected from.
        group: The recipe's part.
        branches: Guidance branches of a call.
    """
    taken = {component: _taken_from(pool, inputs, group, branches=branches) for component, pool in pools.items()}
    return CalibrationSets(inputs=inputs, samples=taken)


def calibration_stream(
    teacher: Teacher,
    transformer: TeacherTransformer,
    selected: CalibrationSets,
    folder: ArtefactFolder,
    *,
    recipe: Recipe,
    machine: Machine,
    step_bytes: int,
    spilled: str = "",
) -> TeacherStream:
    """Make the stream that carries the samples of a transformer through its blocks.

    Args:
        teacher: The model.
        transformer: The one of its transformers.
        selected: The samples.
        folder: Where the candidates are kept, and tensors go that memory has no room for.
        recipe: The recipe; decides whether the conditioning of every timestep is needed.
        machine: Where to compute.
        step_bytes: What a step of distillation holds.
        spilled: Prefix of the files of tensors that memory has no room for.
    """

    def builder(call: CalibrationCall) -> Callable[[], dict[str, Any]]:
        return lambda: call_inputs(folder.load(selected.inputs.key(call.prompt)), call)

    samples = selected.samples[transformer.component]
    timesteps = samples.timesteps if recipe.modulation_rounding.needs_hessian and transformer.family.modulation else ()
    return TeacherStream(
        transformer.module,
        transformer.block_names,
        calls=[builder(call) for call in samples.calls],
        names=[call.name for call in samples.calls],
        steps=[call.step for call in samples.calls],
        timesteps=[builder(call) for call in timesteps],
        streams=transformer.family.streams,
        folder=folder.path,
        device=machine.device,
        memory=HostMemory(activation_memory(machine, step_bytes)),
        page_out=teacher.page_out,
        component=transformer.component,
        tokens=transformer.tokens,
        prefix=spilled,
    )


def selection_plot(record: Mapping[str, Any]) -> bytes:
    """Draw the three scores over prompts × timesteps, the chosen candidates marked.

    Args:
        record: See `CalibrationSet`.

    Returns:
        A PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(record["prompts"])
    columns = 1 + max(one["step"] for one in record["candidates"])
    figure = Figure(figsize=(min(16.0, 3 + 0.2 * columns), 1.5 + 3 * (0.6 + 0.16 * rows)), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {
        "diffusion_salience": "diffusion salience",
        "quantization_salience": "quantization salience",
        "salience": "their product",
    }
    axes = figure.subplots(len(titles), 1, squeeze=False, sharex=True)[:, 0]
    chosen = [(one["step"], one["prompt"]) for one in record["candidates"] if one["selected"]]
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        grid = torch.full((rows, columns), float("nan"))
        for one in record["candidates"]:
            grid[one["prompt"], one["step"]] = one[key]
        image = axis.imshow(grid.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1)
        axis.scatter(*zip(*chosen, strict=True), s=14, facecolors="none", edgecolors="red", linewidths=1)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_ylabel("prompt", fontsize=8)
        figure.colorbar(image, ax=axis)
    axes[-1].set_xlabel("denoising step, from noise to video (red: taken)", fontsize=8)
    figure.suptitle(f"selection {record['selection']}: {record['samples']} samples", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _taken_from(pool: CandidatePool, inputs: CalibrationInputs, group: Calibration, *, branches: int) -> CalibrationSet:
    chosen = SELECTIONS[group.selection](pool, group.samples, derive_seed(inputs.seed, "selection"))
    calls = []
    for position, index in enumerate(chosen):
        one = pool.candidates[index]
        rows = {
            "alternate": [(branches - 1 - position) % branches],
            "conditional": [branches - 1],
            "both": list(range(branches)),
        }[group.branches]
        calls += [CalibrationCall(prompt=one.prompt, step=one.step, branch=row) for row in rows]
    taken = set(chosen)
    scores = zip(pool.diffusion_salience, pool.quantization_salience, pool.salience, strict=True)
    record = {
        "schema_version": SCHEMA_VERSION,
        "selection": group.selection,
        "branches": group.branches,
        "prompts": list(inputs.prompts),
        "seed": inputs.seed,
        "settings": inputs.settings.to_dict(),
        "samples": len(chosen),
        "candidates": [
            {
                "prompt": one.prompt,
                "step": one.step,
                "timestep": one.timestep,
                "diffusion": one.diffusion,
                "quantization": one.quantization,
                "diffusion_salience": diffusion,
                "quantization_salience": quantization,
                "salience": salience,
                "selected": index in taken,
            }
            for index, (one, (diffusion, quantization, salience)) in enumerate(
                zip(pool.candidates, scores, strict=True)
            )
        ],
    }
    steps = enumerate(sorted({one.step for one in pool.candidates}))
    timesteps = [CalibrationCall(prompt=index % len(inputs.prompts), step=step, branch=-1) for index, step in steps]
    return CalibrationSet(calls=tuple(calls), timesteps=tuple(timesteps), record=record)
