"""`s2q eval` with VBench: the flags, the videos that it is given, and where its scores go."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from s2q.cli import console
from s2q.common.devices import free_memory
from s2q.common.errors import InvalidInputError, UsageError
from s2q.common.files import atomic_write_bytes, atomic_write_json
from s2q.common.outputs import check_output, owned_matching
from s2q.common.progress import Progress
from s2q.common.records import VBENCH_VERSION
from s2q.evaluation.judges.evalcrafter import evalcrafter_scores
from s2q.evaluation.judges.vbench import (
    MIN_FRAMES,
    RECORD,
    VBenchOptions,
    VBenchPlan,
    flow_scores,
    judge_videos,
    plan_vbench,
    vbench_section,
)
from s2q.report.video import BT601, encode_mp4

_WRITTEN = ("model/*.mp4", "reference/*.mp4", "*-vbench/**")


def vbench_plan(
    out: Path,
    prompts: Sequence[str],
    *,
    seeds: int,
    device: str,
    num_frames: int | None,
    frame_rate: int,
    python: str | None,
    dimensions: Sequence[str],
    cache: Path | None,
    overwrite: bool,
) -> VBenchPlan | None:
    """Check everything that VBench needs; its videos will go to the folder `OUT-vbench` beside OUT.

    Without `num_frames`, the model's own number is checked with the first video; there is no plan without `python`.
    """
    if python is None:
        for flag, value in (("--vbench-dims", dimensions), ("--vbench-cache", cache)):
            if value:
                raise UsageError(f"{flag}: needs --vbench-python, an interpreter with VBench")
        return None
    if num_frames is not None:
        _check_frames(num_frames)
    folder = out.with_name(f"{out.stem}-vbench")
    check_output(folder, overwrite=overwrite, owned=owned_matching(*_WRITTEN, record=RECORD))
    settings = VBenchOptions(
        python=python,
        folder=folder,
        dimensions=tuple(dict.fromkeys(dimensions)),
        cache=cache,
        device=device,
        frame_rate=frame_rate,
    )
    plan = plan_vbench(settings, prompts, videos_a_prompt=seeds)
    for name, reason in plan.absent.items():
        console.say(f"VBench: {name} is left out: {reason}")
    return plan


def keep_for(plan: VBenchPlan | None) -> Callable[[str, Any], None] | None:
    """Return what writes each video where VBench will look for it: full precision's come first, then the model's."""
    if plan is None:
        return None
    total, rate = len(plan.prompts) * plan.videos_a_prompt, plan.options.frame_rate
    written = 0

    def keep(_label: str, video: Any) -> None:
        nonlocal written
        _check_frames(len(video.frames))
        folder = plan.options.folder
        if written == 0:
            shutil.rmtree(folder, ignore_errors=True)  # an old one, which --overwrite has given up
            folder.mkdir(parents=True)
            atomic_write_json(folder / RECORD, {"schema_version": VBENCH_VERSION, "complete": False})
        side = folder / ("reference" if written < total else "model")
        side.mkdir(exist_ok=True)
        name = plan.file_name(video.prompt, written % plan.videos_a_prompt)
        atomic_write_bytes(side / name, encode_mp4(video.frames.numpy(), fps=rate, matrix=BT601))
        written += 1

    return keep


def with_vbench(plan: VBenchPlan, evaluation: Mapping[str, Any], *, progress: Progress) -> dict[str, Any]:
    """Judge the videos that were kept: the evaluation gets `vbench`, and the flow score if it was asked for."""
    free_memory()  # the other process needs it
    progress("vbench", 0, 2)
    reference = judge_videos(plan, "reference")
    progress("vbench", 1, 2)
    model = judge_videos(plan, "model")
    progress("vbench", 2, 2)
    section = vbench_section(plan, model, reference)
    atomic_write_json(plan.options.folder / RECORD, {"schema_version": VBENCH_VERSION, "complete": True})
    scores = evalcrafter_scores(evaluation["metrics"], flow=flow_scores(model, reference))
    return {**evaluation, "vbench": section} | ({} if scores is None else {"evalcrafter": scores})


def _check_frames(count: int) -> None:
    if count < MIN_FRAMES:
        raise InvalidInputError(f"VBench needs videos of at least {MIN_FRAMES} frames, got {count}; raise --num-frames")
