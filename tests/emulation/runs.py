"""Tiny pipelines on the disk, quantized on the CPU and on a GPU with the same settings."""

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

import s2q
from emulation import emulator
from s2q.recipes.load import load_recipe
from s2q.run.report import QuantizationReport
from tiny import reloaded, tiny_call, tiny_pipeline, video_size
from tiny_families import TEXT_TO_VIDEO

MODELS = [name for name in TEXT_TO_VIDEO if name != "cogvideox rotary"]
_WITH_ROTARY = {"cogvideox": "cogvideox rotary"}  # as in the 5B model
PROMPTS = ["red", "a blue square"]
_QUICK = {
    "calibration.n_prompts": 1,
    "calibration.steps": 2,
    "calibration.samples": 1,
    "distillation.epochs": 1,
    "refinement.epochs": 1,
    "transforms.low_rank": 4,  # of the 64 features here; the 32 of published models would leave rounding noise alone
}


@functools.cache
def _scratch():
    return tempfile.TemporaryDirectory(prefix="s2q-emulation-")


@functools.cache
def model_folder(name, dtype=torch.float32):
    """A folder with a tiny pipeline; made once."""
    folder = Path(_scratch().name) / f"{name}-{dtype}".replace(" ", "-")
    pipe = tiny_pipeline(_WITH_ROTARY.get(name, name), num_layers=2 if name == "wan 2.2 a14b" else 1, dtype=dtype)
    pipe.save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps({"num_inference_steps": 2, **video_size(pipe)}))
    return folder


def quick(recipe, replaced=()):
    """What makes a recipe quick, of what it has and other overrides do not replace."""
    has = load_recipe(recipe).resolved()
    changes = {}
    for name, value in _QUICK.items():
        group, key = name.split(".")
        given = any(override.startswith(f"{name}=") for override in replaced)
        if not given and isinstance(has.get(group), dict) and has[group].get(key, 0) != 0:
            changes[name] = value
    return [f"{name}={value}" for name, value in changes.items()]


@dataclass(frozen=True)
class Run:
    """A checkpoint and its report."""

    folder: Path
    report: QuantizationReport

    @property
    def losses(self):
        """Of every block by name and stage."""
        return {(block.name, stage): loss for block in self.report.blocks for stage, loss in block.loss.items()}

    @property
    def codes(self):
        """Packed integers of all layers by name."""
        files = sorted(self.folder.glob("transformer*/*.safetensors"))
        tensors = {f"{path.parent.name}.{name}": tensor for path in files for name, tensor in load_file(path).items()}
        return {name: tensor for name, tensor in tensors.items() if not tensor.is_floating_point()}


def quantize(model, recipe, device, *, dtype=torch.float32, overrides=()):
    """Quantize a tiny model into a new folder."""
    out = Path(tempfile.mkdtemp(dir=_scratch().name)) / "out"
    report = s2q.quantize(
        model_folder(model, dtype),
        recipe=recipe,
        out=out,
        prompts=PROMPTS if load_recipe(recipe).calibrates else None,
        device=device,
        dtype=dtype,
        overrides=[*quick(recipe, overrides), *overrides],
    )
    return Run(out, report)


@functools.cache
def on_cpu(model, recipe, dtype=torch.float32, overrides=()):
    """The same run on the CPU, once for all devices."""
    with emulator.paused():
        return quantize(model, recipe, "cpu", dtype=dtype, overrides=overrides)


def load(folder, device, *, dtype=torch.float32):
    """A pipeline on a device."""
    pipe = reloaded(folder, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def latents(pipe, **call):
    """Of one tiny video of a pipeline, wherever it computes; fp32 on the CPU."""
    arguments = {**tiny_call(pipe), "output_type": "latent", **call}
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", generator=generator, **arguments).frames.float().cpu()


def pairs(recipes, models):
    """Every recipe on every model; on emulated GPUs, which are slow, on every second one, each model with others."""
    step = 2 if emulator.is_installed() else 1
    return [
        (recipe, model)
        for row, recipe in enumerate(recipes)
        for column, model in enumerate(models)
        if (row + column) % step == 0
    ]


def relative_error(result, expected):
    """‖result − expected‖ / ‖expected‖."""
    return float((result - expected).norm() / expected.norm())


EXACT = 1e-4
"""Relative difference between devices of what is computed from weights alone, and of the loss of plain rounding."""
ROUNDED = 0.1
"""Of the loss before training, which the bf16 of a low-rank basis or the fp64 of a search decides."""
LEARNED = 0.5
"""Of losses after training and GPTQ, which amplify the order of sums; a third of the codes differ, without harm."""
HALVES = 0.15
"""Of the losses before training where the model is fp16 or bf16, and so are the inputs of its blocks;
and of what two devices generate then."""
SMALL = 5e-5
"""Losses of tiny blocks with a branch. Two devices find bases of one space that differ by a rotation, which float8
rounds otherwise; the losses differ by up to a factor of two."""
RESIDUE = 1 / 200
"""Of the loss of plain rounding: below it, only what float8 and bf16 round is left of a tiny block with a branch. On
one device, weights changed by a millionth change it by up to a factor of two, and so does the instruction set."""
DIGITS = 0.02
"""Of the latents that two devices generate from one checkpoint: usually 1e-6; a single code of a 6-bit input that is
rounded the other way moves those of a model of three tokens by half a percent."""


def check_against_cpu(
    model, recipe, device, *, dtype=torch.float32, overrides=(), call=None, precision: str | None = "float32"
):
    """Quantize on the CPU and on a device; generate on both from the checkpoint of the device.

    Args:
        precision: Of the calibration on both; None is the default of the device, bf16, which the CPU is told to take.
    """
    call = call or {}
    given, same = (
        (*overrides, *([f"calibration.precision={value}"] if value and load_recipe(recipe).calibrates else []))
        for value in (precision, precision or "bfloat16")
    )
    result = quantize(model, recipe, device, dtype=dtype, overrides=given)
    expected = on_cpu(model, recipe, dtype, same)
    if not result.losses:
        codes = result.codes
        assert codes.keys() == expected.codes.keys()
        differing = sum(int((tensor != expected.codes[name]).sum()) for name, tensor in codes.items())
        assert differing <= EXACT * sum(tensor.numel() for tensor in codes.values())
    assert result.losses.keys() == expected.losses.keys()
    for (block, stage), loss in result.losses.items():
        tolerance = {"rtn": EXACT, "initial": ROUNDED}.get(stage, LEARNED)
        if load_recipe(recipe).loss.temporal:  # a divergence of nearly equal distributions
            tolerance = max(tolerance, ROUNDED)
        if dtype != torch.float32 or precision is None:
            tolerance = max(tolerance, HALVES)
        wanted = expected.losses[block, stage]
        message = f"{block}: {stage} loss {loss}; on the CPU {wanted}"
        if stage != "rtn" and load_recipe(recipe).transforms.low_rank and max(loss, wanted) < SMALL:
            only_residue = max(loss, wanted) < RESIDUE * expected.losses[block, "rtn"]
            assert 0 < max(loss, wanted) <= (4 if only_residue else 2) * min(loss, wanted), message
        else:
            assert abs(loss / wanted - 1) <= tolerance, message
    with emulator.paused():
        pipe = load(result.folder, "cpu", dtype=dtype)
        on_host = latents(pipe, **call)
    tolerance = DIGITS if dtype == torch.float32 else HALVES
    error = relative_error(latents(pipe.to(device), **call), on_host)
    assert error <= tolerance, f"latents of one checkpoint on {device} and the CPU differ by {error}"
    return result
