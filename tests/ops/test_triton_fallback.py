"""Where a kernel cannot run, "auto" computes in PyTorch and logs one line; "triton" raises one line."""

import importlib
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources, PTXASError

from s2q.common.errors import InvalidInputError
from s2q.common.log import log_once
from s2q.core.input_path import InputTensors
from s2q.ops import activation_path, attention_colsum, dispatch, rescaled_int_matmul, weight_only_matmul


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(*shape, seed=0):
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@dataclass
class Call:
    """A call of an op whose first kernel is `kernel`."""

    op: Any
    kernel: str
    run: Callable[[str], Any]

    @property
    def name(self):
        return self.op.__name__.rpartition(".")[2]

    @property
    def module(self):
        return importlib.import_module(f"{self.op.__name__}.triton")


X, GRID = draw(5, 192), {"left": draw(12, 12, seed=1), "right": draw(16, 16, seed=2)}
PRODUCT = (codes(5, 64), draw(5, 1).abs(), codes(24, 64, seed=1), draw(24).abs())
PACKED = (codes(300, 33), draw(300, 1).abs(), torch.randint(0, 255, (24, 17), dtype=torch.uint8), draw(24).abs())
CALLS = {
    "quantize": Call(
        activation_path,
        "quantize_kernel",
        lambda b: activation_path.activation_path(X, InputTensors(), num_bits=6, backend=b),
    ),
    "rotate": Call(
        activation_path,
        "rotate_quantize_kernel",
        lambda b: activation_path.activation_path(X, InputTensors(**GRID), num_bits=6, backend=b),
    ),
    "product": Call(
        rescaled_int_matmul,
        "rescaled_matmul_kernel",
        lambda b: rescaled_int_matmul.rescaled_int_matmul(*PRODUCT, out_dtype=torch.float32, backend=b),
    ),
    "unpack": Call(
        rescaled_int_matmul,
        "unpack_kernel",
        lambda b: rescaled_int_matmul.rescaled_int_matmul(*PACKED, w_bits=4, out_dtype=torch.float32, backend=b),
    ),
    "weight only": Call(
        weight_only_matmul,
        "weight_only_kernel",
        lambda b: weight_only_matmul.weight_only_matmul(X, codes(24, 192), draw(24).abs(), backend=b),
    ),
    "first pass": Call(
        attention_colsum,
        "log_sum_kernel",
        lambda b: attention_colsum.attention_colsum(X.view(1, 5, 12, 16), X.view(1, 5, 12, 16), backend=b),
    ),
    "second pass": Call(
        attention_colsum,
        "column_sum_kernel",
        lambda b: attention_colsum.attention_colsum(X.view(1, 5, 12, 16), X.view(1, 5, 12, 16), backend=b),
    ),
}
ERRORS = {
    "shared memory": OutOfResources(131072, 101376, "shared memory"),
    "a compiler pass": RuntimeError("PassManager::run failed"),
    "the assembler": PTXASError("Internal Triton PTX codegen error\n`ptxas` stderr:\nptxas fatal"),
    "no assembler": FileNotFoundError("[Errno 2] No such file or directory: '/opt/bin/ptxas'"),
    "no C compiler": RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    "no headers": subprocess.CalledProcessError(1, ["gcc", "main.c"]),
    "no libcuda": AssertionError("libcuda.so cannot found!\nPossible files are located at []."),
    "no driver": RuntimeError("0 active drivers ([]). There should only be one."),
    "an old driver": RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    "a stale module": ImportError("cuda_utils.so: undefined symbol: cuModuleLoad"),
    "no words": ValueError(),
}


class Broken:
    """A kernel whose launches raise."""

    def __init__(self, name, error):
        self.__name__, self.error, self.launches = name, error, 0

    def __getitem__(self, grid):
        return self.fail

    def fail(self, *args, **kwargs):
        self.launches += 1
        raise self.error


@pytest.fixture
def auto_is_triton(monkeypatch, caplog):
    """As on a GPU, with nothing refused and nothing said before."""
    resolve = dispatch.resolve_backend
    monkeypatch.setattr(dispatch, "resolve_backend", lambda b, *rest: "triton" if b == "auto" else resolve(b, *rest))
    monkeypatch.setattr(dispatch, "_REFUSED", {})
    log_once.cache_clear()
    caplog.set_level("WARNING", logger="s2q.ops.dispatch")


def assert_equal(found, expected):
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    assert all(torch.equal(one, other) for one, other in pairs if one is not None)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", CALLS)
def test_a_failed_launch_runs_in_pytorch_with_one_line_and_is_not_tried_again(
    auto_is_triton, monkeypatch, caplog, name, error
):
    call, broken = CALLS[name], Broken(CALLS[name].kernel, ERRORS[error])
    monkeypatch.setattr(call.module, call.kernel, broken)
    expected = call.run("reference")
    for _ in range(3):
        assert_equal(call.run("auto"), expected)
    assert broken.launches == 1
    (record,) = caplog.records
    first_line = (str(ERRORS[error]).splitlines() or [""])[0]
    assert record.message == (
        f"{call.name} on cpu runs in PyTorch, slower than its kernel: {call.kernel}: {type(ERRORS[error]).__name__}"
        + (f": {first_line}" if first_line else "")
    )


@pytest.mark.parametrize("name", CALLS)
def test_backend_triton_raises_one_line(auto_is_triton, monkeypatch, name):
    call = CALLS[name]
    monkeypatch.setattr(call.module, call.kernel, Broken(call.kernel, ERRORS["shared memory"]))
    with pytest.raises(InvalidInputError) as raised:
        call.run("triton")
    assert str(raised.value).startswith(f"{call.name}: backend 'triton' cannot run: {call.kernel}: OutOfResources")
    assert str(raised.value).endswith("; use backend='reference'")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["quantize", "product", "weight only", "first pass"])
def test_a_triton_that_cannot_be_imported_is_tried_once(auto_is_triton, monkeypatch, caplog, name):
    call, tries = CALLS[name], []

    def broken(module):
        tries.append(module)
        raise ImportError("libtriton.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    for _ in range(2):
        assert_equal(call.run("auto"), call.run("reference"))
    assert len(tries) == 1
    assert [record.message.partition("kernel: ")[2] for record in caplog.records] == [
        "triton cannot be imported: ImportError: libtriton.so: cannot open shared object file"
    ]
    with pytest.raises(InvalidInputError, match="cannot be imported"):
        call.run("triton")


def test_another_variant_of_a_refused_kernel_is_tried(auto_is_triton, monkeypatch, caplog):
    call = CALLS["rotate"]
    kernel, refused = call.module.rotate_quantize_kernel, []

    class TooLargeFor64:
        __name__ = "rotate_quantize_kernel"

        def __getitem__(self, grid):
            def run(*args, **settings):
                if settings["ROWS"] == 32:
                    refused.append(settings)
                    raise ERRORS["shared memory"]
                return kernel[grid](*args, **settings)

            return run

    monkeypatch.setattr(call.module, "rotate_quantize_kernel", TooLargeFor64())
    wide, factors = draw(3, 1024), {"left": draw(32, 32), "right": draw(32, 32)}
    for _ in range(2):
        activation_path.activation_path(wide, InputTensors(**factors), num_bits=6)
        call.run("auto")
    assert len(refused) == len(caplog.records) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
    ],
)
def test_errors_that_are_not_the_kernels_are_raised(auto_is_triton, monkeypatch, error):
    call = CALLS["product"]
    monkeypatch.setattr(call.module, call.kernel, Broken(call.kernel, error))
    with pytest.raises(type(error), match=str(error)[:20].replace("[", r"\[")):
        call.run("auto")


def test_a_module_that_found_no_memory_is_tried_again(auto_is_triton, monkeypatch):
    call = CALLS["product"]
    broken = Broken(call.kernel, RuntimeError("Triton Error [CUDA]: out of memory"))
    monkeypatch.setattr(call.module, call.kernel, broken)
    for _ in range(2):
        assert_equal(call.run("auto"), call.run("reference"))
    assert broken.launches == 2


def test_heads_without_a_tile_run_in_pytorch_with_one_line(auto_is_triton, caplog):
    query, key = draw(1, 1, 3, 300), draw(1, 1, 4, 300, seed=1)
    expected = attention_colsum.attention_colsum(query, key, backend="reference")
    for _ in range(2):
        assert torch.equal(attention_colsum.attention_colsum(query, key), expected)
    (record,) = caplog.records
    assert record.message.startswith(
        "attention_colsum on cpu runs in PyTorch, slower than its kernel: got heads of 300"
    )
    with pytest.raises(InvalidInputError, match="heads of 300 features"):
        attention_colsum.attention_colsum(query, key, backend="triton")


def test_wrong_shapes_are_raised_not_computed(auto_is_triton):
    with pytest.raises(InvalidInputError, match="order 12 and 10"):
        activation_path.activation_path(X, InputTensors(left=draw(12, 12), right=draw(10, 10)), num_bits=4)
