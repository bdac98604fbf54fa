"""Checkpoints of other tools in a comparison: ranked by the width they have, measured by the bytes they take."""

import json
import shutil

import pytest
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from safetensors.torch import load_file, save_file

from s2q.cli import run
from s2q.common.errors import ResourceError
from s2q.comparison.compare import compare
from s2q.comparison.entries import find_entries
from s2q.comparison.widths import foreign_width
from s2q.models import source
from s2q.run.quantize import quantize

SETTINGS = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 16, "width": 16, "num_frames": 9}
SDNQ = {"quant_method": "sdnq", "weights_dtype": "uint4", "group_size": 0}
CONFIGS = [
    (None, "not quantized"),
    (SDNQ, "w4a16"),
    (SDNQ | {"use_quantized_matmul": True}, "w4a8"),
    (SDNQ | {"use_quantized_matmul": True, "quantized_matmul_dtype": None}, "w4a8"),
    (SDNQ | {"use_quantized_matmul": True, "quantized_matmul_dtype": "fp8"}, "w4a8"),
    (SDNQ | {"use_quantized_matmul": True, "quantized_matmul_dtype": "float16"}, "w4a16"),
    (SDNQ | {"weights_dtype": "int8", "use_quantized_matmul": True}, "w8a8"),
    (SDNQ | {"weights_dtype": "float8_e4m3fn"}, "w8a16"),
    (SDNQ | {"weights_dtype": "float4_e2m1fn"}, "w4a16"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "w4a16"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, "w8a8"),
    ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
    ({"quant_method": "quanto", "weights_dtype": "int8"}, "w8a16"),
    ({"quant_method": "quanto", "weights": "int4", "activations": "int8"}, "w4a8"),
    ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {}}}}, "w4a16"),
    (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8DynamicActivationInt4WeightConfig"}}},
        "w4a8",
    ),
    ({"quant_method": "torchao", "quant_type": "float8_dynamic_activation_float8_weight"}, "w8a8"),
    ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "w8a16"),
    ({"quant_method": "torchao", "quant_type": "IntxWeightOnlyConfig"}, "torchao"),
    ({"quant_method": "torchao", "quant_type": 7}, "torchao"),
    ({"quant_method": "torchao"}, "torchao"),
    ({"quant_method": "modelopt", "quant_type": "NVFP4_NVFP4"}, "w4a4"),
    ({"quant_method": "modelopt", "quant_type": "INT8_INT8", "weight_only": True}, "w8a16"),
    ({"quant_method": "modelopt", "quant_type": "FP8"}, "w8a16"),
    ({"quant_method": "auto-round", "bits": 4, "group_size": 128}, "w4a16"),
    ({"quant_method": "auto-round", "bits": "four"}, "auto-round"),
    ({"quant_method": "nunchaku_lite", "svdq_w4a4": {"targets": ["a"]}, "awq_w4a16": {"targets": ["b"]}}, "w4a4"),
    ({"quant_method": "nunchaku_lite", "awq_w4a16": {"targets": ["b"]}}, "w4a16"),
    ({"quant_method": "gguf", "compute_dtype": "bfloat16"}, "gguf"),
    ({"quant_method": "somebody's"}, "somebody's"),
    ({"bits": 4}, "unknown method"),
]


@pytest.mark.parametrize(("config", "width"), CONFIGS)
def test_the_width_is_that_of_the_configuration_else_a_group_of_the_method(config, width):
    assert foreign_width(config) == width


class PlainConfig(QuantizationConfigMixin):
    """The configuration of another tool."""

    def __init__(self, **options):
        self.quant_method = auto.QuantizationMethod.SDNQ
        self.options = options

    def to_diff_dict(self):
        return {"quant_method": self.quant_method.value, **self.options}


class PlainQuantizer(DiffusersQuantizer):
    """The quantizer of another tool, whose weights are stored in eight bits and loaded into plain linears."""

    def _process_model_before_weight_loading(self, model, **_):
        pass

    def _process_model_after_weight_loading(self, model, **_):
        return model

    is_serializable = is_trainable = False


@pytest.fixture
def foreign(tiny_model, tmp_path, monkeypatch):
    """Makes a folder of another tool, whose transformer is stored in bf16 with a configuration of `SDNQ`."""
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "sdnq", PlainQuantizer)
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "sdnq", PlainConfig)
    monkeypatch.setattr(source, "is_installed", lambda package: True)

    def make(name, **changes):
        folder = shutil.copytree(tiny_model, tmp_path / name)
        path = folder / "transformer/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": SDNQ | changes}))
        (weights,) = (folder / "transformer").glob("*.safetensors")
        halved = {key: tensor.bfloat16() for key, tensor in load_file(weights).items()}
        save_file(halved, weights, metadata={"format": "pt"})
        return folder

    return make


def bytes_of(folder):
    (weights,) = (folder / "transformer").glob("*.safetensors")
    return sum(tensor.nbytes for tensor in load_file(weights).values())


@pytest.mark.slow
def test_a_foreign_checkpoint_is_ranked_among_its_width_with_its_bytes(foreign, tiny_model, tmp_path, monkeypatch):
    from s2q.comparison import pages

    monkeypatch.setattr("s2q.report.video.encode_mp4", lambda frames, **_: b"")
    monkeypatch.setattr(pages, "write_mp4", lambda path, frames, fps: path.write_bytes(b""))
    theirs, wider = foreign("theirs", use_quantized_matmul=True), foreign("wider")
    (theirs / "transformer/stale.safetensors").write_bytes(b"")
    result = compare(
        [str(theirs), str(wider), "rtn-w4a8"],
        model=tiny_model,
        out=tmp_path / "out",
        prompts=[f"scene {number}" for number in range(10)],
        **SETTINGS,
        seeds=[0],
        metrics=("psnr", "velocity"),
    )
    assert [entry["error"] for entry in result["entries"]] == [None] * 3
    groups = {group["width"]: group["ranking"] for group in result["groups"]}
    assert groups == {"w4a16": ["wider"], "w4a8": ["theirs", "rtn-w4a8"]}, "bf16 weights beat 4 bits"
    storage = {entry["label"]: entry["storage"] for entry in result["entries"]}
    assert storage["wider"]["quantized_bytes"] == bytes_of(wider)
    assert storage["wider"]["full_precision_bytes"] == storage["rtn-w4a8"]["full_precision_bytes"]
    assert storage["wider"]["ratio"] == pytest.approx(1)
    assert storage["rtn-w4a8"]["ratio"] > 1.5


def test_a_dry_run_knows_width_and_bytes(foreign, tiny_model, tmp_path):
    theirs = foreign("theirs", use_quantized_matmul=True)
    shown = compare(
        [str(theirs), str(tiny_model)],
        model=tiny_model,
        out=tmp_path / "out",
        prompts=["a"],
        **SETTINGS,
        dry_run=True,
    )
    first, second = shown["entries"]
    assert (first["width"], first["storage"]["quantized_bytes"]) == ("w4a8", bytes_of(theirs))
    assert (second["width"], second["storage"]["quantized_bytes"]) == ("not quantized", bytes_of(tiny_model))


def test_a_checkpoint_that_diffusers_saved_again_keeps_width_and_bytes(tiny_model, tmp_path):
    from s2q.generation.load import load_pipeline

    quantize(tiny_model, recipe="rtn-w4a6", out=tmp_path / "made")
    load_pipeline(tmp_path / "made").save_pretrained(tmp_path / "again")
    made, again = find_entries([str(tmp_path / "made"), str(tmp_path / "again")])
    assert made.width == again.width == "w4a6"
    assert made.source.storage() == again.source.storage()


@pytest.mark.parametrize("verb", ["compare", "generate", "eval"])
def test_a_missing_package_is_one_line_of_every_verb(foreign, tiny_model, tmp_path, monkeypatch, capsys, verb):
    theirs = foreign("theirs")
    monkeypatch.setattr(source, "is_installed", lambda package: False)
    (tmp_path / "prompts.txt").write_text("a\n")
    given = {
        "compare": ["compare", theirs, "-m", tiny_model, "--prompts", tmp_path / "prompts.txt"],
        "generate": ["generate", "-m", theirs, "--prompt", "a"],
        "eval": ["eval", "-m", theirs, "--reference", tiny_model, "--prompts", tmp_path / "prompts.txt"],
    }[verb]
    assert run([str(word) for word in [*given, "-o", tmp_path / "out"]]) == ResourceError.exit_code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("its transformer is quantized by sdnq, which needs a package that is not installed; "
                         "pip install sdnq, or run s2q convert")  # fmt: skip
