"""From what was measured on each video to `eval.json`: means with intervals, the noise floor, settings, versions."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from s2q.common.records import EVALUATION_VERSION
from s2q.common.versions import package_versions
from s2q.evaluation.definitions import REFERENCE, definition_of, version_of
from s2q.evaluation.intervals import INTERVAL, clustered_mean
from s2q.evaluation.judges.evalcrafter import evalcrafter_scores
from s2q.evaluation.scores import EvaluationResult, VideoScores
from s2q.evaluation.video_metrics import VELOCITY

_CHANGE = "adherence_all_change"


def summarise(measured: EvaluationResult) -> dict[str, Any]:
    """Build the content of `eval.json`, JSON-ready, without NaN or infinity.

    Returns:
        `schema_version`, `model`, `reference`, `n_prompts`, `n_seeds`, `inputs` (the prompts, with the hash of an image
        and the negative prompt where they have them), `metrics`, `videos`, `velocity` (by step), `noise_floor` (full
        precision with another seed), `settings` and `versions`; with a CLIP model also `evalcrafter`.
    """
    judged = measured.videos
    prompts = list(dict.fromkeys(video.prompt for video in judged))
    seeds = list(dict.fromkeys(video.seed for video in judged))
    tables = [_with_change(video.metrics) for video in judged]
    names = list(tables[0])
    means = {name: _estimate(name, judged, tables) for name in names}
    evalcrafter = evalcrafter_scores(means)
    return {
        "schema_version": EVALUATION_VERSION,
        "model": measured.model,
        "reference": measured.reference,
        "n_prompts": len(prompts),
        "n_seeds": len(seeds),
        "inputs": list(measured.inputs),
        "metrics": means,
        "velocity": _velocity_by_step(judged, measured.timesteps),
        "noise_floor": _noise_floor(measured.floor),
        "videos": [
            {"prompt": video.prompt, "seed": video.seed, "metrics": table}
            for video, table in zip(judged, tables, strict=True)
        ],
        "settings": measured.settings.to_dict() | {"seeds": seeds, "dtype": measured.dtype, "interval": INTERVAL},
        "versions": versions(),
        **({} if evalcrafter is None else {"evalcrafter": evalcrafter}),
    }


def summarise_kinds(
    counts: Mapping[str, int], prompts: Sequence[str], errors: Sequence[Mapping[str, float]]
) -> dict[str, Any] | None:
    """Build the entry `sensitivity` of `eval.json`; None where no video was measured.

    Args:
        counts: Number of linears of each kind.
        prompts: Prompt of each video.
        errors: Velocity error of each video by kind.

    Returns:
        `definition`, `n_videos` and `kinds`, the largest error first: `linears` ("blocks.*.attn1.to_q"), their number
        `count`, and `mean`, `low` and `high` of the error over the prompts.
    """
    if not errors:
        return None
    means = {kind: asdict(clustered_mean(_by_prompt(prompts, [video[kind] for video in errors]))) for kind in counts}
    return {
        "definition": "velocity error with the linears of one kind quantized, all others at full precision",
        "n_videos": len(errors),
        "kinds": [
            {"linears": kind, "count": counts[kind], **means[kind]}
            for kind in sorted(counts, key=lambda kind: -means[kind]["mean"])
        ],
    }


def _noise_floor(pairs: Sequence[VideoScores]) -> dict[str, Any] | None:
    if not pairs:
        return None
    means: dict[str, float | None] = {}
    for name in pairs[0].metrics:
        values = [value for pair in pairs if (value := pair.metrics[name]) is not None]
        means[name] = sum(values) / len(values) if values else None
    return {
        "definition": "full precision against full precision of the same prompt with another seed",
        "n_pairs": len(pairs),
        "metrics": means,
    }


def versions() -> dict[str, str | None]:
    """Return the versions of what computed the result, and the kind of machine."""
    installed = package_versions(("s2q", "torch", "diffusers", "transformers", "numpy", "scipy"))
    installed["machine"] = f"{platform.system()} {platform.machine()}"
    if torch.cuda.is_available():
        installed["gpu"] = torch.cuda.get_device_name()
    return installed


def _with_change(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Add the paired change in adherence and put each reference's value after its own."""
    table: dict[str, float | None] = {}
    for name, value in values.items():
        if name.startswith(REFERENCE):
            continue
        table[name] = value
        if REFERENCE + name in values:
            base = table[REFERENCE + name] = values[REFERENCE + name]
            if name == "adherence_all":
                table[_CHANGE] = None if value is None or base is None else value - base
    return table


def _estimate(name: str, judged: Sequence[VideoScores], tables: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    by_prompt = _by_prompt([video.prompt for video in judged], [table[name] for table in tables])
    entry: dict[str, Any] = {"mean": None, "low": None, "high": None}
    if by_prompt:
        entry = asdict(clustered_mean(by_prompt, proportion="adherence" in name and name != _CHANGE))
    return entry | {"definition": definition_of(name), "version": version_of(name)}


def _by_prompt(prompts: Sequence[str], values: Sequence[float | None]) -> dict[str, list[float]]:
    """Return the values of the videos of each prompt, without None."""
    by_prompt: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        if value is not None:
            by_prompt.setdefault(prompt, []).append(value)
    return by_prompt


def _velocity_by_step(videos: Sequence[VideoScores], timesteps: Sequence[float]) -> dict[str, Any] | None:
    recorded = [video for video in videos if video.velocity_steps]
    if not recorded:
        return None
    steps, prompts = [], [video.prompt for video in recorded]
    for index, timestep in enumerate(timesteps):
        by_prompt = _by_prompt(prompts, [video.velocity_steps[index] for video in recorded])
        steps.append({"step": index, "timestep": timestep, **asdict(clustered_mean(by_prompt))})
    return {"definition": definition_of(VELOCITY), "n_videos": len(recorded), "steps": steps}
