"""Content of the report page of a quantized model: what `s2q demo` and `s2q eval --page` show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2q.cli import console
from s2q.common.files import atomic_write_text
from s2q.common.outputs import check_file_output
from s2q.report.formatting import format_bytes

if TYPE_CHECKING:
    import numpy as np

    from s2q.generation.generate import Video
    from s2q.report.page import PageContent
    from s2q.report.run_records import RunRecords

SHOWN_PROMPTS = 4

VideoDone = Callable[[str, Any], None]


def all_of(*listeners: VideoDone | None) -> VideoDone | None:
    """Return a listener that tells all of those that are there; None without any."""
    given = [listener for listener in listeners if listener is not None]

    def tell(label: str, video: Any) -> None:
        for listener in given:
            listener(label, video)

    return tell if given else None


@dataclass
class EvaluationPage:
    """The page of an evaluation: its path, the records of the run, and the videos that it shows, by prompt."""

    path: Path
    records: RunRecords
    theirs: dict[str, Video] = field(default_factory=dict)
    ours: dict[str, Video] = field(default_factory=dict)

    @classmethod
    def prepare(cls, path: Path | None, folder: Path, *, overwrite: bool) -> EvaluationPage | None:
        """Check the path and read the records of a model's folder, before anything is computed; None without a path."""
        from s2q.report.run_records import read_records

        if path is None:
            return None
        check_file_output(path, overwrite=overwrite)
        return cls(path=path, records=read_records(folder))

    def keep(self, _label: str, video: Video) -> None:
        """Keep the first video of each of the first prompts: full precision's, which come first, then the model's."""
        if video.prompt not in self.theirs:
            if len(self.theirs) < SHOWN_PROMPTS:
                self.theirs[video.prompt] = video
        elif video.prompt not in self.ours and self.theirs[video.prompt].seed == video.seed:
            self.ours[video.prompt] = video

    def write(self, evaluation: Mapping[str, Any]) -> None:
        """Write the page. The sample of the attention maps is generated again if the run was of an embedded model."""
        from s2q.report.page import render_page
        from s2q.shapes.embedded import EMBEDDED_NAMES

        source = (self.records.report or {}).get("source", "")
        frames = sample_frames(source, self.records) if source in EMBEDDED_NAMES else None
        content = page_content(self.records, evaluation, pairs_of(self.theirs, self.ours), frames=frames)
        atomic_write_text(self.path, render_page(content))


def page_content(
    records: RunRecords,
    evaluation: Mapping[str, Any],
    pairs: Sequence[Any],
    *,
    planned: Sequence[Any] = (),
    frames: np.ndarray | None = None,
    commands: Sequence[str] = (),
    seconds: Mapping[str, float] | None = None,
) -> PageContent:
    """Return the content of a page: evaluation and videos, and what the run recorded, where it did.

    Args:
        planned: `StagePlan` of the stages of the run, to show beside what was measured.
        frames: The video of the sample whose attention the run recorded.
    """
    from s2q.report.page import PageContent

    report = records.report or {}
    tables: dict[str, Sequence[Mapping[str, Any]]] = {}
    if report:
        tables = {"Quantization, block by block": _rows(records.blocks), "Every linear of the blocks": report["layers"]}
    return PageContent(
        title=f"{report['source']}, {_bits(report)}" if report else Path(str(evaluation["model"])).name,
        pairs=pairs,
        evaluation=evaluation,
        storage=report.get("storage"),
        recipe=records.recipe,
        blocks=records.blocks,
        frames=frames,
        notes=records.notes,
        selection=records.selection,
        stages=_stages(planned, report.get("stages") or ()),
        tables=tables,
        commands=commands,
        seconds=dict(seconds or {}),
    )


def pairs_of(theirs: Mapping[str, Video], ours: Mapping[str, Video]) -> list[Any]:
    """Return pairs of full-precision and quantized videos by prompt; those in which something moves come first."""
    from s2q.evaluation.video_metrics import compare_videos
    from s2q.report.page import PlayerPair
    from s2q.shapes.scenes import parse_caption

    def is_still(prompt: str) -> bool:
        labels = parse_caption(prompt)
        return labels is not None and labels.motion == "still"

    return [
        PlayerPair(
            prompt=prompt,
            seed=theirs[prompt].seed,
            reference=theirs[prompt].frames.numpy(),
            student=ours[prompt].frames.numpy(),
            metrics=compare_videos(ours[prompt], theirs[prompt]),
        )
        for prompt in sorted(theirs, key=is_still)[:SHOWN_PROMPTS]
    ]


def sample_frames(model: str, records: RunRecords) -> np.ndarray | None:
    """Generate the calibration video in which the blocks recorded their attention, from its own noise.

    None where the run recorded none, or is of a prompt with an image.
    """
    from s2q.common.seeds import derive_seed
    from s2q.generation.generate import generate
    from s2q.report.attention_charts import map_sample

    sample = map_sample(records.blocks)
    if sample is None or records.selection is None:
        return None
    prompt, selection = records.selection["prompts"][sample[0]], records.selection
    if not isinstance(prompt, str):
        return None
    seed = derive_seed(selection["seed"], "prompt", sample[0])
    (video,) = generate(model, prompts=[prompt], seeds=[seed], workers=1, **selection["settings"])
    return video.frames.numpy()


def _rows(blocks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    from s2q.report.run_charts import LOSSES

    return [
        {
            "block": block["name"],
            "linears": len(block["layers"]),
            "relative weight error": block["weight_relative_error"],
            **{
                f"loss, {title}": block["loss"][name] for name, title in LOSSES.items() if name in (block["loss"] or {})
            },
            "seconds": block["seconds"],
        }
        for block in blocks
    ]


def _stages(planned: Sequence[Any], measured: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the stages of the run, each with its planned and measured peak memory and time, as far as planned."""
    memory = {stage.name: stage.peak_memory_bytes for stage in planned}
    seconds = {stage.name: stage.seconds for stage in planned if stage.seconds is not None}
    rows = []
    for stage in measured:
        name, row = stage["name"], {"Stage": stage["name"]}
        if planned:
            row["Planned peak memory"] = format_bytes(memory[name]) if memory.get(name) else "–"
        row["Measured peak memory"] = format_bytes(stage["peak_memory_bytes"])
        if seconds:
            row["Planned time, one worker"] = console.format_seconds(seconds[name]) if name in seconds else "–"
        rows.append(row | {"Measured time": console.format_seconds(stage["seconds"])})
    return rows


def _bits(report: Mapping[str, Any]) -> str:
    """Return the scheme of most of the quantized bytes, for the title: "W4A6"."""
    sizes: Counter[str] = Counter()
    for layer in report["layers"]:
        sizes[layer["scheme"]] += math.prod(layer["shape"])
    return sizes.most_common(1)[0][0].upper() if sizes else report["recipe"]
