"""Other tools in a comparison: found by name, asked once, ranked among their width, measured by their bytes."""

import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from loras import save_lora
from s2q.cli import run
from s2q.common.components import transformers_of
from s2q.common.errors import InvalidInputError, ResourceError
from s2q.comparison import compare as compare_module
from s2q.comparison import pages, peers, setup
from s2q.comparison.compare import compare
from s2q.comparison.peers import PEERS, Peer, cost_of_peer, find_peers, load_with_peer
from s2q.models import ModelSource, family_of, resolve_model
from s2q.models.family import block_linears
from s2q.models.lora import with_loras
from s2q.shapes.embedded import embedded_prompts
from tiny import tiny_pipeline

SETTINGS = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 16, "width": 16, "num_frames": 9}


class Rounded(nn.Linear):
    """A linear of another tool: int8 codes and a scale a row in place of the weight."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", scale)

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.weight.to(inputs.dtype) * self.scale.to(inputs.dtype), self.bias)


@pytest.fixture
def tool(monkeypatch):
    """A tool of the table, whose package is always there."""
    monkeypatch.setattr("s2q.report.video.encode_mp4", lambda frames, **_: b"")
    monkeypatch.setattr(pages, "write_mp4", lambda path, frames, fps: path.write_bytes(b""))
    quantize = partial(peers._by_linear, Rounded)
    peer = Peer(name="tool-w8a16", package="torch", width="w8a16", does="int8 a row", quantize=quantize)
    monkeypatch.setattr(peers, "PEERS", {"tool-w8a16": peer})
    monkeypatch.setattr("s2q.comparison.shards.PEERS", {"tool-w8a16": peer})
    return peer


def test_the_name_tells_the_width_of_every_peer():
    assert all(peer.name.endswith(f"-{peer.width}") for peer in PEERS.values())


def test_only_the_linears_of_the_blocks_change_and_their_bytes_are_counted(tool, tiny_model):
    source = resolve_model(tiny_model)
    transformer = load_with_peer(tool, source).transformer
    linears = block_linears(source.meta_transformer(), family_of(source.transformer_class))
    changed = {name for name, module in transformer.named_modules() if isinstance(module, Rounded)}
    assert changed == {linear.name for linear in linears}
    storage = cost_of_peer(tool, source)["storage"]
    saved = sum(linear.in_features * linear.out_features for linear in linears)  # a byte of two
    scales = sum(linear.out_features for linear in linears) * source.stored_dtype().itemsize
    assert storage["quantized_bytes"] == storage["full_precision_bytes"] - saved + scales


@pytest.fixture
def adapted(tmp_path):
    """Return a tiny model of two transformers with an adapter each."""
    pipe = tiny_pipeline("wan 2.2 a14b")
    pipe.save_pretrained(tmp_path / "model")
    high = save_lora(pipe, tmp_path / "high", seed=1)
    low = save_lora(pipe, tmp_path / "low", seed=2, component="transformer_2")
    return with_loras(resolve_model(tmp_path / "model"), [str(high), f"transformer_2={low}:2"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["shapes-cogvideox", "shapes-cogvideox-outliers", "shapes-wan-outliers", "with adapters"]
)
def test_a_peer_gets_the_weights_that_loading_gives(model, request, monkeypatch):
    """Outlier channels and adapters are added to a model when it is loaded, and are not in its files."""
    source = request.getfixturevalue("adapted") if model == "with adapters" else resolve_model(model)
    expected = transformers_of(source.load_pipeline(dtype=torch.float32))
    load, loaded = ModelSource.load_pipeline, []

    def load_and_watch(self, **options):
        pipe = load(self, **options)
        loaded.append([weakref.ref(transformer) for transformer in transformers_of(pipe).values()])
        return pipe

    def quantize(load, *_):
        assert [transformer() for transformer in loaded[0]] == [None] * len(expected), "its memory is for the peer's"
        return load()

    monkeypatch.setattr(ModelSource, "load_pipeline", load_and_watch)
    unchanged = Peer(name="n-w8a16", package="torch", width="w8a16", does="nothing", quantize=quantize)
    given = transformers_of(load_with_peer(unchanged, source, dtype=torch.float32))
    assert len(loaded) == 1
    assert given.keys() == expected.keys()
    for component, transformer in expected.items():
        weights = given[component].state_dict()
        assert weights.keys() == transformer.state_dict().keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in transformer.state_dict().items())


@pytest.mark.slow
def test_a_worker_checks_adapters_once_for_all_its_shards(tool, adapted, tmp_path, monkeypatch):
    fits, built = setup.with_loras, []
    monkeypatch.setattr(setup, "SHARD_PROMPTS", 1)
    monkeypatch.setattr(setup, "with_loras", lambda *given: built.append(given) or fits(*given))
    result = compare(
        peers=["all"],
        model=adapted.folder,
        loras=[str(lora) for lora in adapted.loras],
        out=tmp_path / "out",
        prompts=["a", "b"],
        seeds=[0],
        metrics=["velocity"],
        **SETTINGS,
    )
    assert result["entries"][0]["error"] is None
    assert result["entries"][0]["metrics"]["velocity_relative_error"]["mean"] < 0.01, "both sides have the adapters"
    assert len(built) == 2, "before any compute, and in the worker"


@pytest.mark.slow
def test_a_peer_is_ranked_among_its_width_and_is_asked_for_its_cost_once(tool, tiny_model, tmp_path, monkeypatch):
    arguments = {"model": tiny_model, "out": tmp_path / "out", "prompts": ["a"], "seeds": [0], **SETTINGS}
    arguments |= {"peers": ["all"], "metrics": ["psnr", "velocity"]}
    result = compare(["rtn-w8a8"], **arguments)
    entry = result["entries"][1]
    assert (entry["label"], entry["width"], entry["error"]) == (f"tool-w8a16-{torch.__version__}", "w8a16", None)
    assert (entry["peer"], entry["storage"]["ratio"] > 1.2, entry["seconds"] > 0) == ("tool-w8a16", True, True)
    assert 0 < entry["metrics"]["velocity_relative_error"]["mean"] < 1e-3
    assert {group["width"]: group["ranking"] for group in result["groups"]}["w8a16"] == [entry["label"]]
    assert "--peers tool-w8a16" in (tmp_path / "out/index.html").read_text()
    monkeypatch.setattr(compare_module, "cost_of_peer", None)
    assert compare(["rtn-w8a8"], **arguments)["entries"][1] == entry


def test_a_peer_that_fails_does_not_stop_the_others(tool, tiny_model, tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no kernel")

    broken = Peer(name="bad-w4a8", package="torch", width="w4a8", does="", quantize=refuse)
    monkeypatch.setattr(peers, "PEERS", {"bad-w4a8": broken, tool.name: tool})
    arguments = {"model": tiny_model, "out": tmp_path / "out", "prompts": ["a"], "seeds": [0], **SETTINGS}
    bad, good = compare(peers=["all"], metrics=["psnr"], **arguments)["entries"]
    assert bad["error"] == "ValueError while it was quantized: no kernel"
    assert good["error"] is None


def test_an_unknown_peer_names_the_nearest():
    with pytest.raises(InvalidInputError, match="unknown peer 'torchao-w8': nearest names are torchao-w8a8"):
        find_peers(["torchao-w8"])
    with pytest.raises(InvalidInputError, match="unknown peer 'typo'"):
        find_peers(["all", "typo"])


def test_a_missing_package_is_one_line(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "is_installed", lambda package: False)
    words = ["compare", "--peers", "sdnq-w4a8", "-m", str(tiny_model), "-o", str(tmp_path / "out")]
    assert run(words) == ResourceError.exit_code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("--peers: sdnq-w4a8 needs a package that is not installed; pip install sdnq")
    with pytest.raises(ResourceError, match="no peer is installed; pip install one or more of sdnq torchao"):
        find_peers(["all"])


def test_a_peer_calibrates_on_a_pipeline_of_its_own_with_the_prompts_that_are_given(monkeypatch):
    source, given = resolve_model("shapes-cogvideox"), []

    def quantize(load, _names, _others, calibrate):
        given.append(calibrate(2))
        for part in given[-1].pipe.transformer.parameters():
            part.data.zero_()
        return load()

    peer = Peer(name="n-w8a16", package="torch", width="w8a16", does="", quantize=quantize, calibrates=True)
    transformer = load_with_peer(peer, source, prompts=["a", "b", "c"]).transformer
    assert all(part.any() for part in transformer.proj_out.parameters()), "the tool had a pipeline of its own"
    cost_of_peer(peer, source)
    assert [calibration.prompts for calibration in given] == [
        ["a", "b"],
        embedded_prompts("shapes-cogvideox", split="calibration", count=2),
    ]
    assert all(calibration.settings.num_frames == 9 for calibration in given)


def test_a_peer_that_calibrates_needs_prompts_that_the_model_takes(tool, tiny_model, tmp_path, monkeypatch):
    given = []

    def quantize(load, _names, _others, calibrate):
        given.append(calibrate(8).prompts)
        return load()

    peer = replace(tool, quantize=quantize, calibrates=True)
    monkeypatch.setattr(peers, "PEERS", {tool.name: peer})
    monkeypatch.setattr("s2q.comparison.shards.PEERS", {tool.name: peer})
    arguments = {"model": tiny_model, "out": tmp_path / "out", "prompts": ["a"], "seeds": [0], **SETTINGS}
    arguments |= {"peers": ["all"], "metrics": ["psnr"]}
    with pytest.raises(InvalidInputError, match="need calibration prompts; pass --calibration-prompts"):
        compare(**arguments)
    with pytest.raises(InvalidInputError, match="prompt 1 of 1 has 1[0-9][0-9] tokens"):
        compare(calibration_prompts=["b" * 120], **arguments)
    (entry,) = compare(calibration_prompts=["c", "d"], **arguments)["entries"]
    assert entry["error"] is None
    assert given == [["c", "d"]] * 2, "for its cost and in the shard"


@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_an_installed_peer_quantizes_a_model(peer, monkeypatch):
    """Runs where peers are installed; the project installs none."""
    pytest.importorskip({"optimum-quanto": "optimum.quanto"}.get(peer.package, peer.package.replace("-", "_")))
    monkeypatch.setattr(peers, "_AUTOROUND_PROMPTS", 1)
    monkeypatch.setattr(peers, "_AUTOROUND_STEPS", 1)
    storage = cost_of_peer(peer, resolve_model("shapes-cogvideox"))["storage"]  # tiny widths have no groups of 64
    assert storage["quantized_bytes"] < storage["full_precision_bytes"]
