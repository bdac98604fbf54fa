"""The mass on the most attended tokens and the map of a video, against sums by hand."""

import json

import pytest
import torch

from s2q.core.tokens import TokenGrid
from s2q.distillation.attention_profile import FRACTIONS, AttentionProfile, ImportanceMap, mass_on_top


def test_mass_is_the_share_of_the_largest_sums_and_interpolates_between_tokens():
    sums = torch.tensor([[1.0, 5.0, 0.0, 2.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]])
    mass = dict(zip(FRACTIONS, mass_on_top(sums)[0].tolist(), strict=True))
    assert mass[0.0] == 0
    assert mass[0.05] == pytest.approx(0.25)  # half of the first of ten tokens
    assert mass[0.1] == pytest.approx(0.5)
    assert mass[0.15] == pytest.approx(0.6)
    assert mass[0.2] == pytest.approx(0.7)
    assert mass[0.5] == mass[1.0] == pytest.approx(1.0)


@pytest.mark.parametrize("tokens", [1, 3, 208])
def test_mass_of_uniform_attention_is_the_fraction_itself(tokens):
    assert mass_on_top(torch.full((2, tokens), 3.0)).tolist() == [pytest.approx(list(FRACTIONS))] * 2


def test_mass_without_any_attention_is_zero():
    assert mass_on_top(torch.zeros(1, 4)).tolist() == [[0.0] * len(FRACTIONS)]


def test_a_small_map_has_every_token_over_the_mean():
    sums = torch.arange(12.0)
    shown = ImportanceMap.of(sums, TokenGrid(frames=3, height=2, width=2), sample="prompt 0")
    assert shown.frames == (0, 1, 2)
    torch.testing.assert_close(shown.values, sums.view(3, 2, 2) / 5.5)


def test_a_large_map_skips_frames_and_averages_neighbours():
    grid = TokenGrid(frames=13, height=30, width=48)
    sums = torch.rand(grid.tokens, generator=torch.Generator().manual_seed(0))
    shown = ImportanceMap.of(sums, grid, sample="prompt 0")
    assert shown.frames[0] == 0
    assert shown.frames[-1] == 12
    assert shown.values.shape == (6, 24, 24)
    pairs = sums.view(13, 30, 24, 2).mean(-1)[0] / sums.mean()
    torch.testing.assert_close(shown.values[0, 0], pairs[:2].mean(0))  # the first 30 / 24 rows touch two


def test_a_map_survives_json_to_within_half_a_level():
    grid = TokenGrid(frames=2, height=5, width=7)
    shown = ImportanceMap.of(torch.rand(grid.tokens), grid, sample="prompt 1, step 3, branch 0")
    record = json.loads(json.dumps(shown.to_dict()))
    read = ImportanceMap.from_dict(record)
    assert (read.grid, read.frames, read.sample) == (shown.grid, shown.frames, shown.sample)
    torch.testing.assert_close(read.values, shown.values, atol=0.51 * record["peak"] / 255, rtol=0)
    with pytest.raises(ValueError, match="a map of 70 values"):
        ImportanceMap.from_dict(record | {"rows": 6})


def test_a_profile_averages_samples_and_counts_text():
    profile = AttentionProfile()
    profile.add(torch.tensor([[4.0, 0.0, 0.0, 0.0]]), text=slice(0, 1))
    profile.add(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), text=slice(0, 1))
    record = profile.to_dict()
    assert record["samples"] == 2
    assert record["tokens"] == 4
    assert record["text_share"] == pytest.approx((1 + 0.25) / 2)
    assert record["mass"][FRACTIONS.index(0.5)] == pytest.approx((1 + 0.5) / 2)
    assert record["map"] is None
