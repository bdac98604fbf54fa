"""Keeping results while parameters stand still."""

import torch

from s2q.core.reuse import once, once_for, parameters_held


class _Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls


def test_outside_the_context_everything_is_computed_anew() -> None:
    owner, count = object(), _Counter()
    assert [once(owner, "k", count), once(owner, "k", count)] == [1, 2]
    assert [once_for(owner, owner, count), once_for(owner, owner, count)] == [3, 4]


def test_within_the_context_a_result_is_kept_by_owner_and_key() -> None:
    one, other, count = object(), object(), _Counter()
    with parameters_held():
        assert [once(one, "k", count), once(one, "k", count), once(one, "l", count), once(other, "k", count)] == [
            1,
            1,
            2,
            3,
        ]
    with parameters_held():
        assert once(one, "k", count) == 4


def test_only_the_latest_subject_is_kept_and_compared_by_identity() -> None:
    owner, count = object(), _Counter()
    x, equal = torch.ones(2), torch.ones(2)
    with parameters_held():
        assert [once_for(owner, s, count) for s in (x, x, equal, x)] == [1, 1, 2, 3]


def test_an_inner_context_keeps_its_own_results() -> None:
    owner, count = object(), _Counter()
    with parameters_held():
        once(owner, "k", count)
        with parameters_held():
            assert once(owner, "k", count) == 2
        assert once(owner, "k", count) == 1
