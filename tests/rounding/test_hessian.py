import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.rounding.hessian import HessianAccumulator, hessian_error


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_batches_add_up_to_twice_the_gram_matrix():
    x = draw(2, 15, 8)
    accumulator = HessianAccumulator(8)
    for part in (x[:1], x[1, :4], x[1, 4:], x[:0]):
        accumulator.add(part)
    rows = x.reshape(-1, 8)
    assert accumulator.num_tokens == 30
    torch.testing.assert_close(accumulator.hessian(), 2 * rows.t() @ rows)
    assert torch.equal(accumulator.hessian(), accumulator.hessian().t())


def test_half_precision_is_summed_in_fp32():
    x = draw(512, 4).bfloat16()
    accumulator = HessianAccumulator(4)
    accumulator.add(x)
    torch.testing.assert_close(accumulator.hessian(), 2 * x.float().t() @ x.float())


def test_hessian_error_is_the_squared_error_of_the_output():
    x, deviation = draw(20, 6), draw(3, 6, seed=1)
    accumulator = HessianAccumulator(6)
    accumulator.add(x)
    expected = (x @ deviation.t()).double().square().sum(dim=0)
    torch.testing.assert_close(hessian_error(deviation, accumulator.hessian()), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_show_in_the_hessian(bad):
    accumulator = HessianAccumulator(4)
    x = draw(5, 4)
    x[2, 1] = bad
    accumulator.add(x)
    accumulator.add(draw(5, 4))
    assert not torch.isfinite(accumulator.hessian()[1]).any()


def test_wrong_width_and_no_tokens():
    accumulator = HessianAccumulator(4)
    with pytest.raises(InvalidInputError, match=r"\[\.\.\., 4\]"):
        accumulator.add(draw(2, 5))
    with pytest.raises(InvalidInputError, match="no token"):
        accumulator.hessian()


def test_more_tokens_than_are_copied_at_a_time(monkeypatch):
    monkeypatch.setattr("s2q.rounding.hessian.PIECE", 7)
    x = draw(2, 15, 8).bfloat16()
    accumulator = HessianAccumulator(8)
    accumulator.add(x)
    rows = x.reshape(-1, 8).float()
    assert accumulator.num_tokens == 30
    torch.testing.assert_close(accumulator.hessian(), 2 * rows.t() @ rows)
