"""The tables of models that are used otherwise than they were calibrated: on longer videos, with an adapter."""

import json
from pathlib import Path

from markdown_tables import interval, table_head, table_row

from s2q.evaluation.intervals import clustered_mean
from s2q.evaluation.paired import paired_differences

RESULTS = Path(__file__).parent / "results"
RECIPES = ("rtn-w4a6", "s2q-w4a6", "s2q-plus-w4a6")
LENGTH_COLUMNS = {
    "velocity_relative_error": ("#.3g", 100.0),
    "motion_ratio": (".3f", 1.0),
    "psnr_frame_mean_db": (".1f", 1.0),
    "adherence_all": (".3f", 1.0),
    "reference_adherence_all": (".3f", 1.0),
}
LORA_COLUMNS = {
    "velocity_relative_error": ("#.3g", 100.0),
    "psnr_frame_mean_db": (".1f", 1.0),
    "new_colour": (".3f", 1.0),
    "effect_ratio": (".3f", 1.0),
    "effect_error": ("#.3g", 100.0),
}
PAIR_COLUMNS = {"velocity_relative_error": ("#.3g", 100.0), "psnr_frame_mean_db": (".1f", 1.0)}
PAIRED_FORMS = {"velocity_relative_error": ".3f", "psnr_frame_mean_db": "+.2f"}
WAYS = {"full_precision": "full precision (default)", "quantized": "the quantized first transformer"}


def pairs_table(_: str) -> str:
    """Pairs by the model that generated the samples of the second transformer, and their paired difference."""
    records = [json.loads(path.read_text()) for path in sorted((RESULTS / "pairs").glob("*.json"))]
    runs: dict[tuple[str, int], dict[str, dict]] = {}
    for record in records:
        runs.setdefault((record["recipe"], record["seed"]), {})[record["trajectory_2"]] = record
    lines = table_head("recipe, seed, samples of the second by", ["velocity error, %", "PSNR dB"])
    for (recipe, seed), ways in runs.items():
        for way in (name for name in WAYS if name in ways):
            cells = []
            for name, (form, scale) in PAIR_COLUMNS.items():
                values = {video["prompt"]: [video["metrics"][name]] for video in ways[way]["videos"]}
                cells.append(interval(vars(clustered_mean(values)), form, scale=scale))
            lines.append(table_row(f"`{recipe}`, {seed}, {WAYS[way]}", cells))
        if len(ways) == len(WAYS):
            differences = paired_differences(ways["quantized"]["videos"], ways["full_precision"]["videos"])
            cells = []
            for name, form in PAIRED_FORMS.items():
                estimate = vars(differences[name])
                cells.append(interval({**estimate, "mean": estimate["estimate"]}, form))
            lines.append(table_row(f"`{recipe}`, {seed}, quantized against default, paired", cells))
    counts = " and ".join(map(str, sorted({len(record["videos"]) for record in records})))
    boundaries = " and ".join(map(str, sorted({record["boundary_ratio"] for record in records})))
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(record["command"] for record in records))
    note = f"{counts} held-out prompts, float32, `boundary_ratio` {boundaries}. Made by {commands}."
    return "\n".join([*lines, "", f"Paired by prompt: ratio of velocity errors, difference of PSNR. {note}"])


def lengths_table(model: str) -> str:
    """Recipes of one model on videos of several lengths, against full precision of the same length."""
    head = ["velocity error, %", "motion ratio", "PSNR dB", "adherence", "adherence, full precision"]
    lines = table_head("recipe, frames", head)
    for recipe in RECIPES:
        path = RESULTS / "lengths" / model / f"{recipe}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        for frames, result in record["lengths"].items():
            cells = [interval(result["metrics"][name], form, scale=s) for name, (form, s) in LENGTH_COLUMNS.items()]
            lines.append(table_row(f"`{recipe}`, {frames}", cells))
        count = result["n_prompts"]
    note = f"{count} held-out prompts, one seed, float32; calibrated on {record['calibrated_frames']} frames."
    return "\n".join([*lines, "", f"{note} Made by `python benchmarks/lengths.py -m {model}`."])


def lora_table(model: str) -> str:
    """Recipes with a trained adapter, fused before quantization or attached after it; full precision has it too."""
    record = json.loads((RESULTS / "lora.json").read_text())
    assert record["model"] == model
    head = ["velocity error, %", "PSNR dB", "colours of the adapter", "effect, ratio", "effect, error %"]
    lines = table_head("model", head)
    rows = {
        "full precision, adapter": record["with adapter"],
        "full precision, no adapter": record["without adapter"],
    }
    for recipe in RECIPES:
        rows |= {f"`{recipe}`, {way}": result for way, result in record["recipes"].get(recipe, {}).items()}
    for name, result in rows.items():
        cells = [
            interval(result[column], form, scale=scale) if column in result else ""
            for column, (form, scale) in LORA_COLUMNS.items()
        ]
        lines.append(table_row(name, cells))
    command = f"PYTHONPATH=. python benchmarks/lora.py --prompts {record['prompts']}"
    note = f"{record['prompts']} held-out prompts, one seed, float32. Made by `{command}`."
    return "\n".join([*lines, "", note])
