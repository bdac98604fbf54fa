"""The emulated GPUs refuse what real ones refuse, and count what they are asked for."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F

from emulation import emulator

pytestmark = [pytest.mark.gpu, pytest.mark.emulated]

MIXED = {
    "cuda and cpu": lambda: (torch.ones(3, device="cuda"), torch.ones(3)),
    "cuda:1 and cpu": lambda: (torch.ones(3, device="cuda:1"), torch.ones(3)),
    "cuda:0 and cuda:1": lambda: (torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")),
    "a scalar of the other GPU": lambda: (torch.ones(3, device="cuda:0"), torch.ones((), device="cuda:1")),
}
OPERATORS = {
    "add": lambda x, y: x + y,
    "in place": lambda x, y: x.mul_(y),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "cat": lambda x, y: torch.cat([x.reshape(-1), y.reshape(-1)]),
    "linear": lambda x, y: F.linear(x.reshape(1, -1), y.reshape(1, -1)),
    "foreach": lambda x, y: torch._foreach_add([x], [y]),
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("mixed", MIXED)
def test_operators_refuse_tensors_of_several_devices(mixed, operator):
    x, y = MIXED[mixed]()
    with pytest.raises(RuntimeError, match="at least two devices"):
        OPERATORS[operator](x, y)


@pytest.mark.parametrize("place", ["cuda:0", "cuda:1"])
def test_what_cuda_takes_is_taken(place):
    x = torch.arange(6.0, device=place)
    assert (x + torch.tensor(1.0)).device == torch.device(place)
    assert x[torch.tensor([0, 2])].tolist() == [0.0, 2.0]
    assert torch.zeros(6).copy_(x).tolist() == x.tolist()
    other = x.to("cuda:0" if place == "cuda:1" else "cuda:1")
    assert other.device != x.device
    other.add_(1)
    assert x.tolist() == [0, 1, 2, 3, 4, 5]


def test_indices_of_the_other_gpu_are_refused():
    with pytest.raises(RuntimeError, match="at least two devices"):
        torch.ones(3, device="cuda:0")[torch.tensor([0], device="cuda:1")]


def test_a_list_is_an_index_on_the_device():
    values = torch.arange(12.0).view(3, 4)
    on_device = values.to("cuda:1")
    assert torch.equal(on_device[:, [0, -1]].cpu(), values[:, [0, -1]])
    on_device[[0, 2]] = 5.0
    assert on_device.cpu()[:, 0].tolist() == [5.0, 4.0, 5.0]


def test_cuda_without_a_number_is_the_current_device():
    with torch.cuda.device(1):
        assert torch.ones(2, device="cuda").device == torch.device("cuda:1")
        assert torch.ones(2).cuda().device == torch.device("cuda:1")
    assert torch.ones(2, device="cuda").device == torch.device("cuda:0")


def test_the_current_device_is_that_of_the_thread():
    seen = []
    with torch.cuda.device(1):
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_device()))
        thread.start()
        thread.join()
    assert seen == [0]


@pytest.mark.parametrize("index", [0, 1])
def test_the_backward_pass_runs_in_a_thread_of_the_device(index):
    layer = torch.nn.Linear(3, 2).to(f"cuda:{index}")
    output, seen = layer(torch.ones(1, 3, device=f"cuda:{index}")), []
    output.register_hook(lambda _gradient: seen.append((torch.cuda.current_device(), threading.get_ident())))
    output.sum().backward()
    assert layer.weight.grad.device == torch.device("cuda", index)
    assert [device for device, _ in seen] == [index]
    assert seen[0][1] != threading.get_ident()


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.set_device(emulator.DEVICES)


def test_generators_have_the_type_of_their_device():
    with pytest.raises(RuntimeError, match="'cuda' device type for generator but found 'cpu'"):
        torch.randn(2, device="cuda", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="'cpu' device type for generator but found 'cuda:1'"):
        torch.randn(2, generator=torch.Generator("cuda:1"))
    assert torch.randn(2, device="cuda:1", generator=torch.Generator("cuda:1")).is_cuda


def test_numpy_needs_the_host():
    with pytest.raises(TypeError, match="can't convert cuda:1 device type tensor to numpy"):
        torch.ones(2, device="cuda:1").numpy()


def test_a_kernel_on_another_device_than_the_current_one_is_an_illegal_access():
    from s2q.ops.weight_only_matmul.triton import weight_only_matmul

    x, codes, scale = (torch.ones(2, 4), torch.ones(3, 4, dtype=torch.int8), torch.ones(3))
    on_second = [one.to("cuda:1") for one in (x, codes, scale)]
    with pytest.raises(RuntimeError, match="launched on cuda:0 with tensors on cuda:1: an illegal memory access"):
        weight_only_matmul(*on_second)
    with torch.cuda.device(1):
        torch.testing.assert_close(weight_only_matmul(*on_second).cpu(), torch.full((2, 3), 4.0))


@pytest.fixture
def stats():
    from emulation.emulator.stats import STATS

    STATS.reset()
    return STATS


def test_synchronisations_are_counted(stats):
    x = torch.arange(4.0, device="cuda:1")
    stats.reset()
    y = (x + 1).sum()
    assert not stats.synchronisations
    assert stats.kernels == 2
    for wait in (y.item, lambda: bool(y > 0), x.cpu, x.tolist, lambda: x[x > 1], lambda: torch.zeros(4).copy_(x)):
        before = sum(stats.synchronisations.values())
        wait()
        assert sum(stats.synchronisations.values()) == before + 1
    before = sum(stats.synchronisations.values())
    x.to("cpu", non_blocking=True)
    assert sum(stats.synchronisations.values()) == before


def test_copies_to_the_device_are_counted_by_the_kind_of_their_memory(stats):
    pageable, pinned = torch.ones(4), torch.ones(4).pin_memory()
    allocated = torch.empty(4, pin_memory=True)
    for one in (pageable, pinned, pinned[1:], allocated):
        one.to("cuda")
    counts = {}
    for (kind, _), count in stats.uploads.items():
        counts[kind] = counts.get(kind, 0) + count
    assert counts == {"pageable": 1, "pinned": 3}


def test_bytes_are_counted_once_for_tensors_that_share_them():
    before = torch.cuda.memory_allocated("cuda:1")
    torch.cuda.reset_peak_memory_stats("cuda:1")
    x = torch.zeros(100, device="cuda:1")
    view, twin = x[10:], x.detach()
    assert torch.cuda.memory_allocated("cuda:1") == before + 400
    twin = copy.deepcopy(view)
    assert torch.cuda.max_memory_allocated("cuda:1") == before + 760
    del x, view, twin
    assert torch.cuda.memory_allocated("cuda:1") == before
    assert torch.cuda.max_memory_allocated("cuda:1") == before + 760
    assert torch.cuda.memory_allocated("cuda:0") == torch.cuda.memory_allocated()


def test_optimizers_take_their_foreach_path(stats):
    layer = torch.nn.Linear(3, 2).to("cuda")
    layer(torch.ones(1, 3, device="cuda")).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    assert any("_foreach_" in name for name in stats.operators)
