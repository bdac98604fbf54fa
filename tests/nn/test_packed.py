import copy
import io

import accelerate
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2q.common.errors import InvalidInputError, UsageError
from s2q.core.packing import weight_bytes
from s2q.core.qparams import RoundedWeight, dequantize_weight, quantize_per_token
from s2q.core.stored_form import file_dtypes, file_form, from_file, packed_dtypes
from s2q.nn import PackedLinear
from s2q.rounding import round_rtn
from schemes import scheme

SCHEMES = [
    scheme(8, 8),
    scheme(4, 8),
    scheme(4, 6),
    scheme(4, 4),
    scheme(4, None),
    scheme(2, 2),
    scheme(7, 5),
    scheme(4, 6, group_size=8),
    scheme(8, 8, group_size=24),
    scheme(3, None, group_size=12),
]


def a_layer(layer_scheme, *, in_features=24, out_features=10, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    rounded = round_rtn(weight, layer_scheme.weight)
    offset = torch.randn(out_features, generator=generator) if bias else None
    return PackedLinear.from_rounded(rounded, bias=offset, scheme=layer_scheme, dtype=dtype), rounded


def inputs(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_double(layer, rounded, x):
    """The layer by its definition, in fp64 from the codes on."""
    if layer.scheme.activation is None:
        values = x.double()
    else:
        codes, scale = quantize_per_token(x, num_bits=layer.scheme.activation.num_bits)
        values = codes.double() * scale.double()
    scale_OI = (
        rounded.scale.double()
        .reshape(layer.out_features, -1)
        .repeat_interleave(layer.in_features // (rounded.scale.numel() // layer.out_features), dim=1)
    )
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(values, rounded.codes.double() * scale_OI, bias)


@pytest.mark.parametrize("layer_scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("bias", [True, False])
def test_output_is_that_of_the_codes(layer_scheme, bias):
    layer, rounded = a_layer(layer_scheme, bias=bias)
    x = inputs(2, 5, 24)
    torch.testing.assert_close(layer(x).double(), in_double(layer, rounded, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer_scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_half_precision_out(layer_scheme, dtype):
    layer, rounded = a_layer(layer_scheme, dtype=dtype)
    x = inputs(3, 24).to(dtype)
    output = layer(x)
    assert output.dtype == dtype
    # integer layers round once, at the end; weight-only ones also round the weight
    expected = in_double(layer, rounded, x)
    steps = 1 if layer_scheme.activation is not None else 4
    bound = steps * torch.finfo(dtype).eps * expected.abs().max()
    assert (output.double() - expected).abs().max() <= bound


def test_odd_in_features_and_no_rows():
    layer, rounded = a_layer(scheme(4, 6), in_features=23)
    x = inputs(4, 23)
    torch.testing.assert_close(layer(x).double(), in_double(layer, rounded, x), rtol=1e-5, atol=1e-5)
    assert layer(x[:0]).shape == (0, 10)
    assert layer(x[0]).shape == (10,)


def test_long_inputs_are_cut_into_chunks_that_do_not_show():
    layer, _ = a_layer(scheme(4, 6))
    x = inputs(2600, 24)
    assert torch.equal(layer(x), torch.cat([layer(part) for part in x.split(100)]))


def test_an_all_zero_token_gives_the_bias():
    layer, _ = a_layer(scheme(4, 6))
    assert torch.equal(layer(torch.zeros(1, 24))[0], layer.bias)


@pytest.mark.parametrize("layer_scheme", SCHEMES, ids=lambda s: s.name)
def test_stored_bytes_are_the_planned_ones(layer_scheme):
    layer, _ = a_layer(layer_scheme, bias=False)
    stored = sum(tensor.nbytes for tensor in file_form(layer.state_dict()).values())
    assert stored == weight_bytes(layer_scheme.weight, 10, 24)
    assert not list(layer.buffers())
    before = {name: id(value) for name, value in vars(layer).items()}
    layer(inputs(2, 24))
    assert {name: id(value) for name, value in vars(layer).items()} == before  # nothing unpacked is kept


@pytest.mark.parametrize("layer_scheme", SCHEMES, ids=lambda s: s.name)
def test_dequantized_weight_and_codes(layer_scheme):
    layer, rounded = a_layer(layer_scheme)
    assert torch.equal(layer.codes(), rounded.codes)
    assert torch.equal(layer.dequantized_weight(torch.float32), dequantize_weight(rounded.codes, rounded.scale))
    assert layer.dequantized_weight(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("layer_scheme", SCHEMES, ids=lambda s: s.name)
def test_state_dict_round_trip_through_the_meta_device(layer_scheme):
    layer, _ = a_layer(layer_scheme, dtype=torch.bfloat16)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = PackedLinear(24, 10, bias=True, scheme=layer_scheme, dtype=torch.bfloat16, device="meta")
    assert all(parameter.is_meta for parameter in fresh.parameters())
    fresh.load_state_dict(torch.load(buffer), assign=True)
    x = inputs(3, 24).bfloat16()
    assert torch.equal(fresh(x), layer(x))

    copied = PackedLinear(24, 10, bias=True, scheme=layer_scheme, dtype=torch.bfloat16)
    copied.load_state_dict(layer.state_dict())
    assert torch.equal(copied(x), layer(x))


PARTS = {
    "input_shift": inputs(24, seed=1),
    "transform_scale": 1 + inputs(24, seed=2).abs(),
    "transform_left": inputs(4, 4, seed=3),
    "transform_right": inputs(6, 6, seed=4),
    "low_rank_basis": torch.linalg.qr(inputs(24, 2, seed=5))[0].bfloat16(),
    "low_rank_weight": inputs(10, 2, seed=6).bfloat16(),
    "activation_clip": torch.tensor([0.9001]),
}


@pytest.mark.parametrize("layer_scheme", [scheme(4, 6), scheme(4, 6, group_size=8)], ids=lambda s: s.name)
@pytest.mark.parametrize("wide", [False, True], ids=["version 4", "version 3"])
def test_every_tensor_comes_back_from_a_file_bit_for_bit(layer_scheme, wide):
    rounded = round_rtn(inputs(10, 24, seed=8), layer_scheme.weight)
    layer = PackedLinear.from_rounded(rounded, bias=inputs(10, seed=9), scheme=layer_scheme, inputs=PARTS)
    if wide:  # what files before version 4 have is not rounded
        for name in ("weight_scale", "input_shift", "transform_scale", "transform_left", "transform_right"):
            layer.get_parameter(name).data.mul_(1.001)
    state = file_form(layer.state_dict(), wide=wide)
    assert {name: tensor.dtype for name, tensor in state.items() if name != "bias"} == {
        name: dtype for name, dtype in file_dtypes(wide=wide).items() if name in state
    }
    again = PackedLinear(24, 10, bias=True, scheme=layer_scheme, path=layer.path, dtype=torch.float32, device="meta")
    read = {name: from_file(tensor, packed_dtypes().get(name, tensor.dtype)) for name, tensor in state.items()}
    again.load_state_dict(read, assign=True)
    for name, tensor in layer.named_parameters():
        assert torch.equal(again.get_parameter(name), tensor), name
    assert torch.equal(again(inputs(5, 24)), layer(inputs(5, 24)))


def test_shapes_and_dtypes_of_a_layer_on_the_meta_device():
    layer = PackedLinear(24, 10, bias=True, scheme=scheme(4, 6, group_size=8), dtype=torch.bfloat16, device="meta")
    parameters = {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()}
    assert parameters == {
        "weight": ((10, 12), torch.uint8, False),
        "weight_scale": ((10, 3), torch.float32, False),
        "bias": ((10,), torch.bfloat16, False),
    }
    assert layer(torch.empty(2, 24, device="meta")).shape == (2, 10)
    assert PackedLinear(24, 10, bias=False, scheme=scheme(8, 8), device="meta").bias is None


def test_loading_a_floating_point_weight_is_refused():
    layer, _ = a_layer(scheme(8, 8))
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match=r"proj\.weight: got torch.float32; expected torch.uint8"):
        nn.ModuleDict({"proj": layer}).load_state_dict(
            {"proj." + k: v for k, v in nn.Linear(24, 10).state_dict().items()}
        )
    assert torch.equal(layer.weight, before)


def test_loading_scales_of_another_dtype_is_refused():
    layer, _ = a_layer(scheme(4, 6))
    state = layer.state_dict() | {"weight_scale": layer.weight_scale.half()}
    with pytest.raises(RuntimeError, match="weight_scale: got torch.float16"):
        layer.load_state_dict(state)


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.bfloat16(),
        lambda module: module.half(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.double(),
        lambda module: module.type(torch.bfloat16),
        lambda module: module.half().float(),
    ],
)
@pytest.mark.parametrize("through_parent", [True, False])
def test_casting_moves_the_bias_and_never_codes_or_scales(cast, through_parent):
    layer, _ = a_layer(scheme(4, 6))
    weight, weight_scale, bias = layer.weight.clone(), layer.weight_scale.clone(), layer.bias.clone()
    expected = cast(nn.Linear(1, 1)).bias.dtype
    cast(nn.Sequential(layer) if through_parent else layer)
    assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight_scale, weight_scale)
    assert layer.weight.dtype == torch.uint8
    assert torch.equal(layer.weight, weight)
    assert layer.bias.dtype == expected
    torch.testing.assert_close(layer.bias.float(), bias, rtol=1e-2, atol=1e-2)


def test_moving_to_another_device_moves_everything():
    layer, _ = a_layer(scheme(4, 6))
    layer.to("meta", torch.bfloat16)
    assert [(p.device.type, p.dtype) for p in layer.parameters()] == [
        ("meta", torch.bfloat16),  # the bias, first: what diffusers takes for the dtype of the layer
        ("meta", torch.uint8),
        ("meta", torch.float32),
    ]


def test_layerwise_casting_is_refused_and_can_be_told_to_skip_packed_layers():
    hooks = pytest.importorskip("diffusers.hooks")
    layer, _ = a_layer(scheme(4, 6))
    model = nn.Sequential(nn.Linear(24, 24), layer)
    arguments = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    with pytest.raises(UsageError, match="skip_modules_classes"):
        hooks.apply_layerwise_casting(model[1:], skip_modules_pattern=(), **arguments)
    assert layer.bias.dtype == torch.float32
    hooks.apply_layerwise_casting(model, skip_modules_pattern=(), skip_modules_classes=(PackedLinear,), **arguments)
    assert model[0].weight.dtype == torch.float8_e4m3fn
    assert model(inputs(2, 24)).shape == (2, 10)


def test_deepcopy_is_independent():
    layer, _ = a_layer(scheme(4, 6))
    other = copy.deepcopy(layer)
    x = inputs(3, 24)
    assert torch.equal(other(x), layer(x))
    assert other.scheme == layer.scheme
    before = layer(x)
    other.weight_scale.data *= 2
    assert torch.equal(layer(x), before)


def test_no_gradient_is_asked_for():
    layer, _ = a_layer(scheme(4, 6))
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not layer(inputs(2, 24)).requires_grad


@pytest.mark.parametrize(
    "layer_scheme",
    [scheme(4, 6), scheme(4, 6, group_size=8), scheme(4, None)],
    ids=lambda s: s.name,
)
def test_the_gradient_goes_straight_through_the_rounding(layer_scheme):
    layer, _ = a_layer(layer_scheme)
    x = inputs(2, 3, 24).requires_grad_()
    output = layer(x)
    assert torch.equal(output, layer(x.detach()))
    upstream = inputs(2, 3, 10, seed=8)
    output.backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.effective_weight(torch.float32))


def test_compiles_without_graph_breaks():
    for layer_scheme in (scheme(4, 6), scheme(4, None), scheme(4, 6, group_size=8)):
        layer, _ = a_layer(layer_scheme)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(inputs(3, 24)), layer(inputs(3, 24)))


@pytest.mark.parametrize("layer_scheme", [scheme(4, 6), scheme(8, 8), scheme(4, None)], ids=lambda s: s.name)
class TestAdapters:
    def adapted(self, layer_scheme):
        peft = pytest.importorskip("peft")
        layer, _ = a_layer(layer_scheme, out_features=24)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["1"], init_lora_weights=False)
        return peft.get_peft_model(nn.Sequential(nn.Identity(), layer), config), layer

    def test_lora_adds_its_product(self, layer_scheme):
        model, layer = self.adapted(layer_scheme)
        wrapped = model.base_model.model[1]
        x = inputs(5, 24)
        delta = wrapped.lora_B["default"](wrapped.lora_A["default"](x))
        assert delta.abs().max() > 0.01
        torch.testing.assert_close(model(x), layer(x) + delta)

    def test_lora_can_be_trained(self, layer_scheme):
        model, _ = self.adapted(layer_scheme)
        model(inputs(5, 24)).square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert len(gradients) == 2
        assert all(gradient.abs().sum() > 0 for gradient in gradients.values())

    @pytest.mark.parametrize("safe", [True, False])
    def test_merging_is_refused_before_anything_changes(self, layer_scheme, safe):
        model, layer = self.adapted(layer_scheme)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        with pytest.raises(UsageError, match="cannot be merged"):
            model.merge_adapter(safe_merge=safe)
        with pytest.raises(UsageError, match="cannot be merged"):
            model.merge_and_unload(safe_merge=safe)
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())

    def test_weight_stays_readable_for_everybody_else(self, layer_scheme):
        _, layer = self.adapted(layer_scheme)
        assert layer.weight.dtype == torch.uint8


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 32), torch.zeros(2, 8), torch.zeros(2, 16, dtype=torch.int8), torch.zeros(())]
)
def test_an_input_of_another_width_or_dtype_is_refused(wrong):
    layer = PackedLinear(16, 8, bias=True, scheme=scheme(4, 6), dtype=torch.float32)
    with pytest.raises(InvalidInputError, match=r"got torch\..* on cpu; expected floating \[\.\.\., 16\] on cpu"):
        layer(wrong)


def test_an_input_on_another_device_is_refused():
    layer = PackedLinear(16, 8, bias=True, scheme=scheme(4, 6), dtype=torch.float32)
    with pytest.raises(InvalidInputError, match="on meta; expected floating .* on cpu"):
        layer(torch.zeros(2, 16, device="meta"))


def test_from_rounded_checks_what_it_gets():
    layer_scheme = scheme(4, 6)
    good = round_rtn(torch.randn(10, 24), layer_scheme.weight)
    build = PackedLinear.from_rounded
    with pytest.raises(InvalidInputError, match="weight scale"):
        build(RoundedWeight(codes=good.codes, scale=good.scale[:, None]), bias=None, scheme=layer_scheme)
    with pytest.raises(InvalidInputError, match="weight scale"):
        build(RoundedWeight(codes=good.codes, scale=good.scale.half()), bias=None, scheme=layer_scheme)
    with pytest.raises(InvalidInputError, match="bias"):
        build(good, bias=torch.zeros(11), scheme=layer_scheme)
    with pytest.raises(InvalidInputError, match="4 bits represent"):
        build(RoundedWeight(codes=good.codes.clone().fill_(9), scale=good.scale), bias=None, scheme=layer_scheme)
    with pytest.raises(InvalidInputError, match="group_size=7"):
        build(good, bias=None, scheme=scheme(4, 6, group_size=7))


def test_from_rounded_does_not_share_memory():
    layer_scheme = scheme(8, 8)
    rounded, bias = round_rtn(torch.randn(10, 24), layer_scheme.weight), torch.zeros(10)
    layer = PackedLinear.from_rounded(rounded, bias=bias, scheme=layer_scheme)
    x = inputs(2, 24)
    before = layer(x)
    rounded.codes.zero_()
    rounded.scale.zero_()
    bias.fill_(9)
    assert torch.equal(layer(x), before)


def test_repr_names_the_scheme():
    layer, _ = a_layer(scheme(4, 6, group_size=8))
    assert repr(layer) == "PackedLinear(in_features=24, out_features=10, bias=True, w4g8a6)"


def test_offloading_keeps_the_values_of_every_tensor():
    layer_scheme = scheme(4, 6)
    rounded = round_rtn(inputs(10, 24, seed=8), layer_scheme.weight)
    layer = PackedLinear.from_rounded(rounded, bias=inputs(10, seed=9), scheme=layer_scheme, inputs=PARTS)
    expected, model = layer(inputs(5, 24)), nn.Sequential(layer)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(model(inputs(5, 24)), expected)
