"""The commands and their flags; each command's work is in `commands` and `demo`, imported when it runs.

The surface below is stable: a test compares it with a golden text.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="s2q",
    help="4-bit quantization of text-to-video diffusion transformers, for any diffusers pipeline.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Dtype(StrEnum):
    """Compute dtypes."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Backend(StrEnum):
    """Backends of quantized linears."""

    AUTO = "auto"
    REFERENCE = "reference"
    CPU = "cpu"
    TRITON = "triton"
    FASTEST = "fastest"


Model = Annotated[
    str, typer.Option("-m", "--model", help="Embedded name, diffusers folder or Hub id (@revision).", metavar="MODEL")
]
RecipeName = Annotated[str, typer.Option("-r", "--recipe", help="Recipe name or YAML file.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a recipe field, e.g. weights.num_bits=8.", metavar="K=V"),
]
Prompts = Annotated[Path | None, typer.Option("--prompts", help="Text file, one prompt per line.", metavar="FILE")]
Seed = Annotated[int, typer.Option("--seed", help="Random seed.", metavar="S")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", metavar="D")]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option("--dtype", help="Compute dtype. Default: the stored one; float32 where a CPU emulates it."),
]
Variant = Annotated[
    str | None,
    typer.Option("--variant", help="Weight variant, e.g. fp16. Default: none.", metavar="NAME"),
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
AttentionBackend = Annotated[
    str | None,
    typer.Option("--attention", help="Attention backend of diffusers. Default: PyTorch.", metavar="NAME"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output of the same kind.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps. Default: the model's.", metavar="N")]
Frames = Annotated[
    int | None, typer.Option("--num-frames", help="Frames per video. Default: the model's.", metavar="N")
]
Height = Annotated[
    int | None,
    typer.Option("--height", help="Height in pixels. Default: the model's.", metavar="N"),
]
Width = Annotated[
    int | None,
    typer.Option("--width", help="Width in pixels. Default: the model's.", metavar="N"),
]
Guidance = Annotated[
    float | None, typer.Option("--guidance-scale", help="Guidance scale. Default: the model's.", metavar="X")
]

Samples = Annotated[
    int | None,
    typer.Option("--samples", help="Number of calibration samples.", min=1, metavar="N"),
]
NumPrompts = Annotated[
    int,
    typer.Option(
        "--num-prompts", help="Number of held-out captions, for embedded models without --prompts.", min=1, metavar="N"
    ),
]
Seeds = Annotated[int, typer.Option("--seeds", help="Videos per prompt, with seeds 0 to N-1.", min=1, metavar="N")]
Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metrics", help="Comma-separated metrics or groups, e.g. psnr,ssim,velocity. Default: all.", metavar="NAMES"
    ),
]
LpipsWeights = Annotated[
    Path | None, typer.Option("--lpips-weights", help="Add LPIPS with these weights.", metavar="FILE")
]
ClipFolder = Annotated[
    Path | None, typer.Option("--clip", help="Add CLIP scores with the CLIP model in this folder.", metavar="DIR")
]
Processes = Annotated[
    int,
    typer.Option(
        "--processes",
        help="Number of processes: one thread each on a CPU, GPUs in turn with --device cuda.",
        min=1,
        metavar="N",
    ),
]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Resume an interrupted run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and show the plan, without computing.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"s2q {metadata.version('s2q')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and all logs; allowed anywhere.")] = False,
) -> None:
    """4-bit quantization of text-to-video diffusion transformers, for any diffusers pipeline."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.", metavar="DIR")] = Path("s2q-demo"),
    model: Model = "shapes-cogvideox",
    recipe: RecipeName = "s2q-w4a6",
    short: Annotated[
        bool, typer.Option("--short", help="Fewer samples and videos: one minute, rougher metrics.")
    ] = False,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser at the end.")] = True,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Quantize an embedded model and show the result as an HTML report."""
    from s2q.cli.demo import run_demo

    run_demo(
        output, model=model, recipe=recipe, short=short, options=_given(locals(), "open_page", "overwrite", "as_json")
    )


@app.command()
def plan(
    model: Model,
    recipe: RecipeName = "s2q-w4a6",
    overrides: Overrides = None,
    dtype: DtypeOption = None,
    variant: Variant = None,
    device: Device = "auto",
    device_memory: Annotated[
        str | None,
        typer.Option("--device-memory", help="Plan for a device with this much memory, e.g. 24GB.", metavar="SIZE"),
    ] = None,
    memory_budget: MemoryBudget = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Run a slice of the work on this device to estimate the time."),
    ] = False,
    prompts: Prompts = None,
    as_json: AsJson = False,
) -> None:
    """Show layers, bits, storage and memory before any compute."""
    from s2q.cli import commands

    options = _given(locals(), "dtype", "variant", "device", "device_memory", "memory_budget", "measure", "prompts")
    commands.plan(model, recipe, overrides=overrides, options=options, as_json=as_json)


@app.command()
def quantize(
    model: Model,
    recipe: RecipeName,
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint folder to write.", metavar="OUT")],
    prompts: Prompts = None,
    samples: Samples = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = None,
    variant: Variant = None,
    memory_budget: MemoryBudget = None,
    processes: Processes = 1,
    resume: Resume = True,
    overwrite: Overwrite = False,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model into a checkpoint that diffusers loads."""
    from s2q.cli import commands

    options = _given(
        locals(), "seed", "device", "dtype", "variant", "memory_budget", "processes", "resume", "overwrite", "dry_run"
    )
    commands.quantize(
        model, recipe, output, prompts=prompts, samples=samples, overrides=overrides, options=options, as_json=as_json
    )


@app.command()
def generate(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.", metavar="OUT")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Prompt; can be repeated.", metavar="TEXT")
    ] = None,
    prompts: Prompts = None,
    num_frames: Frames = None,
    height: Height = None,
    width: Width = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    seed: Seed = 0,
    backend: Annotated[Backend, typer.Option("--backend", help="How quantized linears are computed.")] = Backend.AUTO,
    attention: AttentionBackend = None,
    fps: Annotated[
        int | None,
        typer.Option("--fps", help="Frame rate of the video files. Default: the model's.", min=1, metavar="N"),
    ] = None,
    save_latents: Annotated[bool, typer.Option("--save-latents", help="Also write latents.safetensors.")] = False,
    device: Device = "auto",
    dtype: DtypeOption = None,
    variant: Variant = None,
    verify: Verify = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Generate videos and a contact sheet."""
    from s2q.cli import commands

    settings = _given(locals(), "num_frames", "height", "width", "guidance_scale") | {"num_inference_steps": steps}
    options = _given(locals(), "seed", "backend", "attention", "fps", "save_latents", "device", "dtype", "variant")
    options |= _given(locals(), "verify", "overwrite", "as_json")
    commands.generate(model, output, prompt=prompt or [], prompts=prompts, settings=settings, options=options)


@app.command("eval")
def evaluate(
    model: Model,
    reference: Annotated[str, typer.Option("--reference", help="The full-precision model.", metavar="MODEL")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.", metavar="FILE")] = Path(
        "eval.json"
    ),
    prompts: Prompts = None,
    num_prompts: NumPrompts = 64,
    seeds: Seeds = 2,
    metrics: Metrics = None,
    lpips_weights: LpipsWeights = None,
    clip: ClipFolder = None,
    vbench_python: Annotated[
        str | None,
        typer.Option(
            "--vbench-python",
            help="Add VBench scores, computed by this Python interpreter with VBench installed.",
            metavar="PYTHON",
        ),
    ] = None,
    vbench_dims: Annotated[
        list[str] | None,
        typer.Option(
            "--vbench-dims", help="Comma-separated VBench dimensions. Default: the paper's eight.", metavar="NAMES"
        ),
    ] = None,
    vbench_cache: Annotated[
        Path | None,
        typer.Option("--vbench-cache", help="VBench's weight cache. Default: VBench's default.", metavar="DIR"),
    ] = None,
    num_frames: Frames = None,
    height: Height = None,
    width: Width = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    device: Device = "auto",
    dtype: DtypeOption = None,
    variant: Variant = None,
    verify: Verify = None,
    processes: Processes = 1,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model against full precision."""
    from s2q.cli import commands

    settings = _given(locals(), "num_frames", "height", "width", "guidance_scale") | {"num_inference_steps": steps}
    options = _given(locals(), "num_prompts", "seeds", "metrics", "device", "dtype", "overwrite", "as_json")
    options |= _given(locals(), "lpips_weights", "clip", "vbench_python", "vbench_dims", "vbench_cache")
    options |= _given(locals(), "variant", "verify", "processes")
    commands.evaluate(model, reference, output, prompts=prompts, settings=settings, options=options)


@app.command()
def compare(
    entries: Annotated[
        list[str] | None,
        typer.Argument(
            help="Recipe names, patterns such as s2q-*, recipe files, checkpoints.",
            metavar="RECIPE_OR_CHECKPOINT",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "-m",
            "--model",
            help="The full-precision model: embedded name, diffusers folder or Hub id (@revision).",
            metavar="MODEL",
        ),
    ] = "shapes-cogvideox",
    recipes: Annotated[
        list[str] | None,
        typer.Option(
            "-r",
            "--recipe",
            "--recipes",
            help="Recipes, comma-separated or repeated; all for every recipe.",
            metavar="RECIPE",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.", metavar="DIR")] = Path(
        "s2q-compare"
    ),
    prompts: Prompts = None,
    num_prompts: NumPrompts = 32,
    seeds: Seeds = 2,
    calibration_prompts: Annotated[
        Path | None,
        typer.Option(
            "--calibration-prompts",
            help="Calibration prompts: text file, one per line.",
            metavar="FILE",
        ),
    ] = None,
    samples: Samples = None,
    seed: Seed = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a field of the recipes, e.g. distillation.epochs=5.", metavar="K=V"),
    ] = None,
    metrics: Metrics = None,
    lpips_weights: LpipsWeights = None,
    clip: ClipFolder = None,
    num_frames: Frames = None,
    height: Height = None,
    width: Width = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    device: Device = "auto",
    dtype: DtypeOption = None,
    variant: Variant = None,
    verify: Verify = None,
    processes: Processes = 1,
    resume: Resume = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a comparison that cannot be resumed.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Compare recipes and checkpoints with full precision and each other."""
    from s2q.cli.compare import run_compare

    settings = _given(locals(), "num_frames", "height", "width", "guidance_scale") | {"num_inference_steps": steps}
    options = _given(locals(), "num_prompts", "seeds", "samples", "seed", "overrides", "metrics", "device", "dtype")
    options |= _given(locals(), "lpips_weights", "clip", "calibration_prompts", "variant", "verify")
    options |= _given(locals(), "processes", "resume", "overwrite", "dry_run")
    run_compare(
        [*(entries or ()), *(recipes or ())],
        model,
        output,
        prompts=prompts,
        options=options | {"settings": settings},
        as_json=as_json,
    )


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="synthetic:NAME (random weights: cogvideox-2b, cogvideox-5b, hunyuanvideo, ltx-2b, wan-1.3b, wan-14b),"
            " embedded name, folder or Hub id. Default: the layers of these six, and the step of shapes-cogvideox.",
            metavar="MODEL",
        ),
    ] = None,
    ops: Annotated[
        list[str] | None,
        typer.Option(
            "--ops",
            help="Comma-separated ops. Default: linear,activation_path,gemm,attention_colsum,denoising_step,"
            "calibration_block.",
            metavar="NAMES",
        ),
    ] = None,
    recipes: Annotated[
        list[str] | None,
        typer.Option(
            "-r", "--recipe", help="Recipes, comma-separated or repeated. Default: s2q-w4a6,s2q-w4a4.", metavar="RECIPE"
        ),
    ] = None,
    backends: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            help="Comma-separated backends: auto,reference,cpu,triton,fastest. Default: auto.",
            metavar="NAMES",
        ),
    ] = None,
    attention: AttentionBackend = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            help="Rows of an op, video tokens of a block. Default: the model's; on a CPU 2048 and 1024.",
            min=1,
            metavar="N",
        ),
    ] = None,
    blocks: Annotated[
        int,
        typer.Option("--blocks", help="Number of blocks of a synthetic model to build and time.", min=1, metavar="N"),
    ] = 1,
    repeats: Annotated[int, typer.Option("--repeats", help="Maximum number of rounds.", min=1, metavar="N")] = 10,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds", help="Start no new round after this time; at least three rounds.", min=0, metavar="X"
        ),
    ] = 10.0,
    device: Device = "auto",
    variant: Variant = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="JSON file to write or resume.", metavar="FILE")
    ] = Path("bench.json"),
    again: Annotated[bool, typer.Option("--again", help="Repeat measurements that the file already has.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory against bf16: operations, denoising steps, calibration."""
    from s2q.cli.bench import run_bench

    options = _given(locals(), "ops", "recipes", "backends", "attention", "tokens", "blocks", "repeats", "seconds")
    run_bench(output, model=model, options=options | _given(locals(), "device", "variant", "again", "as_json"))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or Hub id (@revision).", metavar="MODEL")],
    variant: Variant = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the SHA-256 of every file against the manifest.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the contents of a checkpoint."""
    from s2q.cli import commands

    commands.inspect(model, variant=variant, verify=verify, as_json=as_json)


def _given(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}
