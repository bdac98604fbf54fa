import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.transforms import SmoothScale, smooth_scale


def test_the_example_of_the_docstring():
    s = smooth_scale(torch.tensor([4.0, 1.0]), torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(s, torch.tensor([2.0, 0.5], dtype=torch.float64))
    transform = SmoothScale(s)
    torch.testing.assert_close(transform(torch.tensor([4.0, 1.0])), torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(
        transform.fold_inverse(torch.tensor([[1.0, 4.0]])), torch.tensor([[2.0, 2.0]], dtype=torch.float64)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_equals_the_formula(alpha):
    x_amax, w_amax = torch.rand(9, dtype=torch.float64) + 0.1, torch.rand(9, dtype=torch.float64) + 0.1
    torch.testing.assert_close(smooth_scale(x_amax, w_amax, alpha=alpha), x_amax**alpha / w_amax ** (1 - alpha))


def test_a_channel_without_input_gets_the_mean_of_the_others():
    s = smooth_scale(torch.tensor([4.0, 0.0, 1.0]), torch.tensor([1.0, 5.0, 4.0]))
    torch.testing.assert_close(s, torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64))


def test_an_outlier_that_no_weight_reads_is_scaled_away():
    s = smooth_scale(torch.tensor([1.0, 1000.0]), torch.tensor([1.0, 0.0]))
    assert s.isfinite().all()
    assert float((torch.tensor([1.0, 1000.0]) / s)[1]) < 1


@pytest.mark.parametrize("zero", ["input", "weight", "both"])
def test_all_zero_weights_or_inputs_have_a_scale_of_1(zero):
    zeros, ones = torch.zeros(3), torch.ones(3)
    s = smooth_scale(ones if zero == "weight" else zeros, ones if zero == "input" else zeros)
    assert torch.equal(s, torch.ones(3, dtype=torch.float64))


def test_fixed_or_learned_in_log_space():
    assert not SmoothScale(torch.ones(2), learnable=False).log_s.requires_grad
    transform = SmoothScale(torch.tensor([2.0, 3.0]))
    with torch.no_grad():
        transform.log_s -= 100  # any step leaves s positive
    assert (transform.factors(torch.float64, inverse_transpose=True).scale > 0).all()


@pytest.mark.parametrize(
    ("x_amax", "w_amax", "alpha", "message"),
    [
        ([1.0, float("nan")], [1.0, 1.0], 0.5, "input maxima contain NaN"),
        ([1.0, 1.0], [1.0, float("inf")], 0.5, "weight maxima contain NaN, infinite"),
        ([1.0, -1.0], [1.0, 1.0], 0.5, "negative"),
        ([1.0], [1.0, 1.0], 0.5, "shape"),
        ([1.0, 1.0], [1.0, 1.0], 1.5, "alpha=1.5"),
    ],
)
def test_smooth_scale_refuses_bad_maxima_shapes_and_alpha(x_amax, w_amax, alpha, message):
    with pytest.raises(InvalidInputError, match=message):
        smooth_scale(torch.tensor(x_amax), torch.tensor(w_amax), alpha=alpha)


@pytest.mark.parametrize("s", [[1.0, 0.0], [1.0, -2.0], [float("nan")]])
def test_s_must_be_positive(s):
    with pytest.raises(InvalidInputError, match="positive and finite"):
        SmoothScale(torch.tensor(s))
