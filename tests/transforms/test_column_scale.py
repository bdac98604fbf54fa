"""The channel scale from weights alone."""

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.transforms import SmoothScale, column_scale


def test_the_example_of_the_docstring():
    weight = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    assert column_scale([weight]).tolist() == [0.625, 2.5]


def test_folded_columns_have_one_norm_over_all_weights_that_read_the_input():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 12, generator=generator) * torch.rand(12, generator=generator) for rows in (5, 9)]
    scale = SmoothScale(column_scale(weights))
    folded = torch.cat([scale.fold_inverse(weight) for weight in weights]).norm(dim=0)
    torch.testing.assert_close(folded, folded.mean().expand(12), rtol=1e-6, atol=0)


def test_a_channel_made_large_where_its_column_is_made_small_changes_nothing():
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(6, 12, generator=generator), torch.randn(3, 12, generator=generator)
    outlier = torch.ones(12)
    outlier[4] = 32.0
    plain, scaled = SmoothScale(column_scale([weight])), SmoothScale(column_scale([weight / outlier]))
    ratio = scaled(x * outlier) / plain(x)
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-5, atol=0)


def test_a_column_of_zeros_has_a_finite_scale_and_all_zeros_have_ones():
    weight = torch.ones(3, 4)
    weight[:, 2] = 0
    assert bool(column_scale([weight]).isfinite().all())
    assert column_scale([torch.zeros(3, 4)]).tolist() == [1.0] * 4


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(InvalidInputError, match="NaN or infinite"):
        column_scale([torch.tensor([[1.0, float("nan")]])])
