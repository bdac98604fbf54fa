import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.transforms.hadamard import best_factors, hadamard, hadamard_matrix, orthogonal_matrix

KNOWN = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 60, 64, 68, 72, 76, 80, 84, 88, 96, 112, 128, 144]


@pytest.mark.parametrize("order", KNOWN)
def test_hadamard_matrices_are_orthogonal_signs(order):
    matrix = hadamard_matrix(order)
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [0, -4, 3, 5, 6, 10, 15, 30, 92])
def test_orders_without_a_construction(order):
    assert hadamard_matrix(order) is None


@pytest.mark.parametrize("order", [1, 2, 3, 5, 6, 15, 30, 35, 36, 92, 105])
def test_any_order_has_an_orthogonal_matrix_with_even_entries(order):
    matrix = orthogonal_matrix(order)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(order, dtype=torch.float64))
    assert float(matrix.abs().max()) <= (2 / order) ** 0.5 + 1e-12


def test_no_orthogonal_matrix_of_order_zero():
    with pytest.raises(InvalidInputError, match="order 0"):
        orthogonal_matrix(0)


def test_best_factors_are_the_nearest_to_a_square():
    cases = {1: (1, 1), 7: (1, 7), 192: (12, 16), 1920: (40, 48), 3072: (48, 64), 12288: (96, 128), 768: (24, 32)}
    assert {features: best_factors(features) for features in cases} == cases


@pytest.mark.parametrize("features", [192, 768, 1536, 1920, 3072, 5120, 7680, 8960, 12288, 13824, 14336])
def test_widths_of_real_models_get_a_true_hadamard_matrix_of_two_small_factors(features):
    transform = hadamard(features, seed=0)
    assert transform.left.shape[0] * transform.right.shape[0] == features
    assert transform.right.shape[0] <= 4 * transform.left.shape[0]
    one_channel = torch.zeros(features)
    one_channel[features // 3] = 1
    torch.testing.assert_close(transform(one_channel).abs(), torch.full((features,), features**-0.5))


@pytest.mark.parametrize("features", [1, 2, 7, 15, 18, 60, 92, 105])
def test_every_other_width_works_too(features):
    matrix = hadamard(features, seed=1)(torch.eye(features, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(features, dtype=torch.float64))
    assert float(matrix.abs().max()) <= 2 * features**-0.5 + 1e-12


def test_signs_are_random_and_about_half_of_each():
    signs = hadamard(1920, seed=0).scale
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.1
    assert not torch.equal(signs, hadamard(1920, seed=1).scale)
