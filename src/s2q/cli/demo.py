"""`s2q demo`: the main job on an embedded model, end to end, in minutes on a CPU, with a page to look at."""

from __future__ import annotations

import os
import shlex
import sys
import time
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from s2q.cli import console, next_steps, options, output, pages
from s2q.common.errors import InvalidInputError
from s2q.common.files import atomic_write_bytes, atomic_write_json, atomic_write_text, slug
from s2q.common.outputs import check_output, owned_matching, staged_directory
from s2q.common.progress import Progress
from s2q.common.records import DEMO_VERSION
from s2q.report.formatting import format_bytes, format_sample

if TYPE_CHECKING:
    from s2q.generation.generate import Video
    from s2q.recipes.schema import Recipe

RECORD = "demo.json"
PAGE = "report.html"
_CHECKPOINT = "checkpoint"
_WRITTEN = (PAGE, "sheet.png", "eval.json", "videos/*-full-precision.mp4", "videos/*-quantized.mp4")
_SENSITIVITY_PROMPTS = 2
_SEED = 0
_SHOWN = ("psnr_frame_mean_db", "ssim", "velocity_relative_error", "adherence_all")
_SHORT_CALIBRATION = ("calibration.n_prompts=2", "calibration.samples=8")
_LEARNING = ("distillation", "refinement")


def demo(
    out: Annotated[Path, options.folder_option("-o", "--output", help="Folder to write.")] = Path("s2q-demo"),
    model: options.Model = "shapes-cogvideox",
    recipe: options.RecipeName = "s2q-w4a6",
    short: Annotated[
        bool, typer.Option("--short", help="Fewer samples and videos: one minute, rougher metrics.")
    ] = False,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser at the end.")] = True,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Quantize an embedded model and show the result as an HTML report."""
    from s2q.recipes.load import load_recipe
    from s2q.shapes.embedded import EMBEDDED_NAMES

    if model not in EMBEDDED_NAMES:
        raise InvalidInputError(f"demo: {model} is not an embedded model; use {' or '.join(EMBEDDED_NAMES)}")
    validated = load_recipe(recipe)
    overrides: tuple[str, ...] = ()
    if short and validated.calibrates:
        overrides += _SHORT_CALIBRATION
    if short:
        overrides += tuple(f"{group}.epochs=1" for group in _LEARNING if getattr(validated, group) is not None)
    console.quiet_libraries()
    check_output(out, overwrite=overwrite, owned=_owned)
    with console.progress() as progress, staged_directory(out, overwrite=overwrite, owned=_owned) as staged:
        changed = load_recipe(recipe, overrides=overrides)
        record = _make(staged, out, model=model, recipe=changed, overrides=overrides, short=short, progress=progress)
    page = (out / PAGE).resolve()
    if as_json:
        output.emit_json(record)
    else:
        _show(record, page)
        own = ["quantize", "-m", "MODEL", "-r", next_steps.recipe_of_choice(), "--prompts", "FILE", "-o", "OUT"]
        next_steps.say_next([next_steps.generate_with(out / _CHECKPOINT), own])
    if open_page and console.stderr.is_terminal and _has_screen():
        webbrowser.open(page.as_uri())


def _owned(folder: Path) -> set[str] | None:
    """The files that a demo wrote into its folder, its checkpoint's included."""
    from s2q.checkpoint import owned_files

    ours = owned_matching(*_WRITTEN, record=RECORD)(folder)
    inside = owned_files(folder / _CHECKPOINT) or ()
    return None if ours is None else {*ours, *(f"{_CHECKPOINT}/{name}" for name in inside)}


def _make(
    staged: Path,
    out: Path,
    *,
    model: str,
    recipe: Recipe,
    overrides: Sequence[str],
    short: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Do everything inside the staged folder; names in the results are those of the final one."""
    from s2q.evaluation.evaluate import evaluate
    from s2q.models import resolve_model
    from s2q.planning import this_machine
    from s2q.planning.plan import plan
    from s2q.report.run_records import read_records
    from s2q.run.quantize import quantize
    from s2q.run.time_estimate import measured
    from s2q.shapes.embedded import embedded_prompts

    started, seconds = time.monotonic(), dict[str, float]()
    with _timed(seconds, "plan"):
        progress("plan", 0, 1)
        planned = plan(model, recipe=recipe)
        if not short:
            planned = measured(planned, resolve_model(model), recipe, machine=this_machine("cpu"))
        progress("plan", 1, 1)
    with _timed(seconds, "quantize"):
        report = quantize(model, recipe=recipe, out=staged / _CHECKPOINT, progress=progress)
    videos: dict[str, dict[str, Video]] = {}

    def keep(label: str, video: Video) -> None:
        if video.seed == _SEED:
            videos.setdefault(label, {})[video.prompt] = video

    with _timed(seconds, "evaluate"):
        evaluation = evaluate(
            staged / _CHECKPOINT,
            reference=model,
            prompts=embedded_prompts(model, split="held-out", count=4 if short else 16),
            seeds=(_SEED,) if short else (_SEED, _SEED + 1),
            num_inference_steps=8 if short else None,
            sensitivity=_SENSITIVITY_PROMPTS,
            video_done=keep,
            progress=progress,
        )
    evaluation |= {"model": str(out / _CHECKPOINT), "reference": model}
    with _timed(seconds, "write"):
        (ours,) = (by_prompt for label, by_prompt in videos.items() if label != model)
        pairs, records = pages.pairs_of(videos[model], ours), read_records(staged / _CHECKPOINT)
        content = pages.page_content(
            records,
            evaluation,
            pairs,
            planned=planned.stages,
            frames=pages.sample_frames(model, records),
            commands=_commands(report.to_dict(), recipe, overrides, evaluation, pairs[0].prompt, out),
            seconds=seconds,
        )
        _write(staged, content, pairs)
    record = {
        "schema_version": DEMO_VERSION,
        "model": model,
        "recipe": recipe.name,
        "overrides": list(overrides),
        "output": str(out),
        "page": str(out / PAGE),
        "storage": dict(report.storage),
        "evaluation": {name: value for name, value in evaluation.items() if name != "videos"},
        "seconds": seconds | {"total": time.monotonic() - started},
    }
    atomic_write_json(staged / RECORD, record)
    return record


def _commands(
    report: Mapping[str, Any],
    recipe: Recipe,
    overrides: Sequence[str],
    evaluation: Mapping[str, Any],
    prompt: str,
    out: Path,
) -> tuple[str, ...]:
    """The commands that give the result of the demo."""
    checkpoint, model = shlex.quote(str(out / _CHECKPOINT)), report["source"]
    changes = "".join(f" --set {shlex.quote(override)}" for override in overrides)
    sample = f"--num-prompts {evaluation['n_prompts']} --seeds {evaluation['n_seeds']}"
    steps = evaluation["settings"]["num_inference_steps"]
    return (
        f"s2q quantize -m {model} -r {recipe.name}{changes} -o {checkpoint}",
        f"s2q eval -m {checkpoint} --reference {model} {sample} --steps {steps}"
        f" --sensitivity {_SENSITIVITY_PROMPTS} -o eval.json --page report.html",
        f"s2q generate -m {checkpoint} --prompt {shlex.quote(prompt)} --steps {steps} -o videos",
    )


def _write(staged: Path, content: Any, pairs: Sequence[Any]) -> None:
    from s2q.report.page import pair_sheet, render_page
    from s2q.report.video import write_mp4

    folder = staged / "videos"
    folder.mkdir()
    for index, pair in enumerate(pairs):
        stem = f"{index:03d}-{slug(pair.prompt)}"
        write_mp4(folder / f"{stem}-full-precision.mp4", pair.reference)
        write_mp4(folder / f"{stem}-quantized.mp4", pair.student)
    atomic_write_bytes(staged / "sheet.png", pair_sheet(pairs))
    atomic_write_json(staged / "eval.json", dict(content.evaluation))
    atomic_write_text(staged / PAGE, render_page(content))


def _show(record: Mapping[str, Any], page: Path) -> None:
    out = output.wide_console()
    storage, evaluation = record["storage"], record["evaluation"]
    changes = f" (shortened: {', '.join(record['overrides'])})" if record["overrides"] else ""
    before, after = (format_bytes(storage[f"{side}_bytes"]) for side in ("full_precision", "quantized"))
    out.print()
    out.print(
        Text.assemble(
            (f"{record['model']} with {record['recipe']}", "bold"),
            f"{changes}: the transformer is {storage['ratio']:.2f} times smaller ({before} → {after})",
        ),
        soft_wrap=True,
    )
    out.print(output.metric_table(evaluation, names=_SHOWN))
    sample = format_sample(evaluation["n_prompts"], evaluation["n_seeds"])
    total = console.format_seconds(record["seconds"]["total"])
    out.print(f"Held-out captions, {sample}; {total} in all", highlight=False)
    out.print(Text.assemble("Report: ", (page.as_uri(), "bold cyan")), soft_wrap=True)


def _has_screen() -> bool:
    """Whether a browser window can open; without one, Python would start a text browser in the terminal."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started
