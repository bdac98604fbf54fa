"""`s2q generate`: videos, a contact sheet and a record of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from s2q.cli import options
from s2q.common.errors import InvalidInputError, UsageError, counted
from s2q.common.files import atomic_write_bytes, atomic_write_json, slug
from s2q.common.outputs import check_output, owned_matching, staged_directory
from s2q.common.progress import Progress
from s2q.common.records import GENERATION_VERSION

GENERATION_RECORD = "generation.json"
_OWNED = owned_matching("[0-9][0-9][0-9]*-*.mp4", "sheet.png", "latents.safetensors", record=GENERATION_RECORD)


Backend = Literal["auto", "reference", "cpu", "triton", "fastest", "fp4"]


@options.takes_generation
def generate(
    model: options.Model,
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.", metavar="OUT")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Prompt; can be repeated.", metavar="TEXT")
    ] = None,
    prompts: options.Prompts = None,
    generation: options.Generation = options.NO_GENERATION,
    seed: options.Seed = 0,
    backend: Annotated[Backend, typer.Option("--backend", help="Backends of quantized linears.")] = "auto",
    attention: options.AttentionBackend = None,
    fps: Annotated[
        int | None, options.number_option("--fps", help="Frame rate of the video files. Default: the model's.")
    ] = None,
    save_latents: Annotated[bool, typer.Option("--save-latents", help="Also write latents.safetensors.")] = False,
    device: options.Device = "auto",
    dtype: options.DtypeOption = None,
    variant: options.Variant = None,
    loras: options.Loras = None,
    verify: options.Verify = None,
    workers: options.GenerationWorkers = "auto",
    devices: options.Devices = None,
    engine: options.EngineName = "processes",
    ray_address: options.RayAddress = None,
    offload: options.OffloadName = "auto",
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Generate videos and a contact sheet."""
    if bool(prompt) == (prompts is not None):
        raise UsageError("generate: pass either --prompt or --prompts FILE")
    if out.suffix in (".mp4", ".png", ".gif"):
        raise UsageError(f"generate: -o must be a folder; got {out}; remove {out.suffix}")
    check_output(out, overwrite=overwrite, owned=_OWNED)
    device = options.resolve_device(device)
    check_backend(backend, device)
    from s2q.cli import console, next_steps, output
    from s2q.generation.defaults import frame_rate_of
    from s2q.generation.generate import generate as run
    from s2q.generation.prompts import check_distinct, prompt_list
    from s2q.models import resolve_model

    console.quiet_libraries()
    texts = options.read_prompt_file(prompts) or prompt_list("prompts", prompt or ())
    check_distinct(texts)
    source = resolve_model(model, variant=variant)
    with console.progress() as report, staged_directory(out, overwrite=overwrite, owned=_OWNED) as staged:
        videos = run(
            source,
            prompts=texts,
            seeds=(seed,),
            **generation,
            device=device,
            dtype=dtype,
            loras=loras or (),
            verify=verify,
            backend=backend,
            attention_backend=attention,
            workers=workers,
            devices=devices or None,
            engine=engine,
            ray_address=ray_address,
            offload=offload,
            progress=report,
        )
        rate = fps or frame_rate_of(source)
        record = _write(staged, videos, frame_rate=rate, save_latents=save_latents, progress=report)
        record |= {"model": model, "output": str(out)}
        atomic_write_json(staged / GENERATION_RECORD, record)
    if as_json:
        output.emit_json(record)
    else:
        console.say(f"{out}: {counted(len(videos), 'video')} and sheet.png")
        next_steps.say_next(next_steps.after_generate(model, source.folder, variant=variant))


def _write(
    folder: Path, videos: Sequence[Any], *, frame_rate: int, save_latents: bool, progress: Progress
) -> dict[str, Any]:
    """Write videos and contact sheet into an empty folder; return their record for `generation.json`."""
    from s2q.evaluation.summary import versions
    from s2q.generation.generate import described
    from s2q.report.video import contact_sheet, write_mp4

    entries = []
    for index, video in enumerate(videos):
        stem = f"{index:03d}-{slug(video.prompt)}"
        write_mp4(folder / f"{stem}.mp4", video.frames.numpy(), fps=frame_rate)
        entries.append({**described(video), "file": f"{stem}.mp4"})
        progress("write", index + 1, len(videos))
    sheet = contact_sheet([(video.prompt, video.frames.numpy()) for video in videos])
    atomic_write_bytes(folder / "sheet.png", sheet)
    if save_latents:
        import safetensors.torch

        tensors = {Path(entry["file"]).stem: video.latents for entry, video in zip(entries, videos, strict=True)}
        atomic_write_bytes(folder / "latents.safetensors", safetensors.torch.save(tensors))
    return {
        "schema_version": GENERATION_VERSION,
        "frame_rate": frame_rate,
        "sheet": "sheet.png",
        "latents": "latents.safetensors" if save_latents else None,
        "videos": entries,
        "versions": versions(),
    }


def check_backend(name: str, device: str) -> None:
    """Refuse a backend that cannot run on the device, before anything is loaded."""
    import torch

    from s2q.ops.dispatch import backend_obstacle

    obstacle = backend_obstacle(name, torch.empty(0, device=device))
    if obstacle is not None:
        raise InvalidInputError(f"--backend {name}: {obstacle}; use --backend reference, or auto")
