"""VBench (Huang et al. 2024) as a judge, in an interpreter of its own: its requirements and s2q's do not go together.

`plan_vbench` asks that interpreter, before anything is generated, what it can judge; the videos are then written under
the names that `VBenchPlan.file_name` gives; `judge_videos` scores a folder of them and refuses incomplete results.
VBench fetches weights by itself where they are not in its caches, unless HF_HUB_OFFLINE is set.
"""

import json
import math
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2q.common.errors import InvalidInputError, S2QError, unknown_name
from s2q.common.files import atomic_write_bytes, atomic_write_json
from s2q.common.temporaries import scratch_folder
from s2q.evaluation.judges.vbench_runner import FLOW
from s2q.evaluation.paper import paper_tables

MAX_VIDEOS_A_PROMPT = 5
MIN_FRAMES = 3
RECORD = "vbench.json"
_LOG_LINES = 4
_OWN_PROMPTS = "VBench judges it on its own prompts only; --prompts would have to name nothing but prompts of VBench"
_NO_PROMPT = "none of the prompts is one that VBench judges it on"


@dataclass(frozen=True, kw_only=True)
class VBenchOptions:
    """Settings of VBench.

    Attributes:
        python: An interpreter that can import vbench.
        folder: Folder for videos, logs and answers.
        dimensions: VBench's dimensions and `flow_score`; empty for those of the paper that the prompts allow.
        cache: VBench's folder of weights; None leaves it to VBench (VBENCH_CACHE_DIR, else ~/.cache/vbench).
        frame_rate: Frames per second of the videos; VBench takes 8 a second of them to judge motion.
    """

    python: str
    folder: Path
    dimensions: tuple[str, ...] = ()
    cache: Path | None = None
    device: str = "cpu"
    frame_rate: int = 8


@dataclass(frozen=True, kw_only=True)
class VBenchPlan:
    """Dimensions that VBench scores.

    Attributes:
        standard: Whether all prompts are VBench's own.
        judged: For each dimension the prompts whose videos it is judged on.
        own_prompts: For each dimension how many prompts VBench has for it.
        absent: Why the paper's other dimensions are not judged.
    """

    options: VBenchOptions
    version: str
    standard: bool
    prompts: tuple[str, ...]
    videos_a_prompt: int
    judged: Mapping[str, tuple[str, ...]]
    own_prompts: Mapping[str, int]
    absent: Mapping[str, str]

    def file_name(self, prompt: str, index: int) -> str:
        """Return the name of a prompt's video: VBench tells its own prompts by it, others are listed for it."""
        return f"{prompt if self.standard else f'{self.prompts.index(prompt):04d}'}-{index}.mp4"


def paper_dimensions() -> tuple[str, ...]:
    """Return the dimensions of VBench that the paper reports."""
    return tuple(paper_tables()["vbench-w4a6"]["scores"])


def plan_vbench(options: VBenchOptions, prompts: Sequence[str], *, videos_a_prompt: int) -> VBenchPlan:
    """Ask the interpreter what it can judge of these prompts."""
    answer = _ask(options)
    dimensions_of: dict[str, set[str]] = {}
    for entry in answer["prompts"]:
        dimensions_of.setdefault(entry["prompt"], {FLOW}).update(entry["dimensions"])
    standard = all(prompt in dimensions_of for prompt in prompts)
    judged: dict[str, tuple[str, ...]] = {}
    absent: dict[str, str] = {}
    for name in options.dimensions or paper_dimensions():
        on = tuple(prompt for prompt in prompts if not standard or name in dimensions_of[prompt])
        if not standard and name not in (*answer["custom"], FLOW):
            absent[name] = _OWN_PROMPTS
        elif not on:
            absent[name] = _NO_PROMPT
        else:
            judged[name] = on
    if absent and (options.dimensions or not judged):
        refused = [
            f"{', '.join(name for name in absent if absent[name] == reason)}: {reason}"
            for reason in dict.fromkeys(absent.values())
        ]
        raise InvalidInputError(f"--vbench-dims {'; '.join(refused)}")
    for name in judged:
        if name in answer["problems"]:
            raise InvalidInputError(
                f"--vbench-dims {name}: {options.python} cannot score it: {answer['problems'][name]}"
            )
    if standard and videos_a_prompt > MAX_VIDEOS_A_PROMPT:
        raise InvalidInputError(
            f"VBench scores at most {MAX_VIDEOS_A_PROMPT} videos per prompt; got {videos_a_prompt} seeds"
        )
    return VBenchPlan(
        options=options,
        version=answer["version"],
        standard=standard,
        prompts=tuple(prompts),
        videos_a_prompt=videos_a_prompt,
        judged=judged,
        own_prompts={name: sum(name in dimensions for dimensions in dimensions_of.values()) for name in judged},
        absent=absent,
    )


@dataclass(frozen=True, kw_only=True)
class VBenchScores:
    """VBench's scores of one model by dimension, and of each of its videos by file name, as VBench gives them."""

    scores: Mapping[str, float]
    videos: Mapping[str, Mapping[str, float]]


def judge_videos(plan: VBenchPlan, side: str) -> VBenchScores:
    """Score every video of a side, "model" or "reference": the folder of its videos under the plan's folder."""
    folder = plan.options.folder
    files = {plan.file_name(prompt, index): prompt for prompt in plan.prompts for index in range(plan.videos_a_prompt)}
    request = {
        "videos": str((folder / side).resolve()),
        "prompts": {} if plan.standard else files,
        "dimensions": list(plan.judged),
        "device": plan.options.device,
    }
    answer = _run(plan.options, "judge", request, folder=folder / f"{side}-vbench")
    scores: dict[str, float] = {}
    by_video: dict[str, dict[str, float]] = {}
    for name, prompts in plan.judged.items():
        where = f"VBench, {name} of the {side}'s videos"
        if not isinstance(answer.get(name), list) or len(answer[name]) != 2:
            raise S2QError(f"{where}: not in its results; see {folder / f'{side}-vbench'}")
        score, videos = answer[name]
        results = {Path(video["video_path"]).name: float(video["video_results"]) for video in videos}
        wanted = {file for file, prompt in files.items() if prompt in prompts}
        missing = sorted(wanted - results.keys())
        if missing:
            raise S2QError(f"{where}: {len(missing)} of {len(wanted)} videos were not scored, {missing[0]!r} first")
        for subject, value in [("the score", float(score)), *results.items()]:
            if not math.isfinite(value):
                raise S2QError(f"{where}: {subject} is {value}, not a number")
        scores[name], by_video[name] = float(score), {file: results[file] for file in sorted(wanted)}
    return VBenchScores(scores=scores, videos=by_video)


def vbench_section(plan: VBenchPlan, model: VBenchScores, reference: VBenchScores) -> dict[str, Any]:
    """Return what `eval.json` has under `vbench`.

    The unit of `dimensions` is per cent, as the paper's; `videos` have VBench's own numbers.
    """
    names = [name for name in plan.judged if name != FLOW]
    dimensions = {
        name: {
            "model": 100 * model.scores[name],
            "reference": 100 * reference.scores[name],
            "n_prompts": len(plan.judged[name]),
            "n_videos": len(plan.judged[name]) * plan.videos_a_prompt,
            "n_prompts_of_vbench": plan.own_prompts[name],
        }
        for name in names
    }
    videos = []
    for prompt in plan.prompts:
        for index in range(plan.videos_a_prompt):
            file = plan.file_name(prompt, index)
            sides = {"model": model.videos, "reference": reference.videos}
            results = {
                side: {name: scores[file] for name, scores in by_name.items() if file in scores}
                for side, by_name in sides.items()
            }
            videos.append({"prompt": prompt, "index": index, "file": file} | results)
    return {
        "version": plan.version,
        "mode": "vbench_standard" if plan.standard else "custom_input",
        "unit": "percent",
        "frame_rate": plan.options.frame_rate,
        "dimensions": dimensions,
        "absent": dict(plan.absent),
        "notes": _notes(plan, names),
        "videos": videos,
    }


def flow_scores(model: VBenchScores, reference: VBenchScores) -> dict[str, float] | None:
    """Return EvalCrafter's flow score of both, in pixels; None where it was not asked for."""
    if FLOW not in model.scores:
        return None
    return {"model": model.scores[FLOW], "reference": reference.scores[FLOW]}


def _notes(plan: VBenchPlan, names: Sequence[str]) -> list[str]:
    if not plan.standard:
        return ["not VBench's prompts: the scores compare the two models with each other, with nobody else's"]
    counts = {name: (len(plan.judged[name]), plan.own_prompts[name]) for name in names}
    short = ", ".join(f"{name} {judged} of {total}" for name, (judged, total) in counts.items() if judged < total)
    notes = [f"fewer prompts than VBench has, not comparable with published scores: {short}"] if short else []
    if plan.videos_a_prompt < MAX_VIDEOS_A_PROMPT:
        notes.append(
            f"{plan.videos_a_prompt} of the {MAX_VIDEOS_A_PROMPT} videos a prompt that VBench's own tables rest on "
            "(the paper: 1)"
        )
    return notes


def _ask(options: VBenchOptions) -> dict[str, Any]:
    """Return the interpreter's description of itself and of the requested dimensions, which it must know."""
    if shutil.which(options.python) is None:
        raise InvalidInputError(f"--vbench-python {options.python}: no such program; pass an interpreter")
    if options.cache is not None and not options.cache.is_dir():
        raise InvalidInputError(f"--vbench-cache {options.cache}: no such folder")
    asked = options.dimensions or paper_dimensions()
    with scratch_folder("vbench") as folder:
        answer = _run(options, "check", {"dimensions": asked}, folder=folder)
    if "error" in answer:
        raise InvalidInputError(
            f"--vbench-python {options.python}: cannot import vbench: {answer['error']}; see docs/judging.md to "
            "install it there"
        )
    for name in asked:
        if name not in (*answer["dimensions"], FLOW):
            raise unknown_name("VBench dimension", name, (*answer["dimensions"], FLOW))
    return answer


def _run(options: VBenchOptions, task: str, request: Mapping[str, Any], *, folder: Path) -> dict[str, Any]:
    """Carry out a task of `vbench_runner` in the other interpreter; its output goes to a log."""
    folder.mkdir(parents=True, exist_ok=True)
    runner, log, answer = folder / "run_vbench.py", folder / "log.txt", folder / "answer.json"
    atomic_write_bytes(runner, Path(__file__).with_name("vbench_runner.py").read_bytes())  # away from s2q's own modules
    environment = dict(os.environ)
    if options.cache is not None:
        environment["VBENCH_CACHE_DIR"] = str(options.cache.resolve())
    common = {
        "local": options.cache is not None,
        "offline": environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"),
        "folder": str(folder.resolve()),
    }
    atomic_write_json(folder / "request.json", {**request, **common})
    answer.unlink(missing_ok=True)
    python = os.path.abspath(shutil.which(options.python) or options.python)  # not resolved: links lead out of venvs
    command = [python, runner.name, task, "request.json", answer.name]
    with log.open("wb") as output:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
        )
    if done.returncode or not answer.is_file():
        lines = map(str.strip, log.read_text(encoding="utf-8", errors="replace").splitlines())
        last_lines = " | ".join(list(filter(None, lines))[-_LOG_LINES:]) or "nothing"
        raise S2QError(f"VBench failed (exit code {done.returncode}); {log} ends with: {last_lines}")
    content: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return content
