import pytest
import torch
from torch import nn

from s2q.core.errors import InvalidInputError
from s2q.core.qparams import dequantize, dequantize_weight
from s2q.core.schemes import LinearScheme, PerChannel, PerGroup, PerToken, QuantScheme
from s2q.nn import FakeQuantLinear, LearnableClip, PackedLinear, StudentInput, StudentLinear
from s2q.ops.quantize_per_token import quantize_per_token
from s2q.rounding import round_rtn
from s2q.transforms import Compose, KroneckerTransform, SmoothScale, hadamard

ACTIVATION = QuantScheme(num_bits=6, granularity=PerToken(), dynamic=True)


def scheme(group_size=None, activation=ACTIVATION):
    granularity = PerChannel() if group_size is None else PerGroup(group_size=group_size)
    return LinearScheme(weight=QuantScheme(num_bits=4, granularity=granularity), activation=activation)


SCHEMES = [scheme(), scheme(8), scheme(activation=None)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_linear(*, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(24, 10, bias=bias)


def a_transform():
    return Compose(SmoothScale(draw(24).abs() + 0.5), KroneckerTransform.build(24, seed=1))


@pytest.mark.parametrize("layer_scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("bias", [True, False])
def test_without_transform_and_clips_it_is_the_plain_twin(layer_scheme, bias):
    linear, x = a_linear(bias=bias), draw(2, 5, 24)
    student = StudentLinear(linear, scheme=layer_scheme, source=StudentInput(layer_scheme.activation))
    torch.testing.assert_close(student(x), FakeQuantLinear.from_linear(linear, layer_scheme)(x))


@pytest.mark.parametrize("layer_scheme", SCHEMES, ids=lambda s: s.name)
def test_equals_what_will_run_with_its_codes(layer_scheme):
    linear, x = a_linear(), draw(5, 24)
    clip = None if layer_scheme.activation is None else LearnableClip(start=1.0)
    source = StudentInput(layer_scheme.activation, transform=a_transform(), clip=clip)
    student = StudentLinear.with_clip(linear, scheme=layer_scheme, source=source)
    rounded = round_rtn(student.folded_weight(), layer_scheme.weight, clip_ratio=student.clip_ratio())
    inner = source.transform(x)
    if layer_scheme.activation is not None:
        inner = dequantize(*quantize_per_token(inner, num_bits=6, clip_ratio=clip().detach()))
    expected = inner @ dequantize_weight(rounded.codes, rounded.scale).t() + linear.bias
    torch.testing.assert_close(student(x), expected, rtol=1e-4, atol=1e-4)


def test_with_many_bits_the_transform_changes_nothing():
    eight = QuantScheme(num_bits=8, granularity=PerToken(), dynamic=True)
    fine = LinearScheme(weight=QuantScheme(num_bits=8, granularity=PerChannel()), activation=eight)
    linear, x = a_linear(), draw(50, 24)
    student = StudentLinear(linear, scheme=fine, source=StudentInput(eight, transform=hadamard(24)))
    assert (student(x) - linear(x)).norm() < 0.02 * linear(x).norm()


def test_what_is_trained_is_the_transform_and_the_clips():
    source = StudentInput(ACTIVATION, transform=a_transform(), clip=LearnableClip())
    linear = a_linear()
    students = nn.ModuleList([StudentLinear.with_clip(linear, scheme=scheme(), source=source) for _ in range(3)])
    names = [name.split(".", 1)[1] for name, _ in students.named_parameters()]
    assert len(names) == len(set(names)) + 2  # the shared input counts once, a weight clip for each of the three
    students[0](draw(5, 24)).square().sum().backward()
    for parameter in students[0].parameters():
        assert parameter.grad.abs().sum() > 0
    assert linear.weight.grad is None
    assert not any("weight" in key and "clip" not in key for key in students.state_dict())


def test_distillation_in_small_lowers_the_error():
    linear, x = a_linear(), draw(64, 24)
    x[:, 5] *= 30
    coarse = QuantScheme(num_bits=4, granularity=PerToken(), dynamic=True)
    layer_scheme = scheme(activation=coarse)
    source = StudentInput(coarse, transform=KroneckerTransform.build(24), clip=LearnableClip())
    student = StudentLinear.with_clip(linear, scheme=layer_scheme, source=source)
    target = linear(x).detach()
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3, weight_decay=0)
    losses = []
    for _ in range(60):
        loss = (student(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < 0.7 * losses[0]


def test_half_precision():
    student = StudentLinear.with_clip(
        a_linear().bfloat16(), scheme=scheme(), source=StudentInput(ACTIVATION, transform=hadamard(24))
    )
    assert student(draw(3, 24).bfloat16()).dtype == torch.bfloat16
    assert student.folded_weight().dtype == torch.float32


def test_bad_schemes():
    with pytest.raises(InvalidInputError, match="group_size=7"):
        StudentLinear(a_linear(), scheme=scheme(7), source=StudentInput(ACTIVATION))
    with pytest.raises(InvalidInputError, match="quantized as None"):
        StudentLinear(a_linear(), scheme=scheme(), source=StudentInput(None))


@pytest.mark.parametrize("layer_scheme", SCHEMES, ids=lambda s: s.name)
def test_a_shift_moves_the_input_and_its_product_into_the_bias(layer_scheme):
    linear, x = a_linear(), draw(50, 24) + 5 * draw(24, seed=1)
    shift = x.mean(0)
    source = StudentInput(layer_scheme.activation, shift=shift, transform=a_transform())
    student = StudentLinear(linear, scheme=layer_scheme, source=source)
    packed = PackedLinear.from_rounded(
        round_rtn(student.folded_weight(), layer_scheme.weight),
        bias=student.bias,
        scheme=layer_scheme,
        inputs={"input_shift": shift}
        | {f"transform_{name}": value for name, value in source.transform.state_tensors().items()},
    )
    torch.testing.assert_close(student(x), packed(x), rtol=1e-3, atol=1e-3)
    unshifted = StudentLinear(
        linear, scheme=layer_scheme, source=StudentInput(layer_scheme.activation, transform=a_transform())
    )
    exact = linear(x)
    assert (student(x) - exact).square().mean() < 0.5 * (unshifted(x) - exact).square().mean()
    mean = packed.effective_weight(torch.float32) @ shift + packed.effective_bias(torch.float32)
    torch.testing.assert_close(mean, linear(shift), rtol=1e-4, atol=1e-4)  # exact at the mean, however coarse the codes


def test_a_shift_needs_a_bias():
    with pytest.raises(InvalidInputError, match="expected a linear with a bias"):
        StudentLinear(a_linear(bias=False), scheme=scheme(), source=StudentInput(ACTIVATION, shift=torch.ones(24)))
