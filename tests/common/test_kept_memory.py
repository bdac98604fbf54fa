"""Memory that the allocator keeps for the next step, so that its pages are not asked for again."""

import resource
import sys

import pytest
import torch

from s2q.common.memory import keep_freed_memory


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        values = [torch.zeros(2**18) for _ in range(4)]  # 1 MiB each, 256 pages
        del values
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of glibc")
def test_freed_memory_is_kept():
    keep_freed_memory()
    faults()
    assert faults() < 500  # 20,480 if every page were new
