"""Tables of what `s2q bench` and the scripts of this folder have timed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markdown_tables import table_head, table_row

from s2q.benchmark.results import place_of

RESULTS = Path(__file__).parent / "results"
KINDS_RECIPES = ("s2q-w4a8", "s2q-w4a6", "s2q-w4a4", "s2q-plus-w4a8", "s2q-table-w4a8")


def bench_results(device: str, op: str) -> tuple[dict, list[dict]]:
    """Return the results file of a kind of device, and its results of one op."""
    path = RESULTS / "bench" / f"{device}.json"
    content = json.loads(path.read_text()) if path.exists() else {"results": []}
    return content, [result for result in content["results"] if result["op"] == op]


def _measured_on(content: dict, device: str) -> str:
    place = place_of(content["hardware"])
    return f"{place}, torch {content['versions']['torch']}; made by `make bench-{device}`."


def linear_table(device: str) -> str:
    """Times faster than bf16 of a whole quantized linear, shape by shape, and what its activation path adds."""
    content, linears = bench_results(device, "linear")
    if not linears:
        return f"Not measured yet: `make bench-{device}`."
    paths = {(tuple(path["shape"]), path["recipe"]): path for path in bench_results(device, "activation_path")[1]}
    recipes = list(dict.fromkeys(linear["recipe"] for linear in linears))
    head = ["layer", "int8 product only", *(f"`{name}`" for name in recipes), f"activation path, `{recipes[0]}`"]
    lines = table_head("M × K × N", head)
    rows: dict[tuple, dict[str, dict]] = {}
    for linear in linears:
        rows.setdefault((tuple(linear["shape"]), linear["readers"]), {})[linear["recipe"]] = linear
    for (shape, readers), by_recipe in rows.items():
        first = next(iter(by_recipe.values()))
        path = paths.get((shape, recipes[0]))
        cells = [
            _short(first["layers"]),
            _times(first["bound_ratio"]),
            *(_times(by_recipe[name]["ratio_to_bf16"]) if name in by_recipe else "" for name in recipes),
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
    """Seconds of the demo on CPUs with and without VNNI."""
    lines = table_head("instructions", ["quantize, s", "evaluate, s", "total, s"])
    places = []
    for file in ("demo-seconds.json", "demo-seconds-no-vnni.json"):
        content = json.loads((RESULTS / file).read_text())
        places.append(_place_and_command(content, device))
        for row in content["rows"]:
            seconds = [f"{row['seconds'][name]:.0f}" for name in ("quantize", "evaluate", "total")]
            instructions = "AVX2, capped" if row["variables"] else content["hardware"]["instruction_set"]
            lines.append(table_row(instructions, seconds))
    return "\n".join([*lines, "", " ".join(places)])


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


def step_against_table(device: str) -> str:
    """Steps of distillation against those of an earlier commit, which took turns."""
    content = json.loads((RESULTS / "step-against.json").read_text())
    lines = table_head("model", ["recipe", "before, ms", "now, ms", "speedup"])
    for row in content["results"]:
        medians = [f"{row['milliseconds'][side]:.3g}" for side in ("before", "after")]
        lines.append(table_row(row["model"], [f"`{row['recipe']}`", *medians, _times(row["ratio"])]))
    rounds = content["results"][0]["rounds"]
    lines += [
        "",
        f"Medians of {rounds} rounds, one thread; other work ran on the machine. Before: commit {content['before']}. "
        + _place_and_command(content, device),
    ]
    return "\n".join(lines)


def kinds_table(device: str) -> str:
    """Whole linears and the embedded step against fp32 and bf16, on CPUs with and without VNNI."""
    recipes = [f"`{name}`" for name in KINDS_RECIPES]
    lines = table_head("instruction set", ["operation", "fp32 ms", "bf16 ms", *recipes])
    places = []
    for kind in (f"{device}-one-thread", f"{device}-one-thread-avx2", f"{device}-one-thread-no-vnni"):
        content, linears = bench_results(kind, "linear")
        rows: dict[tuple, dict[str, dict]] = {}
        for result in (*linears, *bench_results(kind, "denoising_step")[1]):
            if result["backend"] == "auto":
                operation = " × ".join(map(str, result["shape"] or ())) or f"step of {result['model']}"
                rows.setdefault((operation, result["readers"]), {})[result["recipe"]] = result
        for (operation, readers), by_recipe in rows.items():
            first = next(iter(by_recipe.values()))
            cells = [
                operation + (f", {readers} sharing an input" if readers else ""),
                *(f"{first[f'{full}_milliseconds']:.3g}" for full in ("fp32", "bf16")),
                *(_times(by_recipe[name]["ratio_to_baseline"]) if name in by_recipe else "" for name in KINDS_RECIPES),
            ]
            capped = ", capped" if content["hardware"]["limited_by"] else ""
            lines.append(table_row(content["hardware"]["instruction_set"] + capped, cells))
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
    content, steps = bench_results(device, "denoising_step")
    if not steps:
        return f"Not measured yet: `make bench-{device}`."
    head = ["configuration", "speedup", "bound", "storage", "peak memory"]
    lines = table_head("model", head)
    for step in steps:
        peaks = step["peak_memory_bytes"], step["bf16_peak_memory_bytes"]
        cells = [
            _contender(step),
            _times(step["ratio_to_bf16"]),
            _times(step["bound_ratio"]),
            f"{step['bf16_storage_bytes'] / step['storage_bytes']:.2f}×",
            "" if None in peaks else f"{peaks[1] / peaks[0]:.2f}×",
        ]
        lines.append(table_row(_model_of(step), cells))
    lines += [
        "",
        "Speedup over bf16. Bound: speedup if each linear took the time of a plain int8 product and nothing else "
        "changed. Storage, peak memory: reduction relative to bf16. Published dimensions: one block of each list is "
        "timed and its time is multiplied by the number of blocks. " + _measured_on(content, device),
    ]
    return "\n".join(lines)


def step_estimates_table(_: str) -> str:
    """Estimated and measured time of a step of distillation on a CPU."""
    result = json.loads((RESULTS / "step-estimates.json").read_text())
    lines = table_head("model", ["recipe", "FLOP", "estimated", "measured", "estimated / measured"])
    for step in result["steps"]:
        cells = [f"`{step['recipe']}`", f"{step['flop']:.2e}"]
        cells += [f"{step[f'{kind}_seconds']:.2f} s" for kind in ("estimated", "measured")]
        name = step["model"].removeprefix("synthetic:")
        lines.append(table_row(f"{name}, {step['tokens']:,} tokens", [*cells, f"{step['ratio']:.2f}"]))
    rates, hardware = result["rates"], result["hardware"]
    lines += [
        "",
        f"{hardware['processor']}: {rates['fp32_flops'] / 1e9:.0f} GFLOP/s, {rates['bandwidth'] / 1e9:.0f} GB/s, "
        f"{1e6 * rates['launch_seconds']:.1f} µs an operation. Made by `{result['command']}`.",
    ]
    return "\n".join(lines)


def launches_table(_: str) -> str:
    """Estimated time of a distillation step on a GPU and of its launches on the host."""
    result = json.loads((RESULTS / "launches.json").read_text())
    head = ["GPU", "operations", "host, ms", "device, ms", "device / host", "at least", "equal at, tokens"]
    lines = table_head("model", head)
    for step in result["steps"]:
        host, device, equal = step["host_seconds"], step["device_seconds"], step["equal_at_tokens"]
        cells = [step["device"], f"{step['launches']:,.0f}", f"{1000 * host:.1f}", f"{1000 * device:,.0f}"]
        cells += [f"{ratio:,.2g}" if ratio < 10 else f"{ratio:,.0f}" for ratio in (device / host, step["least_ratio"])]
        cells += ["longer" if equal is None else "below 64" if equal <= 64 else f"{equal:,}"]
        lines.append(table_row(f"{step['model']}, {step['tokens']:,} tokens", cells))
    lines += [
        "",
        f"`{result['recipe']}`, first block, one sample, bf16, estimated. At least: a fast device and a slow host. "
        f"Made by `{result['command']}`.",
    ]
    return "\n".join(lines)


def calibration_table(device: str) -> str:
    """A step of distillation of each recipe against that of the first, and a bf16 forward pass of the block."""
    content, steps = bench_results(f"{device}-one-thread", "calibration_block")
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
    content, steps = bench_results(device, "denoising_step")
    if not steps:
        return f"Not measured yet: `make bench-{device}`."
    parts = list(steps[0]["breakdown"])
    head = ["configuration", *(name.replace("_", " ") for name in parts), "sum"]
    lines = table_head("model", head)
    before = None
    for step in steps:
        if before != step["model"]:
            lines.append(table_row(_model_of(step), _shares("bf16", step["bf16_breakdown"], step, parts)))
            before = step["model"]
        lines.append(table_row("", _shares(_contender(step), step["breakdown"], step, parts)))
    lines += ["", "Percent of the bf16 step, timed in the same rounds. " + _measured_on(content, device)]
    return "\n".join(lines)


def _contender(step: dict) -> str:
    """What ran, and how if that is not the default."""
    name = f"`{step['recipe']}`" if step["recipe"] else step["scheme"]
    return f"{name}, `--backend fastest`" if step["backend"] == "fastest" else name


def _shares(name: str, breakdown: dict, step: dict, parts: list[str]) -> list[str]:
    whole = step["bf16_milliseconds"]
    values = [100 * breakdown[part] / whole for part in parts]
    return [name, *(f"{value:.0f}" for value in (*values, sum(values)))]


def _model_of(step: dict) -> str:
    name = step["model"].removeprefix("synthetic:")
    return name if step["tokens"] is None else f"{name}, {step['tokens']} tokens"


def _short(layers: list[str]) -> str:
    """Layers by model: "cogvideox-5b to_q and 3 more"."""
    first = layers[0].split(" ", 1)
    return f"{first[0]} `{first[1]}`" + (f" and {len(layers) - 1} more" if len(layers) > 1 else "")


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
