"""Published models, from `published.yaml`: what `s2q plan` says of them, and the commands that make and run them."""

import functools
from pathlib import Path
from typing import Any

import yaml
from markdown_tables import table_head, table_row

from s2q.common.components import TRANSFORMERS
from s2q.core.packing import packed_width
from s2q.evaluation.paper import paper_tables
from s2q.models import FAMILIES
from s2q.models.family import ImageToVideo
from s2q.models.synthetic import synthetic_model
from s2q.pipelines import loading_class
from s2q.planning import plan
from s2q.planning.cost import DEFAULT_MEMORY_BUDGET
from s2q.planning.resolve import recipe_linears, resolve
from s2q.recipes.load import load_recipe

GIB = 2**30
SIZES = ("num_frames", "height", "width")
PLUS = "s2q-plus-w4a6"
GPUS = (24 * 10**9, 80 * 10**9)
"""Memory in bytes of the GPUs that runs are planned for."""


@functools.cache
def published_models() -> dict[str, dict[str, Any]]:
    """Return the models by name; `published.yaml` explains the fields."""
    text = Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")
    models: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return models


def published_name(model: str) -> str | None:
    """Return the name of the published model that a Hub id means, None if it means none."""
    for name, entry in published_models().items():
        if model.lower() in {hub_id.lower() for hub_id in (entry["hub"], *entry["also"])}:
            return name
    return None


def planned_peak(planned: Any) -> str:
    """Return the largest memory of the stages of a plan, and whether it is more than the device has."""
    peak = max(stage.peak_memory_bytes for stage in planned.stages)
    size = f"{peak / 1e9:.1f} GB"
    return size if peak <= planned.device["memory_bytes"] else f"does not fit: {size}"


@functools.cache
def plan_of(synthetic: str, recipe: str, *overrides: str, memory: int = GPUS[-1]) -> Any:
    """Return the plan of a model by its dimensions, without its weights, on a GPU with so many bytes of memory."""
    return plan(
        f"synthetic:{synthetic}",
        recipe=recipe,
        overrides=overrides,
        device="cuda",
        device_memory=memory,
        memory_budget=DEFAULT_MEMORY_BUDGET,
    )


def sizes_table(recipe: str) -> str:
    """Storage of published transformers under a recipe, by `s2q plan`."""
    head = [
        "Hub id",
        "licence of the weights",
        "bf16 GiB",
        f"`{recipe}` GiB",
        "reduction",
        "`outer=null`",
        "`s2q-plus-w4a6`",
    ]
    lines = table_head("model", head)
    for entry in published_models().values():
        cells = [f"`{entry['hub']}`", entry["licence"] or "see model page"]
        if entry["synthetic"] is None:
            cells += ["run `s2q plan`", *[""] * 4]
        else:
            storage = plan_of(entry["synthetic"], recipe).storage
            outer, plus = (plan_of(entry["synthetic"], *given).storage for given in ((recipe, "outer=null"), (PLUS,)))
            figures = [storage["full_precision_bytes"] / GIB, storage["quantized_bytes"] / GIB]
            cells += [f"{figure:.2f}" for figure in (*figures, storage["ratio"], outer["ratio"], plus["ratio"])]
        lines.append(table_row(f"[{entry['title']}](models/{entry['page']}.md)", cells))
    return "\n".join(lines)


def bytes_table(recipe: str) -> str:
    """What the bytes of a quantized transformer are for."""
    lines = table_head("model", ["recipe", "codes", "scales, transforms, biases", "low-rank branch", "outer", "rest"])
    for entry in published_models().values():
        for name in (recipe, PLUS) if entry["synthetic"] else ():
            shares = _shares(entry["synthetic"], name)
            lines.append(table_row(entry["title"], [f"`{name}`", *(f"{100 * share:.1f} %" for share in shares)]))
    return "\n".join(lines)


def _shares(synthetic: str, recipe: str) -> list[float]:
    model, validated = synthetic_model(synthetic), load_recipe(recipe)
    planned = plan_of(synthetic, recipe)
    total, layers = planned.storage["quantized_bytes"], {layer.name: layer.bytes for layer in planned.layers}
    linears = recipe_linears(validated, dict.fromkeys(TRANSFORMERS[: model.transformers], model.meta_transformer()))
    codes = branch = outer = inside = 0
    for linear in resolve(validated, linears, frames=model.frames):
        size = layers[linear.name]
        if linear.role == "outer":
            outer += size
            continue
        inside += size
        codes += linear.out_features * packed_width(linear.scheme.weight.num_bits, linear.in_features)
        rank = linear.path.replace(low_rank=None, deflates=True) if linear.path.low_rank else linear.path
        branch += sum(
            sign * path.num_bytes(linear.in_features, linear.out_features)
            for sign, path in ((1, linear.path), (-1, rank))
        )
    parts = (codes, inside - codes - branch, branch, outer, total - inside - outer)
    return [part / total for part in parts]


def cost_table(recipe: str) -> str:
    """What quantizing a published model takes: memory as planned, and what the paper took."""
    gpus = [f"peak on {size // 10**9} GB" for size in GPUS]
    heads = [*gpus, "distillation step", "block inputs and targets", "paper: memory", "paper: time"]
    lines = table_head("model", heads)
    figures = paper_tables()["samples"]["values"]
    for name, entry in published_models().items():
        planned = [""] * 4
        if entry["synthetic"] is not None:
            plans = [plan_of(entry["synthetic"], recipe, memory=size) for size in GPUS]
            cost = plans[-1].calibration
            step = f"{cost.step_bytes / 1e9:.1f} GB{', checkpointed' if cost.gradient_checkpointing else ''}"
            planned = [*map(planned_peak, plans), step, f"{cost.activation_bytes / 1e9:.0f} GB"]
        hours, memory = figures.get(name, {}).get("40 samples", (None, None))
        theirs = ["" if memory is None else f"{memory:.2f} GB", "" if hours is None else f"{hours:.2f} h"]
        lines.append(table_row(entry["title"], planned + theirs))
    return "\n".join(lines)


@functools.cache
def on_gpu(synthetic: str, recipe: str, precision: str, device: str) -> Any:
    """Return the plan of a model by its dimensions on a GPU by name, which its time is estimated for."""
    overrides = [f"calibration.precision={precision}"]
    budget = DEFAULT_MEMORY_BUDGET
    return plan(f"synthetic:{synthetic}", recipe=recipe, overrides=overrides, device=device, memory_budget=budget)


def planned_hours(planned: Any) -> str:
    """Minutes or hours with their range; a dash where it does not fit."""
    if max(stage.peak_memory_bytes for stage in planned.stages) > planned.device["memory_bytes"]:
        return "does not fit"
    low, middle, high = (getattr(planned.estimate, key) for key in ("low", "gpu_hours", "high"))
    if middle < 2:
        return f"{60 * middle:.0f} min ({60 * low:.0f}–{60 * high:.0f})"
    return f"{middle:.1f} h ({low:.1f}–{high:.1f})" if middle < 100 else f"{middle:.0f} h ({low:.0f}–{high:.0f})"


def calls_table(_: str) -> str:
    """Pipeline class, dtype and arguments of the call of each published model."""
    head = ["class", "dtype", "frames × height × width", "steps", "guidance", "fps"]
    lines = table_head("model", head)
    for entry in published_models().values():
        call = entry["call"]
        sizes = [str(call[key]) for key in SIZES if key in call]
        cells = [f"`{loading_class(entry['pipeline'])}`", entry["dtype"], " × ".join(sizes) or "default"]
        cells += [str(call["num_inference_steps"]), str(call["guidance_scale"]), str(entry["fps"])]
        lines.append(table_row(entry["title"], cells))
    return "\n".join(lines)


def commands_of(name: str) -> str:
    """Return the commands that plan, quantize and evaluate a model of `published.yaml`."""
    entry = published_models()[name]
    out = f"{name}-w4a6"
    same = "".join(f" --{key.replace('_', '-')} {entry['call'][key]}" for key in SIZES if key in entry["call"])
    settings = generation_options(name)
    where = f"--device cuda --dtype {entry['dtype']}"
    planned = (
        "" if entry["synthetic"] is None else f"s2q plan -m synthetic:{entry['synthetic']} -r s2q-w4a6{settings}\n"
    )
    kind = "txt" if image_to_video_of(name) is None else "jsonl"
    judging = f"s2q eval -m {out} --reference {entry['hub']} --prompts judged.{kind} --seeds 1"
    shell = [
        f"{planned}s2q plan -m {entry['hub']} -r s2q-w4a6 --dtype {entry['dtype']}{settings}",
        _broken(
            f"s2q quantize -m {entry['hub']} -r s2q-w4a6 -o {out} --prompts calibration.{kind}", same + settings, where
        ),
        _broken(judging, same, f"{where} -o {name}-eval.json"),
    ]
    return "\n".join(["```", *shell, "```"])


def image_to_video_of(name: str) -> ImageToVideo | None:
    """Return what is known of a model's pipeline if that takes an image; None for text to video."""
    pipeline = published_models()[name]["pipeline"]
    return next(filter(None, (family.image_pipeline([pipeline]) for family in FAMILIES.values())), None)


def generation_options(name: str) -> str:
    """Return the options of a command for steps and guidance of a model, where they differ from its family's."""
    entry = published_models()[name]
    (family,) = (family for family in FAMILIES.values() if family.pipeline_class == entry["pipeline"])
    options = {"num_inference_steps": "--steps", "guidance_scale": "--guidance-scale"}
    call = entry["call"]
    return "".join(f" {option} {call[key]:g}" for key, option in options.items() if call[key] != family.defaults[key])


def _broken(*parts: str) -> str:
    """Return a command over several lines, a part each."""
    return " \\\n    ".join(part.strip() for part in parts if part)


def python_of(name: str) -> str:
    """Return the Python that loads and runs the checkpoint of a model of `published.yaml`."""
    entry, known = published_models()[name], image_to_video_of(name)
    (family,) = (family for family in FAMILIES.values() if entry["pipeline"] == family.pipeline_class)
    call = {family.frames_argument if key == "num_frames" else key: value for key, value in entry["call"].items()}
    files: tuple[str, ...] = ()
    if known is not None:
        files = ('image=load_image("image.png")', *(f'{video}=load_video("{video}.mp4")' for video in known.videos))
    loaders = "".join(f", {loader}" for loader in ("load_image", "load_video") if any(loader in text for text in files))
    subject = 'prompt="a man waves"' if files else '"a cat walking over wet grass"'
    arguments = "".join(
        f"    {text},\n" for text in (subject, *files, *(f"{key}={value}" for key, value in call.items()))
    )
    pipeline = entry["pipeline"]
    if loading_class(pipeline) == pipeline:
        imported = f"import s2q  # registers the quantizer with diffusers\nfrom diffusers import {pipeline}"
        load = f"{pipeline}.from_pretrained"
    else:  # one of s2q's own
        imported, load = "import s2q", "s2q.load"
    return f'''```python
import torch

{imported}
from diffusers.utils import export_to_video{loaders}

pipe = {load}("{name}-w4a6", dtype=torch.{entry["dtype"]})
pipe.enable_model_cpu_offload()
pipe.vae.enable_tiling()
video = pipe(
{arguments}).frames[0]
export_to_video(video, "video.mp4", fps={entry["fps"]})
```'''
