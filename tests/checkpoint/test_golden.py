"""The bytes of a checkpoint, pinned: a change of the format must be deliberate and needs a new `FORMAT_VERSION`."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from s2q.run.quantize import quantize
from tiny import tiny_pipeline

TENSORS = "30c03bcadf88906ba9b8de345c5eae97297a60422dcf544cf14dff3ad192ec49"
CONFIG = "94b762d17de84d72ef09260f819fcc39fd10d7a749ef5d087e165f622802c1a6"


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Weights by integer arithmetic, exact in every dtype, so that no random generator decides the bytes."""
    pipe = tiny_pipeline("cogvideox")
    with torch.no_grad():
        for index, parameter in enumerate(pipe.transformer.parameters()):
            values = (torch.arange(parameter.numel()) * 37 + 11 * index) % 101 - 50
            parameter.copy_(values.reshape(parameter.shape) / 64)
    out = tmp_path_factory.mktemp("golden") / "out"
    overrides = ["modulation.num_bits=8", "modulation.granularity=per_group", "modulation.group_size=16"]
    quantize(pipe, recipe="rtn-w4a6", overrides=overrides, out=out)
    return out / "transformer"


def test_tensors_have_the_recorded_hash(golden):
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(golden / "diffusion_pytorch_model.safetensors").items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == TENSORS


def test_the_configuration_has_the_recorded_hash(golden):
    config = json.loads((golden / "config.json").read_text())["quantization_config"]
    assert hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest() == CONFIG


def test_a_row_by_hand(golden):
    """The first row of the first to_q: scale max / 7, codes round(w / scale) + 8, two a byte, low nibble first."""
    tensors = load_file(golden / "diffusion_pytorch_model.safetensors")
    names = [name for name, _ in tiny_pipeline("cogvideox").transformer.named_parameters()]
    name = "transformer_blocks.0.attn1.to_q"
    index = names.index(f"{name}.weight")
    values = [((position * 37 + 11 * index) % 101 - 50) / 64 for position in range(64)]
    scale = float(tensors[f"{name}.weight_scale"][0])
    assert scale == pytest.approx(max(map(abs, values)) / 7, rel=2**-8)
    codes = [round(value / scale) + 8 for value in values]
    row = [codes[at] | codes[at + 1] << 4 for at in range(0, 64, 2)]
    assert tensors[f"{name}.weight"][0].tolist() == row
