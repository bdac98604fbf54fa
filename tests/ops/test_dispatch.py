import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.common.log import log_once
from s2q.ops import activation_path, attention_colsum, dispatch, rescaled_int_matmul, weight_only_matmul
from s2q.ops.architectures import SHARED_BYTES, nearest_architecture


@pytest.mark.slow
def test_packages_import_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import s2q, s2q.ops.activation_path, s2q.ops.rescaled_int_matmul, s2q.ops.attention_colsum"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)


class OnGpu:
    """What `dispatch` asks of a tensor."""

    dtype, is_cuda, device = torch.bfloat16, True, torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "obstacle"),
    [
        ((7, 5), "compute capability 7.5; expected 8.0"),
        ((8, 0), None),
        ((8, 7), None),
        ((10, 3), None),
        ((11, 0), "compute capability 11.0, for which no tiles are known"),
        ((12, 0), None),
        ((12, 1), None),
        ((13, 0), "compute capability 13.0, for which no tiles are known"),
    ],
)
def test_triton_runs_on_gpus_that_it_supports_and_the_reference_on_others(compiled, monkeypatch, capability, obstacle):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    backends = {"reference": lambda x: "the reference", "triton": lambda x: "the kernel"}
    found = dispatch.triton_obstacle(OnGpu())
    assert found is None if obstacle is None else obstacle in found
    result = dispatch.choose_backend("auto", OnGpu(), backends)(OnGpu())
    assert result == ("the kernel" if obstacle is None else "the reference")


OPS = (activation_path, attention_colsum, rescaled_int_matmul, weight_only_matmul)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_tiles_for_every_architecture(op):
    tiles = importlib.import_module(f"{op.__name__}.tiles")
    assert set(tiles.TILES) == set(SHARED_BYTES)


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((8, 0), 80), ((8, 7), 86), ((8, 8), 86), ((9, 0), 90), ((10, 1), 100), ((10, 3), 103), ((12, 1), 120)]
    + [((11, 0), None), ((13, 0), None), ((7, 5), None)],
)
def test_an_unlisted_gpu_takes_the_tiles_of_its_generation_that_need_the_least(capability, architecture):
    assert nearest_architecture(capability) == architecture
    family = [SHARED_BYTES[one] for one in SHARED_BYTES if one // 10 == capability[0]]
    listed = 10 * capability[0] + capability[1] in SHARED_BYTES
    assert architecture is None or listed or SHARED_BYTES[architecture] == min(family)


def test_auto_says_once_what_it_chose_and_warns_where_it_is_slow(compiled, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    log_once.cache_clear()
    caplog.set_level("DEBUG", logger="s2q.ops.dispatch")
    for _ in range(2):
        assert dispatch.resolve_backend("auto", OnGpu(), ("reference", "triton")) == "reference"
        assert dispatch.resolve_backend("auto", torch.zeros(1), ("reference", "cpu", "triton")) == "cpu"
    said = [(record.levelname, record.message) for record in caplog.records]
    assert [level for level, _ in said] == ["WARNING", "DEBUG"]
    assert "is 'reference', slower than full precision: got a GPU of compute capability 7.5" in said[0][1]
    assert said[1][1] == "on cpu, backend 'auto' of quantized linears is 'cpu'"


def test_a_rocm_gpu_is_refused(compiled, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in dispatch.triton_obstacle(OnGpu())


def test_a_cpu_tensor_is_refused_in_one_line(compiled):
    run = dispatch.triton_backend("activation_path")
    with pytest.raises(InvalidInputError) as raised:
        run(torch.zeros(1, 4), num_bits=4)
    assert str(raised.value) == (
        "activation_path: backend 'triton' cannot run: got a tensor on cpu; expected an NVIDIA GPU; "
        "use backend='reference'"
    )


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    run = dispatch.triton_backend("activation_path")
    with pytest.raises(InvalidInputError, match="triton is not installed; use backend='reference'"):
        run(torch.zeros(1, 4), num_bits=4)
    assert dispatch.choose_backend("auto", OnGpu(), {"reference": 1, "triton": 2}) == 1


@pytest.fixture
def current_device(monkeypatch):
    """The current GPU of a machine with two."""
    current = SimpleNamespace(index=0)

    def exchange(index):
        before, current.index = current.index, index
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    return current


class OnSecondGpu(OnGpu):
    device = torch.device("cuda", 1)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("fails", [False, True])
def test_triton_launches_on_the_device_of_the_tensor(compiled, monkeypatch, current_device, op, fails):
    launched_on = []

    def launch(x):
        launched_on.append(current_device.index)
        if fails:
            raise MemoryError
        return "the result"

    name = op.__name__.rpartition(".")[2]
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda x: None)
    monkeypatch.setattr(importlib, "import_module", lambda module: SimpleNamespace(**{name: launch}))
    run = op.BACKENDS["triton"]
    if fails:
        with pytest.raises(MemoryError):
            run(OnSecondGpu())
    else:
        assert run(OnSecondGpu()) == "the result"
    assert launched_on == [1]
    assert current_device.index == 0
