"""Every Triton kernel compiles for every GPU that is supported: no spills, tensor cores used, shared memory that fits.

Compilation needs no GPU, but a process in which Triton was not told to interpret, as the other tests tell it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
KERNELS = (
    "matmul w4",
    "matmul w8",
    "unpack",
    "quantize bf16",
    "rotate bf16",
    "weight only w4",
    "log_sum",
    "column_sum",
)


def run(*command):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = [sys.executable, *command]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=FOLDER, check=False)


@pytest.mark.parametrize("arch", ["80", "89", "90"])
def test_kernels_compile_ahead_of_time(arch):
    done = run("triton_aot.py", "--arch", arch)
    header, *lines = done.stdout.splitlines() or [done.stderr]
    assert done.returncode == 0, "\n".join(line for line in lines if "FAILED" in line or "does not compile" in line)
    assert header.split() == ["kernel", "arch", "registers", "spills", "shared", "instructions"]
    for kernel in KERNELS:
        assert any(line.startswith(kernel) for line in lines), kernel
    assert any("wgmma s32.s8.s8" in line for line in lines) == (arch == "90")


def test_a_kernel_that_spills_fails_the_check():
    code = (
        "import dataclasses, sys; sys.path.insert(0, '.'); import triton_aot as aot\n"
        "tile = aot.rotation_tile\n"
        "def narrow(*grid, **settings):\n"
        "    found = tile(*grid, **settings)\n"
        "    return found and dataclasses.replace(found, num_warps=1)\n"
        "aot.rotation_tile = narrow\n"
        "sys.argv = ['triton_aot', '--arch', '90', '--only', 'rotate bf16 x bf16 48x64']\n"
        "sys.exit(aot.main())"
    )
    done = run("-c", code)
    assert done.returncode == 1, done.stderr
    assert "FAILED: spills" in done.stdout
