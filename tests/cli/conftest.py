import json

import pytest
import torch

from s2q.shapes import embedded
from tiny import tiny_cogvideox_pipeline

GENERATION = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 32, "num_frames": 9}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a random pipeline that takes captions of 96 characters."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe = tiny_cogvideox_pipeline()
    torch.manual_seed(0)
    config = dict(pipe.transformer.config) | {"max_text_seq_length": 96}
    pipe.register_modules(transformer=type(pipe.transformer).from_config(config).eval())
    pipe.save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture
def embedded_tiny(tiny_model, monkeypatch):
    """Makes the embedded names mean the tiny model, so that nothing depends on trained weights."""
    monkeypatch.setattr(embedded, "embedded_folder", lambda name: tiny_model)
    return "shapes-cogvideox"


@pytest.fixture(scope="session")
def checkpoint(tiny_model, tmp_path_factory):
    """The tiny model, quantized."""
    import s2q

    out = tmp_path_factory.mktemp("checkpoints") / "tiny-w4a6"
    s2q.quantize(tiny_model, recipe="rtn-w4a6", out=out)
    return out
