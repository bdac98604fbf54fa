import logging

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.comparison.compare import compare
from s2q.generation.load import load_pipeline, pipeline_to_ask
from s2q.models import ModelSource, resolve_model
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
