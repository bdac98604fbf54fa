"""Commands that usually follow a command, which it shows at its end; words in capitals are for the user to fill in."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2q.cli import console


def say_next(commands: Sequence[Sequence[str]]) -> None:
    """Show commands, one a line, as they are typed."""
    for index, words in enumerate(commands):
        console.say(f"{'      ' if index else 'next: '}{shlex.join(['s2q', *words])}")


def recipe_of_choice() -> str:
    """Return the recipe that `s2q plan` recommends on this machine (docs/choose.md)."""
    from s2q.cli.options import resolve_device
    from s2q.planning.widths import recommended_recipe

    return recommended_recipe(resolve_device("auto"))


def generate_with(model: str | Path, *, folder: Path | None = None, variant: str | None = None) -> list[str]:
    """Return the command that generates a video, of a file of prompts if each of them needs an image.

    Args:
        model: Folder or Hub id of the model.
        folder: The same model on this machine, if `model` is a Hub id.
        variant: Variant of the weights.
    """
    prompt = ["--prompts", "FILE.jsonl"] if _needs_image(folder or Path(model)) else ["--prompt", "TEXT"]
    return ["generate", "-m", str(model), *prompt, "-o", "videos", *_variant(variant)]


def evaluate_with(
    model: str | Path, reference: str | None, *, variant: str | None = None, loras: Sequence[str] = ()
) -> list[str]:
    """Return the command that evaluates a model against full precision; MODEL in place of one that is not known."""
    pair = ["-m", str(model), "--reference", _full_precision(reference)]
    return ["eval", *pair, *_prompts(reference, Path(model)), *_variant(variant), *_adapters(loras), "-o", "eval.json"]


def after_plan(
    model: str, recipe: str, *, overrides: Sequence[str], variant: str | None, loras: Sequence[str]
) -> list[list[str]]:
    """Quantize, with prompts if they are needed; the dimensions of a published model have no weights to quantize."""
    from s2q.models.synthetic import SYNTHETIC_PREFIX
    from s2q.recipes.load import load_recipe

    if model.startswith(SYNTHETIC_PREFIX):
        return [["bench", "-m", model, "-r", recipe, "-o", "bench.json"]]
    changes = [word for change in overrides for word in ("--set", change)]
    prompts = _prompts(model, Path(model)) if load_recipe(recipe, overrides=overrides).calibrates else []
    options = [*changes, *prompts, *_variant(variant), *_adapters(loras)]
    return [["quantize", "-m", model, "-r", recipe, *options, "-o", "OUT"]]


def after_generate(model: str, folder: Path, *, variant: str | None) -> list[list[str]]:
    """Evaluate a checkpoint; quantize a full-precision model."""
    from s2q.generation.defaults import checkpoint_record
    from s2q.models.quantized import full_precision_origin

    if not checkpoint_record(folder):
        options = [*_prompts(model, folder), *_variant(variant), "-o", "OUT"]
        return [["quantize", "-m", model, "-r", recipe_of_choice(), *options]]
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


def _full_precision(name: str | None) -> str:
    """A full-precision model as commands take it in any folder; MODEL for one that is not known or not here.

    The record of a checkpoint has the names of files and folders without their places.
    """
    from s2q.common.cards import files_and_base
    from s2q.common.components import TRANSFORMERS
    from s2q.common.errors import InvalidInputError
    from s2q.models.hub import parse_hub_id
    from s2q.models.originals import originals_text, parse_originals
    from s2q.shapes.embedded import EMBEDDED_NAMES

    if name is None:
        return "MODEL"
    _, base = files_and_base(name)
    if not (base in EMBEDDED_NAMES or Path(base).exists() or parse_hub_id(base)):
        return "MODEL"
    try:
        files = parse_originals(name)
    except InvalidInputError:
        return "MODEL"
    place = str(Path(base).resolve()) if Path(base).is_dir() else base
    return name if files is None else originals_text(files[0], place).removeprefix(f"{TRANSFORMERS[0]}=")


def _prompts(model: str | None, folder: Path) -> list[str]:
    """The prompts of a calibration or an evaluation, which embedded models have themselves, for a model in a folder."""
    from s2q.shapes.embedded import EMBEDDED_NAMES

    name = "FILE.jsonl" if _needs_image(folder) else "FILE"
    return [] if model in EMBEDDED_NAMES else ["--prompts", name]


def _needs_image(folder: Path) -> bool:
    """Whether prompts of a model on this machine need an image; one made from an embedded model draws its own."""
    from s2q.generation.defaults import embedded_source
    from s2q.models import FAMILIES
    from s2q.pipelines import find_index, read_index

    if not find_index(folder).is_file():
        return False
    name = read_index(folder, remedy="copy the model again").get("_class_name")
    return any(family.image_pipeline([name]) for family in FAMILIES.values()) and embedded_source(folder) is None


def _variant(variant: str | None) -> list[str]:
    return [] if variant is None else ["--variant", variant]


def _adapters(loras: Sequence[str]) -> list[str]:
    return [word for lora in loras for word in ("--lora", lora)]
