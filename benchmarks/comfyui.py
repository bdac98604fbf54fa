"""Exports to ComfyUI, run by ComfyUI's own loader and model code on a CPU, beside s2q and full precision.

    python benchmarks/comfyui.py COMFYUI_FOLDER --python INTERPRETER [-m wan ...]

INTERPRETER has the packages of ComfyUI's requirements. Models have random weights, two blocks (HunyuanVideo: one of
each kind, of the published width, which its original layout needs) and the sizes that ComfyUI fixes: 128 channels a
head in Wan, 32 heads in LTX-Video. Each recipe is quantized and exported, and the transformer is called once with the
same inputs in fp32. Into ``results/exports/comfyui.json``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel, LTXVideoTransformer3DModel, WanTransformer3DModel
from environment import environment
from records import rounded, write_record
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import s2q

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny import tiny_pipeline  # noqa: E402

RESULT = Path(__file__).parent / "results" / "exports" / "comfyui.json"
FORWARD = Path(__file__).with_name("comfyui_forward.py")
COMMAND = "python benchmarks/comfyui.py COMFYUI_FOLDER --python INTERPRETER"
TABLE = "convrot-w4a8 weights.granularity=per_group weights.group_size=16 weights.levels=fp8_table"
FRAMES, HEIGHT, WIDTH = 3, 16, 16
"""Of the latents."""


@dataclass(frozen=True)
class Case:
    """A transformer and one call of it, by diffusers and by ComfyUI.

    Attributes:
        pipeline: Of `tests.tiny_families`, whose other components are kept.
        transformer: Makes the transformer.
        diffusers: Arguments of its call.
        comfyui: Arguments of the call of ComfyUI's model.
        unpacked: Brings the output of diffusers to [B, C, F, H, W].
        recipes: That are exported, with overrides after the name.
        overrides: Of all recipes.
    """

    pipeline: str
    transformer: Callable[[], nn.Module]
    diffusers: dict[str, Any]
    comfyui: dict[str, Tensor]
    unpacked: Callable[[Tensor], Tensor] = lambda output: output
    recipes: tuple[str, ...] = ("convrot-w8a8", "convrot-w4a8", TABLE, "convrot-w4a4")
    overrides: tuple[str, ...] = ()


def _wan(x: Tensor) -> Case:
    text, timestep = torch.randn(2, 12, 4096), torch.full((2,), 700.0)
    return Case(
        pipeline="wan",
        transformer=lambda: WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=128, ffn_dim=512, num_layers=2, rope_max_seq_len=64
        ),
        diffusers={"hidden_states": x, "timestep": timestep, "encoder_hidden_states": text},
        comfyui={"x": x, "timestep": timestep, "context": text},
    )


def _hunyuanvideo(x: Tensor) -> Case:
    text, pooled, timestep = torch.randn(2, 12, 256), torch.randn(2, 768), torch.full((2,), 700.0)
    return Case(
        pipeline="hunyuanvideo",
        transformer=lambda: HunyuanVideoTransformer3DModel(
            num_layers=1, num_single_layers=1, num_refiner_layers=2, text_embed_dim=256
        ),
        diffusers={
            "hidden_states": x,
            "timestep": timestep,
            "encoder_hidden_states": text,
            "encoder_attention_mask": torch.ones(2, 12, dtype=torch.bool),
            "pooled_projections": pooled,
            "guidance": torch.full((2,), 6000.0),
        },
        comfyui={"x": x, "timestep": timestep, "context": text, "y": pooled, "guidance": torch.full((2,), 6.0)},
        recipes=("convrot-w4a8", TABLE),
    )


def _ltx(x: Tensor) -> Case:
    x = torch.randn(2, 128, FRAMES, HEIGHT, WIDTH)
    text, time = torch.randn(2, 12, 4096), torch.full((2,), 0.7)
    return Case(
        pipeline="ltx",
        transformer=lambda: LTXVideoTransformer3DModel(
            num_attention_heads=32, attention_head_dim=16, cross_attention_dim=512, num_layers=2
        ),
        diffusers={
            "hidden_states": x.flatten(2).transpose(1, 2),
            "encoder_hidden_states": text,
            "timestep": time * 1000,
            "encoder_attention_mask": torch.ones(2, 12),
            "num_frames": FRAMES,
            "height": HEIGHT,
            "width": WIDTH,
            "rope_interpolation_scale": (8 / 25, 32, 32),  # 25 frames per second
        },
        comfyui={"x": x, "timestep": time, "context": text},
        unpacked=lambda output: output.transpose(1, 2).unflatten(2, (FRAMES, HEIGHT, WIDTH)),
        overrides=("skip=['transformer_blocks.0.attn2.to_k']",),  # ComfyUI reads a width from its shape
    )


CASES = {"wan": _wan, "ltx": _ltx, "hunyuanvideo": _hunyuanvideo}


def measure(name: str, folder: Path, *, comfyui: Path, python: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return for each recipe what ComfyUI detected and the distances of outputs; and the versions."""
    torch.manual_seed(0)
    case = CASES[name](torch.randn(2, 16, FRAMES, HEIGHT, WIDTH))
    pipe, transformer = tiny_pipeline(case.pipeline), case.transformer().eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    pipe.register_modules(transformer=transformer)
    pipe.save_pretrained(folder / "model")
    expected, files = {}, {}
    full = _output(s2q.load(folder / "model", dtype="float32").transformer, case)
    for number, recipe in enumerate(case.recipes):
        builtin, *overrides = recipe.split(" ")
        checkpoint = folder / str(number)
        s2q.quantize(folder / "model", recipe=builtin, out=checkpoint, overrides=[*case.overrides, *overrides])
        files[recipe] = str(folder / f"{number}.safetensors")
        s2q.export(checkpoint, to="comfyui", out=files[recipe])
        expected[recipe] = _output(s2q.load(checkpoint, dtype="float32").transformer, case)
    save_file(
        {f"comfyui.{key}": value.contiguous() for key, value in case.comfyui.items()}, folder / "inputs.safetensors"
    )
    command = [
        python,
        str(FORWARD),
        str(comfyui),
        *(str(folder / f"{part}.safetensors") for part in ("inputs", "outputs")),
    ]
    done = subprocess.run([*command, *files.values()], stdout=subprocess.PIPE, text=True, check=True)
    found, outputs = json.loads(done.stdout.splitlines()[-1]), load_file(folder / "outputs.safetensors")
    rows = {
        recipe: {
            **found["files"][file],
            "comfyui_to_s2q": _distance(outputs[file], expected[recipe]),
            "comfyui_to_full_precision": _distance(outputs[file], full),
            "s2q_to_full_precision": _distance(expected[recipe], full),
        }
        for recipe, file in files.items()
    }
    return rows, found["versions"]


@torch.no_grad()
def _output(transformer: nn.Module, case: Case) -> Tensor:
    return case.unpacked(transformer(**case.diffusers, return_dict=False)[0])


def _distance(output: Tensor, reference: Tensor) -> float:
    return rounded(float((output - reference).norm() / reference.norm()))


def main() -> None:
    """Measure the models; replace their rows in the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="folder of ComfyUI's source")
    parser.add_argument("--python", required=True, help="interpreter with the packages that ComfyUI needs")
    parser.add_argument("-m", "--model", action="append", choices=CASES, help="default: all")
    arguments = parser.parse_args()
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {"models": {}}
    for name in arguments.model or CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows, versions = measure(name, Path(folder), comfyui=arguments.comfyui, python=arguments.python)
        where = environment()
        where |= {"versions": where["versions"] | versions, "command": COMMAND}
        record = {"models": record["models"] | {name: rows}, **where}
        write_record(RESULT, record)


if __name__ == "__main__":
    main()
