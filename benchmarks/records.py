"""Results files: one JSON object in a line, written at once, per-video values to six digits."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from s2q.common.files import atomic_write_text


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a results file; a reader sees the old one or the new one, never half of it. Missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(record, separators=(",", ":")) + "\n")


def rounded(value: float) -> float:
    """Return a value to six digits that count."""
    return float(f"{value:.6g}")


def rounded_metrics(videos: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the videos of an `eval.json` with their metrics to six digits.

    Args:
        videos: Each with its `metrics`, which may be None.
    """
    return [
        {
            **video,
            "metrics": {name: None if value is None else rounded(value) for name, value in video["metrics"].items()},
        }
        for video in videos
    ]
