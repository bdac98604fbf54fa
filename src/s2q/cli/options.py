"""Options that several commands share, and how their values are read; nothing heavy is imported before one is used."""

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import typer

from s2q.common.device_names import is_device_name, kind_of_device
from s2q.common.errors import InvalidInputError, UsageError

model_option = partial(typer.Option, "-m", "--model", metavar="MODEL")
recipe_option = partial(typer.Option, "-r", "--recipe", metavar="RECIPE")
file_option = partial(typer.Option, metavar="FILE")
folder_option = partial(typer.Option, metavar="DIR")
name_option = partial(typer.Option, metavar="NAME")
number_option = partial(typer.Option, min=1, metavar="N")
"""An option whose value is a whole number from 1 on."""


def split_names(values: Sequence[str] | None) -> list[str]:
    """Return names that were given with commas, repeatedly, or both."""
    return [name.strip() for entry in values or () for name in entry.split(",") if name.strip()]


names_option = partial(typer.Option, metavar="NAMES", callback=split_names)
"""An option whose value are names, with commas."""


def check_overrides(values: Sequence[str] | None) -> list[str]:
    """Return `--set` values."""
    for value in values or ():
        if "=" not in value.strip("="):
            raise InvalidInputError(f"--set {value}: expected key=value, for example weights.num_bits=8")
    return list(values or ())


set_option = partial(typer.Option, "--set", metavar="K=V", callback=check_overrides)


def with_generation(overrides: Sequence[str] | None, generation: Mapping[str, Any]) -> list[str]:
    """Return `--set` values with generation settings of the calibration, as recipes name them: calibration.steps=4."""
    values = {"steps" if name == "num_inference_steps" else name: value for name, value in generation.items()}
    settings = (f"calibration.{name}={json.dumps(value, ensure_ascii=False)}" for name, value in values.items())
    return [*(overrides or ()), *settings]


def read_workers(value: str | int) -> str | int:
    """Return a number of workers, or "auto"."""
    if value == "auto" or (str(value).isdecimal() and int(value) >= 1):
        return value if value == "auto" else int(value)
    raise UsageError(f"--workers {value}: expected auto, or a whole number from 1 on")


def check_device_name(name: str, *, others: Sequence[str] = ()) -> None:
    """Refuse what is no device; whether this machine has it is not looked at. `others` are expected too."""
    if name != "auto" and not is_device_name(name):
        kind = kind_of_device(name)
        named = f", or one of {', '.join(others)}" if others else ""
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N{named}{f'; got {kind}' if kind else ''}")


def resolve_device(name: str, *, others: Sequence[str] = ()) -> str:
    """Return the device to compute on; `auto` is a GPU if there is one; see `check_device_name`."""
    check_device_name(name, others=others)
    if name == "cpu":
        return name
    import torch

    from s2q.common.devices import check_device

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name


def read_size(flag: str, text: str | None) -> int | None:
    """Return the bytes of a size such as "24GB"; None where the flag was not given."""
    from s2q.core.storage import parse_bytes

    return None if text is None else parse_bytes(text, option=flag)


def read_prompt_file(path: Path | None) -> list[str] | None:
    """Return the prompts of a file; None where none was given."""
    from s2q.generation.prompts import read_prompts

    return None if path is None else read_prompts(path)


Model = Annotated[
    str, model_option(help="Embedded name, diffusers folder, Hub id (@revision), or FILE.safetensors@BASE.")
]
RecipeName = Annotated[str, recipe_option(help="Recipe name or YAML file.")]
Overrides = Annotated[list[str] | None, set_option(help="Override a recipe field, e.g. weights.num_bits=8.")]
Prompts = Annotated[Path | None, file_option("--prompts", help="Text file, one prompt per line, or JSONL file.")]
Seed = Annotated[int, typer.Option("--seed", help="Random seed.", metavar="S")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", metavar="D")]
DtypeOption = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option("--dtype", help="Compute dtype. Default: the stored one; float32 where a CPU emulates it."),
]
Variant = Annotated[str | None, name_option("--variant", help="Weight variant, e.g. fp16. Default: none.")]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        help="Fuse a LoRA into the full-precision model: [transformer_2=]FILE[:SCALE]. Repeatable.",
        metavar="FILE",
    ),
]
Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="Check an s2q checkpoint against its manifest. Default: if it has one; --verify requires one.",
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        "--memory-budget",
        help="Host memory for activations; the rest is on disk. Default: half of the host's, at most 16GB.",
        metavar="SIZE",
    ),
]
OffloadName = Annotated[
    Literal["auto", "none", "model", "group"],
    typer.Option("--offload", help="How to offload a model that does not fit on the GPU: by component, or by block."),
]
AttentionBackend = Annotated[
    str | None, name_option("--attention", help="Attention backend of diffusers. Default: PyTorch.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output of the same kind.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps. Default: the model's.", metavar="N")]
Frames = Annotated[
    int | None, typer.Option("--num-frames", help="Frames per video. Default: the model's.", metavar="N")
]
Height = Annotated[int | None, typer.Option("--height", help="Height in pixels. Default: the model's.", metavar="N")]
Width = Annotated[int | None, typer.Option("--width", help="Width in pixels. Default: the model's.", metavar="N")]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance-scale", help="Guidance scale; 1: no guidance. Default: the model's.", metavar="X"),
]
SecondGuidance = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale-2", help="Guidance scale of a second transformer. Default: that of the first.", metavar="X"
    ),
]
SchedulerName = Annotated[
    str | None, name_option("--scheduler", help="Scheduler class of diffusers. Default: the model's.")
]
Shift = Annotated[
    float | None, typer.Option("--shift", help="Shift of the scheduler's sigmas. Default: the model's.", metavar="X")
]
NegativePrompt = Annotated[
    str | None,
    typer.Option("--negative-prompt", help="Text of the unconditional branch. Default: empty.", metavar="TEXT"),
]
TextLength = Annotated[
    int | None,
    typer.Option("--max-sequence-length", help="Text tokens. Default: as many as the model reads.", metavar="N"),
]

_GENERATION = {
    "num_frames": Frames,
    "height": Height,
    "width": Width,
    "num_inference_steps": Steps,
    "guidance_scale": Guidance,
    "guidance_scale_2": SecondGuidance,
    "scheduler": SchedulerName,
    "shift": Shift,
    "negative_prompt": NegativePrompt,
    "max_sequence_length": TextLength,
}
"""Options of the generation settings, by the names that the verbs have for them."""

Generation = Mapping[str, Any]
"""Generation settings that were given, by name; see `takes_generation`."""

NO_GENERATION: Generation = MappingProxyType({})


def takes_generation(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of the generation settings in place of its parameter `generation`."""
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == "generation":
            options = _GENERATION.items()
            parameters += [parameter.replace(name=name, annotation=kind, default=None) for name, kind in options]
        else:
            parameters.append(parameter)

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        settings = {name: given.pop(name) for name in _GENERATION}
        command(**given, generation={name: value for name, value in settings.items() if value is not None})

    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


Samples = Annotated[int | None, number_option("--samples", help="Number of calibration samples.")]
NumPrompts = Annotated[
    int, number_option("--num-prompts", help="Number of held-out captions, for embedded models without --prompts.")
]
Seeds = Annotated[int, number_option("--seeds", help="Videos per prompt, with seeds 0 to N-1.")]
Metrics = Annotated[
    list[str] | None,
    names_option("--metrics", help="Comma-separated metrics or groups, e.g. psnr,ssim,velocity. Default: all."),
]
LpipsWeights = Annotated[Path | None, file_option("--lpips-weights", help="Add LPIPS with these weights.")]
ClipFolder = Annotated[Path | None, folder_option("--clip", help="Add CLIP scores with the CLIP model in this folder.")]
Sensitivity = Annotated[
    int | None, number_option("--sensitivity", help="Number of prompts to measure each kind of linears alone on.")
]
Workers = Annotated[
    str,
    typer.Option(
        "--workers",
        help="Number of workers, one thread each on a CPU. auto: every visible GPU, or all cores.",
        metavar="N",
        callback=read_workers,
    ),
]
GenerationWorkers = Annotated[
    str,
    typer.Option(
        "--workers",
        help="Number of workers, one thread each on a CPU. auto: every visible GPU, or this process.",
        metavar="N",
        callback=read_workers,
    ),
]
Devices = Annotated[
    list[str] | None, names_option("--devices", help="Devices that workers take in turn, e.g. cuda:0,cuda:2.")
]
EngineName = Annotated[Literal["processes", "ray"], typer.Option("--engine", help="Where workers run.")]
RayAddress = Annotated[
    str | None,
    typer.Option("--ray-address", help="Ray cluster to join. Default: Ray on this machine.", metavar="HOST:PORT"),
]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Resume an interrupted run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and show the plan, without computing.")]
