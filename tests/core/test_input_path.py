"""The table of an input path's parts, and a part that is added to it: learned, stored, packed, on every backend."""

import pickle

import pytest
import torch
from torch import nn

from extending.token_mean import TOKEN_MEAN
from s2q.common.errors import InvalidInputError
from s2q.core.input_path import BACKEND_TENSORS, PARTS, InputPart, InputPath, InputTensors, StoredTensor
from s2q.core.schemes import LinearScheme
from s2q.core.stored_form import stored_values
from s2q.nn import PackedLinear, RefinedLinear, StudentInput, StudentLinear, share_inputs
from s2q.ops.fake_quantize import fake_quantize_input
from s2q.planning.plan import plan
from s2q.planning.resolve import PLANNED_PARTS
from s2q.rounding import round_rtn
from schemes import activations, weights

W4, A6 = weights(4), activations(6)
COMPANDING = InputPart(
    tensors={"exponent": StoredTensor(lambda i, o, size: (1,), start=lambda weight: torch.tensor([0.5]), learned=True)},
    apply=lambda y, exponent: (y.sign() * y.abs() ** exponent, None),
    restore=lambda quantized, exponent: quantized.sign() * quantized.abs() ** (1 / exponent),
)

SQUARE_ROOT = InputPart(
    apply=lambda y: (y.sign() * y.abs().sqrt(), None), restore=lambda quantized: quantized.sign() * quantized.square()
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student_of(path, *, basis=None):
    linear = nn.Linear(24, 10)
    linear.weight.data, linear.bias.data = draw(10, 24, seed=1), draw(10, seed=2)
    source = StudentInput(A6, low_rank_basis=basis, steps=path.steps, weight=linear.weight)
    return StudentLinear(linear, scheme=LinearScheme(weight=W4, activation=A6), source=source), linear


def packed_of(student, *, path=None):
    return PackedLinear.from_rounded(
        round_rtn(student.folded_weight(), W4),
        bias=student.bias,
        scheme=student.scheme,
        inputs=student.stored(),
        path=path,
    )


def test_the_fields_of_input_tensors_are_those_parts_of_the_table_that_backends_compute():
    fields = dict(zip(BACKEND_TENSORS, InputTensors._fields, strict=False))
    assert fields == {
        "input_shift": "shift",
        "transform_scale": "scale",
        "transform_left": "left",
        "transform_right": "right",
        "low_rank_basis": "low_rank_basis",
        "activation_clip": "clip_ratio",
    }


BASES = [None, stored_values("low_rank_basis", torch.linalg.qr(draw(24, 2))[0]).float()]


@pytest.mark.parametrize("basis", BASES)
def test_a_part_with_coefficients_is_stored_and_packed_linears_give_the_output_of_the_student(monkeypatch, basis):
    monkeypatch.setitem(PARTS, "token_mean", TOKEN_MEAN)
    path = InputPath(token_mean=True)
    assert InputPath.from_dict(path.to_dict()) == path
    assert "token_mean" not in InputPath().to_dict()
    assert path.num_bytes(24, 10) == 40
    student, linear = student_of(path, basis=basis)
    packed = packed_of(student)
    assert packed.path == InputPath(token_mean=True, low_rank=None if basis is None else 2)
    assert packed.row_sums.shape == (10, 1)
    x = draw(5, 24) + 30
    outputs = []
    for backend in ("auto", "reference", "cpu"):
        packed.backend = backend
        outputs.append(packed(x))
    for output in outputs:
        torch.testing.assert_close(output, student(x), rtol=1e-2, atol=1e-2)
    plain = PackedLinear.from_rounded(round_rtn(linear.weight, W4), bias=linear.bias, scheme=packed.scheme)
    error, without = (float((layer(x) - linear(x)).detach().norm()) for layer in (packed, plain))
    assert error < without / 5  # the mean of a token, 30 times its deviations, is not quantized


@pytest.mark.parametrize("basis", BASES)
def test_refinement_starts_from_the_packed_linear_of_a_part_with_coefficients(monkeypatch, basis):
    monkeypatch.setitem(PARTS, "token_mean", TOKEN_MEAN)
    student, _ = student_of(InputPath(token_mean=True), basis=basis)
    packed = packed_of(student)
    refined = RefinedLinear(packed, source=student.source)
    x = draw(5, 24) + 30
    torch.testing.assert_close(refined(x), packed(x), rtol=1e-2, atol=1e-2)
    again = refined.repacked()
    assert again.path == packed.path
    for name, tensor in packed.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_path_with_a_part_of_lambdas_is_pickled(monkeypatch):
    monkeypatch.setitem(PARTS, "token_mean", TOKEN_MEAN)
    path = InputPath(token_mean=True, low_rank=2)
    again = pickle.loads(pickle.dumps(path))
    assert again == path
    assert again.steps == (TOKEN_MEAN,)


def test_a_part_without_tensors_is_kept_by_packed_and_repacked_linears(monkeypatch):
    monkeypatch.setitem(PARTS, "square_root", SQUARE_ROOT)
    path = InputPath(square_root=True)
    student, _ = student_of(path)
    packed = packed_of(student, path=path)
    x = draw(5, 24)
    torch.testing.assert_close(packed(x), student(x))
    assert packed.simulated
    assert RefinedLinear(packed, source=student.source).repacked().path == path


def test_tensors_that_are_not_those_of_the_path_are_refused(monkeypatch):
    monkeypatch.setitem(PARTS, "token_mean", TOKEN_MEAN)
    student, _ = student_of(InputPath(token_mean=True))
    with pytest.raises(InvalidInputError, match=r"got \['row_sums'\]; expected \[\] for InputPath\(\)"):
        packed_of(student, path=InputPath())


def test_a_plan_is_simulated_if_a_part_is_restored(monkeypatch):
    assert not plan("shapes-cogvideox", recipe="rtn-w4a6").simulated
    monkeypatch.setitem(PARTS, "square_root", SQUARE_ROOT)
    monkeypatch.setitem(PLANNED_PARTS, "square_root", lambda recipe, plan: True)
    assert plan("shapes-cogvideox", recipe="rtn-w4a6").simulated


def test_a_part_that_is_restored_makes_a_linear_simulated_and_is_learned(monkeypatch):
    monkeypatch.setitem(PARTS, "companding", COMPANDING)
    student, _ = student_of(InputPath(companding=True))
    assert [name for name, parameter in student.named_parameters() if parameter.requires_grad] == [
        "source.tensors.exponent"
    ]
    x = draw(5, 24)
    student(x).square().sum().backward()
    assert student.source.tensors["exponent"].grad.abs() > 0
    packed = packed_of(student)
    assert packed.simulated
    expected = fake_quantize_input(x.sign() * x.abs().sqrt(), A6)
    expected = expected.sign() * expected.square()
    weight = packed.dequantized_weight(torch.float32)
    torch.testing.assert_close(packed(x), nn.functional.linear(expected, weight, packed.bias))


def test_linears_with_the_same_further_part_share_the_codes_of_their_input(monkeypatch):
    monkeypatch.setitem(PARTS, "token_mean", TOKEN_MEAN)
    student, _ = student_of(InputPath(token_mean=True))
    model = nn.ModuleList([packed_of(student), packed_of(student)])
    assert share_inputs(model) == 2
    x = draw(5, 24)
    assert torch.equal(model[0](x), model[1](x))
