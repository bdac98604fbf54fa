"""Measurements for the pictures of docs/concepts.md: selection, attention, transforms and GPTQ on embedded models.

    python benchmarks/concepts.py

Writes ``benchmarks/results/concepts.json``; ``python benchmarks/tables.py`` draws it. Selection and attention are of
a run of s2q-w4a6 with its own calibration (one epoch, which changes neither). The other two are of one linear and its
inputs while a video is generated.
"""

import base64
import zlib
from pathlib import Path
from typing import Any

import torch
from environment import environment
from records import rounded, write_record
from torch import Tensor

from s2q.cli.pages import sample_frames
from s2q.common.hooks import capture_inputs
from s2q.common.temporaries import scratch_folder
from s2q.core.qparams import dequantize_weight, fake_quantize, token_scale
from s2q.core.schemes import PerChannel, QuantScheme
from s2q.report.run_records import RunRecords, read_records
from s2q.rounding.gptq import round_gptq
from s2q.rounding.hessian import HessianAccumulator
from s2q.rounding.rtn import round_rtn
from s2q.run.quantize import quantize
from s2q.shapes.embedded import embedded_pipeline, embedded_prompts, generation_defaults
from s2q.transforms.compose import Compose
from s2q.transforms.hadamard import hadamard
from s2q.transforms.smooth_scale import SmoothScale, smooth_scale

RESULTS = Path(__file__).parent / "results/concepts.json"
MODEL, OUTLIERS = "shapes-cogvideox", "shapes-cogvideox-outliers"
RECIPE = "s2q-w4a6"
BLOCK = "transformer_blocks.3"
GROUP = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
ROUNDED = "ff.net.2"
SCHEME = QuantScheme(num_bits=4, granularity=PerChannel(), dynamic=False)
ACTIVATION_BITS = 6
CALLS = 5
"""Calls of the transformer, spread over the denoising steps of one video, whose inputs are taken."""


def main() -> None:
    """Measure all and write the results."""
    with scratch_folder("concepts") as folder:
        out = folder / "checkpoint"
        quantize(MODEL, recipe=RECIPE, overrides=["distillation.epochs=1"], out=out)
        run = read_records(out)
    record = {
        "model": MODEL,
        "recipe": RECIPE,
        "selection": _selection(run),
        "blocks": [{"name": block["name"], "attention": block["attention"]} for block in run.blocks],
        "frames": _frames(run),
        "transforms": _transforms(),
        "gptq": _gptq(),
        **environment(),
    }
    write_record(RESULTS, record)


def _selection(run: RunRecords) -> dict[str, Any]:
    assert run.selection is not None
    scores = ("diffusion_salience", "quantization_salience", "salience")
    candidates = [
        {name: candidate[name] for name in ("prompt", "step", "selected")}
        | {name: rounded(candidate[name]) for name in scores}
        for candidate in run.selection["candidates"]
    ]
    kept = ("prompts", "selection", "settings", "samples")
    return {"candidates": candidates, **{name: run.selection[name] for name in kept}}


def _frames(run: RunRecords) -> dict[str, Any]:
    """The video whose attention was recorded, uint8 [F, H, W, 3], compressed."""
    frames = sample_frames(MODEL, run)
    assert frames is not None
    data = base64.b64encode(zlib.compress(frames.tobytes(), 9)).decode("ascii")
    return {"shape": list(frames.shape), "data": data}


@torch.no_grad()
def _inputs(model: str, linear: str) -> tuple[torch.nn.Module, Tensor]:
    """A block in fp32, and the inputs [T, I] of one of its linears while the first calibration prompt is generated."""
    pipeline = embedded_pipeline(model, dtype=torch.float32)
    block, captured = pipeline.transformer.get_submodule(BLOCK), []
    settings = generation_defaults(model)
    with capture_inputs(block, {linear: captured.append}):
        pipeline(
            prompt=embedded_prompts(model, split="calibration", count=1)[0],
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            max_sequence_length=pipeline.transformer.config.max_text_seq_length,
            **settings,
        )
    places = torch.linspace(0, len(captured) - 1, CALLS).round().int().tolist()
    return block, torch.cat([captured[place].reshape(-1, captured[place].shape[-1]) for place in places]).float()


def _transforms() -> dict[str, Any]:
    """The largest magnitude of each input channel before and after each transform, and the error of the outputs."""
    block, x = _inputs(OUTLIERS, GROUP[0])
    weight = torch.cat([block.get_submodule(name).weight.detach() for name in GROUP]).float()
    scale = SmoothScale(smooth_scale(x.abs().amax(0), weight.abs().amax(0)), learnable=False)
    rotation = hadamard(x.shape[1], seed=0)
    paths = {
        "none": (x, weight),
        "smooth_scale": (scale(x), scale.factors(torch.float32, inverse_transpose=True).apply(weight)),
    }
    both = Compose(scale, rotation)
    paths["smooth_scale + rotation"] = both(x), both.factors(torch.float32, inverse_transpose=True).apply(weight)
    exact = x.double() @ weight.double().T
    result = {}
    for name, (inputs, weights) in paths.items():
        again = inputs.double() @ weights.double().T
        assert torch.allclose(again, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max())), "the transform cancels"
        output = _quantized(inputs) @ _nearest(weights).T
        result[name] = {
            "channel_amax": [rounded(float(value)) for value in inputs.abs().amax(0)],
            "output_error": rounded(_relative(output.double(), exact)),
        }
    return {
        "model": OUTLIERS,
        "linears": [f"{BLOCK}.{name}" for name in GROUP],
        "tokens": len(x),
        "weight_bits": SCHEME.num_bits,
        "activation_bits": ACTIVATION_BITS,
        "paths": result,
    }


def _gptq() -> dict[str, Any]:
    """The output error of a linear while its columns are rounded one after another, in GPTQ's order.

    After i columns, with errors ``E``, GPTQ has changed the others by ``-E H̃_ir H̃_rr⁻¹`` (dampened Hessian ``H̃``).
    """
    block, x = _inputs(MODEL, ROUNDED)
    weight = block.get_submodule(ROUNDED).weight.detach().float()
    accumulator = HessianAccumulator(x.shape[1])
    accumulator.add(_quantized(x))
    hessian = accumulator.hessian()
    ((by_gptq, report),) = round_gptq([weight], SCHEME, hessian=hessian)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    wide = hessian[order][:, order].double()
    damped = wide + report.dampening_frac * wide.diagonal().mean() * torch.eye(len(wide), dtype=torch.float64)
    power = float(((weight[:, order].double() @ wide) * weight[:, order].double()).sum())
    deviations = {
        "rtn": (_nearest(weight) - weight)[:, order].double(),
        "gptq": (dequantize_weight(by_gptq.codes, by_gptq.scale) - weight)[:, order].double(),
    }
    columns = sorted({round(index * len(wide) / 48) for index in range(1, 49)})
    curves: dict[str, list[float]] = {"rtn": [], "gptq": []}
    for count in columns:
        made_up = torch.linalg.solve(damped[count:, count:], damped[count:, :count]).T  # H̃_ir H̃_rr⁻¹
        for name, deviation in deviations.items():
            others = -deviation[:, :count] @ made_up if name == "gptq" else torch.zeros_like(deviation[:, count:])
            changed = torch.cat([deviation[:, :count], others], dim=1)
            curves[name].append(rounded(float(((changed @ wide) * changed).sum()) / power))
    return {
        "model": MODEL,
        "linear": f"{BLOCK}.{ROUNDED}",
        "tokens": len(x),
        "weight_bits": SCHEME.num_bits,
        "columns": columns,
        "output_error": curves,
        "weight_error": {
            name: rounded(float(deviation.square().sum() / weight.double().square().sum()))
            for name, deviation in deviations.items()
        },
        "rows_rounded_to_nearest": report.rtn_rows,
    }


def _quantized(x: Tensor) -> Tensor:
    return fake_quantize(x, token_scale(x, num_bits=ACTIVATION_BITS), num_bits=ACTIVATION_BITS)


def _nearest(weight: Tensor) -> Tensor:
    rounded_weight = round_rtn(weight, SCHEME)
    return dequantize_weight(rounded_weight.codes, rounded_weight.scale)


def _relative(output: Tensor, exact: Tensor) -> float:
    return float((output - exact).square().sum() / exact.square().sum())


if __name__ == "__main__":
    main()
