"""The devices that these tests run on, and what has to hold after each of them."""

import gc

import pytest
import torch

from emulation import emulator
from s2q.core import codebook


def pytest_runtest_setup(item):
    if emulator.obstacle() is not None:
        pytest.skip(f"no emulated GPU: {emulator.obstacle()}")
    if item.get_closest_marker("emulated") and not emulator.is_installed():
        pytest.skip("looks at the emulator; this GPU is real")


@pytest.fixture(autouse=True)
def quick_kernels(request, monkeypatch):
    """On an emulated GPU, the references in the place of Triton's interpreter, which takes minutes a block."""
    if emulator.is_installed() and not request.node.get_closest_marker("kernels"):
        emulator.use_references(monkeypatch.setitem)


@pytest.fixture
def device():
    """The second GPU, which is not the current one, where there is one."""
    yield from _left_as_it_was("cuda:1" if torch.cuda.device_count() > 1 else "cuda")


@pytest.fixture(params=["cuda", "cuda:1"])
def each_device(request):
    """The current GPU by the name without a number, and the second one."""
    if request.param == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    yield from _left_as_it_was(request.param)


def _left_as_it_was(device):
    """Check that a test leaves nothing on any GPU, and the current one as it was."""
    before = _allocated()
    yield device
    assert _allocated() == before
    assert torch.cuda.current_device() == 0


def _allocated():
    gc.collect()  # modules with hooks are in cycles
    for constant in (codebook.levels_of, codebook.nibble_levels, codebook.table_levels):
        constant.cache_clear()  # of all layers of a device, some bytes
    return [torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count())]
