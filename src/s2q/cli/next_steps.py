"""Commands that usually follow a command, which it shows at its end; words in capitals are for the user to fill in."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2q.cli import console

ACCURATE = "s2q-plus-w4a8"
"""The recipe of choice (docs/choose.md)."""


def say_next(commands: Sequence[Sequence[str]]) -> None:
    """Show commands, one a line, as they are typed."""
    for index, words in enumerate(commands):
        console.say(f"{'      ' if index else 'next: '}{shlex.join(['s2q', *words])}")


def generate_with(model: str | Path, *, variant: str | None = None) -> list[str]:
    """Return the command that generates a video, of a file of prompts if each of them needs an image."""
    prompt = ["--prompts", "FILE.jsonl"] if _needs_image(Path(model)) else ["--prompt", "TEXT"]
    return ["generate", "-m", str(model), *prompt, "-o", "videos", *_variant(variant)]


def evaluate_with(
    model: str | Path, reference: str | None, *, variant: str | None = None, loras: Sequence[str] = ()
) -> list[str]:
    """Return the command that evaluates a model against full precision; MODEL in place of one that is not known."""
    from s2q.shapes.embedded import EMBEDDED_NAMES

    prompts = [] if reference in EMBEDDED_NAMES else ["--prompts", "FILE"]
    pair = ["-m", str(model), "--reference", reference or "MODEL"]
    return ["eval", *pair, *prompts, *_variant(variant), *_adapters(loras), "-o", "eval.json"]


def after_plan(
    model: str, recipe: str, *, overrides: Sequence[str], variant: str | None, loras: Sequence[str]
) -> list[list[str]]:
    """Quantize; the dimensions of a published model have no weights to quantize."""
    from s2q.models.synthetic import SYNTHETIC_PREFIX

    if model.startswith(SYNTHETIC_PREFIX):
        return [["bench", "-m", model, "-r", recipe, "-o", "bench.json"]]
    changes = [word for change in overrides for word in ("--set", change)]
    return [["quantize", "-m", model, "-r", recipe, *changes, *_variant(variant), *_adapters(loras), "-o", "OUT"]]


def after_generate(model: str, folder: Path, *, variant: str | None) -> list[list[str]]:
    """Evaluate a checkpoint; quantize a full-precision model."""
    from s2q.generation.defaults import checkpoint_record
    from s2q.models.quantized import full_precision_origin

    if not checkpoint_record(folder):
        return [["quantize", "-m", model, "-r", ACCURATE, *_variant(variant), "-o", "OUT"]]
    return [evaluate_with(model, full_precision_origin(folder), variant=variant)]


def after_evaluate(
    model: str,
    reference: str,
    out: Path,
    *,
    prompts: Path | None = None,
    variant: str | None = None,
    loras: Sequence[str] = (),
) -> list[list[str]]:
    """Show the videos of the same prompts side by side; push a checkpoint of this machine."""
    from s2q.checkpoint.manifest import MANIFEST

    texts = [] if prompts is None else ["--prompts", str(prompts)]
    options = [*texts, *_variant(variant), *_adapters(loras)]
    commands = [["compare", model, "-m", reference, *options, "-o", "compared"]]
    if (Path(model) / MANIFEST).exists():
        commands.append(["push", model, "REPO_ID", "--eval", str(out)])
    return commands


def after_dry_push(
    model: str,
    repo: str,
    *,
    evaluation: Path | None,
    videos: Path | None,
    public: bool,
    message: str | None,
    overwrite: bool,
) -> list[list[str]]:
    """Push what the dry run has checked."""
    values = {"--eval": evaluation, "--videos": videos, "--message": message}
    given = [word for name, value in values.items() if value is not None for word in (name, str(value))]
    flags = [name for name, is_set in {"--public": public, "--overwrite": overwrite}.items() if is_set]
    return [["push", model, repo, *given, *flags]]


def after_compare(result: Mapping[str, Any], out: Path) -> list[list[str]]:
    """Generate with the checkpoint of the least velocity error, if there is one."""
    from s2q.comparison.folder import CompareFolder

    errors = {}
    for entry in result["entries"]:
        path = Path(entry["checkpoint"] or CompareFolder(out).checkpoint(entry["label"]))
        if path.exists() and not entry["error"] and "velocity_relative_error" in entry["metrics"]:
            errors[path] = entry["metrics"]["velocity_relative_error"]["mean"]
    return [generate_with(min(errors, key=lambda path: errors[path]))] if errors else []


def _needs_image(folder: Path) -> bool:
    """Whether prompts of a model on this machine need an image; one made from an embedded model draws its own."""
    from s2q.common.files import read_json
    from s2q.generation.defaults import embedded_source
    from s2q.models import FAMILIES

    index = folder / "model_index.json"
    if not index.is_file():
        return False
    name = read_json(index, remedy="copy the model again").get("_class_name")
    return any(family.image_pipeline([name]) for family in FAMILIES.values()) and embedded_source(folder) is None


def _variant(variant: str | None) -> list[str]:
    return [] if variant is None else ["--variant", variant]


def _adapters(loras: Sequence[str]) -> list[str]:
    return [word for lora in loras for word in ("--lora", lora)]
