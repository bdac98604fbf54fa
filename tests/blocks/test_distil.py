"""Samples of a GPU are read ahead by a second thread, which changes nothing about what comes of them."""

import threading

import pytest
import torch
from torch import nn

from s2q.blocks import distil as module
from s2q.blocks.distil import (
    BlockSample,
    block_loss,
    distil,
)
from s2q.distillation.options import Distillation


class Samples:
    """Samples in host memory that say they are somewhere else; notes which thread reads which."""

    def __init__(self, device, count=4):
        generator = torch.Generator().manual_seed(0)
        self.device, self.threads, self.placing = device, {}, set()
        self.began = [threading.Event() for _ in range(count)]
        self.videos = [torch.randn(1, 5, 3, generator=generator) for _ in range(count)]

    def __len__(self):
        return len(self.videos)

    def read(self, index):
        self.threads[index] = threading.get_ident()
        self.began[index].set()
        x = self.videos[index]
        return BlockSample(inputs={"x": x}, outputs=(2 * x + 1,))

    def to_device(self, sample):
        assert self.threads, "read first"
        self.placing.add(threading.get_ident())
        return sample


class Block(nn.Module):
    """One factor for each channel."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_the_next_sample_of_a_gpu_is_read_meanwhile_in_another_thread(device):
    samples, order = Samples(device), [2, 0, 3]
    taken = []
    for position, sample in enumerate(module._ahead(samples, order)):
        taken.append(sample.inputs["x"])
        if position + 1 < len(order):
            assert samples.began[order[position + 1]].wait(timeout=30)
    assert all(torch.equal(one, samples.videos[index]) for one, index in zip(taken, order, strict=True))
    assert samples.threads.keys() == set(order)
    (reader,) = set(samples.threads.values())
    assert reader != threading.get_ident()
    assert samples.placing == {threading.get_ident()}, "the device holds no sample that is not worked on"


def test_samples_of_a_cpu_are_read_one_by_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU that is not computed on
    samples = Samples("cpu")
    for position, _ in enumerate(module._ahead(samples, range(len(samples)))):
        assert [event.is_set() for event in samples.began].count(True) == position + 1
    assert set(samples.threads.values()) == {threading.get_ident()}


def test_nothing_is_read_of_no_samples():
    assert list(module._ahead(Samples("cuda"), [])) == []


def test_an_error_of_the_reader_is_raised():
    samples = Samples("cuda")
    del samples.videos[3]
    with pytest.raises(IndexError):
        list(module._ahead(samples, range(4)))


def test_distilling_is_the_same_either_way():
    results = []
    for device in ("cpu", "cuda"):
        block, samples = Block(), Samples(device)
        report = distil(block, samples, options=Distillation(epochs=4), seed=0)
        assert report.loss == block_loss(block, samples) < report.initial_loss
        results.append((report, block.factor.tolist()))
    assert results[0] == results[1]
