"""Backends and shared inputs of the packed linears of a whole model."""

import copy
import pickle

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.common.log import log_once
from s2q.core.schemes import LinearScheme, PerGroup, PerToken, QuantScheme
from s2q.nn import PackedLinear, dequantized, packed, set_backend, share_inputs
from s2q.rounding import round_rtn
from s2q.run.quantize import quantize
from tiny import run_transformer, tiny_pipeline

CALIBRATED = ["calibration.steps=1", "calibration.samples=1", "transforms.shift=mean", "transforms.low_rank=2"]


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """A tiny transformer with everything that can stand before a linear."""
    from s2q.checkpoint import load_pipeline

    out = tmp_path_factory.mktemp("runtime") / "out"
    overrides = [*CALIBRATED, "transforms.scale=smooth", "transforms.rotation=kronecker", "clip.constant=0.9"]
    quantize(tiny_pipeline("cogvideox"), recipe="rtn-w4a6", out=out, prompts=["a"], overrides=overrides)
    return load_pipeline(out).transformer


@pytest.fixture
def counted(monkeypatch):
    """How often an input was quantized."""
    calls = []
    original = packed.activation_path
    monkeypatch.setattr(
        packed, "activation_path", lambda x, *args, **rest: calls.append(len(x)) or original(x, *args, **rest)
    )
    return calls


def test_queries_keys_and_values_share_one_quantized_input(transformer, counted):
    blocks = len(transformer.transformer_blocks)
    assert share_inputs(transformer) == 3 * blocks
    shared = run_transformer(transformer)
    assert len(counted) == 4 * blocks  # qkv, to_out, and the two of the feed-forward
    for module in transformer.modules():
        if isinstance(module, PackedLinear):
            module.shared_input = None
    assert torch.equal(run_transformer(transformer), shared)
    assert len(counted) == (4 + 6) * blocks
    share_inputs(transformer)


def test_linears_with_other_transforms_do_not_share(transformer):
    attention = transformer.transformer_blocks[0].attn1
    kept = attention.to_k.transform_scale.data.clone()
    attention.to_k.transform_scale.data[0] *= 2
    assert share_inputs(transformer) == 3 * len(transformer.transformer_blocks) - 1
    assert attention.to_k.shared_input is None
    assert attention.to_q.shared_input is attention.to_v.shared_input
    attention.to_k.transform_scale.data.copy_(kept)
    share_inputs(transformer)


def test_linears_whose_branches_are_taken_from_the_other_side_do_not_share(transformer):
    attention = transformer.transformer_blocks[0].attn1
    kept = attention.to_k.path
    attention.to_k.path = kept.replace(deflates=False)
    assert share_inputs(transformer) == 3 * len(transformer.transformer_blocks) - 1
    assert attention.to_k.shared_input is None
    attention.to_k.path = kept
    share_inputs(transformer)


def test_every_backend_gives_the_same_output(transformer):
    outputs = {}
    for backend in ("auto", "reference", "cpu"):
        set_backend(transformer, backend)
        outputs[backend] = run_transformer(transformer)
    set_backend(transformer, "auto")
    exact = outputs.pop("reference")
    for output in outputs.values():
        assert float((output - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedded_pipeline_gives_the_same_latents_on_every_cpu_backend(dtype):
    """Small differences would not stay small: a code that lands on the other side of a boundary moves many others."""
    from s2q.benchmark.pipeline_steps import pack_randomly
    from s2q.generation.defaults import generation_defaults
    from s2q.generation.denoise import denoise
    from s2q.generation.load import load_pipeline
    from s2q.generation.settings import resolve_settings
    from s2q.recipes.load import load_recipe

    pipe = load_pipeline("shapes-cogvideox", dtype=dtype)
    pack_randomly(pipe.transformer, load_recipe("s2q-plus-w4a6"), frames=3)
    defaults = dict(generation_defaults("shapes-cogvideox"))
    settings = resolve_settings(pipe, requested={"num_inference_steps": 3}, defaults=defaults)
    latents = {}
    for backend in ("reference", "cpu"):
        set_backend(pipe.transformer, backend)
        result = denoise(pipe, ["a red circle moving left on a grey background"], seeds=[0], settings=settings)
        latents[backend] = result.latents.float()
    exact = latents["reference"]
    assert float((latents["cpu"] - exact).norm() / exact.norm()) < 1e-3


def test_triton_gives_the_output_of_the_reference(transformer):
    pytest.importorskip("triton")
    exact = run_transformer(transformer)
    set_backend(transformer, "triton")
    result = run_transformer(transformer)
    set_backend(transformer, "auto")
    assert float((result - exact).norm() / exact.norm()) < 1e-2


def test_weights_in_groups_are_said_to_be_slow_once(caplog):
    log_once.cache_clear()
    scheme = LinearScheme(
        weight=QuantScheme(num_bits=4, granularity=PerGroup(group_size=16)),
        activation=QuantScheme(num_bits=6, granularity=PerToken(), dynamic=True),
    )
    layer = PackedLinear.from_rounded(round_rtn(torch.randn(8, 32), scheme.weight), bias=None, scheme=scheme)
    for _ in range(2):
        layer(torch.randn(3, 32))
    assert [record.message for record in caplog.records] == [
        f"{scheme.name} linears multiply group after group of their weights, slower than full precision: no integer "
        "kernel takes them"
    ]


def test_an_unknown_backend_is_refused(transformer):
    with pytest.raises(InvalidInputError, match="unknown backend 'cup': nearest names are cpu"):
        set_backend(transformer, "cup")


def test_a_block_compiles_into_one_graph_and_shares_inputs(transformer):
    expected = run_transformer(transformer)
    compiled, graphs = copy.deepcopy(transformer), []

    def backend(graph, _inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    share_inputs(compiled)
    compiled.transformer_blocks[0].compile(backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run_transformer(compiled), expected, rtol=1e-4, atol=1e-4)
    paths = [sum("activation_path" in target for target in targets) for targets in graphs]
    assert set(paths) == {4}  # qkv, to_out, and the two of the feed-forward
    shared = [module.shared_input for module in compiled.modules() if isinstance(module, PackedLinear)]
    assert all(shared_input is None or shared_input._traced is None for shared_input in shared)


def packed_of(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def test_the_fastest_backend_runs_narrow_linears_dequantized(transformer, counted):
    plain = copy.deepcopy(transformer)
    plain.dequantize()
    fastest = copy.deepcopy(transformer)
    before = fastest.state_dict()
    set_backend(fastest, "fastest")
    assert not sum(layer.kept.num_bytes for layer in packed_of(fastest)), "nothing is kept before it is needed"
    assert torch.equal(run_transformer(fastest), run_transformer(plain))
    assert not counted
    weights = sum(layer.in_features * layer.out_features for layer in packed_of(fastest))
    kept = sum(layer.kept.num_bytes for layer in packed_of(fastest))
    assert kept > weights * fastest.dtype.itemsize
    assert fastest.state_dict().keys() == before.keys()
    set_backend(fastest, "auto")
    assert not sum(layer.kept.num_bytes for layer in packed_of(fastest))
    assert torch.equal(run_transformer(fastest), run_transformer(transformer))


@pytest.mark.parametrize("change", ["codes", "weight_scale", "bias", "transform_scale", "data"])
def test_the_fastest_backend_follows_changes_in_place(transformer, change):
    layer = copy.deepcopy(transformer.transformer_blocks[0].attn1.to_q)
    set_backend(layer, "fastest")
    x = torch.randn(3, layer.in_features)
    first = layer(x)
    with torch.no_grad():
        if change == "codes":
            layer.weight.copy_(layer.packed_weight.flip(0))
        elif change == "data":
            layer.weight_scale.data = layer.weight_scale * 2
        else:
            getattr(layer, change).mul_(2)
    expected = torch.nn.functional.linear(x, *layer.effective_parameters(x.dtype))
    assert not torch.equal(layer(x), first)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("offload", ["data", "parameter", "to"])
def test_the_fastest_backend_keeps_nothing_of_an_offloaded_layer(transformer, offload):
    layer = copy.deepcopy(transformer.transformer_blocks[0].attn1.to_q)
    set_backend(layer, "fastest")
    x = torch.randn(3, layer.in_features)
    expected = layer(x)
    assert layer.kept.num_bytes
    codes = layer.packed_weight.clone()
    if offload == "data":
        layer.weight.data = codes
    elif offload == "parameter":
        layer._parameters["weight"] = torch.nn.Parameter(codes, requires_grad=False)
    else:
        layer.to("cpu")
    assert not layer.kept.num_bytes
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("in_pairs", [False, True], ids=["as on this CPU", "without VNNI"])
def test_the_fastest_backend_leaves_wide_linears_on_integers(transformer, counted, monkeypatch, in_pairs):
    """Wide linears whose widths have an integer product; without VNNI the 8-bit ones outside the blocks have none."""
    monkeypatch.setattr(dequantized, "NARROW", 1)
    if in_pairs:
        monkeypatch.setattr(dequantized.cpu, "has_int8_dot", lambda: False)
    if not dequantized.cpu.is_fast(x_bits=6, w_bits=4):
        pytest.skip("without int8 instructions integers are never faster")
    integers = run_transformer(transformer)
    expected = len(counted)
    fastest = copy.deepcopy(transformer)
    set_backend(fastest.transformer_blocks, "fastest")
    assert torch.equal(run_transformer(fastest), integers)
    assert len(counted) == 2 * expected > 0
    set_backend(fastest, "fastest")
    assert fastest.norm_out.linear.scheme.weight.num_bits == 8
    has_product = dequantized.cpu.adds_in_32_bits()
    assert dequantized.runs_dequantized(fastest.norm_out.linear) == (not has_product)
    assert torch.equal(run_transformer(fastest), integers) == has_product


def test_what_is_kept_follows_the_layer(transformer):
    layer = copy.deepcopy(transformer.transformer_blocks[0].attn1.to_q)
    set_backend(layer, "fastest")
    x = torch.randn(3, layer.in_features, requires_grad=True)
    first = layer(x)
    first.sum().backward()
    assert torch.allclose(x.grad, layer.effective_weight(torch.float32).sum(0).expand_as(x), rtol=1e-4, atol=1e-5)
    state = layer.state_dict()
    layer.load_state_dict(state | {"weight_scale": 2 * state["weight_scale"]})
    assert not torch.equal(layer(x), first)
    layer.bfloat16()
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.fixture
def pairs(monkeypatch):
    """A CPU without VNNI that multiplies pairs."""
    monkeypatch.setattr(dequantized.cpu, "has_int8_dot", lambda: False)
    if not dequantized.cpu.adds_pairs(x_bits=6, w_bits=4):
        pytest.skip("no oneDNN that multiplies int8 on this CPU")


def test_small_linears_keep_their_codes_prepacked_where_pairs_are_multiplied(transformer, pairs, monkeypatch):
    small = copy.deepcopy(transformer)
    expected = run_transformer(small)
    quantized = [layer for layer in packed_of(small) if layer.scheme.activation is not None]
    assert sum(layer.kept.num_bytes for layer in packed_of(small)) == sum(
        layer.in_features * layer.out_features for layer in quantized
    )
    assert torch.equal(run_transformer(small), expected)
    monkeypatch.setattr(dequantized, "PREPACKED_CODES", 0)
    large = copy.deepcopy(small)
    assert torch.equal(run_transformer(large), expected)
    assert not sum(layer.kept.num_bytes for layer in packed_of(large)), "neither copied nor kept"
    pickled = pickle.loads(pickle.dumps(small))
    assert torch.equal(run_transformer(pickled), expected)
    set_backend(small, "reference")
    torch.testing.assert_close(run_transformer(small), expected, rtol=1e-4, atol=1e-4)
    assert not sum(layer.kept.num_bytes for layer in packed_of(small))


def test_prepacked_codes_follow_the_layer(transformer, pairs):
    layer, other = (copy.deepcopy(transformer.transformer_blocks[0].attn1.to_q) for _ in range(2))
    x = torch.randn(3, layer.in_features)
    with torch.inference_mode():
        first = layer(x).clone()
    changed = torch.flip(layer.packed_weight, [0])
    other.load_state_dict(other.state_dict() | {"weight": changed})
    expected = other(x)
    assert not torch.equal(expected, first)
    layer.load_state_dict(layer.state_dict() | {"weight": changed})
    assert torch.equal(layer(x), expected)
    layer.packed_weight.copy_(torch.flip(changed, [0]))
    assert torch.equal(layer(x), first)
    layer._parameters["weight"] = torch.nn.Parameter(changed, requires_grad=False)
    assert torch.equal(layer(x), expected)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)


def test_what_is_kept_in_inference_mode_serves_outside_of_it_and_in_graphs(transformer):
    fastest = copy.deepcopy(transformer)
    set_backend(fastest, "fastest")
    expected = run_transformer(fastest)
    layer = fastest.transformer_blocks[0].attn1.to_q
    layer.kept.release()
    with torch.inference_mode():
        layer(torch.randn(3, layer.in_features))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    set_backend(fastest, "fastest")
    fastest.transformer_blocks[0].compile(fullgraph=True, backend="eager")
    assert torch.equal(run_transformer(fastest), expected)
