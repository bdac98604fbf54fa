import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.transforms.kronecker import STARTS, KroneckerTransform, cayley


@pytest.mark.parametrize("order", [1, 2, 3, 8])
def test_cayley_is_orthogonal_wherever_it_is(order):
    free = torch.randn(2, order * (order - 1) // 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    for q in cayley(free, order):
        torch.testing.assert_close(q @ q.t(), torch.eye(order, dtype=torch.float64))
        torch.testing.assert_close(torch.linalg.det(q), torch.tensor(1.0, dtype=torch.float64))
    assert torch.equal(cayley(torch.zeros(3), 3), torch.eye(3))


def test_cayley_of_a_rotation_by_hand():
    # A = [[0, t], [-t, 0]] is a rotation by 2·atan(t): t = 1 turns by 90 degrees
    torch.testing.assert_close(cayley(torch.tensor([1.0]), 2), torch.tensor([[0.0, -1.0], [1.0, 0.0]]))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("features", [12, 15, 192, 7])
def test_starts_orthogonal_and_as_named(start, features):
    transform = KroneckerTransform.build(features, seed=2, start=start)
    eye = torch.eye(features, dtype=torch.float64)
    matrix = transform(eye).detach()
    torch.testing.assert_close(matrix @ matrix.t(), eye)
    if start == "identity":
        assert torch.equal(matrix, eye)
    if start == "hadamard" and features in (12, 192):
        limit = (2 / features) ** 0.5 * 1.01  # 12 = 3 · 4: one DCT factor
        assert float(matrix.abs().max()) <= limit


def test_sigma_stays_positive_and_scales_the_directions():
    transform = KroneckerTransform.build(16)
    with torch.no_grad():
        transform.left.log_sigma.copy_(torch.tensor([1.0, 2.0, -3.0, -50.0]))
    factors = transform.factors(torch.float64)
    singular = torch.linalg.svdvals(factors.left)
    torch.testing.assert_close(singular.sort().values, transform.left.log_sigma.detach().double().exp().sort().values)


def test_learning_finds_a_transform_that_lowers_the_error():
    """The point of it all, in small: an outlier direction is spread, and the product quantizes better."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator)
    x[:, 3] *= 20
    transform = KroneckerTransform.build(16, start="identity")

    def peak_to_rms():
        y = transform(x)
        return (y.abs().amax(dim=1) / y.square().mean(dim=1).sqrt()).mean()

    before = float(peak_to_rms().detach())
    optimizer = torch.optim.Adam(transform.parameters(), lr=2e-2)
    for _ in range(60):
        loss = peak_to_rms()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(peak_to_rms().detach()) < 0.8 * before


def test_bad_starts_are_refused():
    with pytest.raises(InvalidInputError, match="unknown start"):
        KroneckerTransform.build(16, start="hadamar")
    with pytest.raises(InvalidInputError, match="not orthogonal"):
        KroneckerTransform(torch.ones(2, 2), torch.eye(2))


def test_gradients_of_both_directions_equal_finite_differences():
    transform = KroneckerTransform.build(6, seed=1).double()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    parameters = list(transform.parameters())
    assert torch.autograd.gradcheck(lambda *_: (transform(x), transform.fold_inverse(x)), parameters)
