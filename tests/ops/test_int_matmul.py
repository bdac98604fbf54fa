import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from extreme_products import failures
from quick import quick, quick_if
from s2q.common.processor import is_x86
from s2q.ops.int_matmul import cpu, int_matmul, reference

BITS = [(8, 8), (8, 7), (7, 8), (6, 8), (8, 4), (6, 4), (4, 4), (2, 2)]


def is_quick(x_bits, w_bits):
    return (x_bits, w_bits) in ((8, 8), (6, 4))


EXACT = pytest.mark.parametrize("multiply", [int_matmul, reference.int_matmul, cpu.int_matmul])


@pytest.fixture(params=["native", "pairs", "fp32"], autouse=True)
def instructions(request, monkeypatch):
    """How the CPU backend multiplies: as it would on this CPU, without VNNI, and without anything for integers."""
    if request.param == "pairs":
        monkeypatch.setattr(cpu, "has_int8_dot", lambda: False)
        if not cpu.adds_pairs(x_bits=8, w_bits=4):
            pytest.skip("no oneDNN that multiplies int8 on this CPU")
    elif request.param == "fp32":
        monkeypatch.setattr(cpu, "has_int8_dot", lambda: False)
        monkeypatch.setattr(cpu, "features", frozenset)


def codes(num_bits, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1), shape, dtype=torch.int8, generator=generator)


def exact(x, w):
    return x.long() @ w.long().t()


@EXACT
@pytest.mark.parametrize(("x_bits", "w_bits"), quick_if(is_quick, BITS))
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (33, 64, 17), (3, 1025, 2), (4, 5000, 3)])
def test_bit_equal_to_int64(multiply, x_bits, w_bits, shape):
    rows, inner, columns = shape
    x, w = codes(x_bits, (rows, inner), 0), codes(w_bits, (columns, inner), 1)
    product = multiply(x, w, x_bits=x_bits, w_bits=w_bits)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), exact(x, w))


@EXACT
@pytest.mark.parametrize("inner", [1023, 1024, 1025, 4097, 131071])
@pytest.mark.parametrize(("left", "right"), [(-128, -128), (-128, 127), (127, 127)])
def test_the_largest_sums_are_exact(multiply, inner, left, right):
    x, w = torch.full((2, inner), left, dtype=torch.int8), torch.full((3, inner), right, dtype=torch.int8)
    x[1, 0] += 1 if left < 0 else -1  # an odd sum: the first that a rounded fp32 could not hold
    assert torch.equal(multiply(x, w).long(), exact(x, w))


@EXACT
def test_narrow_codes_at_their_extremes_over_long_rows(multiply):
    x, w = torch.full((1, 70001), -32, dtype=torch.int8), torch.full((1, 70001), -8, dtype=torch.int8)
    x[0, 0] = 31
    w[0, 0] = 7
    assert torch.equal(multiply(x, w, x_bits=6, w_bits=4).long(), exact(x, w))


@EXACT
def test_no_rows_and_non_contiguous_operands(multiply):
    assert multiply(codes(8, (0, 8), 0), codes(8, (3, 8), 1)).shape == (0, 3)
    x, w = codes(8, (12, 9), 2).t(), codes(8, (5, 24), 3)[:, ::2]
    assert torch.equal(multiply(x, w).long(), exact(x, w))


def test_autocast_does_not_round_the_sums():
    x, w = codes(8, (4, 512), 4), codes(8, (6, 512), 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int_matmul(x, w).long(), exact(x, w))


def test_meta_tensors_give_a_shape():
    product = int_matmul(
        torch.empty(4, 8, dtype=torch.int8, device="meta"), torch.empty(3, 8, dtype=torch.int8, device="meta")
    )
    assert (product.shape, product.dtype) == ((4, 3), torch.int32)


def test_products_at_the_extremes_of_their_codes_are_exact(instructions):
    assert failures() == []


@pytest.mark.skipif(not is_x86(), reason="only x86 CPUs can be capped")
@pytest.mark.parametrize("cap", quick(["AVX2", "AVX512_CORE", "SSE41"], "AVX2"))
def test_products_are_exact_where_onednn_is_capped(instructions, request, cap):
    if request.node.callspec.params["instructions"] != "native":
        pytest.skip("in a process of its own")
    program = Path(__file__).parents[1] / "extreme_products.py"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": cap}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    name, pairs, none = done.stdout.rsplit(maxsplit=2)
    assert none == "[]"
    assert "VNNI" not in name
    assert pairs == str(cap != "SSE41" and cpu.adds_pairs(x_bits=8, w_bits=4))


def test_pairs_that_could_saturate_are_not_multiplied_in_pairs():
    for x_bits in range(2, 9):
        for w_bits in range(2, 9):
            largest = 2 * ((1 << x_bits) - 1) * (1 << (w_bits - 1))
            if cpu.adds_pairs(x_bits=x_bits, w_bits=w_bits):
                assert largest < 1 << 15
