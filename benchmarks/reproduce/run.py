"""Carrying a table out: quantize, judge in pieces, keep the videos. What is there is not made again."""

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from environment import environment
from published import published_models, published_name
from records import rounded_metrics, write_record

from reproduce.plan import Request, Run, bench_command, runs_of, shown, video_name
from reproduce.specs import Table
from s2q.common.files import atomic_write_bytes, atomic_write_json
from s2q.evaluation.measure import judge_model, run_reference
from s2q.evaluation.settings import EvaluationSettings
from s2q.evaluation.summary import summarise
from s2q.generation.defaults import frame_rate_of
from s2q.generation.generate import Video
from s2q.report.video import BT601, encode_mp4

logger = logging.getLogger("reproduce")


def commands(table: Table, request: Request) -> list[str]:
    """Return what a run would do, as lines for a shell; what is there already is left out."""
    if table.kind == "speed":
        return [shown(bench_command(recipes_of(table), request, model=timed_model(request.model)))]
    lines = []
    for run in runs_of(table, request):
        if not run.checkpoint.exists():
            lines.append(shown(run.quantize_command()))
        if run.missing():
            lines.append(shown(run.eval_command()))
    return lines


def carry_out(table: Table, request: Request) -> None:
    """Make what a table lacks.

    Raises:
        SystemExit: If a command fails, with its exit code; run again then.
    """
    if table.kind == "speed":
        _command(bench_command(recipes_of(table), request, model=timed_model(request.model)))
        return
    runs = runs_of(table, request)
    for run in runs:
        if not run.checkpoint.exists():
            _command(run.quantize_command())
    for prompts in request.pieces():
        left = [run for run in runs if not run.record(prompts).exists()]
        if left:
            _judge(left, prompts, request)


def recipes_of(table: Table) -> list[str]:
    """Return the recipes of a table's rows that the package has."""
    return [row.variant.recipe for row in table.rows if row.variant is not None and row.runs]


def timed_model(model: str) -> str:
    """Return the name under which a model is planned and timed: its dimensions, if the package knows them.

    Args:
        model: A Hub id, an embedded name or a folder.
    """
    name = published_name(model)
    synthetic = None if name is None else published_models()[name]["synthetic"]
    return model if synthetic is None else f"synthetic:{synthetic}"


def _command(arguments: Sequence[str]) -> None:
    """Run `s2q` in a process of its own, so that memory is free afterwards and its peak is that of this run."""
    logger.info("%s", shown(arguments))
    done = subprocess.run([sys.executable, "-c", "from s2q.cli import main; main()", *arguments], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def _judge(runs: Sequence[Run], prompts: Sequence[str], request: Request) -> None:
    """Judge several runs on a piece; full precision generates once for all of them."""
    folders = {str(run.checkpoint): run.videos for run in runs} | {request.model: request.full_precision_videos()}
    frame_rate = frame_rate_of(request.model)
    settings = EvaluationSettings(requested=request.settings, device=request.device, dtype=request.dtype)

    def keep(label: str, video: Video) -> None:
        _keep(folders[label], video, frame_rate)

    seeds = range(request.seeds)
    reference = run_reference(request.model, prompts=prompts, seeds=seeds, settings=settings, video_done=keep)
    for run in runs:
        result = summarise(judge_model(str(run.checkpoint), reference, video_done=keep))
        result["videos"] = rounded_metrics(result["videos"])
        write_record(run.record(prompts), result | environment())
        logger.info("%s: %d prompts judged, %d pieces left", run.key, len(prompts), len(run.missing()))


def _keep(folder: Path, video: Video, frame_rate: int) -> None:
    """Write a video, and its prompt to the folder's `prompts.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    name = video_name(video.prompt, video.seed)
    if (folder / name).exists():
        return
    content = encode_mp4(video.frames.numpy(), fps=frame_rate, matrix=BT601)  # as VBench reads it
    atomic_write_bytes(folder / name, content)
    index = folder / "prompts.json"
    known = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    atomic_write_json(index, known | {name: video.prompt})
