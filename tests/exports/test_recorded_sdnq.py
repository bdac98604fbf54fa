"""Linears of sdnq 0.2.8, recorded: what converted ones compute. Runs without sdnq.

`python tests/exports/test_recorded_sdnq.py`, where sdnq 0.2.8 is installed, writes recorded_sdnq.safetensors: a linear
of 64 to 32 features with random weights, quantized by sdnq with each of the settings, its stored tensors, an input of
40 rows, and the output of sdnq's forward for it, in fp32 and without torch.compile.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

RECORDED = Path(__file__).with_name("recorded_sdnq.safetensors")
W4A8 = {"weights_dtype": "int4", "use_hadamard": True, "use_quantized_matmul": True}
SETTINGS = {
    "hadamard": (W4A8 | {"group_size": -1}, 5e-6),
    "svd": (W4A8 | {"group_size": -1, "use_svd": True, "svd_rank": 8}, 4e-3),
    "groups": (W4A8 | {"group_size": 32}, 2e-2),
}
"""Options, and the largest difference of an output relative to its largest magnitude; see test_convert_sdnq."""


def new_linear():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(64, 32), torch.randn(40, 64)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_converted_linear_computes_what_was_recorded(setting):
    from safetensors import safe_open

    from s2q.exports.repack import repacked
    from s2q.exports.sdnq import SDNQ_FORMAT, linear_options

    with safe_open(RECORDED, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()[setting])
    assert config["sdnq_version"] == SDNQ_FORMAT.version
    stored = {name.removeprefix(f"{setting}."): tensors[name] for name in tensors if name.startswith(f"{setting}.")}
    expected = stored.pop("output")
    form = SDNQ_FORMAT.form("x", nn.Linear(64, 32), stored, linear_options(config, "x"), torch.float32)
    assert (form.scheme.name, form.path.low_rank) == (
        "w4g32a8" if setting == "groups" else "w4a8",
        8 if setting == "svd" else None,
    )
    layer = repacked(SDNQ_FORMAT.weight(stored, form), form, stored["bias"], scheme=form.scheme).layer(wide=True)
    difference = float((layer(tensors["input"]) - expected).abs().max() / expected.abs().max())
    assert difference < SETTINGS[setting][1]


def record():
    from safetensors.torch import save_file
    from sdnq import SDNQConfig
    from sdnq.quantizer import sdnq_quantize_layer

    tensors, texts = {}, {}
    for setting, (options, _) in SETTINGS.items():
        layer, tensors["input"] = new_linear()
        config = SDNQConfig(add_skip_keys=False, minimum_allowed_numel=0, minimum_allowed_channel_size=0, **options)
        layer, config = sdnq_quantize_layer(layer, config, torch_dtype=torch.float32, param_name="x.weight")
        with torch.no_grad():
            stored = {**layer.state_dict(), "output": layer(tensors["input"])}
        tensors |= {f"{setting}.{name}": tensor.contiguous() for name, tensor in stored.items()}
        texts[setting] = json.dumps({name: value for name, value in config.to_dict().items() if value is not None})
    save_file(tensors, RECORDED, metadata=texts)


if __name__ == "__main__":
    os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"
    record()
