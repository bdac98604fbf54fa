import re

import pytest
import torch

from s2q.common.devices import (
    check_device,
    has_bf16_products,
    overflow_remedy,
    peak_memory_bytes,
    reset_peak_memory,
)
from s2q.common.errors import InvalidInputError, ResourceError


@pytest.fixture
def gpus(monkeypatch):
    def pretend(count, *, is_built=True):
        monkeypatch.setattr(torch.version, "cuda", "13.0" if is_built else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


@pytest.mark.parametrize("device", ["tpu9", "meta", "cuda:", "cuda:x", "cuda:-1", "CPU", ""])
def test_unknown_device_names_are_refused(device):
    with pytest.raises(InvalidInputError, match="is unknown; use cpu, cuda or cuda:N"):
        check_device(device)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("mps", "an Apple GPU, which is not supported"),
        ("mps:0", "an Apple GPU, which is not supported"),
        ("xpu", "an Intel GPU, which is not supported"),
        ("xpu:1", "an Intel GPU, which is not supported"),
        ("npu:0", "an NPU, which is not supported"),
        ("rocm", "an AMD GPU, which PyTorch calls cuda"),
    ],
)
def test_devices_that_are_not_supported_are_told_from_misspelt_ones(device, reason):
    with pytest.raises(InvalidInputError) as raised:
        check_device(device)
    assert str(raised.value) == f"device={device!r} is {reason}; use cpu, cuda or cuda:N"


def test_cuda_without_a_gpu_is_refused(gpus):
    gpus(0)
    check_device("cpu")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ResourceError, match="PyTorch finds no GPU; check the driver .* or use cpu"):
            check_device(device)


def test_cuda_with_a_cpu_build_is_refused(gpus):
    gpus(0, is_built=False)
    with pytest.raises(
        ResourceError, match=f"PyTorch {re.escape(torch.__version__)} is built for CPUs only; install a build for CUDA"
    ):
        check_device("cuda")


def test_two_gpus_are_accepted_and_a_third_refused(gpus):
    gpus(2)
    for device in ("cpu", "cuda", "cuda:0", "cuda:1", torch.device("cpu"), torch.device("cuda", 1)):
        check_device(device)
    with pytest.raises(ResourceError) as raised:
        check_device("cuda:9")
    assert str(raised.value) == ("device='cuda:9': this machine has cuda:0, cuda:1; use one of these, or cpu")


def test_an_amd_gpu_is_a_cuda_device(gpus, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    gpus(1)
    check_device("cuda")


@pytest.mark.parametrize(("capability", "multiplies"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_have_products_of_bf16_from_a_capability_on(capability, multiplies, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    gpus(1)
    monkeypatch.setattr(torch.version, "hip", None)
    assert has_bf16_products("cuda") == has_bf16_products(torch.device("cuda", 0)) == multiplies
    assert has_bf16_products("cuda:1")  # planned for, not here
    assert not has_bf16_products("cpu")


def test_the_peak_of_memory_starts_anew():
    reset_peak_memory("cpu")
    block = bytearray(b"x") * (200 * 2**20)  # zeros would take no memory
    high = peak_memory_bytes("cpu")
    del block
    reset_peak_memory("cpu")
    assert peak_memory_bytes("cpu") < high - 100 * 2**20


def test_float16_overflow_has_a_remedy():
    assert overflow_remedy(torch.float16) == "float16 overflows above 65,504; use --dtype bfloat16 (dtype=)"
    assert "float16" not in overflow_remedy(torch.bfloat16)
