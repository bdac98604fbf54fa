"""Generate the tables of the README and the docs, and `measured.yaml`, from the results; ``--check`` only checks them.

    python benchmarks/tables.py [--check]

A table is between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

from choosing import devices_table, models_table, recipes_table
from export_tables import comfyui_table, exports_table
from family_pages import modes_table, page_names, sizes_and_times_table
from figures import FIGURES, IMAGES
from judging import evalcrafter_table, metrics_table, paper_table
from kernel_tables import kernels_table
from markdown_tables import interval, table_head, table_row
from methods import field_table, measured_errors, methods_table, parts_added_table, times_smaller
from peer_tables import peers_table, tools_table
from published import bytes_table, calls_table, commands_of, cost_table, python_of, sizes_table
from quickstart import quickstart_table
from reproduce.beside import overview_table
from scaling_tables import limits_table, speedup_table
from speed_tables import (
    calibration_table,
    demo_table,
    kinds_table,
    launches_table,
    linear_table,
    parts_table,
    step_against_table,
    step_estimates_table,
    steps_table,
    threads_table,
)
from use_tables import lengths_table, lora_table, pairs_table
from variants import GROUPS, JUDGED, Variant

from s2q.evaluation.intervals import clustered_mean
from s2q.shapes.embedded import EMBEDDED_NAMES as MODELS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    "docs/quickstart.md",
    "docs/choose.md",
    "docs/comfyui.md",
    "docs/results.md",
    "docs/observations.md",
    "docs/speed.md",
    "docs/real-models.md",
    "docs/judging.md",
    "docs/scale-out.md",
    "docs/decisions.md",
    "docs/recipes.md",
    *(f"docs/models/{name}.md" for name in page_names()),
)
MEASURED = "src/s2q/planning/measured.yaml"
WIDTHS = ("w8a8", "w4a16", "w4a8", "w4a6", "w4a4", "w3a6")
METHODS = (
    *("rtn", "smoothquant", "ptq4dit", "brecq", "quarot", "vidit-q", "svdquant", "vidit-q-mp", "q-dit"),
    *("s2q", "s2q-plus", "table", "s2q-table"),
)
ORDER = [f"{method}-{width}" for width in WIDTHS for method in METHODS]
LABELS = ("shape", "colour", "direction", "background")


def _quality(model: str) -> list[dict]:
    folder = RESULTS / "quality" / model
    results = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return [
        results[name] for name in sorted(results, key=lambda n: (n not in ORDER, ORDER.index(n) if n in ORDER else n))
    ]


def quality_table(model: str) -> str:
    """Recipes of one model against its full precision, means with 95 % intervals over prompts."""
    results = _quality(model)
    first = results[0]
    frame = ["first_frame_psnr_db"] if _has_images(first) else []
    head = ["storage", "PSNR dB", "SSIM", "latent rel. L2", "velocity error", "prompt adherence (all labels)"]
    lines = table_head("recipe", [*head, *("first frame, dB" for _ in frame)])
    alone = [interval(first["metrics"]["reference_adherence_all"], ".3f")]
    alone += [interval(first["metrics"][f"reference_{name}"], ".1f") for name in frame]
    lines.append(table_row("full precision", ["1.00×", "", "", "", "", *alone]))
    for result in results:
        metrics = result["metrics"]
        cells = [
            times_smaller(result),
            interval(metrics["psnr_frame_mean_db"], ".1f"),
            interval(metrics["ssim"], ".3f"),
            interval(metrics["latent_relative_l2"], ".3f"),
            interval(metrics["velocity_relative_error"], ".5f"),
            interval(metrics["adherence_all"], ".3f"),
            *(interval(metrics[name], ".1f") for name in frame),
        ]
        lines.append(table_row(f"`{result['model']}`", cells))
    floor = first["noise_floor"]
    if floor:
        lines.append(
            table_row("full precision, different seed", ["", *_floor_cells(floor), "", "", *("" for _ in frame)])
        )
    settings = first["settings"]
    lines += [
        "",
        f"{first['n_prompts']} held-out prompts × {first['n_seeds']} seeds, {settings['num_inference_steps']} steps, "
        f"{settings['dtype']} on both sides. Brackets: 95 % bootstrap interval over prompts. Storage: reduction of the "
        f"whole transformer relative to bfloat16. Made by `{first['command']}` "
        f"(torch {first['versions']['torch']}, diffusers {first['versions']['diffusers']}).",
    ]
    return "\n".join(lines)


def _has_images(result: dict) -> bool:
    """Whether the videos of a result start from images; results before that metric have none."""
    return result["metrics"].get("first_frame_psnr_db", {"mean": None})["mean"] is not None


def _floor_cells(floor: dict) -> list[str]:
    values = floor.get("metrics", floor)
    names = ("psnr_frame_mean_db", "ssim", "latent_relative_l2")
    forms = (".1f", ".3f", ".3f")
    cells = []
    for name, form in zip(names, forms, strict=True):
        value = values.get(name)
        cells.append("" if value is None else format(value["mean"] if isinstance(value, dict) else value, form))
    return cells


def adherence_table(model: str) -> str:
    """Adherence label by label, as the detector sees it."""
    results = _quality(model)
    lines = table_head("recipe", list(LABELS))
    first = results[0]["metrics"]
    lines.append(
        table_row("full precision", [interval(first[f"reference_adherence_{label}"], ".3f") for label in LABELS])
    )
    for result in results:
        cells = [interval(result["metrics"][f"adherence_{label}"], ".3f") for label in LABELS]
        lines.append(table_row(f"`{result['model']}`", cells))
    return "\n".join(lines)


def attention_table(model: str) -> str:
    """Attention mass on the top tenth of the tokens: per block, at the first, the middle and the last step."""
    result = json.loads((RESULTS / f"observations-{model}.json").read_text())
    steps = [0, len(result["timesteps"]) // 2, len(result["timesteps"]) - 1]
    names = [f"t = {result['timesteps'][i]}" for i in steps]
    lines = table_head("block", [*names, "mean", "share on text"])
    pairs = zip(result["attention_mass_top_10_percent"], result["attention_mass_text"], strict=True)
    for block, (top, text) in enumerate(pairs):
        cells = [f"{top[i]:.2f}" for i in steps] + [f"{sum(top) / len(top):.2f}", f"{sum(text) / len(text):.2f}"]
        lines.append(table_row(str(block), cells))
    return "\n".join(lines)


def outlier_table(model: str) -> str:
    """Largest over median channel maximum, by kind of linear: median and largest over blocks and steps."""
    result = json.loads((RESULTS / f"observations-{model}.json").read_text())
    kinds: dict[str, list[float]] = {}
    for name, values in result["input_max_over_median"].items():
        kinds.setdefault(name.split(".", 2)[2], []).extend(values)
    lines = table_head("input of", ["median", "largest"])
    for kind, values in kinds.items():
        ordered = sorted(values)
        lines.append(table_row(f"`{kind}`", [f"{ordered[len(ordered) // 2]:.1f}", f"{ordered[-1]:.1f}"]))
    return "\n".join(lines)


def ablation_table(group: str, model: str) -> str:
    """Variants of a group in order: velocity error over seeds, and against the base of the group, paired by prompt."""
    folder = RESULTS / "ablations" / model
    base = _base(group, model)
    runs = {
        variant.name: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{variant.name}-[0-9].json"))]
        for variant in GROUPS[group]
    }
    if not runs[base.name]:
        return f"Not measured yet: `python benchmarks/ablations.py {group}`."
    head = ["velocity error", "min, max over seeds", f"ratio to {base.label.removeprefix('+ ')}", "seeds"]
    lines = table_head("variant", head)
    for variant in GROUPS[group]:
        seeds = runs[variant.name]
        if not seeds:
            continue
        errors = [run["velocity_relative_error"] for run in seeds]
        spread = f"{min(errors):.5f}, {max(errors):.5f}" if len(errors) > 1 else ""
        cells = [
            f"{sum(errors) / len(errors):.5f}",
            spread,
            _ratio(seeds, runs[base.name]),
            str(len(seeds)),
        ]
        lines.append(table_row(variant.label, cells))
    first = runs[base.name][0]
    judged = ", ".join(f"`{name}={value:g}`" for name, value in JUDGED.get(group, {}).items())
    lines += [
        "",
        f"{len(first['videos'])} held-out prompts, float32{judged and f', judged with {judged}'}. "
        f"Made by `python benchmarks/ablations.py {group}{'' if model == MODELS[0] else f' -m {model}'} "
        f"--prompts {len(first['videos'])} --seeds {max(map(len, runs.values()))}`.",
    ]
    return "\n".join(lines)


def _ratio(runs: list[dict], base: list[dict]) -> str:
    """Geometric mean over prompts of the runs' errors over the base's, of the seeds that both have."""
    other = {run["seed"]: run for run in base}
    pairs = [(run, other[run["seed"]]) for run in runs if run["seed"] in other]
    if not pairs or runs is base:
        return "1" if runs is base else ""
    logs: dict[str, list[float]] = {}
    for run, reference in pairs:
        for ours, theirs in zip(run["videos"], reference["videos"], strict=True):
            value = math.log(ours["velocity_relative_error"] / theirs["velocity_relative_error"])
            logs.setdefault(ours["prompt"], []).append(value)
    estimate = clustered_mean(logs)
    if estimate.low is None or estimate.high is None:
        return f"{math.exp(estimate.mean):.3f}"
    return f"{math.exp(estimate.mean):.3f} [{math.exp(estimate.low):.3f}, {math.exp(estimate.high):.3f}]"


def _base(group: str, model: str) -> Variant:
    """What the variants of a group are compared with: the recipe itself, or the bar that its parts have to beat."""
    if group in JUDGED or group in ("precision", "rotation"):
        return GROUPS[group][0]
    kind, _, width = group.rpartition("-")
    name = f"s2q-{width}" if kind == "beyond" else "s2q-w4a4"
    if kind == "parts":  # with outlier channels a scale is part of any sensible bar
        name = f"s2q-{width}-" + ("hadamard-gptq" if model == MODELS[0] else "parts-3-gptq")
    return next(variant for variant in GROUPS[group] if variant.name == name)


def index_table(page: str) -> str:
    """Sections of a page of the docs with links to their entries."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    lines = table_head("section", ["entries"])
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        entries = " · ".join(_anchor(entry) for entry in re.findall(r"^### (.+)$", section, flags=re.MULTILINE))
        lines.append(table_row(_anchor(section.partition("\n")[0]), [entries]))
    return "\n".join(lines)


def _anchor(heading: str) -> str:
    """A link to a heading of the same page."""
    slug = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
    return f"[{heading}](#{slug})"


def int8_attention_table(recipe: str) -> str:
    """Velocity error of int8 attention on the embedded models, by itself and beside the linears of a recipe."""
    head = ["attention", "without smoothing", f"linears (`{recipe}`)", "both", "added by attention"]
    lines = table_head("model", head)
    for model in MODELS:
        path = RESULTS / "attention" / f"{model}.json"
        if path.exists():
            result = json.loads(path.read_text())
            names = ("attention", "attention, keys with their mean", recipe, f"{recipe}, attention")
            errors = [result["velocity_relative_error"][name] for name in names]
            share = interval(result["added"], ".1f", scale=100 / errors[2])
            lines.append(table_row(f"`{model}`", [*(f"{error:.6f}" for error in errors), f"{share} %"]))
            note = f"{result['prompts']} held-out prompts, float32"
    return "\n".join([*lines, "", f"{note}. Made by `python benchmarks/attention_error.py -m MODEL`."])


def text_encoders_table(_argument: str) -> str:
    """Effect of weight-only text encoders on the embedded models, by setting."""
    lines = table_head("model, `text_encoder`", ["embeddings", "velocity error", "PSNR, dB"])
    for model in MODELS:
        path = RESULTS / "text-encoders" / f"{model}.json"
        if path.exists():
            result = json.loads(path.read_text())
            for name, figures in result["settings"].items():
                errors = (figures[f"{part}_relative_error"]["mean"] for part in ("embedding", "velocity"))
                cells = [*(f"{error:.1e}" for error in errors), f"{figures['psnr_db']['mean']:.1f}"]
                lines.append(table_row(f"`{model}`, {name}", cells))
            note = f"{result['prompts']} held-out prompts, float32"
    return "\n".join([*lines, "", f"{note}. Made by `python benchmarks/text_encoders.py -m MODEL`."])


TABLES: dict[str, Callable[[str], str]] = {
    "index": index_table,
    "quality": quality_table,
    "methods": methods_table,
    "field": field_table,
    "peers": peers_table,
    "tools": tools_table,
    "choose-devices": devices_table,
    "choose-models": models_table,
    "choose-recipes": recipes_table,
    "comfyui": comfyui_table,
    "exports": exports_table,
    "parts-added": parts_added_table,
    "adherence": adherence_table,
    "attention": attention_table,
    "int8-attention": int8_attention_table,
    "text-encoders": text_encoders_table,
    "lengths": lengths_table,
    "lora": lora_table,
    "pairs": pairs_table,
    "outliers": outlier_table,
    "kernels": kernels_table,
    "linear": linear_table,
    "kinds": kinds_table,
    "threads": threads_table,
    "demo": demo_table,
    "steps": steps_table,
    "step-against": step_against_table,
    "step-estimates": step_estimates_table,
    "launches": launches_table,
    "parts": parts_table,
    "calibration": calibration_table,
    "scaling": speedup_table,
    "scaling-limits": limits_table,
    "sizes": sizes_table,
    "bytes": bytes_table,
    "cost": cost_table,
    "family": sizes_and_times_table,
    "modes": modes_table,
    "calls": calls_table,
    "commands": commands_of,
    "python": python_of,
    "quickstart": quickstart_table,
    "reproduce": overview_table,
    "metrics": metrics_table,
    "evalcrafter": evalcrafter_table,
    "paper": paper_table,
}


def filled(text: str) -> str:
    """The page with every marked table made anew."""

    def replace(match: re.Match[str]) -> str:
        kind, model = match.group(1).split()
        table = TABLES[kind](model) if kind in TABLES else ablation_table(kind, model)
        return f"<!-- table: {kind} {model} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+ \S+) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


def measured_yaml() -> str:
    """The file of the package that `s2q plan --recipes` reads the measured errors from."""
    head = "# Mean velocity error of recipes on embedded models, generated by benchmarks/tables.py from its results.\n"
    lines = (
        f"{recipe}: {{{', '.join(f'{model}: {error}' for model, error in errors.items())}}}\n"
        for recipe, errors in measured_errors().items()
    )
    return head + "".join(lines)


def main() -> int:
    """Fill or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    arguments = parser.parse_args()
    stale = []
    for page in (MEASURED, *PAGES):  # pages read the first
        path = ROOT / page
        text = path.read_text()
        new = measured_yaml() if page == MEASURED else filled(text)
        if new != text:
            stale.append(page)
            if not arguments.check:
                path.write_text(new)
    for name, draw in FIGURES.items():
        path, drawn = IMAGES / name, draw()
        if not path.exists() or path.read_text() != drawn:
            stale.append(f"docs/images/{name}")
            if not arguments.check:
                path.write_text(drawn)
    if arguments.check and stale:
        print(f"out of date: {', '.join(stale)}; run python benchmarks/tables.py", file=sys.stderr)
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
