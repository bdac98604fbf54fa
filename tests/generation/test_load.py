import logging
import shutil

import pytest
import torch

from loras import save_lora
from s2q.common.errors import InvalidInputError
from s2q.comparison.compare import compare
from s2q.generation.load import check_same_loras, load_pipeline, pipeline_to_ask
from s2q.models import ModelSource, resolve_model
from s2q.models.lora import with_loras
from s2q.nn import PackedLinear
from s2q.planning import plan
from s2q.recipes.load import load_recipe
from s2q.run.quantize import quantize
from tiny import run_pipeline, tiny_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_pipeline("cogvideox", dtype=torch.bfloat16).save_pretrained(root / "full")
    quantize(root / "full", recipe="rtn-w4a6", out=root / "quantized")
    return root


def test_a_checkpoint_is_compared_under_the_adapters_that_it_was_made_with_whatever_their_names_and_order(tmp_path):
    pipe = tiny_pipeline("wan")
    pipe.save_pretrained(tmp_path / "model")
    first, second, other = (save_lora(pipe, tmp_path / str(seed), seed=seed) for seed in range(3))
    given = [f"{first}:0.5", str(second)]
    quantize(tmp_path / "model", recipe="rtn-w8a8", out=tmp_path / "out", loras=given)
    renamed = shutil.copy(second, tmp_path / "renamed.safetensors")
    model, plain = resolve_model(tmp_path / "out"), resolve_model(tmp_path / "model")
    for loras in (given, given[::-1], [f"{first}:0.5", str(renamed)]):
        check_same_loras(model, with_loras(plain, loras))
    shutil.copy(other, second)  # another adapter under the name of the first
    for loras in (given, given[:1], [], [*given[:1], f"{renamed}:0.5"], [*given[:1], str(renamed), str(renamed)]):
        with pytest.raises(InvalidInputError, match="pass the same with --lora"):
            check_same_loras(model, with_loras(plain, loras))
    check_same_loras(plain, with_loras(plain, given))  # no checkpoint of s2q


def test_full_precision_and_quantized_alike(folders):
    for name, packed in (("full", 0), ("quantized", 20)):
        for model in (folders / name, str(folders / name), resolve_model(folders / name)):
            pipe = load_pipeline(model)
            assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
            assert sum(isinstance(one, PackedLinear) for one in pipe.transformer.modules()) == packed
        assert torch.isfinite(run_pipeline(load_pipeline(folders / name, dtype="float32"))).all()


def test_a_pipeline_that_cannot_be_built_without_weights_is_loaded_to_be_asked(folders, monkeypatch, caplog):
    source = resolve_model(folders / "full")
    assert all(parameter.is_meta for parameter in pipeline_to_ask(source).vae.parameters())
    monkeypatch.setattr(ModelSource, "_meta_part", lambda *_: torch.empty(1, device="meta").item())  # RuntimeError
    assert source.meta_pipeline(source.meta_transformers()) is None
    assert not any(parameter.is_meta for parameter in pipeline_to_ask(source).vae.parameters())
    with caplog.at_level(logging.INFO):
        planned = plan(source, recipe=load_recipe("smoothquant-w4a6"))
    assert "full: memory is not planned" in caplog.text
    assert planned.generation is None
    settings = {"seeds": [0], "num_inference_steps": 1, "num_frames": 9, "height": 16, "width": 16}
    assert compare(["rtn-w8a8"], model=source.folder, prompts=["a"], out="unused", dry_run=True, **settings)


def test_altered_checkpoints_are_refused_unless_told(folders, tmp_path):
    import shutil

    copy = shutil.copytree(folders / "quantized", tmp_path / "copy")
    (copy / "scheduler/scheduler_config.json").write_text((copy / "scheduler/scheduler_config.json").read_text() + "\n")
    with pytest.raises(InvalidInputError, match=r"scheduler/scheduler_config\.json: got \d+ bytes"):
        load_pipeline(copy)
    load_pipeline(copy, verify=False)


def test_a_quantized_hub_repository_is_downloaded_whole(folders, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, allow_patterns is None))
        return str(folders / "quantized")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    load_pipeline("someone/quantized")
    assert asked == [("someone/quantized", False), ("someone/quantized", True)]


def test_a_full_precision_hub_repository(folders, monkeypatch):
    import huggingface_hub
    from diffusers import DiffusionPipeline

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: str(folders / "full"))
    monkeypatch.setattr(DiffusionPipeline, "download", lambda repo_id, **_: str(folders / "full"))
    assert load_pipeline("someone/full").transformer.dtype == torch.bfloat16


def test_a_hub_repository_that_fails_halfway(folders, monkeypatch):
    import huggingface_hub
    from diffusers import DiffusionPipeline

    def refuse(repo_id, **_):
        raise OSError("connection lost")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: str(folders / "full"))
    monkeypatch.setattr(DiffusionPipeline, "download", refuse)
    with pytest.raises(InvalidInputError, match=r"someone/full: .*connection lost"):
        load_pipeline("someone/full")
