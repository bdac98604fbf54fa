import itertools

import torch

from s2q.common.seeds import derive_seed


def test_same_parts_give_the_same_seed_for_ever():
    assert derive_seed(0, "prompt", 3) == derive_seed(0, "prompt", 3) == 3194399892799510724


def test_different_parts_give_different_seeds():
    parts = [
        (),
        ("a",),
        ("b",),
        ("a", "b"),
        ("ab",),
        ("a", 1),
        ("a", "1"),
        ("a1",),
        (1,),
        (11,),
        (1, 1),
        ("", "a"),
        ("a", ""),
    ]
    seeds = [derive_seed(seed, *names) for seed, names in itertools.product((0, 1, -1, 2**70), parts)]
    assert len(set(seeds)) == len(seeds)


def test_seeds_fit_a_torch_generator():
    for index in range(200):
        seed = derive_seed(index)
        assert 0 <= seed < 2**63
        torch.Generator().manual_seed(seed)
