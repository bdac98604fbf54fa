"""What people look at: the table in Markdown, the page, the videos and the contact sheet."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from s2q.comparing.entries import FULL_PRECISION
from s2q.comparing.folder import PAGE, SHEET, TABLE, CompareFolder
from s2q.comparing.shards import SHOWN_PROMPTS
from s2q.core.files import atomic_write_bytes, atomic_write_text
from s2q.report import Scene, comparison, render_compare_page, scene_sheet, write_mp4

_SLUG_LENGTH = 48


def write_pages(folder: CompareFolder, result: Mapping[str, Any], *, progress: Callable[[str, int, int], None]) -> None:
    """Write compare.md, index.html, sheet.png and the videos.

    Args:
        folder: The comparison.
        result: The content of `compare.json`.
        progress: Called as the files are written.
    """
    atomic_write_text(folder.path / TABLE, comparison.markdown(result))
    scenes = _scenes(folder, result)
    for index, scene in enumerate(scenes):
        progress("write", index, len(scenes))
        name = re.sub(r"[^a-z0-9]+", "-", scene.prompt.lower()).strip("-")[:_SLUG_LENGTH].rstrip("-")
        target = folder.path / "videos" / f"{index:03d}-{name}".rstrip("-")
        target.mkdir(parents=True, exist_ok=True)
        for label, frames in {FULL_PRECISION: scene.reference, **scene.entries}.items():
            write_mp4(target / f"{label}.mp4", frames)
    sheet = scene_sheet(scenes) if scenes else None
    if sheet is not None:
        atomic_write_bytes(folder.path / SHEET, sheet)
    page = render_compare_page(result, scenes, sheet=sheet, command=_command(folder, result))
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


def _command(folder: CompareFolder, result: Mapping[str, Any]) -> str:
    """The command that goes on with this comparison, or makes it again elsewhere."""
    given = [entry["recipe"] or entry["checkpoint"] for entry in result["entries"]]
    words = ["s2q", "compare", *given, "-m", result["model"], "--seeds", str(result["n_seeds"])]
    return " ".join(shlex.quote(str(word)) for word in [*words, "-o", folder.path])
