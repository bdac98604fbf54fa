"""Cubes of neighbouring tokens and their means, smaller at the edges."""

import itertools

import pytest
import torch

from s2q.core.cubes import QuantizedMeans, cube_means, cube_rows, spread


def test_means_by_hand_with_a_smaller_cube_at_the_edge():
    row = torch.tensor([1.0, 3.0, 2.0, 6.0, 7.0]).view(1, 1, 5, 1)
    means = cube_means(row, (1, 1, 2))
    assert means.flatten().tolist() == [2, 4, 7]
    assert spread(means, (1, 1, 2), (1, 1, 5)).flatten().tolist() == [2, 2, 4, 4, 7]
    assert cube_means(row.view(5, 1, 1, 1), (2, 1, 1)).flatten().tolist() == [2, 4, 7]
    block = torch.arange(8.0).view(2, 2, 2, 1)
    assert cube_means(block, (2, 2, 2)).item() == 3.5
    assert cube_means(block, (1, 2, 2)).flatten().tolist() == [1.5, 5.5]
    assert cube_means(block, (4, 4, 4)).item() == 3.5


@pytest.mark.parametrize("cube", [(2, 2, 2), (1, 1, 1), (3, 2, 5), (4, 7, 3)])
def test_means_against_loops(cube):
    sizes = (5, 3, 4)
    video = torch.randn(2, *sizes, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.empty_like(video)
    starts = itertools.product(*(range(0, size, side) for size, side in zip(sizes, cube, strict=True)))
    for place in starts:
        own = (slice(None), *(slice(start, start + side) for start, side in zip(place, cube, strict=True)))
        expected[own] = video[own].double().mean(dim=(1, 2, 3), keepdim=True).float()
    torch.testing.assert_close(spread(cube_means(video, cube), cube, sizes), expected, rtol=0, atol=1e-6)
    assert cube_means(video.bfloat16(), cube).dtype == torch.float32


@pytest.mark.parametrize("cube", [(2, 2, 2), (1, 1, 1), (3, 2, 5)])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (4, 0), (0, 3)])
def test_rows_pick_the_mean_of_each_tokens_cube_and_zero_for_other_tokens(cube, before, after):
    sizes = (5, 3, 4)
    video = torch.randn(2, *sizes, 6, generator=torch.Generator().manual_seed(0))
    means = cube_means(video, cube).reshape(-1, 6)
    rows = cube_rows(sizes, cube, before=before, after=after, samples=2, device="cpu")
    joined_means = torch.cat([means, torch.zeros(1, 6)]).index_select(0, rows).view(2, before + 60 + after, 6)
    expected = spread(cube_means(video, cube), cube, sizes).reshape(2, 60, 6)
    assert torch.equal(joined_means[:, before : before + 60], expected)
    assert int(joined_means[:, :before].count_nonzero() + joined_means[:, before + 60 :].count_nonzero()) == 0


def test_the_difference_from_a_mean_by_hand():
    # The cube of the first two tokens has the mean [4, -2]; the third token is in none.
    codes = torch.tensor([[2, -1], [0, 0]], dtype=torch.int8)
    means = QuantizedMeans(codes, torch.tensor([[2.0], [1.0]]), torch.tensor([0, 0, 1], dtype=torch.int32))
    y = torch.tensor([[5.0, -2.0], [3.0, 1.0], [7.0, 7.0]])
    assert means.difference(y).tolist() == [[1, 0], [-1, 3], [7, 7]]
