"""Self-tests pass on this machine, and each kind of wrong backend fails one."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import s2q.ops
from s2q.benchmark import self_test
from s2q.benchmark.self_test import FAILED, OPS, PASSED, UNAVAILABLE, self_tests
from s2q.common.errors import InvalidInputError
from s2q.ops import dispatch, level_values


def by_backend(tests, backend):
    return {test.op: test for test in tests if test.backend == backend}


@pytest.fixture(scope="module")
def cpu_tests():
    return self_tests("cpu")


@pytest.fixture
def only(monkeypatch):
    """Leaves one op to test; all of them take a second."""
    return lambda name: monkeypatch.setattr(self_test, "OPS", {name: OPS[name]})


def test_every_op_with_a_table_of_backends_is_tested():
    names = {module.__name__.rpartition(".")[2] for module in vars(s2q.ops).values() if hasattr(module, "BACKENDS")}
    assert names == set(OPS) - {"linear w4a8", "linear nvfp4"}
    for name in names:
        assert OPS[name].backends == getattr(s2q.ops, name).BACKENDS


def test_the_cpu_passes_and_what_needs_a_gpu_says_why(cpu_tests):
    cpu = by_backend(cpu_tests, "cpu")
    assert {test.status for test in cpu.values()} == {PASSED}
    assert set(cpu) == {name for name, case in OPS.items() if "cpu" in case.backends}
    assert all(test.error <= test.tolerance and test.seconds > 0 for test in cpu.values())
    assert by_backend(cpu_tests, "fastest")["linear w4a8"].status == PASSED
    fp4 = by_backend(cpu_tests, "fp4")["linear nvfp4"]
    assert (fp4.status, fp4.error, "10.0" in fp4.reason) == (UNAVAILABLE, None, True)
    assert by_backend(cpu_tests, "reference") == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in OPS.items() if "cpu" in case.backends and " " not in name])
def test_a_backend_that_computes_something_else_fails(monkeypatch, name):
    right = OPS[name].backends["cpu"]

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        first, *others = result if isinstance(result, tuple) else (result,)
        first = torch.roll(first, 1, dims=0)
        return (first, *others) if isinstance(result, tuple) else first

    monkeypatch.setitem(OPS[name].backends, "cpu", wrong)
    tests = by_backend(self_tests("cpu"), "cpu")
    assert tests[name].status == FAILED
    assert "expected at most" in tests[name].reason
    assert tests["activation_path" if name != "activation_path" else "level_values"].status == PASSED


@pytest.mark.parametrize(
    ("result", "reason"),
    [(lambda: torch.full((48, 96), torch.nan), "not finite"), (lambda: torch.zeros(48, 95), "got shape (48, 95)")],
)
def test_other_shapes_and_values_that_are_not_finite_fail(only, monkeypatch, result, reason):
    only("level_values")
    monkeypatch.setitem(level_values.BACKENDS, "cpu", lambda *args, **kwargs: result())
    test = by_backend(self_tests("cpu"), "cpu")["level_values"]
    assert (test.status, test.error, reason in test.reason) == (FAILED, None, True)


def test_an_error_of_a_backend_is_the_finding(only, monkeypatch):
    only("level_values")

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setitem(level_values.BACKENDS, "cpu", broken)
    test = by_backend(self_tests("cpu"), "cpu")["level_values"]
    assert (test.status, test.reason) == (FAILED, "RuntimeError: no kernel image")


def test_the_case_of_fp4_computes_the_product_that_is_simulated(only, monkeypatch):
    """Where a GPU would multiply, the case reaches it; what it draws has the shapes that it takes."""
    compute = OPS["linear nvfp4"].draw(torch.Generator().manual_seed(0))
    with pytest.raises(InvalidInputError, match=r"backend 'fp4' cannot run: got a tensor on cpu"):
        compute("cpu", "fp4")
    assert bool(compute("cpu", "reference").isfinite().all())
    only("linear nvfp4")
    monkeypatch.setattr(self_test, "backend_obstacle", lambda backend, x: None)
    assert by_backend(self_tests("cpu"), "fp4")["linear nvfp4"].reason.startswith("InvalidInputError")


@pytest.mark.slow
def test_the_state_of_the_caller_changes_nothing(cpu_tests):
    before = [replace(test, seconds=0.0) for test in cpu_tests]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [replace(test, seconds=0.0) for test in self_tests("cpu")] == before
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.skipif(not dispatch.has_triton(), reason="triton is not installed")
def test_triton_passes_in_its_interpreter(request):
    if os.environ.get("TRITON_INTERPRET") == "1":
        tests = request.getfixturevalue("cpu_tests")
        statuses = {test.op: test.status for test in by_backend(tests, "triton").values()}
    else:  # on a GPU; the interpreter is chosen before Triton is imported
        code = (
            "from s2q.benchmark.self_test import self_tests\n"
            "print({test.op: test.status for test in self_tests('cpu') if test.backend == 'triton'})"
        )
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        statuses = eval(done.stdout)
    assert len(statuses) == sum("triton" in case.backends for case in OPS.values())
    assert set(statuses.values()) == {PASSED}
