import pytest
import torch
from torch import nn

from s2q.core.errors import InvalidInputError
from s2q.core.schemes import LinearScheme, PerChannel, PerGroup, PerToken, QuantScheme
from s2q.nn import FakeQuantLinear
from s2q.rounding import round_rtn


def scheme(w_bits, a_bits, group_size=None):
    granularity = PerChannel() if group_size is None else PerGroup(group_size=group_size)
    activation = None if a_bits is None else QuantScheme(num_bits=a_bits, granularity=PerToken(), dynamic=True)
    return LinearScheme(weight=QuantScheme(num_bits=w_bits, granularity=granularity), activation=activation)


SCHEMES = [
    scheme(8, 8),
    scheme(4, 6),
    scheme(4, 4),
    scheme(4, None),
    scheme(2, 3),
    scheme(4, 6, 8),
    scheme(5, None, 12),
]


def a_linear(*, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(24, 10, bias=bias)


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("layer_scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_layer_it_packs_into(layer_scheme, bias):
    twin = FakeQuantLinear.from_linear(a_linear(bias=bias), layer_scheme)
    x = inputs(2, 5, 24)
    torch.testing.assert_close(twin.pack(round_rtn)(x), twin(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer_scheme", SCHEMES, ids=lambda s: s.name)
def test_bf16_twin_equals_its_packed_layer_to_bf16_rounding(layer_scheme):
    twin = FakeQuantLinear.from_linear(a_linear().bfloat16(), layer_scheme)
    x = inputs(5, 24).bfloat16()
    packed = twin.pack(round_rtn)
    assert packed.bias.dtype == torch.bfloat16
    assert twin(x).dtype == packed(x).dtype == torch.bfloat16
    # the twin rounds x and W to bf16 after quantizing them, the packed layer only its result
    torch.testing.assert_close(packed(x), twin(x), rtol=0.03, atol=0.05)


def test_many_bits_come_close_to_full_precision():
    linear, x = a_linear(), inputs(5, 24)
    errors = [
        (FakeQuantLinear.from_linear(linear, scheme(bits, bits))(x) - linear(x)).norm().item() for bits in range(2, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * linear(x).norm().item()


@pytest.mark.parametrize("layer_scheme", SCHEMES, ids=lambda s: s.name)
def test_gradients_reach_input_weight_and_bias(layer_scheme):
    twin = FakeQuantLinear.from_linear(a_linear(), layer_scheme)
    x = inputs(5, 24).requires_grad_()
    twin(x).square().sum().backward()
    for tensor in (x, twin.weight, twin.bias):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0


def test_training_through_the_quantizers_learns_another_linear():
    x, target = inputs(64, 24), a_linear(seed=1)(inputs(64, 24)).detach()
    twin = FakeQuantLinear.from_linear(a_linear(seed=0), scheme(4, 8))
    optimizer = torch.optim.Adam(twin.parameters(), lr=5e-3)
    losses = []
    for _ in range(120):
        loss = (twin(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    torch.testing.assert_close(twin.pack(round_rtn)(x), twin(x), rtol=1e-4, atol=1e-4)


def test_the_twin_owns_its_parameters():
    linear = a_linear()
    twin = FakeQuantLinear.from_linear(linear, scheme(4, 6))
    before = twin(inputs(3, 24))
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert torch.equal(twin(inputs(3, 24)), before)


def test_pack_hands_the_clip_ratio_to_the_rounding():
    twin = FakeQuantLinear.from_linear(a_linear(), scheme(4, 6))
    clipped, plain = twin.pack(round_rtn, clip_ratio=0.5, dtype=torch.bfloat16), twin.pack(round_rtn)
    torch.testing.assert_close(clipped.weight_scale.data, plain.weight_scale.data * 0.5)
    assert clipped.bias.dtype == torch.bfloat16


def test_indivisible_group():
    with pytest.raises(InvalidInputError, match="group_size=7"):
        FakeQuantLinear.from_linear(a_linear(), scheme(4, 6, 7))
