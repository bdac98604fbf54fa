"""The Triton kernels compile for every architecture: few spills, tensor cores used, shared memory that fits.

Compilation needs no GPU, but a process in which Triton was not told to interpret, as the other tests tell it. Here one
variant of each kind is compiled; all of them are in a results file, whose keys hash what was compiled.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from s2q.ops.architectures import SHARED_BYTES

FOLDER = Path(__file__).parents[2] / "benchmarks"
RESULTS = json.loads((FOLDER / "results" / "triton-aot.json").read_text())
FIGURES = ("registers", "spills", "shared", "instructions")


def run(*command):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = [sys.executable, *command]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=FOLDER, check=False)


def test_the_results_file_has_every_variant_as_it_is_now():
    done = run("triton_aot.py", "--keys")
    assert done.returncode == 0, done.stderr
    stored = {(one["kernel"], one["arch"]): one["key"] for one in RESULTS["results"]}
    current = {(name, arch): key for name, arch, key in json.loads(done.stdout)}
    stale = sorted({one[0] for one in stored.keys() | current.keys() if stored.get(one) != current.get(one)})
    assert not stale, f"run {RESULTS['command']}; out of date: {stale}"


def test_no_variant_of_the_results_file_breaks_a_limit():
    assert {one["arch"] for one in RESULTS["results"]} == set(SHARED_BYTES)
    for one in RESULTS["results"]:
        assert one["problems"] == [], one
        assert one["spills"] <= 64, one
        assert one["shared"] <= SHARED_BYTES[one["arch"]], one
        assert bool(one["instructions"]) == (one["group"] not in ("quantize", "unpack weights")), one
    for one in RESULTS["results"]:
        if one["group"] == "int8 product" and one["arch"] != 90:
            assert "mma.sync s8" in one["instructions"], one


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_kernels_compile_ahead_of_time_to_what_the_results_file_says(arch):
    triton = pytest.importorskip("triton")
    done = run("triton_aot.py", "--arch", str(arch), "--quick", "--json")
    entries = json.loads(done.stdout or "[]")
    assert done.returncode == 0, [one for one in entries if one["problems"]] or done.stderr
    assert {one["group"] for one in entries} == {one["group"] for one in RESULTS["results"]}
    if triton.__version__ == RESULTS["versions"]["triton"]:
        stored = {(one["kernel"], one["arch"]): one for one in RESULTS["results"]}
        for one in entries:
            same = stored[one["kernel"], one["arch"]]
            assert [one[figure] for figure in FIGURES] == [same[figure] for figure in FIGURES], one


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("aot.SPILL_LIMIT = -1", "spills"),
        ("aot.SHARED_BYTES = {90: 1024}", "too much shared memory"),
        ("aot.INSTRUCTION = re.compile('(n)(o)(n)(e)')", "no tensor-core instruction"),
        ("aot.triton.compile = lambda *args, **settings: 1 / 0", "does not compile"),
    ],
)
def test_what_breaks_a_limit_fails_the_check(change, problem):
    code = (
        "import re, sys; sys.path.insert(0, '.'); import triton_aot as aot\n"
        f"{change}\n"
        "sys.argv = ['triton_aot', '--arch', '90', '--only', 'rotate bf16 x bf16 12x16']\n"
        "sys.exit(aot.main())"
    )
    done = run("-c", code)
    assert done.returncode == 1, done.stderr
    assert f"FAILED: {problem}" in done.stdout


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
keys = set()
triton.knobs.runtime.jit_cache_hook = count
from s2q.ops.activation_path.triton import activation_path
from s2q.ops.attention_colsum.triton import attention_colsum
from s2q.ops.rescaled_int_matmul.triton import rescaled_int_matmul
from s2q.ops.weight_only_matmul.triton import weight_only_matmul

for tokens in {tokens}:
    query, mask = torch.zeros(1, 2, tokens, 64, dtype=torch.bfloat16), {mask}
    attention_colsum(query, query, mask=mask)
    x, codes = torch.zeros(tokens, 64), torch.zeros(tokens, 64, dtype=torch.int8)
    activation_path(x, num_bits=6, left=torch.eye(8), right=torch.eye(8))
    rescaled_int_matmul(codes, torch.ones(tokens, 1), codes[:32], torch.ones(32), out_dtype=torch.float32)
    weight_only_matmul(x[: tokens % 17], codes[:32], torch.ones(32))
print(len(keys))
"""


@pytest.mark.parametrize(
    ("mask", "kernels"),
    [
        ("None", 5),
        ("torch.ones(1, 1, 1, tokens, dtype=torch.bool)", 5),
        ("torch.zeros(1, 2, 1, tokens)", 5),
        ("torch.ones(tokens, tokens, dtype=torch.bool)", 7),  # rows of a mask that are aligned, and rows that are not
    ],
)
def test_another_number_of_tokens_compiles_nothing_again(mask, kernels):
    tokens = (1537, 304, 311, 320, 1000, 1001, 999, 544)
    done = run("-c", COUNT.replace("{tokens}", str(tokens)).replace("{mask}", mask))
    assert done.stdout.split() == [str(kernels)], done.stderr


def test_the_instructions_are_read_from_what_the_assembler_gets():
    code = (
        "import sys; sys.path.insert(0, '.'); import triton_aot as aot\n"
        "print([' '.join(filter(None, one)) for one in aot.INSTRUCTION.findall(sys.argv[1])])"
    )
    ptx = (
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {%r1};\n"
        "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {%r1};\n"
        "tcgen05.mma.cta_group::1.kind::tf32 [ %r1 ];\n"
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1};\n"
    )
    done = run("-c", code, ptx)
    assert re.findall("'(.*?)'", done.stdout) == ["wgmma s8", "mma.sync s8", "tcgen05 tf32", "mma.sync bf16"]
