"""The tables of docs/choose.md: what devices multiply, what recipes take and lose, and what models need."""

from functools import cache

from kernel_tables import CARDS
from markdown_tables import table_head, table_row
from methods import FIELD_MODELS
from peer_tables import records_of
from published import GIB, on_gpu, plan_of, published_models
from speed_tables import bench_results

from s2q.planning import device_products
from s2q.planning.comparison import measured_errors
from s2q.planning.widths import RECOMMENDED, WITHOUT_CALIBRATION

RECIPES = (
    "s2q-plus-w8a8",
    *(*RECOMMENDED, "s2q-w4a8", WITHOUT_CALIBRATION, "rtn-w4a8"),
    *("s2q-plus-w4a6", "s2q-w4a6", "s2q-plus-w4a4", "s2q-w4a4"),
)
SIZES = ("s2q-plus-w8a8", *RECOMMENDED, WITHOUT_CALIBRATION, "s2q-w4a8")
TIMED_ON = "h100"
CPUS = {
    "CPU with AVX-512 VNNI": ("int8", "int8", "cpu-one-thread"),
    "CPU with AVX2 alone": ("int8", "fp32", "cpu-one-thread-no-vnni"),
    "other CPUs": ("fp32", "fp32", None),
}
"""Products of 4-bit and of 8-bit weights on CPUs, and the file of their measurements."""

UNUSED_INT4 = (80, 86, 89)
"""Architectures with int4 tensor cores, for which Triton has no product."""


def devices_table(recipe: str) -> str:
    """Products of each kind of device, and the measured speed of whole linears with a recipe."""
    lines = table_head("device", ["W4A8, W4A6, W4A4", "W8A8, tables", "4-bit units", f"speed of a linear, `{recipe}`"])
    for name, (narrow, wide, file) in CPUS.items():
        lines.append(table_row(name, [narrow, wide, "none", _speeds(file, recipe)]))
    for architecture, cards in CARDS.items():
        products = device_products("cuda", capability=divmod(architecture, 10))
        assert products is not None
        units = (
            "int4, no kernel" if architecture in UNUSED_INT4 else "NVFP4 (`--backend fp4`)" if products.fp4 else "none"
        )
        narrow, wide = ("int8" if width in products.integer else "fp32" for width in ("w4a8", "w8a8"))
        lines.append(table_row(cards, [narrow, wide, units, "not measured"]))
    return "\n".join([*lines, "", "Speed: range over layer shapes, over the faster of bf16 and fp32, one thread."])


def _speeds(file: str | None, recipe: str) -> str:
    ratios = [
        result["ratio_to_baseline"]
        for result in (bench_results(file, "linear")[1] if file else [])
        if (result["recipe"], result["backend"]) == (recipe, "auto")
    ]
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "not measured"


def recipes_table(model: str) -> str:
    """Recipes: bytes and estimated time of a published model, velocity error and time of the embedded ones."""
    title = next(entry["title"] for entry in published_models().values() if entry["synthetic"] == model)
    head = [
        f"{title}, GiB",
        f"{title}, H100 hours",
        "embedded, minutes",
        *(f"error, %: `{name.removeprefix('shapes-')}`" for name in FIELD_MODELS),
    ]
    lines = table_head("recipe", head)
    for recipe in RECIPES:
        planned = on_gpu(model, recipe, "auto", TIMED_ON)
        hours = planned.estimate.gpu_hours
        errors = (measured_errors()[recipe].get(name) for name in FIELD_MODELS)
        cells = [
            f"{planned.storage['quantized_bytes'] / GIB:.2f}",
            f"{hours:.1f}" if hours >= 0.1 else "< 0.1",
            _minutes(recipe),
            *("not measured" if error is None else format(100 * error, "#.3g").rstrip(".") for error in errors),
        ]
        lines.append(table_row(f"`{recipe}`", cells))
    full = planned.storage["full_precision_bytes"] / GIB
    note = "Hours are estimated, for calibration on a GPU; errors were measured with calibration in fp32."
    return "\n".join([*lines, "", f"{title} in bf16: {full:.2f} GiB. {note}"])


@cache
def _minutes(recipe: str) -> str:
    """Minutes on the embedded models, from the fastest to the slowest."""
    width = recipe.rpartition("-")[2]
    records = (records_of(model, width).get(recipe) for model in FIELD_MODELS[:2])
    minutes = sorted(record["quantize_seconds"] / 60 for record in records if record is not None)
    ends = list(dict.fromkeys(f"{end:.2g}" for end in minutes))
    return " to ".join(ends) if ends else "not measured"


def models_table(_: str) -> str:
    """Transformers of published models in bf16 and quantized, by their dimensions."""
    lines = table_head("model", ["bf16 GiB", *(f"`{recipe}` GiB" for recipe in SIZES)])
    for entry in published_models().values():
        if entry["synthetic"] is None:
            continue
        storages = [plan_of(entry["synthetic"], recipe).storage for recipe in SIZES]
        figures = [storages[0]["full_precision_bytes"], *(storage["quantized_bytes"] for storage in storages)]
        lines.append(table_row(entry["title"], [f"{figure / GIB:.2f}" for figure in figures]))
    return "\n".join(lines)
