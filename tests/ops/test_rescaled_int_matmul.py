import pytest
import torch

from quick import slow
from s2q.common.errors import InvalidInputError
from s2q.core.packing import pack_codes, unpack_codes
from s2q.ops.level_values.reference import level_values as reference_values
from s2q.ops.rescaled_int_matmul import BACKENDS, rescaled_int_matmul


def draw_codes(num_bits, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1), shape, dtype=torch.int8, generator=generator)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x, x_scale, w, w_scale, bias=None, addend=None):
    total = (x.long() @ w.long().t()).double() * x_scale.double() * w_scale.double()
    for extra in (bias, addend):
        total = total if extra is None else total + extra.double()
    return total


@pytest.fixture(params=BACKENDS)
def product(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return BACKENDS[request.param]


def ones(rows, columns):
    return torch.ones(rows, 1), torch.ones(columns)


def test_the_example_of_the_docstring(product):
    x, w = torch.tensor([[2, 3]], dtype=torch.int8), torch.tensor([[4, -1]], dtype=torch.int8)
    scales = torch.tensor([[0.5]]), torch.tensor([0.25])
    result = product(x, scales[0], w, scales[1], bias=torch.tensor([1.0]), out_dtype=torch.float32)
    assert result.tolist() == [[1.625]]


SHAPES = [(1, 1, 1), (1, 192, 33), (3, 33, 7), (17, 129, 65), (70, 64, 40), (5, 320, 3), (261, 31, 66)]


@pytest.mark.parametrize(("x_bits", "w_bits"), [(8, 8), (6, 4), slow(4, 3), slow(5, 5), slow(8, 6)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packs", [False, True])
def test_sums_are_those_of_int64(product, x_bits, w_bits, shape, packs):
    rows, depth, columns = shape
    x, w = draw_codes(x_bits, (rows, depth), 0), draw_codes(w_bits, (columns, depth), 1)
    given = pack_codes(w, num_bits=w_bits) if packs else w
    x_scale, w_scale = ones(rows, columns)
    sums = product(x, x_scale, given, w_scale, x_bits=x_bits, w_bits=w_bits, out_dtype=torch.float32)
    assert torch.equal(sums.long(), x.long() @ w.long().t())  # below 2^24


@pytest.mark.parametrize("depth", [1024, 1000])
@pytest.mark.parametrize(("left", "right"), [(-128, -128), (-128, 127), (127, 127), (0, 127), (127, -8)])
def test_sums_of_extreme_codes_are_exact(product, depth, left, right):
    x, w = torch.full((2, depth), left, dtype=torch.int8), torch.full((3, depth), right, dtype=torch.int8)
    sums = product(x, torch.ones(2, 1), w, torch.ones(3), out_dtype=torch.float32)
    assert torch.equal(sums.long(), x.long() @ w.long().t())
    if right == -8:
        packed = pack_codes(w, num_bits=4)
        assert torch.equal(product(x, torch.ones(2, 1), packed, torch.ones(3), w_bits=4, out_dtype=torch.float32), sums)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rank", [None, 1, 4, 20])
@pytest.mark.parametrize("rows", [1, 20, 80])
def test_scales_bias_and_branch_equal_the_double_product(product, has_bias, rank, rows):
    x, w = draw_codes(6, (rows, 96), 0), draw_codes(4, (50, 96), 1)
    scales = draw(rows, 1).exp(), draw(50, seed=1).exp() * 0.01
    bias = draw(50, seed=2).bfloat16() if has_bias else None
    branch, addend = {}, None
    if rank is not None:  # coefficients as a bf16 model gives them
        branch = {
            "low_rank_input": draw(rows, rank, seed=3).bfloat16().float(),
            "low_rank_weight": draw(50, rank).bfloat16(),
        }
        addend = branch["low_rank_input"].double() @ branch["low_rank_weight"].double().t()
    expected = exact(x, scales[0], w, scales[1], bias, addend)
    options = {"bias": bias, **branch, "x_bits": 6, "w_bits": 4}
    for given in (w, pack_codes(w, num_bits=4)):
        found = product(x, scales[0], given, scales[1], **options, out_dtype=torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-5)
        rounded = product(x, scales[0], given, scales[1], **options, out_dtype=torch.bfloat16)
        assert rounded.dtype == torch.bfloat16
        # One rounding to bf16; the interpreter truncates, so a whole unit in the last place.
        torch.testing.assert_close(rounded.double(), expected, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branches", [False, True])
def test_rows_of_a_shared_output_are_added(product, dtype, branches):
    x, w, x_scale, w_scale = draw_codes(4, (30, 96), 0), draw_codes(4, (50, 96), 1), draw(30, 1).exp(), draw(50).exp()
    shared, rows = draw(7, 50, seed=3) * 100, torch.randint(0, 7, (30,), dtype=torch.int32)
    branch = {"low_rank_input": draw(30, 3), "low_rank_weight": draw(50, 3)} if branches else {}
    addend = shared.double().index_select(0, rows)
    if branches:
        addend += branch["low_rank_input"].double() @ branch["low_rank_weight"].double().t()
    options = {"x_bits": 4, "w_bits": 4, "shared_output": shared, "shared_rows": rows, **branch, "out_dtype": dtype}
    expected = exact(x, x_scale, w, w_scale, draw(50), addend)
    found = product(x, x_scale, w, w_scale, bias=draw(50), **options)
    tolerance = {"rtol": 2**-7, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-3}
    torch.testing.assert_close(found.double(), expected, **tolerance)


def test_strided_and_transposed_operands(product):
    x, w = draw_codes(8, (6, 200), 0), draw_codes(8, (9, 200), 1)
    for x_part, w_part in ((x[:, :96], w[:, 40:136]), (x[::2, 3:67], w[1::3, :64]), (x[:, ::2], w[:, ::2])):
        x_scale, w_scale = ones(len(x_part), len(w_part))
        found = product(x_part, x_scale, w_part, w_scale, out_dtype=torch.float32)
        assert torch.equal(found.long(), x_part.long() @ w_part.long().t())
    branch = {"low_rank_input": draw(2, 6).t(), "low_rank_weight": draw(9, 4)[:, ::2]}
    found = product(x, torch.ones(6, 1), w, torch.ones(9), **branch, out_dtype=torch.float32)
    addend = branch["low_rank_input"] @ branch["low_rank_weight"].t()
    torch.testing.assert_close(found.double(), exact(x, torch.ones(6, 1), w, torch.ones(9), addend=addend))


def test_no_rows_give_an_empty_result(product):
    result = product(
        draw_codes(8, (0, 8), 0), torch.ones(0, 1), draw_codes(8, (3, 8), 1), torch.ones(3), out_dtype=torch.float16
    )
    assert (result.shape, result.dtype) == ((0, 3), torch.float16)


def test_packed_codes_of_another_width_are_refused(product):
    with pytest.raises(InvalidInputError):
        product(
            draw_codes(4, (2, 8), 0),
            torch.ones(2, 1),
            torch.zeros(3, 8, dtype=torch.uint8),
            torch.ones(3),
            w_bits=4,
            out_dtype=torch.float32,
        )


@pytest.mark.parametrize("depth", [1, 2, 33, 96, 2100])
def test_unpacking_on_triton_equals_that_of_the_core(depth):
    pytest.importorskip("triton")
    from s2q.ops.rescaled_int_matmul.triton import unpack_nibbles

    packed = torch.randint(0, 256, (3, 2 * ((depth + 1) // 2)), dtype=torch.uint8)[:, : (depth + 1) // 2]
    assert torch.equal(unpack_nibbles(packed, in_features=depth), unpack_codes(packed, num_bits=4, in_features=depth))


def test_auto_takes_the_reference_on_a_cpu():
    x, w = draw_codes(8, (2, 8), 0), draw_codes(8, (3, 8), 1)
    found = rescaled_int_matmul(x, torch.ones(2, 1), w, torch.ones(3), out_dtype=torch.float64)
    assert found.dtype == torch.float64  # which Triton does not do


@pytest.mark.parametrize(
    ("rows", "depth", "columns", "groups"), [(5, 96, 40, 6), (3, 32, 4100, 2), (4, 33, 9, 3), (6, 50, 21, None)]
)
def test_levels_are_looked_up_and_multiplied(backend, rows, depth, columns, groups):
    x, w = draw_codes(8, (rows, depth), 0), draw_codes(4, (columns, depth), 1)
    levels = draw_codes(7, (16 if groups is None else 64,), 2)
    scale = None if groups is None else draw_codes(8, (columns, groups), 3)
    packed = pack_codes(w, num_bits=4)
    values = reference_values(levels, packed, scale, in_features=depth)
    x_scale, w_scale = draw(rows, 1).abs(), draw(columns).abs()
    found = rescaled_int_matmul(
        x, x_scale, packed, w_scale, levels=levels, group_scale=scale, out_dtype=torch.float32, backend=backend
    )
    torch.testing.assert_close(found.double(), exact(x, x_scale, values, w_scale), rtol=1e-6, atol=1e-6)
