"""Selecting: the candidates that the blocks of each transformer are calibrated on.

Each transformer has candidates of its own, the steps in which it is called, and its own samples among them, as many as
the recipe says; scores are compared within them. `calibration.stream` carries them through its blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from s2q.calibration.artefacts import CalibrationCall
from s2q.calibration.candidates import CalibrationInputs
from s2q.common.components import full_name
from s2q.common.files import canonical_json
from s2q.common.fingerprint import fingerprint
from s2q.common.records import SELECTION_VERSION
from s2q.common.seeds import derive_seed
from s2q.generation.prompts import prompt_record
from s2q.selection.options import Calibration
from s2q.selection.plot import selection_plot
from s2q.selection.scores import CandidatePool
from s2q.selection.selection import SELECTIONS


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """The samples on which the blocks of one transformer are calibrated.

    Attributes:
        timesteps: One conditional call for each timestep that the transformer sees, of one prompt after another.
        record: The content of selection.json: every recorded candidate with its scores and whether it was taken.
    """

    calls: tuple[CalibrationCall, ...]
    timesteps: tuple[CalibrationCall, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class CalibrationSets:
    """The calibration sets of all transformers, by component, and what their candidates were collected from."""

    inputs: CalibrationInputs
    samples: Mapping[str, CalibrationSet]

    def fingerprint(self, component: str) -> str:
        """Hash what the blocks of a transformer are calibrated on: candidates of all prompts, and which were taken."""
        prompts = [self.inputs.prompt_fingerprint(prompt) for prompt in range(len(self.inputs.prompts))]
        return fingerprint({"prompts": prompts, "calls": [asdict(call) for call in self.samples[component].calls]})

    def with_samples(self, other: CalibrationSets) -> CalibrationSets:
        """Return the sets with those of another transformer, whose candidates were collected apart, for reports."""
        return replace(self, samples={**self.samples, **other.samples})

    @property
    def count(self) -> int:
        """Number of samples, over all transformers."""
        return sum(len(samples.calls) for samples in self.samples.values())

    @property
    def files(self) -> dict[str, bytes]:
        """The files of s2q/ that show the selection, by name."""
        files = {}
        for component, samples in self.samples.items():
            files[full_name(component, "selection.json")] = canonical_json(dict(samples.record)).encode()
            files[full_name(component, "selection.png")] = selection_plot(samples.record)
        return files

    def summary(self) -> dict[str, Any]:
        """Return what the report says: of all transformers together, calls of a second one by full name."""
        records = [samples.record for samples in self.samples.values()]
        calls = [
            full_name(component, f"{call.prompt}/{call.step}/{call.branch}")
            for component, samples in self.samples.items()
            for call in samples.calls
        ]
        return {key: records[0][key] for key in ("selection", "branches", "settings")} | {
            "samples": sum(record["samples"] for record in records),
            "candidates": sum(len(record["candidates"]) for record in records),
            "calls": calls,
        }


def select(
    pools: Mapping[str, CandidatePool], inputs: CalibrationInputs, group: Calibration, *, branches: int
) -> CalibrationSets:
    """Take samples for each transformer, as many as the recipe says of each."""
    taken = {}
    for component, pool in pools.items():
        if inputs.chosen is None:
            chosen = SELECTIONS[group.selection](pool, group.samples, derive_seed(inputs.seed, "selection"))
        else:
            places = [(candidate.prompt, candidate.step) for candidate in pool.candidates]
            chosen = [index for index, place in enumerate(places) if place in inputs.chosen[component]]
        taken[component] = _taken_from(pool, chosen, inputs, group, branches=branches)
    return CalibrationSets(inputs=inputs, samples=taken)


def _taken_from(
    pool: CandidatePool, chosen: Sequence[int], inputs: CalibrationInputs, group: Calibration, *, branches: int
) -> CalibrationSet:
    calls = []
    for position, index in enumerate(chosen):
        candidate = pool.candidates[index]
        rows = {
            "alternate": [(branches - 1 - position) % branches],
            "conditional": [branches - 1],
            "both": list(range(branches)),
        }[group.branches]
        calls += [CalibrationCall(prompt=candidate.prompt, step=candidate.step, branch=row) for row in rows]
    scores = zip(pool.candidates, pool.diffusion_salience, pool.quantization_salience, pool.salience, strict=True)
    record = {
        "schema_version": SELECTION_VERSION,
        "selection": group.selection,
        "branches": group.branches,
        "guidance_branches": branches,
        "prompts": list(map(prompt_record, inputs.prompts)),
        "seed": inputs.seed,
        "settings": inputs.settings.to_dict(),
        "samples": len(chosen),
        "candidates": [
            {
                **asdict(candidate),
                "diffusion_salience": diffusion,
                "quantization_salience": quantization,
                "salience": salience,
                "selected": index in chosen,
            }
            for index, (candidate, diffusion, quantization, salience) in enumerate(scores)
        ],
    }
    timesteps = []
    for index, step in enumerate(sorted({candidate.step for candidate in pool.candidates})):
        prompts = [prompt for prompt, recorded in enumerate(inputs.steps) if recorded > step]
        timesteps.append(CalibrationCall(prompt=prompts[index % len(prompts)], step=step, branch=-1))
    return CalibrationSet(calls=tuple(calls), timesteps=tuple(timesteps), record=record)
