import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.core.packing import pack_codes
from s2q.ops.weight_only_matmul import BACKENDS, cpu, weight_only_matmul


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(rows, columns, bits, *, seed=0):
    limit = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit, (rows, columns), dtype=torch.int8, generator=generator)


def test_the_example_of_the_docstring(backend):
    w, scale = torch.tensor([[4, -1]], dtype=torch.int8), torch.tensor([0.25])
    y = weight_only_matmul(torch.tensor([[2.0, 1.0]]), w, scale, bias=torch.ones(1), backend=backend)
    assert y.tolist() == [[2.75]]


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17])
@pytest.mark.parametrize("depth", [1, 21, 300])
def test_equals_the_product_in_double_precision(backend, bits, rows, depth, monkeypatch):
    monkeypatch.setattr(cpu, "PIECE", 7 * depth)
    w, x, scale = codes(37, depth, bits), draw(rows, depth), draw(37, seed=1).abs()
    w[0], w[1] = -(1 << (bits - 1)), 0
    packed = pack_codes(w, num_bits=bits)
    exact = x.double() @ (w.double() * scale.double()[:, None]).t()
    bias = draw(37, seed=2)
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * (1 << bits) * depth**0.5}
    for own, added in ((None, 0.0), (bias, bias.double())):
        for stored in (w, packed):
            found = weight_only_matmul(x, stored, scale, bias=own, w_bits=bits, backend=backend)
            torch.testing.assert_close(found.double(), exact + added, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(backend, dtype):
    w, x, scale = codes(40, 64, 4), draw(2, 64).to(dtype), draw(40, seed=1).abs()
    exact = x.double() @ (w.double() * scale.double()[:, None]).t()
    found = weight_only_matmul(x, pack_codes(w, num_bits=4), scale, w_bits=4, backend=backend)
    assert found.dtype == dtype
    atol = float(exact.abs().max()) * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=atol)
    if backend != "reference":  # rounded once; by Triton's interpreter towards zero
        half = 1.01 if backend == "triton" else 0.51
        torch.testing.assert_close(found.double(), exact, rtol=half * torch.finfo(dtype).eps, atol=1e-4)


def test_strided_rows_equal_contiguous_ones(backend):
    x, w, scale = draw(6, 80)[::2, 8:72], codes(9, 64, 4), draw(9, seed=1).abs()
    packed = pack_codes(torch.cat([w, w]), num_bits=4)[:9]
    expected = BACKENDS["reference"](x.contiguous(), w, scale)
    torch.testing.assert_close(weight_only_matmul(x, packed, scale, w_bits=4, backend=backend), expected)


def test_grouped_scales_equal_the_double_product(backend):
    x, w, scale = draw(3, 24), codes(5, 24, 4), draw(5, 3).abs()
    exact = x.double() @ (w.double() * scale.double().repeat_interleave(8, dim=1)).t()
    found = weight_only_matmul(x, w, scale, backend=backend)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


def test_packed_codes_of_another_width_are_refused(backend):
    with pytest.raises(InvalidInputError, match="expected uint8"):
        weight_only_matmul(draw(2, 64), pack_codes(codes(5, 62, 4), num_bits=4), draw(5), w_bits=4, backend=backend)
