"""The generated tables of the pages of docs/models/: sizes, memory and time of a family's models, and what it runs."""

from collections.abc import Iterator
from typing import Any

from markdown_tables import table_head, table_row
from published import GIB, GPUS, on_gpu, plan_of, planned_hours, planned_peak, published_models

from s2q.exports.layout import LAYOUTS
from s2q.models import FAMILIES
from s2q.models.family import Family
from s2q.pipelines import loading_class, pipeline_type

RECIPES = ("s2q-w4a6", "s2q-table-w4a8")
TIMED = (
    ("H100, fp32", "float32", "h100"),
    ("H100, bf16", "bfloat16", "h100"),
    ("A100, bf16", "bfloat16", "a100"),
    ("RTX 4090, bf16", "bfloat16", "4090"),
)
"""Headings of times, with the precision of calibration and the GPU."""

UNPUBLISHED = {"hunyuanvideo": ("HunyuanVideo15Transformer3DModel",)}
"""Transformer classes of a page whose models have no entry in `published.yaml`."""


def page_names() -> list[str]:
    """Return the names of the pages, in the order of the models."""
    return list(dict.fromkeys(entry["page"] for entry in published_models().values()))


def models_of(page: str) -> dict[str, dict[str, Any]]:
    """Return the published models of a page, by name."""
    return {name: entry for name, entry in published_models().items() if entry["page"] == page}


def sizes_and_times_table(page: str) -> str:
    """Storage and peak memory of each model, then the estimated time of a run, as `s2q plan` computes them."""
    peaks = [f"peak on {size // 10**9} GB" for size in GPUS]
    sizes = table_head("model", ["bf16", *(f"`{recipe}`" for recipe in RECIPES), *peaks])
    times = table_head("model", [title for title, _, _ in TIMED])
    for entry in models_of(page).values():
        name = entry["synthetic"]
        if name is None:
            sizes.append(table_row(entry["title"], ["run `s2q plan`", *[""] * 4]))
            continue
        storage = [plan_of(name, recipe).storage for recipe in RECIPES]
        taken = [storage[0]["full_precision_bytes"], *(sizes["quantized_bytes"] for sizes in storage)]
        cells = [f"{size / GIB:.2f} GiB" for size in taken]
        cells += [planned_peak(plan_of(name, RECIPES[0], memory=memory)) for memory in GPUS]
        sizes.append(table_row(entry["title"], cells))
        runs = [on_gpu(name, RECIPES[0], precision, device) for _, precision, device in TIMED]
        times.append(table_row(entry["title"], [planned_hours(run) for run in runs]))
    return "\n".join([*sizes, *(["", *times] if len(times) > 2 else [])])


def families_of(page: str) -> Iterator[tuple[str, Family]]:
    """Yield the transformer classes of a page with their families."""
    pipelines = {entry["pipeline"] for entry in models_of(page).values()}
    for name, family in FAMILIES.items():
        if family.pipeline_class in pipelines or name in UNPUBLISHED.get(page, ()):
            yield name, family


def modes_table(page: str) -> str:
    """Pipelines that calibration and evaluation run, adapters, and the formats that checkpoints are exported to."""
    lines = table_head("pipeline", ["calibrated for", "LoRA", "export"])
    for name, family in families_of(page):
        formats = "diffusers, SDNQ" + (", ComfyUI, GGUF" if name in LAYOUTS else "")
        known = family.image_to_video
        modes = {family.pipeline_class: "text to video"}
        if known is not None:
            videos = " and ".join(video.replace("_", " ") for video in known.videos)
            modes[known.pipeline_class] = f"image{', ' * bool(videos)}{videos} to video"
        for pipeline, mode in modes.items():
            lora = "yes" if hasattr(pipeline_type(pipeline), "load_lora_weights") else "no loader in diffusers"
            lines.append(table_row(f"`{loading_class(pipeline)}`", [mode, lora, formats]))
    return "\n".join(lines)
