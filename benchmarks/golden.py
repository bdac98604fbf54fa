"""Record the golden figures of s2q, or compare the working tree with them: what a refactoring may not change.

    python benchmarks/golden.py record --processes 2          # everything, into benchmarks/results/golden.json
    python benchmarks/golden.py check --only recipes,plans    # seconds
    python benchmarks/golden.py check --processes 2           # everything, minutes
    python benchmarks/golden.py check --only tensors --names 's2q-w4a6/*' '*/shapes-wan'

Parts of the file:
    recipes  RECIPE -> resolved values of every recipe, of some variants and of some overrides
    plans    RECIPE/MODEL -> `s2q plan --json`, layers as a hash a block; without `device` and the `seconds` of stages
    tensors  RECIPE/MODEL -> SHA-256 of the transformers' files, of the tensors of each module and of each kind, and of
             each key of `quantization_config`, after a short `quantize` on one thread with the settings in the file
    outputs  RECIPE/MODEL/BACKEND -> SHA-256 (8 digits) of each forward of the transformers while that checkpoint is
             loaded and generates; `triton` where there is a GPU

Bytes of tensors and outputs are comparable on one kind of machine with the same libraries: elsewhere `check` compares
recipes and plans alone, and prints so.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import inspect
import io
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; the processes inherit it
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

# The only internals of s2q and of its tests that this script knows; the rest are the public verbs and the command line.
import diffusers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from environment import environment  # noqa: E402
from records import write_record  # noqa: E402
from safetensors import safe_open  # noqa: E402

import s2q  # noqa: E402
import tiny  # noqa: E402
from s2q.cli import run as run_command_line  # noqa: E402
from s2q.recipes import load_recipe, recipe_names  # noqa: E402

PARTS = ("recipes", "plans", "tensors", "outputs")
PORTABLE = ("recipes", "plans")
FILE = ROOT / "benchmarks" / "results" / "golden.json"
PROMPTS = ("a red circle", "a blue square")

VARIANTS = ("q-vdit-w4a6+sds", "smoothquant-w4a6+std", "svdquant-w4a6+sds", "brecq-w4a6+sds+std")
OVERRIDES = {
    "s2q-w4a6": ("rounding.dampening_frac=0.05", "distillation.epochs=3", "calibration.samples=8", "skip=[proj_out]"),
    "s2q-plus-w4a4": ("transforms.alpha=0.6", "refinement.epochs=2", "weights.num_bits=3"),
    "rtn-w4a6": ("weights.num_bits=8", "outer.num_bits=8", "weights.granularity=per_group", "weights.group_size=64"),
}
PLANNED_RECIPES = ("s2q-w4a6", "s2q-plus-w4a6", "rtn-w4a6")
PLANNED_MODELS = (
    *("shapes-cogvideox", "shapes-wan"),
    *("synthetic:cogvideox-2b", "synthetic:cogvideox-5b", "synthetic:hunyuanvideo", "synthetic:ltx-2b"),
    *("synthetic:ltx-2", "synthetic:ltx-2.3"),
    *("synthetic:skyreels-v2-14b", "synthetic:wan-1.3b", "synthetic:wan-14b"),
    "synthetic:wan-vace-14b",
)
PLAN_OPTIONS = ("--device", "cuda", "--device-memory", "24GB", "--memory-budget", "8GB")
"""On a CPU the memory of a stage includes what the process at hand has taken."""

EMBEDDED_SIZE = {"num_frames": 9, "height": 32, "width": 32}
SHORT_TEXT = {"max_sequence_length": 16}
TINY_SIZE = {"num_frames": 9, "height": 16, "width": 16}
TINY_MODELS: dict[str, tuple[dict[str, int], dict[str, int | bool]]] = {  # size of a video, other arguments
    "tiny-cogvideox": (TINY_SIZE, SHORT_TEXT),
    "tiny-cogvideox-1.5": (TINY_SIZE, SHORT_TEXT),
    "tiny-hunyuanvideo": (TINY_SIZE, {}),
    "tiny-hunyuanvideo-1.5": (TINY_SIZE, {}),
    "tiny-kandinsky5": (TINY_SIZE, {}),
    "tiny-ltx": (TINY_SIZE | {"height": 32, "width": 32}, {}),
    "tiny-ltx-2": (TINY_SIZE | {"height": 32, "width": 32}, {}),
    "tiny-mochi": (TINY_SIZE | {"num_frames": 13}, {}),
    "tiny-sana-video": (TINY_SIZE | {"height": 32, "width": 32}, {"use_resolution_binning": False}),
    "tiny-skyreels-v2": (TINY_SIZE, {}),
    "tiny-wan": (TINY_SIZE, {}),
    "tiny-wan-2.2-5b": (TINY_SIZE, {}),
    "tiny-wan-2.2-a14b": (TINY_SIZE, {}),
    "tiny-wan-vace": (TINY_SIZE, {}),
}
SETTINGS = {  # of groups that a recipe has
    "calibration": ("n_prompts=2", "steps=6", "samples=4"),
    "distillation": ("epochs=1",),
    "refinement": ("epochs=1",),
    "allocation": ("samples=2",),
}
FORWARDS = 10


def quantized_cases() -> list[str]:
    """Return RECIPE/MODEL of all checkpoints, those that take longest first."""
    methods = sorted(name for name in recipe_names() if name.endswith("-w4a6"))
    methods.sort(key=lambda name: load_recipe(name).resolved()["distillation"] is None)
    embedded = [f"{name}/{model}" for name in methods for model in ("shapes-cogvideox", "shapes-wan")]
    return [*embedded, *(f"s2q-w4a6/{model}" for model in TINY_MODELS)]


def compute(part: str, name: str) -> dict[str, Any]:
    """Compute the figures of a recipe or a plan: its entry in the file."""
    if part == "recipes":
        recipe, *overrides = name.split(" ")
        return load_recipe(recipe, overrides=overrides).resolved()
    recipe, model = name.split("/")
    plan = json.loads(_command("plan", "--model", model, "--recipe", recipe, "--json", *PLAN_OPTIONS))
    del plan["device"]
    for stage in plan["stages"]:
        del stage["seconds"]
    blocks: dict[str, list[Any]] = {}
    for layer in plan["layers"]:
        blocks.setdefault(".".join(layer["name"].split(".")[:2]), []).append(layer)
    plan["layers"] = {block: _digest(json.dumps(layers, sort_keys=True)) for block, layers in blocks.items()}
    return plan


def compute_checkpoint(name: str, parts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Quantize; return PART -> name -> figures of the checkpoint."""
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    recipe, model = name.split("/")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source, size, call = model, EMBEDDED_SIZE, SHORT_TEXT if "cogvideox" in model else {}
        if model in TINY_MODELS:
            size, call = TINY_MODELS[model]
            source = str(folder / model)
            family = next(name for name in tiny.FAMILIES if name.replace(" ", "-") == model.removeprefix("tiny-"))
            boundary_ratio = 0.8 if family == "wan 2.2 a14b" else None
            tiny.tiny_pipeline(family, boundary_ratio=boundary_ratio).save_pretrained(source)
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS) + "\n")
        settings = _settings(recipe, size)
        options = [text for setting in settings for text in ("--set", setting)]
        out = folder / "out"
        options += ["--prompts", str(prompts), "--seed", "0", "--device", "cpu", "--dtype", "float32"]
        _command("quantize", "--model", source, "--recipe", recipe, "--output", str(out), *options)
        figures: dict[str, dict[str, Any]] = {"tensors": {}, "outputs": {}}
        if "tensors" in parts:
            figures["tensors"][name] = {"settings": settings, **_checkpoint_digests(out)}
        if "outputs" in parts:
            for backend in ("reference", "cpu", *(["triton"] if torch.cuda.is_available() else [])):
                figures["outputs"][f"{name}/{backend}"] = _forward_digests(out, backend, {**size, **call})
    return figures


def _settings(recipe: str, size: dict[str, int]) -> list[str]:
    resolved = load_recipe(recipe).resolved()
    groups = {key: values for key, values in SETTINGS.items() if resolved[key] is not None}
    if "calibration" in groups:
        groups["calibration"] += tuple(f"{key}={value}" for key, value in size.items())
    return [f"{group}.{value}" for group, values in groups.items() for value in values]


def _checkpoint_digests(folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for file in sorted(folder.glob("transformer*/*.safetensors")):
        with safe_open(file, "pt") as tensors:
            figures[str(file.relative_to(folder))] = {
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                **_grouped({key: _digest(*_content(tensors.get_tensor(key))) for key in tensors.keys()}),
            }
    for file in sorted(folder.glob("transformer*/config.json")):
        config = json.loads(file.read_text())["quantization_config"]
        figures[str(file.relative_to(folder))] = {
            key: _digest(json.dumps(value, sort_keys=True)) for key, value in config.items()
        }
    return figures


def _grouped(digests: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return a digest for each module and for each kind of tensor (`weight_scale`): together they name a tensor."""
    modules: dict[str, list[str]] = {}
    kinds: dict[str, list[str]] = {}
    for name in sorted(digests):
        module, _, kind = name.rpartition(".")
        modules.setdefault(module, []).append(f"{kind}={digests[name]}")
        kinds.setdefault(kind, []).append(f"{module}={digests[name]}")
    return {
        "modules": {module: _digest(" ".join(tensors)) for module, tensors in modules.items()},
        "kinds": {kind: _digest(" ".join(tensors)) for kind, tensors in kinds.items()},
    }


@torch.no_grad()
def _forward_digests(folder: Path, backend: str, call: dict[str, int]) -> list[str]:
    pipe = s2q.load(folder, backend=backend, device="cuda" if backend == "triton" else "cpu")
    digests: list[str] = []

    def record(_module: torch.nn.Module, _inputs: object, output: Any) -> None:
        digests.append(_digest(*_content(output[0])))

    for component in ("transformer", "transformer_2"):
        if (transformer := getattr(pipe, component, None)) is not None:
            transformer.register_forward_hook(record)
    if "frames" in inspect.signature(pipe.__call__).parameters:  # of Sana-Video
        call = {"frames" if name == "num_frames" else name: value for name, value in call.items()}
    generator = torch.Generator().manual_seed(0)
    pipe(prompt=PROMPTS[0], num_inference_steps=FORWARDS, generator=generator, output_type="latent", **call)
    return digests


def _content(tensor: torch.Tensor) -> tuple[str, bytes]:
    tensor = tensor.detach().cpu().contiguous()
    return f"{tensor.dtype} {tuple(tensor.shape)} ", tensor.flatten().view(torch.uint8).numpy().tobytes()


def _digest(*pieces: str | bytes) -> str:
    return hashlib.sha256(b"".join(p.encode() if isinstance(p, str) else p for p in pieces)).hexdigest()[:8]


def _command(*arguments: str) -> str:
    """Run a command of s2q in this process; return what it prints."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = run_command_line(list(arguments))
    if status:
        raise RuntimeError(f"s2q {' '.join(arguments)}: exit code {status}: {stderr.getvalue()[-2000:]}")
    return stdout.getvalue()


def machine() -> dict[str, Any]:
    """Return what the bytes of tensors and outputs depend on."""
    recorded = environment()
    hardware, versions = recorded["hardware"], recorded["versions"]
    return {
        "processor": hardware["processor"],
        "instruction_set": hardware["instruction_set"],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: versions[name] for name in ("torch", "diffusers", "transformers")},
    }


def is_selected(name: str, patterns: list[str]) -> bool:
    """Whether a pattern matches the whole name, or one of its parts."""
    parts = [name, *name.split("/")]
    return not patterns or any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in patterns)


def all_names() -> dict[str, list[str]]:
    """Return PART -> names, as of this working tree; outputs go by the names of their checkpoints."""
    recipes = [*recipe_names(), *VARIANTS, *(" ".join((name, *values)) for name, values in OVERRIDES.items())]
    plans = [f"{recipe}/{model}" for model in PLANNED_MODELS for recipe in PLANNED_RECIPES]
    return {"recipes": recipes, "plans": plans, "tensors": quantized_cases(), "outputs": quantized_cases()}


def measure(names: dict[str, list[str]], *, processes: int) -> dict[str, dict[str, Any]]:
    """Compute the figures of these names: PART -> name -> figures."""
    figures: dict[str, dict[str, Any]] = {part: {} for part in names}
    wanted: dict[str, list[str]] = {}
    for part in PORTABLE:
        for name in names.get(part, []):
            figures[part][name] = _or_error(compute, part, name)
    for part in ("tensors", "outputs"):
        for name in names.get(part, []):
            wanted.setdefault("/".join(name.split("/")[:2]), []).append(part)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        cases = {name: pool.submit(compute_checkpoint, name, tuple(parts)) for name, parts in wanted.items()}
        for number, (name, future) in enumerate(cases.items(), 1):
            made = _or_error(future.result)
            for part in wanted[name]:
                figures[part] |= {name: made} if "error" in made else made[part]
            _say(f"{number}/{len(cases)} {name}")
    return figures


def _or_error(function: Any, *arguments: Any) -> dict[str, Any]:
    try:
        return dict(function(*arguments))
    except Exception as error:  # a difference like any other, with the name of what fails
        return {"error": f"{type(error).__name__}: {error}"}


def differences(recorded: Any, computed: Any, where: str = "") -> Iterator[str]:
    """Yield a line for each value that differs, with the path of its keys."""
    if isinstance(recorded, dict) and isinstance(computed, dict):
        for key in sorted({*recorded, *computed}):
            path = f"{where}: {key}" if where else key
            if key not in computed:
                yield f"{path}: missing"
            elif key not in recorded:
                error = computed[key].get("error", "") if isinstance(computed[key], dict) else ""
                yield f"{path}: new{error and f', {error}'}"
            else:
                yield from differences(recorded[key], computed[key], path)
    elif isinstance(recorded, list) and isinstance(computed, list) and len(recorded) == len(computed):
        for index, (old, new) in enumerate(zip(recorded, computed, strict=True)):
            yield from differences(old, new, f"{where}[{index}]")
    elif recorded != computed:
        yield f"{where}: recorded {json.dumps(recorded)}, now {json.dumps(computed)}"


def record(file: Path, names: dict[str, list[str]], *, processes: int) -> int:
    """Compute and write; figures of other names stay, if they are of this kind of machine."""
    content = json.loads(file.read_text()) if file.exists() else {"machine": machine()}
    if content["machine"] != machine():
        content = {part: content[part] for part in PORTABLE if part in content}
    computed = measure(names, processes=processes)
    errors = [
        f"{part}: {name}: {case['error']}"
        for part, cases in computed.items()
        for name, case in cases.items()
        if "error" in case
    ]
    if errors:
        _say("\n".join(["nothing recorded:", *errors]))
        return 1
    for part in computed:
        content[part] = content.get(part, {}) | computed[part]
    write_record(file, {**environment(), "machine": machine(), **{part: content.get(part, {}) for part in PARTS}})
    return 0


def check(file: Path, parts: list[str], patterns: list[str], *, processes: int, most: int) -> int:
    """Compute what the file has and compare; print the differences."""
    recorded = json.loads(file.read_text())
    if recorded["machine"] != machine():
        _say(f"recorded on another machine, only recipes and plans are compared: {recorded['machine']}, {machine()}")
        parts = [part for part in parts if part in PORTABLE]
    here = {
        part: {name: case for name, case in recorded[part].items() if is_selected(name, patterns)} for part in parts
    }
    if not any(here.values()):
        _say(f"nothing selected; parts {','.join(parts)}, names {' '.join(patterns)}")
        return 2
    computed = measure({part: list(figures) for part, figures in here.items()}, processes=processes)
    for part, figures in here.items():
        computed[part] = {name: case for name, case in computed[part].items() if name in figures or "error" in case}
    lines = list(differences(here, computed))
    for line in itertools.islice(lines, most):
        print(line)
    if len(lines) > most:
        print(f"and {len(lines) - most} more")
    counts = ", ".join(f"{len(figures)} {part}" for part, figures in here.items())
    print(f"{'differs' if lines else 'equal'}: {counts}")
    return 1 if lines else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, comma-separated: {','.join(PARTS)}")
    parser.add_argument("--names", nargs="+", default=[], help="whole names or their parts (RECIPE, MODEL), * allowed")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--most", type=int, default=40, help="differences to print")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; expected some of {','.join(PARTS)}")
    if arguments.action == "check":
        return check(arguments.file, parts, arguments.names, processes=arguments.processes, most=arguments.most)
    names = {part: [n for n in all_names()[part] if is_selected(n, arguments.names)] for part in parts}
    return record(arguments.file, names, processes=arguments.processes)


if __name__ == "__main__":
    sys.exit(main())
