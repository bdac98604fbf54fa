import pytest
import torch

from s2q.core.devices import check_device
from s2q.core.errors import InvalidInputError, ResourceError


@pytest.fixture
def gpus(monkeypatch):
    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


@pytest.mark.parametrize("device", ["tpu9", "mps", "meta", "cuda:", "cuda:x", "CPU", ""])
def test_unknown_names(device):
    with pytest.raises(InvalidInputError, match="use cpu, cuda or cuda:N"):
        check_device(device)


def test_without_a_gpu(gpus):
    gpus(0)
    check_device("cpu")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ResourceError, match="has no CUDA device; use cpu"):
            check_device(device)


def test_with_two_gpus(gpus):
    gpus(2)
    for device in ("cpu", "cuda", "cuda:0", "cuda:1", torch.device("cpu"), torch.device("cuda", 1)):
        check_device(device)
    with pytest.raises(ResourceError, match="'cuda:2': this machine has 2 CUDA devices; use cuda:1"):
        check_device("cuda:2")
