"""Error of exported checkpoints in the program that they are for, beside what that program's own quantization gives.

    pip install sdnq comfy-kitchen
    python benchmarks/exports.py -m shapes-wan [--to sdnq] [-r s2q-export-w4a8 ...] [--prompts 16] [--seeds 1]

Each recipe is quantized and exported, the program's own code computes its linears, and it is judged on the prompts and
noise that the program's own W4A8 setting (``s2q.comparison.peers``) is judged on. diffusers loads SDNQ's folders with
SDNQ; the linears of ComfyUI's files are comfy-kitchen's, in a transformer of diffusers. Records are in
``results/exports/MODEL``, those of ComfyUI in its folder ``comfyui``; what has one is skipped. ``--checkpoints DIR``
takes checkpoints ``DIR/MODEL+RECIPE`` instead of quantizing.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from environment import environment
from records import rounded_metrics, write_record
from safetensors.torch import load_file
from torch import nn

import s2q
from s2q.common.versions import package_versions
from s2q.comparison.peers import cost_of_peer, find_peers, load_with_peer
from s2q.evaluation.measure import judge_model, run_reference
from s2q.evaluation.settings import EvaluationSettings
from s2q.evaluation.summary import summarise
from s2q.exports.layout import layout_of
from s2q.generation.load import load_pipeline
from s2q.models import resolve_model
from s2q.shapes.embedded import EMBEDDED_NAMES, embedded_prompts

RESULTS = Path(__file__).parent / "results" / "exports"
PEERS = {"sdnq": "sdnq-w4a8", "comfyui": "comfy-w4a8"}
RECIPES = {
    "sdnq": ("s2q-export-w4a8", "s2q-export-branch-w4a8"),
    "comfyui": ("s2q-export-w4a8", "s2q-export-table-w4a8"),
}
logger = logging.getLogger("exports")


def exported(model: str, recipe: str, folder: Path, checkpoints: Path | None, *, to: str) -> tuple[Path, dict]:
    """Quantize and export; return the exported folder and the report's storage."""
    checkpoint = folder / "checkpoint" if checkpoints is None else checkpoints / f"{model}+{recipe}"
    if not checkpoint.exists():
        s2q.quantize(model, recipe=recipe, out=checkpoint)
    out = folder / ("exported.safetensors" if to == "comfyui" else "exported")
    report = s2q.export(checkpoint, to=to, out=out)
    return out, dict(report.storage)


def with_comfyui_linears(pipe: DiffusionPipeline, file: Path) -> DiffusionPipeline:
    """Give the transformer of a full-precision pipeline the W4A8 linears of a file, as ComfyUI makes them."""
    from comfy_kitchen.tensor import AsymW4A8Int8Layout, QuantizedTensor

    layout, stored = layout_of(pipe.transformer, "comfyui"), load_file(file)
    count = 0
    for name, linear in pipe.transformer.named_modules():
        original = layout.linear_name(name) if isinstance(linear, nn.Linear) else None
        if f"{original}.comfy_quant" not in stored:
            continue
        mark = json.loads(bytes(stored[f"{original}.comfy_quant"].tolist()))
        kind = mark.pop("format")
        assert kind == "asym_w4a8_int8", (name, kind)
        parameters = AsymW4A8Int8Layout.Params(
            scale=stored[f"{original}.weight_s_rel"],
            s_channel=stored[f"{original}.weight_s_channel"],
            codebook=stored.get(f"{original}.weight_codebook"),
            orig_dtype=linear.weight.dtype,
            orig_shape=tuple(linear.weight.shape),
            **mark,
        )
        weight = QuantizedTensor(stored[f"{original}.weight"], "AsymW4A8Int8Layout", parameters)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if linear.bias is not None:
            linear.bias.data = stored[f"{original}.bias"].to(linear.bias.dtype)
        count += 1
    assert count == sum(key.endswith(".comfy_quant") for key in stored)
    return pipe


def main() -> None:
    """Measure what has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", required=True, choices=EMBEDDED_NAMES)
    parser.add_argument("--to", default="sdnq", choices=PEERS)
    parser.add_argument("-r", "--recipe", action="append")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--checkpoints", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    folder, source = RESULTS / arguments.model, resolve_model(arguments.model)
    folder = folder / "comfyui" if arguments.to == "comfyui" else folder
    names = [PEERS[arguments.to], *(arguments.recipe or RECIPES[arguments.to])]
    wanted = [name for name in names if not (folder / f"{name}.json").exists()]
    if not wanted:
        return
    settings = EvaluationSettings(dtype="float32")
    if arguments.to == "comfyui":
        layout_of(load_pipeline(source).transformer, "comfyui")
    captions = embedded_prompts(arguments.model, split="held-out", count=arguments.prompts)
    reference = run_reference(source, prompts=captions, seeds=range(arguments.seeds), settings=settings)
    (peer,) = find_peers([PEERS[arguments.to]])
    for name in wanted:
        with tempfile.TemporaryDirectory() as scratch:
            if name == peer.name:
                storage = cost_of_peer(peer, source)["storage"]
                pipe = load_with_peer(peer, source, dtype=settings.dtype)
            else:
                path, storage = exported(arguments.model, name, Path(scratch), arguments.checkpoints, to=arguments.to)
                if arguments.to == "comfyui":
                    pipe = with_comfyui_linears(load_pipeline(source, dtype=settings.dtype), path)
                else:
                    pipe = load_pipeline(path, dtype=settings.dtype)
            result = summarise(judge_model(source, reference, pipe=pipe))
        result["videos"] = rounded_metrics(result["videos"])
        record = result | {"model": name, "reference": arguments.model, "storage": storage} | environment()
        record["versions"] |= package_versions((peer.package,))
        write_record(folder / f"{name}.json", record)
        error = result["metrics"]["velocity_relative_error"]["mean"]
        logger.info("%s %s: velocity error %.3e, ratio %.2f", arguments.model, name, error, storage["ratio"])


if __name__ == "__main__":
    main()
