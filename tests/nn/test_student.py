import pytest
import torch
from torch import nn

from s2q.common.errors import InvalidInputError
from s2q.core.input_path import InputPath
from s2q.core.memo import memoization
from s2q.core.qparams import dequantize, dequantize_weight, quantize_per_token
from s2q.core.schemes import LinearScheme, PerChannel, PerToken, QuantScheme
from s2q.core.stored_form import stored_values
from s2q.nn import LearnableClip, PackedLinear, StudentInput, StudentLinear, StudentRows
from s2q.ops.kronecker import scaled_kronecker
from s2q.rounding import round_rtn
from s2q.transforms import Compose, KroneckerTransform, SmoothScale
from s2q.transforms.hadamard import hadamard
from schemes import activations, scheme, weights
from tiny import split_input

ACTIVATION = activations(6)


SCHEMES = [scheme(), scheme(group_size=8), scheme(activation=None)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_linear(*, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(24, 10, bias=bias)


def a_transform():
    return Compose(SmoothScale(draw(24).abs() + 0.5), KroneckerTransform.build(24, seed=1))


def a_stored_transform():
    return a_transform().rounded()


def a_stored_basis(directions):
    return stored_values("low_rank_basis", directions).float()


@pytest.mark.parametrize(
    "layer_scheme",
    [
        scheme(8, 8),
        scheme(4, 6),
        scheme(4, None),
        scheme(2, 3),
        scheme(4, 6, group_size=8),
        scheme(5, None, group_size=12),
    ],
    ids=lambda s: s.name,
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_transform_and_clips_it_is_the_packed_layer(layer_scheme, bias, dtype):
    linear, x = a_linear(bias=bias).to(dtype), draw(2, 5, 24).to(dtype)
    student = StudentLinear(linear, scheme=layer_scheme, source=StudentInput(layer_scheme.activation))
    rounded = round_rtn(linear.weight, layer_scheme.weight)
    packed = PackedLinear.from_rounded(rounded, bias=linear.bias, scheme=layer_scheme)
    assert student(x).dtype == packed(x).dtype == dtype
    # in bf16 the student rounds x and W after quantizing them, the packed layer only its result
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.05}
    torch.testing.assert_close(student(x), packed(x), **tolerance)


def test_a_table_is_trained_as_even_levels_of_its_groups():
    linear, x, outputs = a_linear(), draw(5, 24), []
    for weight in (weights(4, group_size=8, levels="table"), weights(4, group_size=8)):
        of_scheme = LinearScheme(weight=weight, activation=ACTIVATION)
        student = StudentLinear(linear, scheme=of_scheme, source=StudentInput(ACTIVATION, transform=a_transform()))
        outputs.append(student(x))
    assert torch.equal(*outputs)


def test_many_bits_come_close_to_full_precision():
    linear, x = a_linear(), draw(5, 24)
    errors = []
    for bits in range(2, 9):
        wanted = scheme(bits, bits)
        student = StudentLinear(linear, scheme=wanted, source=StudentInput(wanted.activation))
        errors.append((student(x) - linear(x)).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * linear(x).norm().item()


@pytest.mark.parametrize("layer_scheme", SCHEMES, ids=lambda s: s.name)
def test_equals_what_will_run_with_its_codes(layer_scheme):
    linear, x = a_linear(), draw(5, 24)
    clip = None if layer_scheme.activation is None else LearnableClip()
    if clip is not None:
        nn.init.constant_(clip.theta, 1.0)
    source = StudentInput(layer_scheme.activation, transform=a_transform(), clip=clip)
    student = StudentLinear(linear, learns_clip=True, scheme=layer_scheme, source=source)
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
    students = nn.ModuleList(
        [StudentLinear(linear, learns_clip=True, scheme=scheme(), source=source) for _ in range(3)]
    )
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
    layer_scheme = scheme(4, 4)
    source = StudentInput(layer_scheme.activation, transform=KroneckerTransform.build(24), clip=LearnableClip())
    student = StudentLinear(linear, learns_clip=True, scheme=layer_scheme, source=source)
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
    student = StudentLinear(
        a_linear().bfloat16(),
        learns_clip=True,
        scheme=scheme(),
        source=StudentInput(ACTIVATION, transform=hadamard(24)),
    )
    assert student(draw(3, 24).bfloat16()).dtype == torch.bfloat16
    assert student.folded_weight().dtype == torch.float32


def test_schemes_that_do_not_fit_are_refused():
    with pytest.raises(InvalidInputError, match="group_size=7"):
        StudentLinear(a_linear(), scheme=scheme(group_size=7), source=StudentInput(ACTIVATION))
    with pytest.raises(InvalidInputError, match="quantized as None"):
        StudentLinear(a_linear(), scheme=scheme(), source=StudentInput(None))


@pytest.mark.parametrize("layer_scheme", SCHEMES, ids=lambda s: s.name)
def test_a_shift_moves_the_input_and_its_product_into_the_bias(layer_scheme):
    linear, x = a_linear(), draw(50, 24) + 5 * draw(24, seed=1)
    shift = stored_values("input_shift", x.mean(0))
    source = StudentInput(layer_scheme.activation, shift=shift, transform=a_stored_transform())
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
    weight, bias = packed.effective_parameters(torch.float32)
    mean = weight @ shift + bias
    torch.testing.assert_close(mean, linear(shift), rtol=1e-4, atol=1e-4)  # exact at the mean, however coarse the codes


def test_a_shift_needs_a_bias():
    with pytest.raises(InvalidInputError, match="expected a linear with a bias"):
        StudentLinear(a_linear(bias=False), scheme=scheme(), source=StudentInput(ACTIVATION, shift=torch.ones(24)))


@pytest.mark.parametrize("layer_scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("transform", [None, a_stored_transform()], ids=["no transform", "transform"])
def test_a_low_rank_branch_takes_directions_out_of_what_is_quantized(layer_scheme, transform):
    linear = a_linear()
    strong, weak = draw(60, 2, seed=1) @ draw(2, 24, seed=2), draw(60, 24, seed=3)
    x = 10 * strong + weak
    scaled = x if transform is None else transform.scaled(x)
    basis = a_stored_basis(torch.linalg.svd(scaled)[2][:2].t())
    source = StudentInput(layer_scheme.activation, transform=transform, low_rank_basis=basis)
    student = StudentLinear(linear, scheme=layer_scheme, source=source)
    quantized, coefficients = source(x)
    assert coefficients.shape == (60, 2)
    assert quantized.square().mean() < 0.1 * scaled.square().mean()
    stored = {} if transform is None else transform.state_tensors()
    packed = PackedLinear.from_rounded(
        round_rtn(student.folded_weight(), layer_scheme.weight),
        bias=student.bias,
        scheme=layer_scheme,
        inputs={
            "low_rank_basis": basis.bfloat16(),
            "low_rank_weight": student.low_rank_weight().bfloat16(),
            **{f"transform_{name}": value for name, value in stored.items()},
        },
    )
    torch.testing.assert_close(packed(x), student(x), rtol=5e-3, atol=0.05)  # the stored branch is bfloat16
    without = StudentLinear(
        linear, scheme=layer_scheme, source=StudentInput(layer_scheme.activation, transform=transform)
    )
    exact = linear(x)
    assert (student(x) - exact).square().mean() < 0.2 * (without(x) - exact).square().mean()
    rows = torch.eye(24)
    weight = packed.effective_weight(torch.float32)
    quantized, branch = split_input(packed, rows)
    expected = torch.nn.functional.linear(quantized, packed.dequantized_weight(torch.float32)) + branch
    torch.testing.assert_close(weight.t(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer_scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("transform", [None, a_stored_transform()], ids=["no transform", "transform"])
def test_a_low_rank_branch_of_the_weight_leaves_the_input_whole(layer_scheme, transform):
    linear, x = a_linear(), draw(60, 24)
    with torch.no_grad():
        linear.weight += 3 * draw(10, 1, seed=4) @ draw(1, 24, seed=5)
    scaled = linear.weight if transform is None else transform.unscaled(linear.weight).float()
    basis = a_stored_basis(torch.linalg.svd(scaled.detach())[2][:2].t())
    source = StudentInput(layer_scheme.activation, transform=transform, low_rank_basis=basis, low_rank_from="weight")
    student = StudentLinear(linear, scheme=layer_scheme, source=source)
    whole = StudentInput(layer_scheme.activation, transform=transform)
    torch.testing.assert_close(source(x).quantized, whole(x).quantized, rtol=1e-5, atol=1e-5)
    stored = {} if transform is None else transform.state_tensors()
    branch = student.low_rank_weight().bfloat16()
    inputs = {f"transform_{name}": value for name, value in stored.items()}
    inputs |= {"low_rank_basis": basis.bfloat16(), "low_rank_weight": branch}
    packed = PackedLinear.from_rounded(
        round_rtn(student.folded_weight(), layer_scheme.weight),
        bias=student.bias,
        scheme=layer_scheme,
        inputs=inputs,
        path=InputPath.of_tensors(inputs).replace(deflates=False),
    )
    torch.testing.assert_close(packed(x), student(x), rtol=1e-3, atol=1e-3)  # the student's branch is that stored
    rows = torch.eye(24)
    quantized, added = split_input(packed, rows)
    expected = torch.nn.functional.linear(quantized, packed.dequantized_weight(torch.float32)) + added
    torch.testing.assert_close(packed.effective_weight(torch.float32).t(), expected, rtol=1e-4, atol=1e-4)
    exact = torch.nn.functional.linear(quantized, student.folded_weight()) + added
    torch.testing.assert_close(exact, linear.weight.t(), rtol=1e-5, atol=1e-5)  # nothing is lost but by rounding
    without = StudentLinear(linear, scheme=layer_scheme, source=whole)
    errors = [(module(x) - linear(x)).square().mean() for module in (student, without)]
    assert errors[0] < 0.8 * errors[1]


def test_the_scale_before_a_branch_of_the_weight_learns():
    transform = SmoothScale(torch.ones(24))
    source = StudentInput(
        ACTIVATION, transform=transform, low_rank_basis=torch.linalg.qr(draw(24, 2))[0], low_rank_from="weight"
    )
    student = StudentLinear(a_linear(), scheme=scheme(), source=source)
    student(draw(5, 24)).square().sum().backward()
    assert bool((transform.log_s.grad != 0).all())


def test_a_branch_of_both_sides_leaves_the_smaller_weight_and_changes_nothing_else():
    linear, x, transform = a_linear(), 10 * draw(60, 2, seed=1) @ draw(2, 24, seed=2) + draw(60, 24), a_transform()
    basis = a_stored_basis(torch.linalg.svd(transform.scaled(x).detach())[2][:2].t())

    def student(side):
        source = StudentInput(ACTIVATION, transform=transform, low_rank_basis=basis, low_rank_from=side)
        return StudentLinear(linear, scheme=scheme(), source=source)

    both, of_input = student("both"), student("input")
    assert both.source.deflates
    torch.testing.assert_close(both.source(x).quantized, of_input.source(x).quantized)
    residual = transform.unscaled(linear.weight).detach()
    gram = basis.double().t() @ basis.double()
    assert (gram - torch.eye(2)).abs().max() > 1e-3  # as it is stored, it is not orthonormal
    residual = residual - residual @ basis.double() @ basis.double().t()
    quantized = transform.factors(torch.float64, inverse_transpose=True)
    expected = scaled_kronecker(residual, left=quantized.left, right=quantized.right)
    torch.testing.assert_close(both.folded_weight().double(), expected, rtol=0, atol=5e-3)  # bf16
    assert both.folded_weight().square().sum() < of_input.folded_weight().square().sum()
    rows = torch.eye(24)
    split = StudentInput(None, transform=transform, low_rank_basis=basis, low_rank_from="both")(rows)
    product = split.quantized @ both.folded_weight().t() + split.coefficients @ both.low_rank_weight().t()
    torch.testing.assert_close(product, linear.weight.t(), rtol=0, atol=3e-3)


@pytest.mark.parametrize("rank", [None, 3], ids=["plain", "branch"])
@pytest.mark.parametrize("layer_scheme", SCHEMES)
def test_linears_of_one_input_as_rows_of_one_student_are_those_students(layer_scheme, rank):
    linears, x = [a_linear(seed=seed) for seed in range(3)], draw(2, 5, 24)
    results = []
    for joint in (False, True):
        basis = None if rank is None else torch.linalg.qr(draw(24, rank, seed=7)).Q
        source = StudentInput(
            layer_scheme.activation, transform=a_transform(), low_rank_basis=basis, low_rank_from="both"
        )
        shared = {"scheme": layer_scheme, "source": source, "learns_clip": True}
        students = (
            StudentRows.of(linears, **shared) if joint else [StudentLinear(linear, **shared) for linear in linears]
        )
        with memoization():
            outputs = [student(x) for student in students]
            sum((output.square() * draw(*output.shape, seed=9)).sum() for output in outputs).backward()
            folded = [student.folded_weight().detach() for student in students]
            stored = [student.stored() for student in students]
        ratios = [student.clip_ratio().detach() for student in students]
        clips = {
            id(part): part for student in students for part in student.modules() if isinstance(part, LearnableClip)
        }
        gradients = [parameter.grad for parameter in source.parameters()]
        gradients.append(torch.cat([clip.theta.grad for clip in clips.values()]))
        biases = [student.bias for student in students]
        results.append([[output.detach() for output in outputs], folded, ratios, gradients, biases, stored])
    for single, joint in zip(*results, strict=True):
        torch.testing.assert_close(joint, single, rtol=1e-4, atol=1e-4)
