"""Output for people: the table in Markdown, the page, the videos and the contact sheet."""

import shlex
from collections.abc import Mapping
from typing import Any

from s2q.common.files import atomic_write_bytes, atomic_write_text, slug
from s2q.common.progress import Progress
from s2q.comparison.entries import FULL_PRECISION
from s2q.comparison.folder import PAGE, SHEET, TABLE, CompareFolder
from s2q.comparison.setup import CompareSettings, Setup
from s2q.comparison.shards import SHOWN_PROMPTS
from s2q.report import compare_table as comparison
from s2q.report.compare_page import Scene, render_compare_page, scene_sheet
from s2q.report.video import write_mp4


def write_pages(folder: CompareFolder, result: Mapping[str, Any], *, command: str, progress: Progress) -> None:
    """Write compare.md, index.html, sheet.png and the videos."""
    atomic_write_text(folder.path / TABLE, comparison.markdown(result))
    scenes = _scenes(folder, result)
    for index, scene in enumerate(scenes):
        progress("write", index, len(scenes))
        target = folder.path / "videos" / f"{index:03d}-{slug(scene.prompt)}"
        target.mkdir(parents=True, exist_ok=True)
        for label, frames in {FULL_PRECISION: scene.reference, **scene.entries}.items():
            write_mp4(target / f"{label}.mp4", frames, fps=result["settings"]["frame_rate"])
    sheet = scene_sheet(scenes) if scenes else None
    if sheet is not None:
        atomic_write_bytes(folder.path / SHEET, sheet)
    page = render_compare_page(result, scenes, sheet=sheet, command=command)
    atomic_write_text(folder.path / PAGE, page)
    progress("write", len(scenes), len(scenes))


def _scenes(folder: CompareFolder, result: Mapping[str, Any]) -> list[Scene]:
    """The kept videos of every prompt, entries in the order of the table."""
    labels = [row.label for group in comparison.groups_of(result) for row in group.rows if not row.error]
    scenes = []
    for index, prompt in enumerate(result["prompts"][:SHOWN_PROMPTS]):
        reference = folder.load_frames(FULL_PRECISION, index)
        videos = {label: folder.load_frames(label, index) for label in labels}
        kept = {label: frames for label, frames in videos.items() if frames is not None}
        if reference is not None and kept:
            seed = result["settings"]["seeds"][0]
            scenes.append(Scene(prompt=prompt, seed=seed, reference=reference, entries=kept))
    return scenes


def command_of(setup: Setup, settings: CompareSettings) -> str:
    """Return the command that makes a comparison."""
    words: list[Any] = ["s2q", "compare", *(entry.given for entry in setup.entries if entry.peer is None)]
    peers = ",".join(entry.given for entry in setup.entries if entry.peer is not None)
    words += [*(["--peers", peers] if peers else []), "-m", setup.plan.model]
    words += ["--num-prompts", settings.num_prompts] if settings.prompts is None else ["--prompts", "FILE"]
    words += ["--seeds", len(settings.seeds)]
    if settings.calibration_prompts is not None:
        words += ["--calibration-prompts", "FILE"]
    plain = ("samples", "device", "dtype", "variant", "lpips_weights", "clip")
    given = {name: getattr(settings, name) for name in plain} | dict(settings.requested)
    for name, value in (given | {"seed": settings.seed or None}).items():
        flag = "steps" if name == "num_inference_steps" else name.replace("_", "-")
        words += [] if value is None else [f"--{flag}", value]
    words += [word for lora in settings.loras for word in ("--lora", lora)]
    words += [word for override in settings.overrides for word in ("--set", override)]
    if settings.verify is not None:
        words.append("--verify" if settings.verify else "--no-verify")
    words += ["--metrics", ",".join(settings.metrics)] if settings.metrics else []
    command = " ".join(shlex.quote(str(word)) for word in [*words, "-o", settings.out])
    if settings.seeds == tuple(range(len(settings.seeds))):
        return command
    return f"{command}  # in Python, with seeds={list(settings.seeds)}"
