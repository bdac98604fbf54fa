from collections import Counter

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.selection.scores import Candidate, CandidatePool
from s2q.selection.selection import (
    SELECTIONS,
    atfp,
    atop,
    ds,
    qs,
    rtfp,
    sds,
)


def a_pool(prompts=10, steps=50, seed=0):
    scores = torch.rand(prompts, steps, 2, generator=torch.Generator().manual_seed(seed)).tolist()
    return CandidatePool(
        candidates=tuple(
            Candidate(
                prompt=prompt,
                step=step,
                timestep=float(steps - step),
                diffusion=scores[prompt][step][0],
                quantization=scores[prompt][step][1],
            )
            for prompt in range(prompts)
            for step in range(steps)
        )
    )


def by_hand(diffusion, quantization):
    return CandidatePool(
        candidates=tuple(
            Candidate(prompt=0, step=step, timestep=0.0, diffusion=one, quantization=other)
            for step, (one, other) in enumerate(zip(diffusion, quantization, strict=True))
        )
    )


def chosen(pool, indices):
    return [pool.candidates[index] for index in indices]


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("count", [1, 3, 20, 40, 80, 499, 500])
def test_every_selection_gives_so_many_different_indices_in_order(name, count):
    indices = SELECTIONS[name](a_pool(), count, 0)
    assert len(indices) == count
    assert indices == sorted(set(indices))
    assert indices[0] >= 0
    assert indices[-1] < 500


@pytest.mark.parametrize("name", SELECTIONS)
def test_the_same_seed_gives_the_same_and_only_random_ones_care(name):
    pool = a_pool()
    results = [SELECTIONS[name](pool, 40, seed) for seed in (0, 0, 1, 2)]
    assert results[0] == results[1]
    assert (results[0] == results[2] == results[3]) is (name in ("sds", "ds", "qs", "coverage"))


@pytest.mark.parametrize(("prompts", "steps", "count"), [(10, 20, 40), (10, 50, 40), (3, 7, 10), (4, 5, 20)])
def test_coverage_takes_prompts_and_timesteps_alike(prompts, steps, count):
    pool = a_pool(prompts=prompts, steps=steps)
    taken = chosen(pool, SELECTIONS["coverage"](pool, count, 0))
    per_prompt = Counter(one.prompt for one in taken)
    assert len(per_prompt) == prompts
    assert max(per_prompt.values()) - min(per_prompt.values()) <= 1
    thirds = Counter(one.step * 3 // steps for one in taken)
    assert min(thirds.values()) >= count // 3 - 2


def test_saliences_by_hand():
    pool = by_hand(diffusion=[1, 5, 3, 2, 4], quantization=[50, 10, 30, 40, 20])
    # normalised 0, 1, .5, .25, .75 and 1, 0, .5, .75, .25; products 0, 0, .25, .1875, .1875
    assert ds(pool, 2, 0) == [1, 4]
    assert qs(pool, 2, 0) == [0, 3]
    assert sds(pool, 1, 0) == [2]
    assert sds(pool, 2, 0) == [2, 3]  # a tie, the lower index wins
    assert sds(pool, 3, 0) == [2, 3, 4]
    assert sds(pool, 4, 0) == [0, 2, 3, 4]  # the two zeros are a tie too


def test_a_constant_score_leaves_the_choice_to_the_other():
    pool = by_hand(diffusion=[1, 5, 3, 2, 4], quantization=[7, 7, 7, 7, 7])
    assert sds(pool, 2, 0) == ds(pool, 2, 0) == [1, 4]
    assert qs(pool, 2, 0) == [0, 1]


def test_salient_ones_score_at_least_as_high_as_what_is_left():
    pool = a_pool()
    scores = pool.salience
    taken = set(sds(pool, 40, 0))
    assert min(scores[index] for index in taken) >= max(scores[i] for i in range(500) if i not in taken)


def test_atop_takes_one_prompt_over_all_of_its_time():
    pool = a_pool()
    taken = chosen(pool, atop(pool, 50, 0))
    assert len({one.prompt for one in taken}) == 1
    assert [one.step for one in taken] == list(range(50))
    forty = chosen(pool, atop(pool, 40, 0))
    assert {one.prompt for one in forty} == {taken[0].prompt}
    gaps = [after.step - before.step for before, after in zip(forty, forty[1:], strict=False)]
    assert set(gaps) == {1, 2}
    assert len({atop(pool, 40, seed)[0] // 50 for seed in range(30)}) > 5  # any prompt may be the one


def test_atfp_takes_five_prompts_that_together_cover_the_time():
    pool = a_pool()
    taken = chosen(pool, atfp(pool, 40, 3))
    assert sorted(Counter(one.prompt for one in taken).values()) == [8] * 5
    assert len({one.step for one in taken}) >= 35  # shifted against each other
    for prompt in {one.prompt for one in taken}:
        steps = [one.step for one in taken if one.prompt == prompt]
        assert {after - before for before, after in zip(steps, steps[1:], strict=False)} <= {6, 7}
    assert Counter(one.prompt for one in chosen(pool, atfp(pool, 250, 3))).most_common()[-1][1] == 50


def test_rtfp_takes_random_steps_of_five_prompts():
    pool = a_pool()
    taken = chosen(pool, rtfp(pool, 40, 3))
    assert len({one.prompt for one in taken}) == 5
    counts = Counter(index for seed in range(200) for index in rtfp(pool, 40, seed))
    assert len(counts) == 500  # everything has a chance
    assert max(counts.values()) < 40  # and nothing a large one: 16 are expected


def test_more_prompts_are_drawn_where_those_named_do_not_suffice():
    short = a_pool(prompts=10, steps=4)
    assert len({one.prompt for one in chosen(short, atop(short, 10, 0))}) == 3
    assert len({one.prompt for one in chosen(short, atfp(short, 30, 0))}) == 8
    assert len({one.prompt for one in chosen(short, rtfp(short, 28, 0))}) <= 7
    few = a_pool(prompts=2, steps=20)
    assert {one.prompt for one in chosen(few, atfp(few, 30, 0))} == {0, 1}


def test_prompts_of_unequal_length_give_what_they_have():
    full = a_pool(prompts=3, steps=10)
    pool = CandidatePool(candidates=tuple(one for one in full.candidates if one.prompt != 1 or one.step < 2))
    taken = Counter(one.prompt for one in chosen(pool, atfp(pool, 16, 0)))
    assert taken == {0: 7, 1: 2, 2: 7}


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize(("count", "message"), [(21, "only 20 candidates"), (0, "samples=0"), (-3, "samples=-3")])
def test_counts_below_1_or_above_the_candidates_are_refused(name, count, message):
    with pytest.raises(InvalidInputError, match=message):
        SELECTIONS[name](a_pool(prompts=2, steps=10), count, 0)
