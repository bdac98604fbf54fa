"""Fixtures of the tests of ops."""

import pytest
import torch

from s2q.common.processor import is_x86
from s2q.ops import fused


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture
def passes():
    """The compiled passes, which must have the bits of PyTorch wherever they can be compiled."""
    if obstacle := fused._obstacle():
        pytest.skip(obstacle)
    if not is_x86() or torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("PyTorch rounds otherwise without vector instructions of x86")
    compiled = fused.passes()
    assert compiled is not None, "they do not compile, or differ from PyTorch in a bit"
    return compiled
