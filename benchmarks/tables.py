"""Generate the tables of the README and the docs from the results files; ``--check`` only checks them.

    python benchmarks/tables.py [--check]

A table is between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from judging import evalcrafter_table, metrics_table, paper_table
from kernel_tables import kernels_table
from markdown_tables import interval, table_head, table_row
from methods import field_table, methods_table, parts_added_table
from published import calls_table, commands_of, cost_table, python_of, sizes_table
from reproduce.beside import overview_table
from variants import GROUPS, Variant

from s2q.benchmark.results import place_of
from s2q.evaluation.intervals import clustered_mean
from s2q.shapes.embedded import EMBEDDED_NAMES as MODELS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    "docs/results.md",
    "docs/observations.md",
    "docs/speed.md",
    "docs/real-models.md",
    "docs/judging.md",
    "docs/decisions.md",
)
ORDER = (
    "rtn-w8a8",
    "smoothquant-w8a8",
    "ptq4dit-w8a8",
    "brecq-w8a8",
    "quarot-w8a8",
    "vidit-q-w8a8",
    "svdquant-w8a8",
    "q-dit-w8a8",
    "rtn-w4a16",
    "rtn-w4a8",
    "smoothquant-w4a8",
    "ptq4dit-w4a8",
    "brecq-w4a8",
    "quarot-w4a8",
    "vidit-q-w4a8",
    "svdquant-w4a8",
    "vidit-q-mp-w4a8",
    "q-dit-w4a8",
    "s2q-w4a8",
    "rtn-w4a6",
    "smoothquant-w4a6",
    "ptq4dit-w4a6",
    "brecq-w4a6",
    "quarot-w4a6",
    "vidit-q-w4a6",
    "svdquant-w4a6",
    "vidit-q-mp-w4a6",
    "q-dit-w4a6",
    "s2q-w4a6",
    "s2q-plus-w4a6",
    "rtn-w4a4",
    "smoothquant-w4a4",
    "ptq4dit-w4a4",
    "brecq-w4a4",
    "quarot-w4a4",
    "vidit-q-w4a4",
    "svdquant-w4a4",
    "vidit-q-mp-w4a4",
    "q-dit-w4a4",
    "s2q-w4a4",
    "s2q-plus-w4a4",
    "s2q-w3a6",
)
KINDS_RECIPES = ("s2q-w4a8", "s2q-w4a6", "s2q-w4a4")
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
    head = ["storage", "PSNR dB", "SSIM", "latent rel. L2", "velocity error", "prompt adherence (all labels)"]
    lines = table_head("recipe", head)
    first = results[0]
    reference = interval(first["metrics"]["reference_adherence_all"], ".3f")
    lines.append(table_row("full precision", ["1.00×", "", "", "", "", reference]))
    for result in results:
        metrics = result["metrics"]
        cells = [
            f"{result['storage']['ratio']:.2f}×",
            interval(metrics["psnr_frame_mean_db"], ".1f"),
            interval(metrics["ssim"], ".3f"),
            interval(metrics["latent_relative_l2"], ".3f"),
            interval(metrics["velocity_relative_error"], ".5f"),
            interval(metrics["adherence_all"], ".3f"),
        ]
        lines.append(table_row(f"`{result['model']}`", cells))
    floor = first["noise_floor"]
    if floor:
        lines.append(table_row("full precision, different seed", ["", *_floor_cells(floor), "", ""]))
    settings = first["settings"]
    lines += [
        "",
        f"{first['n_prompts']} held-out prompts × {first['n_seeds']} seeds, {settings['num_inference_steps']} steps, "
        f"{settings['dtype']} on both sides. Brackets: 95 % bootstrap interval over prompts. Storage: reduction of the "
        f"whole transformer relative to bfloat16. Made by `{first['command']}` "
        f"(torch {first['versions']['torch']}, diffusers {first['versions']['diffusers']}).",
    ]
    return "\n".join(lines)


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
        own = runs[variant.name]
        if not own:
            continue
        errors = [run["velocity_relative_error"] for run in own]
        spread = f"{min(errors):.5f}, {max(errors):.5f}" if len(errors) > 1 else ""
        cells = [
            f"{sum(errors) / len(errors):.5f}",
            spread,
            _ratio(own, runs[base.name]),
            str(len(own)),
        ]
        lines.append(table_row(variant.label, cells))
    first = runs[base.name][0]
    lines += [
        "",
        f"{len(first['videos'])} held-out prompts, float32. "
        f"Made by `python benchmarks/ablations.py {group}{'' if model == MODELS[0] else f' -m {model}'}`.",
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


def _bench(device: str, op: str) -> tuple[dict, list[dict]]:
    """The results file of a kind of device, and its results of one op."""
    path = RESULTS / "bench" / f"{device}.json"
    content = json.loads(path.read_text()) if path.exists() else {"results": []}
    return content, [one for one in content["results"] if one["op"] == op]


def _measured_on(content: dict, device: str) -> str:
    place = place_of(content["hardware"])
    return f"{place}, torch {content['versions']['torch']}; made by `make bench-{device}`."


def linear_table(device: str) -> str:
    """Times faster than bf16 of a whole quantized linear, shape by shape, and what its activation path adds."""
    content, linears = _bench(device, "linear")
    if not linears:
        return f"Not measured yet: `make bench-{device}`."
    paths = {(tuple(one["shape"]), one["recipe"]): one for one in _bench(device, "activation_path")[1]}
    recipes = list(dict.fromkeys(one["recipe"] for one in linears))
    head = ["layer", "int8 product only", *(f"`{name}`" for name in recipes), f"activation path, `{recipes[0]}`"]
    lines = table_head("M × K × N", head)
    rows: dict[tuple, dict[str, dict]] = {}
    for one in linears:
        rows.setdefault((tuple(one["shape"]), one["readers"]), {})[one["recipe"]] = one
    for (shape, readers), found in rows.items():
        first = next(iter(found.values()))
        path = paths.get((shape, recipes[0]))
        cells = [
            _short(first["layers"]),
            _times(first["bound_ratio"]),
            *(_times(found[name]["ratio_to_bf16"]) if name in found else "" for name in recipes),
            "" if path is None or readers else f"{100 / path['ratio_to_bf16']:.0f} %",
        ]
        lines.append(
            table_row(" × ".join(map(str, shape)) + (f", {readers} sharing an input" if readers else ""), cells)
        )
    lines += [
        "",
        "Speedup over bf16 `F.linear` on the same data in the same rounds (medians over rounds). 3 sharing an input: "
        "q, k and v, whose input is quantized once. Last column: time of the activation path relative to bf16 "
        "`F.linear`. " + _measured_on(content, device),
    ]
    return "\n".join(lines)


def demo_table(device: str) -> str:
    """Seconds of the demo with all instructions of a CPU and with AVX2 alone."""
    content = json.loads((RESULTS / "demo-seconds.json").read_text())
    lines = table_head("instructions", ["quantize, s", "evaluate, s", "total, s"])
    for row in content["rows"]:
        lines.append(
            table_row(row["instructions"], [f"{row['seconds'][n]:.0f}" for n in ("quantize", "evaluate", "total")])
        )
    return "\n".join([*lines, "", _place_and_command(content, device)])


def _place_and_command(content: Mapping[str, Any], device: str) -> str:
    hardware, versions = content["hardware"], content["versions"]
    return (
        f"On a {device.upper()}: {hardware['processor']}, {hardware['cores']} cores, {hardware['instruction_set']}, "
        f"torch {versions['torch']}. Made by `{content['command']}`."
    )


def threads_table(device: str) -> str:
    """A step of the embedded model beside other processes, with threads that spin and threads that sleep."""
    content = json.loads((RESULTS / "waiting-threads.json").read_text())
    lines = table_head("other processes", ["threads", "full precision, ms a step", f"`{content['recipe']}`, ms a step"])
    for row in content["rows"]:
        cells = [row["way"], *(f"{row[name]:.3g}" for name in ("full_precision_ms", "quantized_ms"))]
        lines.append(table_row(str(row["others"]), cells))
    lines += ["", f"`{content['model']}`. {_place_and_command(content, device)}"]
    return "\n".join(lines)


def kinds_table(device: str) -> str:
    """Whole linears and the embedded step against fp32 and bf16, on CPUs of two kinds."""
    lines = table_head("instruction set", ["operation", "fp32 ms", "bf16 ms", "`s2q-w4a8`", "`s2q-w4a6`", "`s2q-w4a4`"])
    places = []
    for kind in (f"{device}-one-thread", f"{device}-one-thread-avx2"):
        content, linears = _bench(kind, "linear")
        rows: dict[tuple, dict[str, dict]] = {}
        for one in (*linears, *_bench(kind, "denoising_step")[1]):
            if one["backend"] == "auto":
                name = " × ".join(map(str, one["shape"])) if one["shape"] else f"step of {one['model']}"
                rows.setdefault((name, one["readers"]), {})[one["recipe"]] = one
        for (name, readers), found in rows.items():
            first = next(iter(found.values()))
            cells = [
                name + (f", {readers} sharing an input" if readers else ""),
                *(f"{first[f'{full}_milliseconds']:.3g}" for full in ("fp32", "bf16")),
                *(_times(found[recipe]["ratio_to_baseline"]) if recipe in found else "" for recipe in KINDS_RECIPES),
            ]
            lines.append(table_row(content["hardware"]["instruction_set"], cells))
        if rows:
            places.append(place_of(content["hardware"]))
    if not places:
        return "Not measured yet: `make bench-cpu-kinds`."
    lines += [
        "",
        f"Recipes: speedup over the faster of fp32 and bf16. {'; '.join(places)}. Made by `make bench-cpu-kinds`.",
    ]
    return "\n".join(lines)


def steps_table(device: str) -> str:
    """Denoising steps: times faster than bf16, memory and storage against it."""
    content, steps = _bench(device, "denoising_step")
    if not steps:
        return f"Not measured yet: `make bench-{device}`."
    head = ["configuration", "speedup", "bound", "storage", "peak memory"]
    lines = table_head("model", head)
    for one in steps:
        peaks = one["peak_memory_bytes"], one["bf16_peak_memory_bytes"]
        cells = [
            _contender(one),
            _times(one["ratio_to_bf16"]),
            _times(one["bound_ratio"]),
            f"{one['bf16_storage_bytes'] / one['storage_bytes']:.2f}×",
            "" if None in peaks else f"{peaks[1] / peaks[0]:.2f}×",
        ]
        lines.append(table_row(_model_of(one), cells))
    lines += [
        "",
        "Speedup over bf16. Bound: speedup if each linear took the time of a plain int8 product and nothing else "
        "changed. Storage, peak memory: reduction relative to bf16. Published dimensions: one block of each list is "
        "timed and its time is multiplied by the number of blocks. " + _measured_on(content, device),
    ]
    return "\n".join(lines)


def calibration_table(device: str) -> str:
    """A step of distillation of each recipe against that of the first, and a bf16 forward pass of the block."""
    content, steps = _bench(f"{device}-one-thread", "calibration_block")
    if not steps:
        return "Not measured yet: `make bench-cpu-kinds`."
    lines = table_head("model", ["recipe", "step", "relative", "bf16 forward passes", "peak memory"])
    first: dict[str, float] = {}
    for step in steps:
        relative = step["milliseconds"] / first.setdefault(step["model"], step["milliseconds"])
        cells = [
            f"`{step['recipe']}`",
            f"{step['milliseconds'] / 1000:.3g} s",
            f"{relative:.2f}",
            f"{1 / step['ratio_to_bf16']:.1f}",
            f"{step['peak_memory_bytes'] / 1e6:.0f} MB",
        ]
        lines.append(table_row(_model_of(step), cells))
    place = f"{place_of(content['hardware'])}, torch {content['versions']['torch']}"
    lines += ["", f"{place}. Made by `make bench-cpu-kinds`."]
    return "\n".join(lines)


def parts_table(device: str) -> str:
    """Where the time of a denoising step goes, each part as a share of the bf16 step."""
    content, steps = _bench(device, "denoising_step")
    if not steps:
        return f"Not measured yet: `make bench-{device}`."
    parts = list(steps[0]["breakdown"])
    head = ["configuration", *(name.replace("_", " ") for name in parts), "sum"]
    lines = table_head("model", head)
    before = None
    for one in steps:
        if before != one["model"]:
            lines.append(table_row(_model_of(one), _shares("bf16", one["bf16_breakdown"], one, parts)))
            before = one["model"]
        lines.append(table_row("", _shares(_contender(one), one["breakdown"], one, parts)))
    lines += ["", "Percent of the bf16 step, timed in the same rounds. " + _measured_on(content, device)]
    return "\n".join(lines)


def _contender(one: dict) -> str:
    """What ran, and how if that is not the default."""
    name = f"`{one['recipe']}`" if one["recipe"] else one["scheme"]
    return f"{name}, `--backend fastest`" if one["backend"] == "fastest" else name


def _shares(name: str, breakdown: dict, one: dict, parts: list[str]) -> list[str]:
    whole = one["bf16_milliseconds"]
    values = [100 * breakdown[part] / whole for part in parts]
    return [name, *(f"{value:.0f}" for value in (*values, sum(values)))]


def _model_of(one: dict) -> str:
    name = one["model"].removeprefix("synthetic:")
    return name if one["tokens"] is None else f"{name}, {one['tokens']} tokens"


def _short(layers: list[str]) -> str:
    """Layers by model: "cogvideox-5b to_q and 3 more"."""
    first = layers[0].split(" ", 1)
    return f"{first[0]} `{first[1]}`" + (f" and {len(layers) - 1} more" if len(layers) > 1 else "")


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _base(group: str, model: str) -> Variant:
    """What the variants of a group are compared with: the recipe itself, or the bar that its parts have to beat."""
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


TABLES: dict[str, Callable[[str], str]] = {
    "index": index_table,
    "quality": quality_table,
    "methods": methods_table,
    "field": field_table,
    "parts-added": parts_added_table,
    "adherence": adherence_table,
    "attention": attention_table,
    "outliers": outlier_table,
    "kernels": kernels_table,
    "linear": linear_table,
    "kinds": kinds_table,
    "threads": threads_table,
    "demo": demo_table,
    "steps": steps_table,
    "parts": parts_table,
    "calibration": calibration_table,
    "sizes": sizes_table,
    "cost": cost_table,
    "calls": calls_table,
    "commands": commands_of,
    "python": python_of,
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


def main() -> int:
    """Fill or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    arguments = parser.parse_args()
    stale = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        new = filled(text)
        if new != text:
            stale.append(page)
            if not arguments.check:
                path.write_text(new)
    if arguments.check and stale:
        print(f"out of date: {', '.join(stale)}; run python benchmarks/tables.py", file=sys.stderr)
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
