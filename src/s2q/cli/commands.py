"""The commands: check everything that can be checked, compute, write, show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2q.cli import console, judges, output
from s2q.common.device_names import is_device_name, kind_of_device
from s2q.common.errors import InvalidInputError, UsageError
from s2q.common.files import atomic_write_bytes, atomic_write_json, slug
from s2q.common.outputs import (
    check_output,
    check_writable,
    output_lock,
    owned_matching,
    staged_directory,
)
from s2q.common.progress import Progress
from s2q.common.records import GENERATION_VERSION

GENERATION_RECORD = "generation.json"
_OWNED = owned_matching("[0-9][0-9][0-9]*-*.mp4", "sheet.png", "latents.safetensors", record=GENERATION_RECORD)


def plan(
    model: str, recipe: str, *, overrides: Sequence[str] | None, options: Mapping[str, Any], as_json: bool
) -> None:
    """Run `s2q plan`."""
    from s2q.models.synthetic import SYNTHETIC_PREFIX
    from s2q.planning import plan as make_plan
    from s2q.planning import this_machine

    console.quiet_libraries()
    memory, budget = (_size(options, name) for name in ("device_memory", "memory_budget"))
    if memory is None:
        device = resolve_device(options["device"])
    else:  # another machine's, a GPU unless the CPU is named
        _check_device_name(options["device"])
        device = "cuda" if options["device"] == "auto" else options["device"]
    machine = this_machine(device, memory_bytes=memory, memory_budget=budget)
    changes = output.parse_overrides(overrides)
    if options["measure"]:
        if memory is not None or model.startswith(SYNTHETIC_PREFIX):
            raise UsageError(
                "plan: --measure needs this device and the model's weights; omit --device-memory, and "
                "time synthetic models with s2q bench --ops calibration_block"
            )
        result = _measured_plan(model, recipe, machine, changes=changes, options=options).to_dict()
    else:
        result = make_plan(
            model, recipe, overrides=changes, dtype=options["dtype"], variant=options["variant"], machine=machine
        ).to_dict()
    output.emit_json(result) if as_json else output.show_plan(result)


def _measured_plan(model: str, recipe: str, machine: Any, *, changes: Sequence[str], options: Mapping[str, Any]) -> Any:
    from s2q.generation.prompts import read_prompts
    from s2q.models import resolve_model
    from s2q.planning import check_memory
    from s2q.planning import plan as make_plan
    from s2q.recipes.load import load_recipe
    from s2q.run.time_estimate import measured

    source = resolve_model(model, variant=options["variant"])
    validated = load_recipe(recipe, overrides=changes)
    planned = make_plan(source, validated, dtype=options["dtype"], machine=machine)
    check_memory(planned)
    prompts = None if options["prompts"] is None else read_prompts(options["prompts"])
    with console.progress() as report:
        return measured(
            planned, source, validated, machine=machine, prompts=prompts, dtype=options["dtype"], progress=report
        )


def quantize(
    model: str,
    recipe: str,
    out: Path,
    *,
    prompts: Path | None,
    samples: int | None,
    overrides: Sequence[str] | None,
    options: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Run `s2q quantize`."""
    changes = output.parse_overrides(overrides)
    if samples is not None:
        from s2q.recipes.load import load_recipe

        if not load_recipe(recipe, overrides=changes).calibrates:
            raise UsageError(f"--samples: recipe {recipe} uses no calibration samples; remove it")
        changes = [*changes, f"calibration.samples={samples}"]
    from s2q.generation.prompts import read_prompts
    from s2q.run.quantize import quantize as run

    console.quiet_libraries()
    texts = read_prompts(prompts) if prompts is not None else None
    budget = _size(options, "memory_budget")
    settings = {**options, "device": resolve_device(options["device"]), "memory_budget": budget}
    with console.progress() as report:
        result = run(
            model, recipe=recipe, out=out, prompts=texts, overrides=changes, progress=report, **settings
        ).to_dict()
    if as_json:
        output.emit_json(result)
    elif options["dry_run"]:
        output.show_plan(result)
    else:
        console.say(f"{out}: {len(result['layers'])} linears, {result['storage']['ratio']:.2f} times smaller")


def generate(
    model: str,
    out: Path,
    *,
    prompt: Sequence[str],
    prompts: Path | None,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Run `s2q generate`."""
    if bool(prompt) == (prompts is not None):
        raise UsageError("generate: pass either --prompt or --prompts FILE")
    if out.suffix in (".mp4", ".png", ".gif"):
        raise UsageError(f"generate: -o must be a folder; got {out}; remove {out.suffix}")
    check_output(out, overwrite=options["overwrite"], owned=_OWNED)
    device = resolve_device(options["device"])
    _check_backend(options["backend"], device)
    from s2q.common.arguments import prompt_list
    from s2q.generation.defaults import frame_rate_of, generation_defaults
    from s2q.generation.generate import generate as run
    from s2q.generation.load import load_pipeline
    from s2q.generation.prompts import check_distinct, read_prompts
    from s2q.models import resolve_model

    console.quiet_libraries()
    texts = read_prompts(prompts) if prompts is not None else prompt_list(prompt)
    check_distinct(texts)
    source = resolve_model(model, variant=options["variant"])
    recommended = generation_defaults(source)
    pipe = load_pipeline(
        source,
        dtype=options["dtype"],
        device=device,
        verify=options["verify"],
        backend=options["backend"],
        attention_backend=options["attention"],
    )
    asked = recommended | {name: value for name, value in settings.items() if value is not None}
    with (
        console.progress() as report,
        staged_directory(out, overwrite=options["overwrite"], owned=_OWNED) as staged,
    ):
        videos = run(pipe, texts, seeds=(options["seed"],), settings=asked, progress=report)
        described = {"model": model, "frame_rate": options["fps"] or frame_rate_of(source), "output": str(out)}
        record = write_videos(
            staged, videos, described=described, save_latents=options["save_latents"], progress=report
        )
    if options["as_json"]:
        output.emit_json(record)
    else:
        console.say(f"{out}: {len(videos)} videos and sheet.png")


def write_videos(
    folder: Path,
    videos: Sequence[Any],
    *,
    described: Mapping[str, Any],
    save_latents: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Write videos, contact sheet and record into a folder.

    Args:
        folder: The folder, empty.
        videos: `s2q.evaluation.Video`s.
        described: `model`, its name, the videos' `frame_rate` and `output`, as the record has them.
        save_latents: Whether to write the latents too.
        progress: Called as the files are written.

    Returns:
        The record, as in `generation.json`.
    """
    from s2q.evaluation.summary import versions
    from s2q.report import contact_sheet, write_mp4

    entries = []
    for index, video in enumerate(videos):
        stem = f"{index:03d}-{slug(video.prompt)}"
        write_mp4(folder / f"{stem}.mp4", video.frames.numpy(), fps=described["frame_rate"])
        entries.append({"prompt": video.prompt, "seed": video.seed, "file": f"{stem}.mp4"})
        progress("write", index + 1, len(videos))
    sheet = contact_sheet([(video.prompt, video.frames.numpy()) for video in videos])
    atomic_write_bytes(folder / "sheet.png", sheet)
    if save_latents:
        import safetensors.torch

        tensors = {Path(entry["file"]).stem: video.latents for entry, video in zip(entries, videos, strict=True)}
        atomic_write_bytes(folder / "latents.safetensors", safetensors.torch.save(tensors))
    record = {
        "schema_version": GENERATION_VERSION,
        **described,
        "sheet": "sheet.png",
        "latents": "latents.safetensors" if save_latents else None,
        "videos": entries,
        "versions": versions(),
    }
    atomic_write_json(folder / GENERATION_RECORD, record)
    return record


def evaluate(
    model: str,
    reference: str,
    out: Path,
    *,
    prompts: Path | None,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Run `s2q eval`."""
    names = output.split_names(options["metrics"])
    check_file_output(out, overwrite=options["overwrite"])
    device = resolve_device(options["device"])
    from s2q.evaluation.evaluate import EvaluationOptions, default_prompts
    from s2q.evaluation.evaluate import evaluate as run
    from s2q.evaluation.judges.learned import learned_names
    from s2q.evaluation.video_metrics import selected_metrics
    from s2q.generation.defaults import frame_rate_of, quantization_scheme
    from s2q.generation.prompts import read_prompts
    from s2q.models import resolve_model
    from s2q.models.source import check_full_precision

    console.quiet_libraries()
    weights = {"lpips": options["lpips_weights"], "clip": options["clip"]}
    selected_metrics(names, learned=learned_names(**{name: path is not None for name, path in weights.items()}))
    variant = options["variant"]
    ours, theirs = resolve_model(model, variant=variant, needs_variant=False), resolve_model(reference, variant=variant)
    check_full_precision(theirs)
    texts = read_prompts(prompts) if prompts is not None else default_prompts(theirs, count=options["num_prompts"])
    planned = judges.vbench_plan(
        out,
        texts,
        seeds=options["seeds"],
        device=device,
        num_frames=settings.get("num_frames"),
        frame_rate=frame_rate_of(theirs),
        options=options,
    )
    how = EvaluationOptions(
        metrics=tuple(names),
        settings=settings,
        dtype=options["dtype"],
        verify=options["verify"],
        device=device,
        lpips_weights=weights["lpips"],
        clip=weights["clip"],
        processes=options["processes"],
        video_done=judges.keep_for(planned),
    )
    with console.progress() as report, output_lock(out):
        result = run(ours, theirs, prompts=texts, seeds=range(options["seeds"]), options=how, progress=report)
        atomic_write_json(out, result)
        if planned is not None:
            result = judges.with_vbench(planned, result, progress=report)
            atomic_write_json(out, result)
    if options["as_json"]:
        output.emit_json(result)
    else:
        output.show_evaluation(result, scheme=quantization_scheme(ours))
    console.say(f"written to {out}")


def inspect(model: str, *, variant: str | None, verify: bool, as_json: bool) -> None:
    """Run `s2q inspect`; a checkpoint that differs from its manifest is invalid input."""
    from s2q.generation.load import inspect_model

    result = inspect_model(model, variant=variant, verify=verify)
    output.emit_json(result.to_dict()) if as_json else output.show_inspection(result.to_dict())
    if result.problems:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        raise InvalidInputError(f"{model} differs from its manifest: {result.problems[0]}{more}")


def resolve_device(name: str) -> str:
    """Return the device to compute on.

    Args:
        name: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: The name is none of these.
        ResourceError: There is no such GPU.
    """
    _check_device_name(name)
    if name == "cpu":
        return name
    import torch

    from s2q.common.devices import check_device

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name


def check_file_output(path: Path, *, overwrite: bool) -> None:
    """Check, before any work, that a file may be written.

    Raises:
        InvalidInputError: It exists and may not be replaced, it is a folder, or the folder above is not writable.
    """
    if path.is_dir():
        raise InvalidInputError(f"{path} is a folder; pass a file")
    check_writable(path) if overwrite and path.exists() else check_output(path, overwrite=False)


def _size(options: Mapping[str, Any], name: str) -> int | None:
    """The bytes that an option says, "24GB"; None where it was not given."""
    from s2q.core.storage import parse_bytes

    return None if options[name] is None else parse_bytes(options[name], option=f"--{name.replace('_', '-')}")


def _check_device_name(name: str) -> None:
    if name != "auto" and not is_device_name(name):
        kind = kind_of_device(name)
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N{f'; got {kind}' if kind else ''}")


def _check_backend(name: str, device: str) -> None:
    """Refuse a backend that cannot run on the device, before anything is loaded."""
    import torch

    from s2q.ops.dispatch import backend_obstacle

    obstacle = backend_obstacle(name, torch.empty(0, device=device))
    if obstacle is not None:
        raise InvalidInputError(f"--backend {name}: {obstacle}; use --backend reference, or auto")
