"""Keeping results while parameters do not change."""

import math
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from s2q.core.memo import (
    checkpointed,
    memoization,
    memoize_for,
    memoize_step,
)


class _Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls


def test_outside_the_context_everything_is_computed_anew() -> None:
    owner, count = object(), _Counter()
    assert [memoize_step(owner, "k", count), memoize_step(owner, "k", count)] == [1, 2]
    assert [memoize_for(owner, owner, count), memoize_for(owner, owner, count)] == [3, 4]


def test_within_the_context_a_result_is_kept_by_owner_and_key() -> None:
    first, second, count = object(), object(), _Counter()
    with memoization():
        assert [
            memoize_step(first, "k", count),
            memoize_step(first, "k", count),
            memoize_step(first, "l", count),
            memoize_step(second, "k", count),
        ] == [
            1,
            1,
            2,
            3,
        ]
    with memoization():
        assert memoize_step(first, "k", count) == 4


def test_only_the_latest_subject_is_kept_and_compared_by_identity() -> None:
    owner, count = object(), _Counter()
    x, equal = torch.ones(2), torch.ones(2)
    with memoization():
        assert [memoize_for(owner, s, count) for s in (x, x, equal, x)] == [1, 1, 2, 3]


def test_an_inner_context_keeps_its_own_results() -> None:
    owner, count = object(), _Counter()
    with memoization():
        memoize_step(owner, "k", count)
        with memoization():
            assert memoize_step(owner, "k", count) == 2
        assert memoize_step(owner, "k", count) == 1


class _Square(torch.nn.Module):
    """y = (w x)², with w² from `once` and the product from `memoize_for`; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([2.0]))
        self.calls, self.weights, self.products = 0, 0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return memoize_for(self, x, lambda: self._product(x)).square()

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        self.products += 1
        return memoize_step(self, "w", self._weight) * x

    def _weight(self) -> torch.Tensor:
        self.weights += 1
        return self.w.exp()


def test_a_recomputed_call_runs_again_in_the_backward_pass_but_not_what_is_kept() -> None:
    layer, x = _Square(), torch.ones(3)
    with memoization():
        (checkpointed(layer, x).sum() + checkpointed(layer, 2 * x).sum()).backward()
    assert (layer.calls, layer.weights, layer.products) == (4, 1, 4)
    assert layer.w.grad is not None
    # y = e²ʷ (1 + 4) · 3, so dy/dw = 2 y
    assert torch.allclose(layer.w.grad, 2 * (2 * layer.w.detach()).exp() * 15)


def test_the_backward_pass_may_run_in_a_thread_of_its_own() -> None:
    layer, x = _Square(), torch.ones(3)
    with memoization():
        loss = checkpointed(layer, x).sum()
        with ThreadPoolExecutor(max_workers=1) as pool:
            pool.submit(loss.backward).result()
    assert (layer.calls, layer.weights) == (2, 1)


def test_without_gradients_a_recomputed_call_is_a_call() -> None:
    layer = _Square()
    with torch.no_grad():
        assert float(checkpointed(layer, torch.ones(1))) == pytest.approx(math.exp(4), rel=1e-5)
    assert layer.calls == 1


def test_nothing_of_a_recomputed_call_is_kept_until_the_backward_pass() -> None:
    owner, seen = object(), weakref.WeakSet[torch.Tensor]()

    def part(x: torch.Tensor) -> torch.Tensor:
        split = memoize_for(owner, x, lambda: checkpointed(torch.exp, x))
        seen.add(split)
        return split.square().sum()

    x = torch.ones(3, requires_grad=True)
    with memoization():
        loss = checkpointed(part, 2 * x)
        assert not seen
        loss.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 4 * (4 * x.detach()).exp())


@pytest.mark.parametrize("gradients", [False, True])
def test_a_recomputed_call_leaves_no_result_of_its_subject_behind(gradients: bool) -> None:
    owner, results = object(), []

    def function(x: torch.Tensor) -> torch.Tensor:
        result = memoize_for(owner, x, lambda: x * 2)
        results.append(weakref.ref(result))
        return result + 1

    with torch.set_grad_enabled(gradients), memoization():
        checkpointed(function, torch.ones(2, requires_grad=gradients))
        assert results[0]() is None
