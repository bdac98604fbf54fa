"""What every transform must do, whatever it is."""

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.transforms import ROTATIONS, Compose, KroneckerTransform, SmoothScale, smooth_scale
from s2q.transforms.base import Factors, FixedTransform, identity
from s2q.transforms.hadamard import hadamard
from s2q.transforms.kronecker import STARTS

FEATURES = 24


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_scale():
    return SmoothScale(smooth_scale(draw(FEATURES).abs() * 9, draw(FEATURES, seed=1).abs()))


def trained(transform, seed=5):
    """Move every parameter away from its start, as training does."""
    with torch.no_grad():
        for index, parameter in enumerate(transform.parameters()):
            parameter.add_(draw(*parameter.shape, seed=seed + index) * 0.3)
    return transform


TRANSFORMS = {
    "identity": lambda: identity(FEATURES),
    "smooth scale": a_scale,
    "hadamard": lambda: hadamard(FEATURES, seed=3),
    "fixed": lambda: FixedTransform(FEATURES, Factors(left=draw(4, 4), right=draw(6, 6), scale=draw(24) ** 2 + 1)),
    **{f"kronecker {name}": lambda name=name: KroneckerTransform.build(FEATURES, start=name) for name in STARTS},
    "hadamard in blocks": lambda: hadamard(FEATURES, seed=3, block_size=8),
    "kronecker in blocks": lambda: KroneckerTransform.build(FEATURES, seed=3, block_size=7),
    "scale, hadamard": lambda: Compose(a_scale(), hadamard(FEATURES, seed=1)),
    "scale, kronecker": lambda: Compose(a_scale(), KroneckerTransform.build(FEATURES, seed=1)),
    "scale, scale, identity": lambda: Compose(Compose(a_scale(), a_scale()), identity(FEATURES)),
}


@pytest.fixture(params=TRANSFORMS)
def transform(request):
    return trained(TRANSFORMS[request.param]())


def matrix_of(transform):
    return transform(torch.eye(FEATURES, dtype=torch.float64))


def test_transform_and_inverse_leave_the_product_as_it_was(transform):
    x, weight = draw(50, FEATURES, seed=1), draw(10, FEATURES, seed=2)
    expected = x.double() @ weight.double().t()
    folded = transform.fold_inverse(weight)
    assert folded.dtype == torch.float64
    result = transform(x) @ folded.float().t()
    assert result.dtype == torch.float32
    assert (result.double() - expected).norm() < 1e-5 * expected.norm()
    exact = transform(x.double()) @ folded.t()
    assert (exact - expected).norm() < 1e-11 * expected.norm()


def test_the_inverse_transpose_is_that_of_the_matrix(transform):
    inverse_transpose = transform.fold_inverse(torch.eye(FEATURES))
    torch.testing.assert_close(inverse_transpose, torch.linalg.inv(matrix_of(transform)).t())


def test_what_is_stored_gives_the_same_transform(transform):
    stored = transform.state_tensors()
    assert set(stored) <= {"scale", "left", "right"}
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in stored.values())
    again = FixedTransform(FEATURES, Factors(**stored))
    torch.testing.assert_close(matrix_of(again), matrix_of(transform), rtol=1e-6, atol=1e-6)
    assert not list(again.parameters())


def test_gradients_reach_every_parameter(transform):
    x, weight = draw(7, FEATURES, seed=1), draw(5, FEATURES, seed=2)
    # (the product itself does not depend on T, so its two sides are looked at apart)
    loss = transform(x).pow(4).sum() + transform.fold_inverse(weight, dtype=torch.float32).pow(4).sum()
    parameters = [parameter for parameter in transform.parameters() if parameter.requires_grad]
    if not parameters:
        assert not loss.requires_grad
        return
    for gradient in torch.autograd.grad(loss, parameters):
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_half_precision_goes_in_and_fp32_comes_out(transform):
    x = draw(3, 5, FEATURES).bfloat16()
    result = transform(x)
    assert (result.dtype, result.shape) == (torch.float32, x.shape)
    torch.testing.assert_close(result, transform(x.float()))


def test_a_weight_of_another_size_is_refused(transform):
    with pytest.raises(InvalidInputError, match="in_features=20; expected 24"):
        transform.fold_inverse(torch.ones(2, 20))


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_are_made_by_name_and_seed(name):
    one, same, other = (ROTATIONS[name](40, seed=seed) for seed in (4, 4, 5))
    eye = torch.eye(40, dtype=torch.float64)
    assert torch.equal(one(eye), same(eye))
    assert torch.equal(one(eye), other(eye)) is (name in ("identity", "convrot"))  # without signs to draw
    torch.testing.assert_close(one(eye) @ one(eye).t(), eye)


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_rotation_in_blocks_mixes_the_channels_of_a_block_alone(name):
    matrix = ROTATIONS[name](40, seed=1, block_size=9)(torch.eye(40, dtype=torch.float64))
    outside = torch.kron(torch.eye(5), torch.ones(8, 8)) == 0  # 8 is the largest divisor of 40 up to 9
    assert not bool(matrix[outside].any())
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(40, dtype=torch.float64))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (Factors(left=torch.ones(2, 2)), "singular"),
        (Factors(left=torch.eye(5)), "n1 · n2 = 24"),
        (Factors(left=torch.eye(4), right=torch.eye(4)), "n1 · n2 = 24"),
        (Factors(left=torch.ones(4, 6)), r"\[n, n\]"),
        (Factors(scale=torch.ones(23)), "23 channels"),
        (Factors(scale=torch.zeros(24)), "zeros"),
        (Factors(scale=torch.full((24,), torch.nan)), "NaN"),
        (Factors(right=torch.full((24, 24), torch.inf)), "infinite"),
    ],
)
def test_factors_that_are_no_transform(factors, message):
    with pytest.raises(InvalidInputError, match=message):
        FixedTransform(FEATURES, factors)


def test_compose_wants_the_scale_first_and_equal_sizes():
    with pytest.raises(InvalidInputError, match="scale first"):
        Compose(hadamard(FEATURES), a_scale())
    with pytest.raises(InvalidInputError, match="24 and 20"):
        Compose(a_scale(), hadamard(20))


def test_factors_without_values_are_accepted():
    """Memory is planned with meta tensors, which can be neither finite nor singular."""
    factors = Factors(
        scale=torch.empty(6, device="meta"),
        left=torch.empty(2, 2, device="meta"),
        right=torch.empty(3, 3, device="meta"),
    )
    rounded = FixedTransform(6, factors).rounded()
    inverse = rounded.factors(torch.float32, inverse_transpose=True)
    assert {name: tuple(tensor.shape) for name, tensor in inverse.tensors().items()} == {
        "scale": (6,),
        "left": (2, 2),
        "right": (3, 3),
    }
