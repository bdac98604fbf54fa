"""The Triton kernels compile for every architecture: few spills, tensor cores used, shared memory that fits.

Compilation needs no GPU, but a process in which Triton was not told to interpret, as the other tests tell it. Here one
variant of each kind is compiled, one in all among the quick tests; all of them are in a results file, whose keys hash
what was compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from s2q.ops.architectures import SHARED_BYTES

FOLDER = Path(__file__).parents[2] / "benchmarks"
RESULTS = json.loads((FOLDER / "results" / "triton-aot.json").read_text())
FIGURES = ("registers", "spills", "shared", "instructions")
BROKEN = ("spills", "too much shared memory", "no tensor-core instruction", "does not compile")
PTX = """
wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {%r1};
mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {%r1};
tcgen05.mma.cta_group::1.kind::tf32 [ %r1 ];
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1};
"""
CHECKS = """
import contextlib, io, json, re, sys
from unittest import mock

sys.path.insert(0, ".")
import triton_aot as aot

def main(*arguments):
    sys.argv = ["triton_aot", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = aot.main()
    return code, printed.getvalue()

ptx = sys.argv[1]
print(json.dumps(["instructions", [" ".join(filter(None, match)) for match in aot.INSTRUCTION.findall(ptx)]]))
print(json.dumps(["keys", main("--keys")]))
changes = {
    "spills": mock.patch.object(aot, "SPILL_LIMIT", -1),
    "too much shared memory": mock.patch.object(aot, "SHARED_BYTES", {90: 1024}),
    "no tensor-core instruction": mock.patch.object(aot, "INSTRUCTION", re.compile("(n)(o)(n)(e)")),
    "does not compile": mock.patch.object(aot.triton, "compile", side_effect=ZeroDivisionError("by zero")),
}
for problem, change in changes.items():
    with change:
        print(json.dumps([problem, main("--arch", "90", "--only", "rotate bf16 x bf16 12x16")]))
"""


def run(*command):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = [sys.executable, *command]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=FOLDER, check=False)


@pytest.fixture(scope="module")
def printed():
    """Keys, refused limits and instructions, as one process prints them: importing Triton takes seconds."""
    done = run("-c", CHECKS, PTX)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


def test_the_results_file_has_every_variant_as_it_is_now(printed):
    stored = {(one["kernel"], one["arch"]): one["key"] for one in RESULTS["results"]}
    current = {(name, arch): key for name, arch, key in json.loads(printed["keys"][1])}
    stale = sorted({one[0] for one in stored.keys() | current.keys() if stored.get(one) != current.get(one)})
    assert not stale, f"run {RESULTS['command']}; out of date: {stale}"


def test_no_variant_of_the_results_file_breaks_a_limit():
    assert {one["arch"] for one in RESULTS["results"]} == set(SHARED_BYTES)
    for one in RESULTS["results"]:
        assert one["problems"] == [], one
        assert one["spills"] <= 64, one
        assert one["shared"] <= SHARED_BYTES[one["arch"]], one
        assert bool(one["instructions"]) == (one["group"] not in ("quantize", "unpack weights", "fake quantization")), (
            one
        )
    for one in RESULTS["results"]:
        if one["group"] == "int8 product" and one["arch"] != 90:
            assert "mma.sync s8" in one["instructions"], one


@pytest.fixture(scope="module")
def compiled():
    """A third of the kinds on each architecture, each kind on two architectures or more."""
    done = run("triton_aot.py", "--quick", "3", "--json")
    entries = json.loads(done.stdout or "[]")
    assert done.returncode == 0, [one for one in entries if one["problems"]] or done.stderr
    return entries


@pytest.mark.slow
def test_every_kind_of_kernel_and_every_architecture_is_compiled(compiled):
    architectures = {one["group"]: set() for one in RESULTS["results"]}
    for one in compiled:
        architectures[one["group"]].add(one["arch"])
    assert all(len(archs) >= 2 for archs in architectures.values()), architectures
    assert set.union(*architectures.values()) == set(SHARED_BYTES)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_kernels_compile_ahead_of_time_to_what_the_results_file_says(compiled, arch):
    triton = pytest.importorskip("triton")
    if triton.__version__ != RESULTS["versions"]["triton"]:
        pytest.skip("the results file is of another Triton")
    stored = {(one["kernel"], one["arch"]): one for one in RESULTS["results"]}
    entries = [one for one in compiled if one["arch"] == arch]
    for one in entries:
        same = stored[one["kernel"], one["arch"]]
        assert [one[figure] for figure in FIGURES] == [same[figure] for figure in FIGURES], one


@pytest.mark.parametrize("problem", BROKEN)
def test_what_breaks_a_limit_fails_the_check(printed, problem):
    code, table = printed[problem]
    assert code == 1, table
    assert f"FAILED: {problem}" in table


COUNT = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.get_current_stream(0)

    def get_current_stream(self, device):
        return 0

def count(*, key, **_):
    keys.add(key)
    return True  # compiles nothing

driver.set_active(Driver())
triton.knobs.runtime.jit_cache_hook = count
from s2q.core.input_path import InputTensors
from s2q.ops.activation_path.triton import activation_path
from s2q.ops.attention_colsum.triton import attention_colsum
from s2q.ops.rescaled_int_matmul.triton import rescaled_int_matmul
from s2q.ops.weight_only_matmul.triton import weight_only_matmul

masks = {
    "none": lambda tokens: None,
    "boolean, a key": lambda tokens: torch.ones(1, 1, 1, tokens, dtype=torch.bool),
    "additive, a head and key": lambda tokens: torch.zeros(1, 2, 1, tokens),
    "boolean, a pair": lambda tokens: torch.ones(tokens, tokens, dtype=torch.bool),
}
for name, mask_of in masks.items():
    keys = set()
    for tokens in (1537, 304, 311, 320, 1000, 1001, 999, 544):
        query = torch.zeros(1, 2, tokens, 64, dtype=torch.bfloat16)
        attention_colsum(query, query, mask=mask_of(tokens))
        x, codes = torch.zeros(tokens, 64), torch.zeros(tokens, 64, dtype=torch.int8)
        activation_path(x, InputTensors(left=torch.eye(8), right=torch.eye(8)), num_bits=6)
        rescaled_int_matmul(codes, torch.ones(tokens, 1), codes[:32], torch.ones(32), out_dtype=torch.float32)
        weight_only_matmul(x[: tokens % 17], codes[:32], torch.ones(32))
    print(f"{name}: {len(keys)}")
"""


def test_another_number_of_tokens_compiles_nothing_again():
    done = run("-c", COUNT)
    assert done.stdout.splitlines() == [
        "none: 5",
        "boolean, a key: 5",
        "additive, a head and key: 5",
        "boolean, a pair: 7",  # rows of a mask that are aligned, and rows that are not
    ], done.stderr


def test_the_instructions_are_read_from_what_the_assembler_gets(printed):
    assert printed["instructions"] == ["wgmma s8", "mma.sync s8", "tcgen05 tf32", "mma.sync bf16"]
