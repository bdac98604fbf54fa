"""The learned correction of rank one with a scale for each frame: by hand, learned, packed."""

import copy

import pytest
import torch
from torch import nn

from s2q.common.errors import InvalidInputError
from s2q.core.schemes import Delta, LinearScheme
from s2q.core.stored_form import stored_values
from s2q.core.tokens import TokenGrid, token_grid
from s2q.nn import Estimator, PackedLinear, StudentInput, StudentLinear, share_inputs
from s2q.ops.fake_quantize import fake_quantize_input
from s2q.rounding import round_rtn
from schemes import activations, weights

W4 = weights(4)
GRID = TokenGrid(frames=3, height=1, width=2, text_tokens=2, text="before")
within_grid = token_grid(GRID)
ACTIVATIONS = {
    "integers": activations(6),
    "deltas": activations(6, delta=Delta(cube=(2, 1, 1))),
    "simulated": activations(6, group_size=8),
    "weight-only": None,
}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def learned(features=24, out=6, frames=3):
    estimator = Estimator(features, out, frames=frames, seed=0)
    with torch.no_grad():
        estimator.beta.copy_(noise(out, seed=1))
        if frames is not None:
            estimator.frames.copy_(1 + noise(frames, seed=2))
    return estimator


def stored(estimator, **more):
    frames = {} if estimator.frames is None else {"estimator_frames": estimator.frames}
    return {"estimator_input": estimator.alpha, "estimator_output": estimator.beta, **frames, **more}


def by_definition(quantized, estimator, factors):
    """[B, N, O] in double: M of each token, times the token's product with α, times β."""
    own = torch.tensor(factors, dtype=torch.float64)[None, :, None]
    coefficients = (quantized.double() * estimator.alpha.double()).sum(dim=-1, keepdim=True)
    return coefficients * own * estimator.beta.double()


def factors_of(estimator, frames):
    return [1, 1, *(value for frame in frames for value in (estimator.frames[frame].item(),) * 2)]


def test_the_estimator_equals_an_example_by_hand():
    estimator = Estimator(1, 1, frames=2, seed=0)
    with torch.no_grad():
        estimator.alpha.fill_(2)
        estimator.beta.fill_(0.5)
        estimator.frames.copy_(torch.tensor([1.0, 3.0]))
    x = torch.tensor([[[4.0], [5.0]]])
    with token_grid(None):
        assert estimator(x).flatten().tolist() == [4, 5]  # it is not known where the frames are
    with token_grid(TokenGrid(frames=2, height=1, width=1)):
        assert estimator(x).flatten().tolist() == [4, 15]
    with token_grid(TokenGrid(frames=1, height=1, width=1, text_tokens=1, text="after")):
        assert estimator(x).flatten().tolist() == [4, 5]
    with token_grid(TokenGrid(frames=3, height=1, width=1)):  # 1, 2, 3: the one between is between
        assert estimator(x.new_full((1, 3, 1), 4)).flatten().tolist() == [4, 8, 12]


@within_grid
def test_it_starts_as_nothing_and_learns_all_of_its_parts():
    estimator = Estimator(24, 6, frames=3, seed=0)
    x = noise(1, 8, 24)
    assert float(estimator(x).detach().abs().max()) == 0
    assert torch.equal(estimator.alpha, Estimator(24, 6, frames=3, seed=0).alpha)
    assert not torch.equal(estimator.alpha, Estimator(24, 6, frames=3, seed=1).alpha)
    assert float(estimator.alpha.detach().abs().max()) < 24**-0.5
    estimator(x).sum().backward()
    assert float(estimator.beta.grad.abs().min()) > 0
    estimator = learned()
    estimator(x).square().sum().backward()
    for parameter in estimator.parameters():
        assert float(parameter.grad.abs().min()) > 0


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_packed_linear_adds_it_to_the_product(kind, low_rank):
    activation = ACTIVATIONS[kind]
    scheme = LinearScheme(weight=W4, activation=activation)
    rounded, bias, estimator = round_rtn(noise(6, 24, seed=3), W4), noise(6, seed=4), learned()
    branch = {}
    if low_rank:
        basis = stored_values("low_rank_basis", torch.linalg.qr(noise(24, 2, seed=5))[0])
        branch = {"low_rank_basis": basis, "low_rank_weight": noise(6, 2, seed=6).bfloat16()}
    plain = PackedLinear.from_rounded(rounded, bias=bias, scheme=scheme, inputs=branch)
    layer = PackedLinear.from_rounded(rounded, bias=bias, scheme=scheme, inputs=stored(estimator, **branch))
    x = noise(2, 8, 24, seed=7)
    rest = x - (x @ basis.float()) @ basis.float().t() if low_rank else x
    for grid, factors in ((GRID, factors_of(estimator, (0, 1, 2))), (None, [1] * 8)):
        quantized = rest if activation is None else fake_quantize_input(rest, activation, grid=grid)
        wanted = by_definition(quantized, estimator, factors)
        with token_grid(grid):
            torch.testing.assert_close((layer(x) - plain(x)).double(), wanted, rtol=0, atol=2e-5)
            assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert scheme.simulated == (kind == "simulated")


@within_grid
def test_the_student_computes_what_its_packed_linear_does():
    activation = ACTIVATIONS["integers"]
    scheme, linear, estimator = LinearScheme(weight=W4, activation=activation), nn.Linear(24, 6), learned()
    student = StudentLinear(linear, scheme=scheme, source=StudentInput(activation), estimator=estimator)
    packed = PackedLinear.from_rounded(
        round_rtn(linear.weight, W4), bias=linear.bias, scheme=scheme, inputs=stored(estimator)
    )
    x = noise(1, 8, 24)
    torch.testing.assert_close(packed(x), student(x), rtol=0, atol=1e-5)
    text = learned(frames=None)
    student = StudentLinear(linear, scheme=scheme, source=StudentInput(activation), estimator=text)
    packed = PackedLinear.from_rounded(
        round_rtn(linear.weight, W4), bias=linear.bias, scheme=scheme, inputs=stored(text)
    )
    assert not packed.needs_grid
    torch.testing.assert_close(packed(x), student(x), rtol=0, atol=1e-5)


@within_grid
def test_linears_with_estimators_share_the_codes_of_their_input():
    scheme = LinearScheme(weight=W4, activation=ACTIVATIONS["integers"])
    parent = nn.Module()
    for index in range(2):
        own = learned()
        with torch.no_grad():
            own.alpha.mul_(index + 2)
        rounded = round_rtn(noise(6, 24, seed=index), W4)
        parent.add_module(
            f"to_{index}", PackedLinear.from_rounded(rounded, bias=None, scheme=scheme, inputs=stored(own))
        )
    x = noise(1, 8, 24)
    alone = [layer(x) for layer in parent.children()]
    assert share_inputs(parent) == 2
    for layer, wanted in zip(parent.children(), alone, strict=True):
        assert torch.equal(layer(x), wanted)


@token_grid(None)
def test_the_effective_weight_has_the_correction_of_a_frame_with_scale_1():
    scheme = LinearScheme(weight=W4, activation=None)
    estimator = learned()
    rotation = torch.linalg.qr(noise(24, 24, seed=8))[0]
    layer = PackedLinear.from_rounded(
        round_rtn(noise(6, 24), W4), bias=noise(6), scheme=scheme, inputs=stored(estimator, transform_left=rotation)
    )
    x = noise(3, 24, seed=1)
    weight, bias = layer.effective_parameters(torch.float32)
    torch.testing.assert_close(layer(x), x @ weight.t() + bias, rtol=0, atol=1e-4)
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_tensors_that_do_not_fit_are_refused():
    scheme, rounded = LinearScheme(weight=W4, activation=None), round_rtn(noise(6, 24), W4)
    with pytest.raises(InvalidInputError, match="estimator_output: got"):
        PackedLinear.from_rounded(rounded, bias=None, scheme=scheme, inputs=stored(learned(out=5)))
    with pytest.raises(InvalidInputError, match="estimator_frames=3 without estimator"):
        PackedLinear.from_rounded(rounded, bias=None, scheme=scheme, inputs={"estimator_frames": torch.ones(3)})


def test_a_compiled_linear_gives_the_same():
    scheme = LinearScheme(weight=W4, activation=ACTIVATIONS["integers"])
    layer = PackedLinear.from_rounded(round_rtn(noise(6, 24), W4), bias=None, scheme=scheme, inputs=stored(learned()))
    compiled, x = torch.compile(layer, backend="eager"), noise(1, 8, 24)
    for grid in (GRID, None, GRID):
        with token_grid(grid):
            torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-6)
