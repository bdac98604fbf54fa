import copy
import gc
import pickle

import torch

from s2q.nn.sharing import SharedInput, same_tensors


class Counted:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.calls


def test_it_is_computed_once_for_all_readers_and_then_forgotten():
    shared, compute, x = SharedInput(3), Counted(), torch.ones(2)
    assert [shared(x, compute) for _ in range(3)] == [1, 1, 1]
    assert shared._kept is None
    assert shared(x, compute) == 2


def test_another_tensor_or_a_changed_one_is_computed_anew():
    shared, compute, x = SharedInput(3), Counted(), torch.ones(2)
    assert shared(x, compute) == 1
    assert shared(x.clone(), compute) == 2
    assert shared(x, compute) == 3
    x.add_(1)
    assert shared(x, compute) == 4
    assert shared(x, compute) == 4


def test_nothing_outlives_the_tensor():
    shared, x = SharedInput(2), torch.ones(2)
    shared(x, Counted())
    del x
    gc.collect()
    assert shared._kept is None


def test_inference_tensors_do_not_count_changes_so_nothing_is_kept():
    shared, compute = SharedInput(2), Counted()
    with torch.inference_mode():
        x = torch.ones(2)
        assert [shared(x, compute), shared(x, compute)] == [1, 2]


def test_copies_share_among_themselves_and_start_empty():
    shared = SharedInput(2)
    x = torch.ones(2)
    shared(x, Counted())
    first, second = copy.deepcopy([shared, shared])
    assert first is second
    assert first is not shared
    assert first._kept is None
    assert pickle.loads(pickle.dumps(shared)).readers == 2


def test_same_tensors():
    a, b = torch.ones(2), torch.zeros(2)
    assert same_tensors([a, None], [a.clone(), None])
    assert not same_tensors([a, None], [a, b])
    assert not same_tensors([a], [b])
    assert not same_tensors([a], [torch.ones(3)])
    assert not same_tensors([torch.empty(2, device="meta")], [torch.empty(2, device="meta")])
