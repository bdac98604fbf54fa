"""Transformers from one file in their original layout: what is read, what is made of it, what is refused."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from safetensors.torch import save_file

import s2q
from s2q.cli import run
from s2q.common.errors import InvalidInputError
from s2q.common.headers import TensorInfo
from s2q.comparison.entries import content_of
from s2q.exports.layout import LAYOUTS
from s2q.models import originals, resolve_model
from s2q.models.originals import check_original
from s2q.planning import plan
from tiny import tiny_pipeline, video_size

QUICK = ["calibration.samples=2", "calibration.n_prompts=1", "calibration.steps=2", "distillation.epochs=1"]
LAYOUT_OF = {
    "wan": "WanTransformer3DModel",
    "wan image": "WanTransformer3DModel",
    "wan-vace": "WanVACETransformer3DModel",
    "skyreels-v2": "SkyReelsV2Transformer3DModel",
    "ltx": "LTXVideoTransformer3DModel",
    "ltx-2": "LTX2VideoTransformer3DModel",
}


def original(transformer, prefix=""):
    layout = LAYOUTS[type(transformer).__name__]
    return {f"{prefix}{name}": tensor for name, tensor in layout.to_original(transformer.state_dict()).items()}


def written(path, tensors):
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline("wan").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned():
    return tiny_pipeline("wan", seed=5).transformer


@pytest.fixture(scope="module")
def file(tuned, tmp_path_factory):
    return written(tmp_path_factory.mktemp("file") / "tuned.safetensors", original(tuned))


def same_weights(loaded, expected):
    tensors = loaded.state_dict()
    assert tensors.keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in expected.state_dict().items())
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize("name", LAYOUT_OF)
def test_every_layout_of_diffusers_is_read(name, tmp_path):
    pipe, tuned = tiny_pipeline(name), tiny_pipeline(name, seed=5).transformer
    assert type(tuned).__name__ == LAYOUT_OF[name]
    pipe.save_pretrained(tmp_path / "base")
    path = written(tmp_path / "tuned.safetensors", original(tuned, "model.diffusion_model."))
    loaded = resolve_model(f"{path}@{tmp_path / 'base'}").load_pipeline()
    same_weights(loaded.transformer, tuned)
    same_weights(loaded.vae, pipe.vae)


def test_hunyuanvideo_is_read_at_its_published_width(monkeypatch):
    with torch.device("meta"):
        transformer = HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1)
    headers = {
        name: TensorInfo(dtype="BF16", shape=tuple(tensor.shape), num_bytes=0, start=0)
        for name, tensor in original(transformer).items()
    }
    monkeypatch.setattr(originals, "original_headers", lambda _path: headers)
    check_original(Path("hunyuan.safetensors"), "transformer", transformer, base="base")
    del headers["double_blocks.0.img_attn_qkv.weight"]
    with pytest.raises(InvalidInputError, match="has no transformer_blocks.0.attn.to_q.weight"):
        check_original(Path("hunyuan.safetensors"), "transformer", transformer, base="base")


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_names_of_diffusers_are_read(prefix, tuned, base, tmp_path):
    tensors = {f"{prefix}{name}": tensor for name, tensor in tuned.state_dict().items()}
    path = written(tmp_path / "tuned.safetensors", tensors)
    same_weights(resolve_model(f"{path}@{base}").load_pipeline().transformer, tuned)


def test_a_family_without_a_known_layout_takes_the_names_of_diffusers(tmp_path):
    pipe, tuned = tiny_pipeline("cogvideox"), tiny_pipeline("cogvideox", seed=5).transformer
    pipe.save_pretrained(tmp_path / "base")
    path = written(tmp_path / "tuned.safetensors", tuned.state_dict())
    same_weights(resolve_model(f"{path}@{tmp_path / 'base'}").load_pipeline().transformer, tuned)
    written(path, {f"blocks.{name}": tensor for name, tensor in tuned.state_dict().items()})
    with pytest.raises(InvalidInputError, match="diffusers knows no original layout of CogVideoXTransformer3DModel"):
        resolve_model(f"{path}@{tmp_path / 'base'}")


def test_other_components_in_the_file_are_not_read(tuned, base, tmp_path):
    others = {"vae.encoder.weight": torch.ones(3, dtype=torch.int8), "text_encoders.t5.weight": torch.ones(3)}
    path = written(tmp_path / "whole.safetensors", original(tuned, "model.diffusion_model.") | others)
    source = resolve_model(f"{path}@{base}")
    same_weights(source.load_pipeline().transformer, tuned)
    assert source.weights_dtype() == torch.float32


def test_a_dtype_is_applied_except_to_what_the_class_keeps_in_fp32(file, base, tuned):
    loaded = resolve_model(f"{file}@{base}").load_pipeline(dtype="bfloat16").transformer
    assert loaded.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert loaded.blocks[0].scale_shift_table.dtype == torch.float32
    assert torch.equal(loaded.blocks[0].attn1.to_q.weight, tuned.blocks[0].attn1.to_q.weight.bfloat16())


def test_a_resolved_model_names_file_and_base(file, base):
    source = resolve_model(f"{file}@{base}")
    assert (source.name, source.kind) == (f"tuned.safetensors@{base.name}", "file")
    assert source.pinned == f"transformer={file}@{base}"
    again = resolve_model(pickle.loads(pickle.dumps(source)).pinned)
    assert (again.name, again.originals) == (source.name, source.originals)
    assert content_of(again) == content_of(source)
    assert content_of(source) != content_of(resolve_model(str(base)))


def test_a_checkpoint_is_that_of_the_same_weights_in_a_folder(file, base, tuned, tmp_path):
    pipe = tiny_pipeline("wan")
    pipe.register_modules(transformer=tuned)
    pipe.save_pretrained(tmp_path / "folder")
    size = [f"calibration.{name}={value}" for name, value in video_size(pipe).items()]
    given = {"file": f"{file}@{base}", "folder": str(tmp_path / "folder")}
    planned = {name: plan(model, recipe="s2q-w4a6", overrides=[*QUICK, *size]) for name, model in given.items()}
    assert planned["file"].storage == planned["folder"].storage
    for name, model in given.items():
        out = tmp_path / f"{name}-out"
        report = s2q.quantize(model, recipe="s2q-w4a6", out=out, prompts=["red"], overrides=[*QUICK, *size])
        assert report.storage == planned[name].storage
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "file-out" / weights).read_bytes() == (tmp_path / "folder-out" / weights).read_bytes()
    report = json.loads((tmp_path / "file-out/s2q/report.json").read_text())
    assert report["source"] == f"tuned.safetensors@{base.name}"
    card = (tmp_path / "file-out/README.md").read_text()
    assert f'base_model: "{base.name}"' in card
    assert f"as in `tuned.safetensors` in `{base.name}`" in card
    options = {**video_size(pipe), "num_inference_steps": 2, "prompts": ["red"], "seeds": [0]}
    found = {
        name: s2q.evaluate(tmp_path / "file-out", reference=reference, **options)["metrics"]
        for name, reference in given.items()
    }
    assert found["file"]["velocity_relative_error"] == found["folder"]["velocity_relative_error"]


def test_commands_take_a_file(file, base, tmp_path, capsys, no_encoding):
    model = f"{file}@{base}"
    small = ["--num-frames", "9", "--height", "16", "--width", "16", "--steps", "2", "--device", "cpu"]
    assert run(["plan", "-m", model, "-r", "rtn-w4a6"]) == 0
    assert "tuned.safetensors" in capsys.readouterr().out
    assert run(["generate", "-m", model, "--prompt", "red", "-o", str(tmp_path / "videos"), *small]) == 0
    (tmp_path / "prompts.txt").write_text("red\n")
    out = ["--prompts", str(tmp_path / "prompts.txt"), "--seeds", "1", "-o", str(tmp_path / "compared")]
    assert run(["compare", "rtn-w8a8", "-m", model, *out, *small]) == 0
    assert run(["quantize", "-m", str(file), "-r", "rtn-w4a6", "-o", str(tmp_path / "out")]) == 3
    assert "expected the folder of a diffusers pipeline" in capsys.readouterr().err


def test_each_of_two_transformers_has_a_file(tmp_path):
    pipe, other = tiny_pipeline("wan 2.2 a14b"), tiny_pipeline("wan 2.2 a14b", seed=5)
    base = tmp_path / "base"
    pipe.save_pretrained(base)
    high = written(tmp_path / "high.safetensors", original(other.transformer))
    low = written(tmp_path / "low.safetensors", original(other.transformer_2))
    both = resolve_model(f"{high},transformer_2={low}@{base}")
    assert both.name == f"high.safetensors+low.safetensors@{base.name}"
    loaded = both.load_pipeline()
    same_weights(loaded.transformer, other.transformer)
    same_weights(loaded.transformer_2, other.transformer_2)
    assert resolve_model(both.pinned).originals == both.originals
    loaded = resolve_model(f"transformer_2={low}@{base}").load_pipeline()
    same_weights(loaded.transformer, pipe.transformer)
    same_weights(loaded.transformer_2, other.transformer_2)
    with pytest.raises(InvalidInputError, match="of another size|has no blocks|belong to another model"):
        resolve_model(f"{low},transformer_2={high}@{base}")


def changed(tensors, **changes):
    return {name: changes.get(name.replace(".", "_"), tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {},
            r"as the transformer of .*: has no scale_shift_table, .* and \d+ more in its original layout",
        ),
        (
            lambda tensors: tensors | {"head.head.weight": tensors["head.head.weight"].to(torch.float8_e4m3fn)},
            "head.head.weight is F8_E4M3, quantized; pass the same model in float32, float16 or bfloat16",
        ),
        (lambda tensors: tensors | {"extra.weight": torch.ones(2)}, "extra.weight belong to another model"),
        (
            lambda tensors: tensors | {"head.head.bias": torch.ones(2)},
            r"proj_out.bias has shape \[2\], expected \[16\]",
        ),
        (
            lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "head.head.bias"},
            "has no proj_out.bias in its original layout or that of diffusers; expected the weights of a WanTrans",
        ),
    ],
    ids=["empty", "fp8", "extra", "size", "missing"],
)
def test_a_file_that_does_not_fit_is_refused_by_its_header(change, message, tuned, base, tmp_path):
    path = written(tmp_path / "bad.safetensors", change(original(tuned)))
    with pytest.raises(InvalidInputError, match=f"^{re.escape(str(path))}: .*{message}"):
        resolve_model(f"{path}@{base}")


def test_a_file_of_another_family_is_refused(base, tmp_path):
    path = written(tmp_path / "ltx.safetensors", original(tiny_pipeline("ltx").transformer))
    with pytest.raises(InvalidInputError, match="as the transformer of .* has no .* the weights of a WanTransformer3D"):
        resolve_model(f"{path}@{base}")


def test_what_is_no_file_and_base_is_refused(file, base, tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    refused = {
        str(gguf): "GGUF files are quantized; pass the full-precision model",
        str(file): "is a file; expected the folder of a diffusers pipeline, .* or FILE.safetensors@BASE",
        f"{tmp_path}/none.safetensors@{base}": "none.safetensors: no such file",
        f"{file}@{base}/none": "does not exist; expected a diffusers pipeline folder",
        f"{file},transformer_2={file}@{base}": "has no transformer_2; it has one transformer",
        f"{file},vae={file}@{base}": "unknown component of a file 'vae'",
        f"{file},transformer={file}@{base}": "names two files for transformer; expected one",
    }
    for text, message in refused.items():
        with pytest.raises(InvalidInputError, match=message):
            resolve_model(text)


def test_a_quantized_base_is_refused(file, base, tmp_path):
    s2q.quantize(str(base), recipe="rtn-w4a6", out=tmp_path / "out")
    with pytest.raises(InvalidInputError, match="its transformer is already quantized"):
        resolve_model(f"{file}@{tmp_path / 'out'}")


def test_a_checkpoint_names_its_file_where_full_precision_is_asked_for(file, base, tmp_path):
    s2q.quantize(f"{file}@{base}", recipe="rtn-w4a6", out=tmp_path / "out")
    with pytest.raises(InvalidInputError, match=f"pass the full-precision model, tuned.safetensors@{base.name}"):
        s2q.quantize(str(tmp_path / "out"), recipe="rtn-w4a6", out=tmp_path / "again")
