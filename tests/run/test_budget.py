"""The multiple-choice knapsack."""

import itertools
import random

import pytest

from s2q.run.budget import choose


def spent(options, taken):
    return sum(own[index][0] for own, index in zip(options, taken, strict=True))


def lost(options, taken):
    return sum(own[index][1] for own, index in zip(options, taken, strict=True))


def best(options, limit):
    """By trying everything."""
    every = itertools.product(*(range(len(own)) for own in options))
    return min(lost(options, taken) for taken in every if spent(options, taken) <= limit)


def test_the_example_of_the_module():
    options = [[(1, 9.0), (3, 1.0)], [(1, 4.0), (2, 3.0)]]
    assert choose(options, 4) == [1, 0]
    assert choose(options, 5) == [1, 1]
    assert choose(options, 3) == [0, 1]
    assert choose(options, 2) == [0, 0]


def test_the_limit_is_kept_to_the_byte():
    options = [[(100, 1.0), (1_000_003, 0.0)]]
    assert choose(options, 1_000_003) == [1]
    assert choose(options, 1_000_002) == [0]


def test_a_candidate_that_costs_more_and_is_no_better_is_not_taken():
    assert choose([[(1, 2.0), (2, 2.0), (3, 5.0)], [(4, 0.0)]], 100) == [0, 0]
    assert choose([[(1, 2.0), (1, 1.0)]], 100) == [1]


@pytest.mark.parametrize("seed", range(20))
def test_as_good_as_trying_everything(seed):
    generator = random.Random(seed)
    options = [
        sorted((generator.randrange(1, 40), generator.random()) for _ in range(generator.randrange(1, 5)))
        for _ in range(5)
    ]
    least = sum(own[0][0] for own in options)
    limit = least + generator.randrange(60)
    taken = choose(options, limit)
    assert spent(options, taken) <= limit
    assert lost(options, taken) == pytest.approx(best(options, limit))


@pytest.mark.parametrize("seed", range(5))
def test_coarse_steps_keep_the_limit_and_lose_little(seed):
    generator = random.Random(seed)
    options = [[(1000, 1.0), (1000 + generator.randrange(1, 10**6), generator.random())] for _ in range(12)]
    limit = 12_000 + 3 * 10**6
    taken = choose(options, limit, steps=1000)
    assert spent(options, taken) <= limit
    assert lost(options, taken) <= best(options, limit - 12 * 3001) + 1e-12
