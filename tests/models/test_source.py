import json
import sys
import types

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.models import resolve_model
from tiny import run_pipeline, tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline("cogvideox", dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def embedded(monkeypatch, folder):
    """Stand-in for the embedded models: one name, kept in `folder`."""
    module = types.ModuleType("s2q.shapes.embedded")
    module.EMBEDDED_NAMES = ("shapes-cogvideox", "shapes-cogvideox-outliers")
    module.embedded_folder = lambda name: folder
    module.embedded_pipeline = lambda name, *, dtype: tiny_pipeline("cogvideox", dtype=dtype)
    monkeypatch.setitem(sys.modules, "s2q.shapes.embedded", module)


@pytest.fixture
def copy(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / "copy")


def test_a_folder_is_resolved_to_its_pipeline(folder):
    source = resolve_model(folder)
    assert (source.name, source.kind, source.folder) == ("tiny", "folder", folder)
    assert source.transformer_class == "CogVideoXTransformer3DModel"
    assert not source.is_quantized
    assert source.weights_dtype() is torch.bfloat16


def test_meta_transformer_has_the_shapes_of_the_stored_one_and_no_memory(folder):
    source = resolve_model(str(folder))
    on_meta = source.meta_transformer()
    real = source.load_pipeline().transformer
    assert {name: tensor.shape for name, tensor in on_meta.state_dict().items()} == {
        name: tensor.shape for name, tensor in real.state_dict().items()
    }
    assert all(parameter.is_meta for parameter in on_meta.parameters())


def test_load_pipeline_takes_the_stored_dtype_unless_told(folder):
    source = resolve_model(folder)
    pipe = source.load_pipeline()
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert torch.isfinite(run_pipeline(pipe)).all()
    pipe = source.load_pipeline(dtype="float32")
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32


def test_an_embedded_name_is_resolved_to_its_folder(embedded, folder):
    source = resolve_model("shapes-cogvideox")
    assert (source.name, source.kind, source.folder) == ("shapes-cogvideox", "embedded", folder)
    pipe = source.load_pipeline(dtype=torch.float32)
    assert pipe.transformer.dtype == torch.float32
    assert resolve_model("shapes-cogvideox-outliers").load_pipeline().name_or_path == "shapes-cogvideox-outliers"


def test_unknown_name_lists_the_nearest(embedded):
    with pytest.raises(InvalidInputError, match="unknown model 'shape-cogvideo': nearest names are shapes-cogvideox"):
        resolve_model("shape-cogvideo")


def test_missing_path_is_not_taken_for_a_hub_id(tmp_path):
    with pytest.raises(InvalidInputError, match="does not exist; expected"):
        resolve_model(tmp_path / "nowhere")


def test_hub_id_that_cannot_be_had_says_what_to_check(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(repo_id, **_):
        raise LocalEntryNotFoundError(f"{repo_id} is not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        InvalidInputError, match=r"nobody/nothing: no such folder, and not available on the Hub.*HF_HUB_OFFLINE"
    ):
        resolve_model("nobody/nothing")


def test_hub_id_in_the_cache(monkeypatch, folder):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: str(folder))
    source = resolve_model("somebody/tiny")
    assert (source.name, source.kind) == ("somebody/tiny", "hub")


def test_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(InvalidInputError, match=r"is not a diffusers pipeline: it has no model_index\.json"):
        resolve_model(tmp_path)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(InvalidInputError, match="is a file; expected the folder.*s2q convert reads"):
        resolve_model(path)


def test_a_pipeline_without_transformer_is_refused(copy):
    index = json.loads((copy / "model_index.json").read_text())
    index["transformer"] = [None, None]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidInputError, match="CogVideoXPipeline has no transformer"):
        resolve_model(copy)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00"])
@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
def test_damaged_json_names_the_file(copy, name, content):
    (copy / name).write_text(content)
    with pytest.raises(InvalidInputError, match=name.replace(".", r"\.")):
        resolve_model(copy)


def test_a_missing_transformer_config_is_refused(copy):
    (copy / "transformer/config.json").unlink()
    with pytest.raises(InvalidInputError, match=r"transformer/config\.json is missing"):
        resolve_model(copy)


def test_truncated_weights_name_the_file(copy):
    path = copy / "transformer/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidInputError, match=r"diffusion_pytorch_model\.safetensors: truncated"):
        resolve_model(copy).load_pipeline()


def test_missing_component_is_one_clear_line(copy):
    (copy / "vae/config.json").unlink()
    with pytest.raises(InvalidInputError, match="cannot be loaded as a diffusers pipeline") as caught:
        resolve_model(copy).load_pipeline()
    assert "\n" not in str(caught.value)


def test_config_that_does_not_fit_its_class(copy):
    path = copy / "transformer/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_layers": "many"}))
    with pytest.raises(InvalidInputError, match="is no configuration of CogVideoXTransformer3DModel"):
        resolve_model(copy).meta_transformer()


def test_pickled_weights_are_never_loaded(copy):
    weights = copy / "transformer/diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file

    torch.save(load_file(weights), weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(InvalidInputError, match=r"has only pickled weights \(diffusion_pytorch_model\.bin\)"):
        resolve_model(copy)


def test_a_second_transformer_is_found(tmp_path):
    tiny_pipeline("wan 2.2 a14b", boundary_ratio=0.5, dtype=torch.bfloat16).save_pretrained(tmp_path)
    source = resolve_model(tmp_path)
    assert list(source.transformer_configs) == ["transformer", "transformer_2"]
    assert [len(source.meta_transformer(name).blocks) for name in source.transformer_configs] == [2, 1]
    assert source.weights_dtype() is torch.bfloat16
    config = tmp_path / "transformer_2/config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "quantization_config": {"quant_method": "other"}}))
    assert resolve_model(tmp_path).is_quantized
    config.unlink()
    with pytest.raises(InvalidInputError, match=r"transformer_2/config\.json is missing"):
        resolve_model(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "transformer_2": [None, None]}))
    assert list(resolve_model(tmp_path).transformer_configs) == ["transformer"]
