"""The metrics as `data/metrics.yaml` defines them: text, version, direction, and what a learned one needs."""

import functools
from importlib import resources
from typing import Any

import yaml

REFERENCE = "reference_"


@functools.cache
def read_data(name: str) -> dict[str, Any]:
    """Return the content of a YAML file of `data`."""
    text = resources.files("s2q.evaluation").joinpath("data", name).read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def metric_table() -> dict[str, dict[str, Any]]:
    """Return `definition`, `version` and, where it has them, `higher_is_better` and `needs` of each metric by name."""
    return dict(read_data("metrics.yaml")["metrics"])


def statistics_definitions() -> dict[str, str]:
    """Return the definitions of what `compare.json` says beside the metrics, by name."""
    return dict(read_data("metrics.yaml")["statistics"])


def directions() -> dict[str, bool]:
    """Return for each metric whether more is better; a metric that is not here has no winner."""
    return {name: entry["higher_is_better"] for name, entry in metric_table().items() if "higher_is_better" in entry}


def definition_of(name: str) -> str:
    """Return the definition of a metric of `eval.json`, in one sentence."""
    definition: str = metric_table()[name.removeprefix(REFERENCE)]["definition"]
    return definition + "; of the full-precision reference's videos" if name.startswith(REFERENCE) else definition


def version_of(name: str) -> int:
    """Return the version of a metric's definition: values of different versions are not compared."""
    return int(metric_table()[name.removeprefix(REFERENCE)]["version"])
