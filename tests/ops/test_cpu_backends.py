"""The CPU backends of a linear's ops: the same integers as the reference, whatever the number of rows."""

import pytest
import torch

from quick import quick
from s2q.common.errors import InvalidInputError
from s2q.core.cubes import QuantizedMeans
from s2q.core.input_path import InputTensors
from s2q.core.packing import pack_codes
from s2q.ops.activation_path import BACKENDS as PATHS
from s2q.ops.activation_path import activation_path, transform_input
from s2q.ops.activation_path import cpu as path_cpu
from s2q.ops.int_matmul import cpu as int_cpu
from s2q.ops.rescaled_int_matmul import BACKENDS as PRODUCTS
from s2q.ops.rescaled_int_matmul import cpu as product_cpu
from s2q.ops.rescaled_int_matmul import rescaled_int_matmul


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(rows, columns, bits, *, seed=0):
    limit = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit, (rows, columns), dtype=torch.int8, generator=generator)


@pytest.fixture(params=["vnni", "pairs", "fp32"])
def instructions(request, monkeypatch):
    """What the CPU multiplies integers with."""
    if request.param == "vnni":
        if not int_cpu.adds_in_32_bits():
            pytest.skip("the processor has no VNNI instructions")
        return
    monkeypatch.setattr(int_cpu, "has_int8_dot", lambda: False)
    if request.param == "fp32":
        monkeypatch.setattr(int_cpu, "features", frozenset)
    elif not int_cpu.adds_pairs(x_bits=8, w_bits=4):
        pytest.skip("no oneDNN that multiplies int8 on this CPU")


@pytest.mark.parametrize("rows", [1, 37, 64, 101])
@pytest.mark.parametrize(("x_bits", "w_bits"), [(6, 4), (8, 8), (8, 4), (8, 7), (4, 3), (5, 5)])
def test_products_are_those_of_the_reference(monkeypatch, instructions, rows, x_bits, w_bits):
    for name, size in (("ROWS", 64), ("COLUMNS", 20), ("EPILOGUE_ROWS", 24)):  # several pieces each
        monkeypatch.setattr(product_cpu, name, size)
    x, w = codes(rows, 51, x_bits), codes(29, 51, w_bits, seed=1)
    x[0], w[0] = -(1 << (x_bits - 1)), -(1 << (w_bits - 1))  # the extremes, and their largest product
    arguments = x, draw(rows, 1).abs(), w, draw(29, seed=2).abs()
    branch = {"low_rank_input": draw(rows, 3, seed=4), "low_rank_weight": draw(29, 3, seed=5).bfloat16()}
    rest = {"bias": draw(29, seed=3), **branch, "x_bits": x_bits, "w_bits": w_bits}
    for dtype in (torch.float32, torch.bfloat16):
        for own in (rest, {"x_bits": x_bits, "w_bits": w_bits}):
            exact = PRODUCTS["reference"](*arguments, **own, out_dtype=dtype)
            last_bit = 3e-7 if dtype == torch.float32 else 8e-3
            found = PRODUCTS["cpu"](*arguments, **own, out_dtype=dtype)
            torch.testing.assert_close(found, exact, rtol=last_bit, atol=last_bit * float(exact.abs().amax()))
    ones = torch.ones(rows, 1), torch.ones(29)
    sums = PRODUCTS["cpu"](x, ones[0], w, ones[1], x_bits=x_bits, w_bits=w_bits, out_dtype=torch.float32)
    assert torch.equal(sums.long(), x.long() @ w.long().t())  # exact: all of them below 2^24
    wide = (x.double() @ w.double().t()) * arguments[1].double() * arguments[3].double()
    plain = PRODUCTS["cpu"](*arguments, x_bits=x_bits, w_bits=w_bits, out_dtype=torch.float32)
    torch.testing.assert_close(plain.double(), wide, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [3, 4])
def test_packed_and_strided_codes(bits, instructions):
    w = codes(10, 21, bits)
    x = codes(30, 42, 6)[:, ::2]
    scales = draw(30, 1).abs(), draw(10).abs()
    expected = rescaled_int_matmul(x.contiguous(), scales[0], w, scales[1], out_dtype=torch.float32)
    packed = pack_codes(w, num_bits=bits)
    found = rescaled_int_matmul(x, scales[0], packed, scales[1], w_bits=bits, out_dtype=torch.float32, backend="cpu")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_grouped_scales_on_every_backend(instructions):
    x, w, scale = codes(6, 24, 6), codes(5, 24, 4), draw(5, 3).abs()
    expected = sum(
        (x[:, part].double() @ w[:, part].double().t()) * scale[:, group].double()
        for group, part in enumerate(slice(8 * index, 8 * index + 8) for index in range(3))
    )
    for backend in ("auto", "reference", "cpu"):
        found = rescaled_int_matmul(x, torch.ones(6, 1), w, scale, out_dtype=torch.float32, backend=backend)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


DTYPES = (torch.float32, torch.bfloat16)
PARTS = [
    (),
    ("shift", "scale"),
    ("left",),
    ("right",),
    ("left", "right"),
    ("blocks",),
    ("scale16", "blocks"),
    ("scale16", "left", "right", "basis"),
    ("scale16", "basis", "whole"),
    ("shift", "scale16", "left", "right"),
    ("shift", "scale", "left", "right", "basis"),
    ("basis", "whole"),
    ("shift", "scale", "basis", "whole"),
    ("shift", "scale", "left", "right", "basis", "whole"),
]


@pytest.mark.parametrize("dtype", quick([torch.float32, torch.bfloat16, torch.float16, torch.float64], *DTYPES))
@pytest.mark.parametrize("rows", quick([0, 1, 32, 101], 0, 101))
@pytest.mark.parametrize("parts", PARTS)
def test_the_activation_path_is_that_of_the_reference(monkeypatch, dtype, rows, parts):
    monkeypatch.setattr(path_cpu, "CHUNK_BYTES", 40 * 24 * dtype.itemsize)
    monkeypatch.setattr(path_cpu, "MIN_ROWS", {})
    everything = {
        "shift": ("shift", draw(24, seed=1)),
        "scale": ("scale", draw(24, seed=2).abs() + 0.1),
        "scale16": ("scale", (draw(24, seed=2).abs() + 0.1).bfloat16().float()),
        "left": ("left", draw(4, 4, seed=3)),
        "blocks": ("right", draw(6, 6, seed=4)),
        "right": ("right", draw(6, 6, seed=4) if "left" in parts else draw(24, 24, seed=4)),
        "basis": ("low_rank_basis", torch.linalg.qr(draw(24, 3, seed=5))[0].bfloat16()),
        "whole": ("deflates", False),
    }
    path = InputTensors(clip_ratio=torch.tensor([0.9]), **dict(everything[part] for part in parts))
    x = draw(rows, 24, seed=6).to(dtype)
    x[rows // 2 : rows // 2 + 1] = 0
    exact, found = (PATHS[backend](x, path, num_bits=6) for backend in ("reference", "cpu"))
    last_bit = 2e-2 if dtype == torch.bfloat16 else 1e-5  # of sums of other lengths, which may round another way
    assert (found[0].int() - exact[0].int()).abs().sum() <= (1e-2 if dtype == torch.bfloat16 else 1e-3) * x.numel()
    torch.testing.assert_close(found[1], exact[1], rtol=last_bit, atol=0)
    assert (found[2] is None) == ("basis" not in parts)
    if found[2] is not None:
        torch.testing.assert_close(found[2], exact[2], rtol=max(last_bit, 1e-4), atol=1e-5)


@pytest.mark.parametrize("parts", [{}, {"scale": draw(24).abs()}, {"left": draw(4, 4), "right": draw(6, 6)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_of_cubes_are_subtracted_before_the_scale(monkeypatch, parts, dtype):
    monkeypatch.setattr(path_cpu, "CHUNK_BYTES", 40 * 24 * dtype.itemsize)
    monkeypatch.setattr(path_cpu, "MIN_ROWS", {})
    x, path = draw(101, 24).to(dtype), InputTensors(clip_ratio=torch.tensor([0.9]), **parts)
    rows = torch.arange(101, dtype=torch.int32) // 10
    means = QuantizedMeans(codes(11, 24, 8), draw(11, 1).abs() / 50, rows)
    kept = x.clone()
    exact, found = (PATHS[backend](x, path, num_bits=4, means=means) for backend in ("reference", "cpu"))
    assert torch.equal(x, kept)
    assert (found[0].int() - exact[0].int()).abs().sum() <= 1e-3 * x.numel()
    torch.testing.assert_close(found[1], exact[1], rtol=1e-5, atol=0)
    whole = transform_input(x, path)[0].double()
    rest = means.codes.double() * means.scale.double()
    rest = whole - rest.index_select(0, rows)
    restored = exact[0].double() * exact[1].double()
    assert float((restored - rest).square().mean() / rest.square().mean()) < 0.05  # 4 bits of the difference


def test_a_backend_that_cannot_run_names_the_reference():
    x = torch.empty(2, 8, device="meta")
    with pytest.raises(InvalidInputError, match=r"backend 'cpu' cannot run: got a tensor on meta.*backend='reference'"):
        activation_path(x, InputTensors(), num_bits=6, backend="cpu")
    with pytest.raises(InvalidInputError, match="unknown backend 'gpu'"):
        activation_path(x, InputTensors(), num_bits=6, backend="gpu")
