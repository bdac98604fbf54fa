import math

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.selection.scores import (
    Candidate,
    CandidatePool,
    diffusion_salience,
    min_max,
    quantization_salience,
    score_trajectory,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def candidate(prompt=0, step=0, diffusion=1.0, quantization=1.0):
    return Candidate(prompt=prompt, step=step, timestep=0.0, diffusion=diffusion, quantization=quantization)


def test_diffusion_salience_by_hand():
    # ‖[1, 2, 2] - [1, 0, 1]‖² / ‖[1, 2, 2]‖² = 5 / 9
    assert diffusion_salience(torch.tensor([1.0, 2, 2]), torch.tensor([1.0, 0, 1])) == pytest.approx(5 / 9)
    assert diffusion_salience(torch.tensor([1.0, 2]), torch.tensor([1.0, 2])) == 0
    assert diffusion_salience(torch.zeros(3), torch.zeros(3)) == 0


def test_diffusion_salience_does_not_depend_on_the_size_of_the_latents():
    before, after = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1)
    assert diffusion_salience(before * 10, after * 10) == pytest.approx(diffusion_salience(before, after))


def test_quantization_salience_by_hand():
    # tokens [3, 0], [0, 2]: the Gram matrix is diag(9, 4)
    assert quantization_salience(torch.tensor([[3.0, 0], [0, 2]]), channel_dim=1) == pytest.approx(9)
    # one token [1, 2, 2]: rank one, its norm squared
    assert quantization_salience(torch.tensor([[1.0, 2, 2]]), channel_dim=1) == pytest.approx(9)


@pytest.mark.parametrize(("shape", "channel_dim"), [((3, 4, 8, 8), 1), ((4, 3, 8, 8), 0), ((50, 4), -1)])
def test_quantization_salience_against_the_spectral_norm(shape, channel_dim):
    latent = draw(*shape)
    tokens = latent.double().movedim(channel_dim, -1).reshape(-1, 4)
    expected = float(torch.linalg.matrix_norm(tokens.T @ tokens, 2))
    assert quantization_salience(latent, channel_dim=channel_dim) == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(float(torch.linalg.svdvals(tokens)[0]) ** 2)


def test_half_precision_latents_are_scored_in_fp64():
    latent = draw(3, 4, 8, 8).bfloat16()
    assert quantization_salience(latent, channel_dim=1) == quantization_salience(latent.double(), channel_dim=1)


def test_min_max_scales_to_0_and_1_and_equal_values_to_1():
    assert min_max([2.0, 4.0, 3.0]) == (0.0, 1.0, 0.5)
    assert min_max([5.0, 5.0]) == (1.0, 1.0)
    assert min_max([5.0]) == (1.0,)


def test_pool_normalises_over_all_prompts_and_multiplies():
    pool = CandidatePool(
        candidates=(
            candidate(0, 0, diffusion=1, quantization=10),
            candidate(0, 1, diffusion=3, quantization=30),
            candidate(1, 0, diffusion=5, quantization=20),
            candidate(1, 1, diffusion=2, quantization=50),
        )
    )
    assert pool.diffusion_salience == (0, 0.5, 1, 0.25)
    assert pool.quantization_salience == (0, 0.5, 0.25, 1)
    assert pool.salience == (0, 0.25, 0.25, 0.25)
    assert pool.prompts == (0, 1)
    assert pool.of_prompt(1) == [2, 3]


def test_a_trajectory_is_scored_step_by_step():
    latents = [draw(3, 4, 2, 2, seed=seed) for seed in range(4)]
    scored = score_trajectory(latents, [999.0, 500.0, 10.0], prompt=7, channel_dim=1)
    assert [(one.prompt, one.step, one.timestep) for one in scored] == [(7, 0, 999.0), (7, 1, 500.0), (7, 2, 10.0)]
    assert scored[1].diffusion == diffusion_salience(latents[1], latents[2])
    assert scored[1].quantization == quantization_salience(latents[1], channel_dim=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_latents_that_are_not_finite_are_named(bad):
    latents = [draw(3, 4, 2, 2, seed=seed) for seed in range(4)]
    latents[2][0, 0, 0, 0] = bad
    with pytest.raises(InvalidInputError, match="prompt 7, step 1: latents: contain NaN or infinite"):
        score_trajectory(latents, [2, 1, 0], prompt=7, channel_dim=1)


def test_latents_of_other_counts_and_shapes_or_all_zero_are_refused():
    with pytest.raises(InvalidInputError, match="3 latents for 3 steps"):
        score_trajectory([draw(1, 2)] * 3, [2, 1, 0], prompt=0, channel_dim=1)
    with pytest.raises(InvalidInputError, match="expected the same"):
        diffusion_salience(draw(2), draw(3))
    with pytest.raises(InvalidInputError, match="all zero"):
        diffusion_salience(torch.zeros(2), torch.ones(2))


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ((), "empty"),
        ((candidate(), candidate()), "prompt 0, step 0 appears twice"),
        ((candidate(), candidate(step=1, diffusion=math.nan)), "step 1: its diffusion salience is nan"),
        ((candidate(quantization=math.inf),), "quantization salience is inf"),
        ((candidate(quantization=-1.0),), "at least 0"),
    ],
)
def test_empty_pools_duplicates_and_bad_scores_are_refused(candidates, message):
    with pytest.raises(InvalidInputError, match=message):
        CandidatePool(candidates=candidates)
