import numpy as np
import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.transforms import principal_directions, weight_directions


def test_the_example_of_the_module():
    rows = torch.tensor([[3.0, 1.0], [3.0, -1.0]])
    direction = principal_directions(rows.t() @ rows / 2, 1)
    torch.testing.assert_close(direction, torch.tensor([[1.0], [0.0]], dtype=torch.float64))


def test_they_are_those_of_the_singular_value_decomposition():
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.logspace(1, -1, 12, dtype=torch.float64)
    found = principal_directions(x.t() @ x / 200, 5)
    exact = torch.linalg.svd(x, full_matrices=False)[2][:5].t()
    torch.testing.assert_close((found.t() @ exact).abs(), torch.eye(5, dtype=torch.float64), atol=1e-8, rtol=0)
    assert bool((found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize(
    ("moment", "rank", "message"),
    [
        (torch.eye(4), 0, "rank=0; expected 1 to 4"),
        (torch.eye(4), 5, "rank=5"),
        (torch.ones(4, 3), 1, r"shape \[4, 3\]"),
        (torch.eye(4) * float("nan"), 1, "NaN or infinite"),
    ],
)
def test_bad_input_is_refused(moment, rank, message):
    with pytest.raises(InvalidInputError, match=message):
        principal_directions(moment, rank)


def test_directions_of_weights_are_those_of_the_singular_value_decomposition_of_all_together():
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(rows, 16, generator=generator, dtype=torch.float64) for rows in (9, 20, 5)]
    found = weight_directions(weights, 4).numpy()
    stacked = np.concatenate([weight.numpy() for weight in weights])
    _, values, right = np.linalg.svd(stacked, full_matrices=False)
    np.testing.assert_allclose(np.abs(right[:4] @ found), np.eye(4), atol=1e-8)
    rest = [weight.numpy() - weight.numpy() @ found @ found.T for weight in weights]
    assert sum((one**2).sum() for one in rest) == pytest.approx((values[4:] ** 2).sum())
    for weight, one in zip(weights, rest, strict=True):
        np.testing.assert_allclose(one + (weight.numpy() @ found) @ found.T, weight.numpy(), atol=1e-14)


def test_fewer_rows_than_the_rank_leave_nothing():
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    found = weight_directions([weight], 5)
    torch.testing.assert_close(weight.double() @ found @ found.t(), weight.double())
    with pytest.raises(InvalidInputError, match="NaN or infinite"):
        weight_directions([torch.full((2, 4), float("nan"))], 1)


def test_the_iterated_directions_of_a_wide_input_leave_no_more_than_the_exact_ones(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    mixing = torch.linalg.qr(torch.randn(96, 96, generator=generator, dtype=torch.float64)).Q
    rows = torch.randn(500, 96, generator=generator, dtype=torch.float64) * torch.arange(1, 97) ** -0.5 @ mixing
    moment = rows.t() @ rows / 500
    exact = principal_directions(moment, 6)
    monkeypatch.setattr("s2q.transforms.low_rank._ITERATED", 64)
    monkeypatch.setattr(
        "torch.linalg.eigh", lambda matrix, eigh=torch.linalg.eigh: eigh(matrix) if len(matrix) < 20 else 1 / 0
    )
    iterated = principal_directions(moment, 6)
    torch.testing.assert_close(iterated.t() @ iterated, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-10)
    left = [float(moment.trace() - (v.t() @ moment @ v).trace()) for v in (iterated, exact)]
    assert left[0] == pytest.approx(left[1], rel=1e-5)
    assert torch.equal(iterated, principal_directions(moment, 6))
    assert not torch.isnan(principal_directions(torch.zeros(96, 96), 6)).any()
