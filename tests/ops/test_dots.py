"""Products of bf16 by dot-product instructions: oneDNN's bits, and PyTorch's operations where they are not taken."""

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.common.processor import features
from s2q.core.cubes import QuantizedMeans
from s2q.core.input_path import InputTensors
from s2q.core.packing import pack_codes
from s2q.ops import bits, fused
from s2q.ops import passes as passes_module
from s2q.ops.activation_path import BACKENDS as PATHS
from s2q.ops.passes import HIGHEST_RANK, LONGEST_ROW, SEGMENT, Passes, column_pairs
from s2q.ops.rescaled_int_matmul import rescaled_int_matmul


@pytest.fixture
def dots(passes):
    if not passes.has("activation_path") or "avx512_bf16" not in features():
        pytest.skip("no AVX512-BF16")
    assert passes.adds_bf16_branches, "their bits differ from those of PyTorch's BLAS"
    if "amx_bf16" in features():
        pytest.skip("oneDNN multiplies bf16 with AMX")
    assert passes.rotates, "their bits differ from oneDNN's"
    assert passes.rotates_wide_branches, "oneDNN sums products of wide inputs in other pieces"
    return passes


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def path_of(n1, n2, rank=0, **others):
    size = n1 * n2
    basis = torch.linalg.qr(draw(size, rank, seed=5))[0].bfloat16() if rank else None
    factors = {name: torch.linalg.qr(draw(n, n, seed=n))[0] for name, n in (("left", n1), ("right", n2))}
    parts = {"shift": draw(size, seed=1) * 0.3, "scale": draw(size, seed=2).exp(), **factors, "low_rank_basis": basis}
    return InputTensors(**(parts | others))


def assert_same(found, exact):
    assert (found[2] is None) == (exact[2] is None)
    for tensor, expected in zip(found, exact, strict=True):
        assert expected is None or torch.equal(tensor, expected)


def counted(monkeypatch):
    calls, exact = [], Passes.activation_path

    def count(self, *arguments, **options):
        calls.append(arguments)
        exact(self, *arguments, **options)

    monkeypatch.setattr(Passes, "activation_path", count)
    return calls


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("n1", "n2"),
    [(2, 2), (4, 6), (12, 16), (8, 48), (30, 64), (6, 70), (10, 98), (40, 48), (256, 2), (24, 32), (32, 32), (80, 96)],
)
@pytest.mark.parametrize("rank", [0, 2, 6, 33])
def test_codes_are_those_of_the_reference(n1, n2, rank, threads, dots, monkeypatch):
    calls, before = counted(monkeypatch), torch.get_num_threads()
    x = draw(77, 2 * n1 * n2).bfloat16()[:, : n1 * n2]
    x[3], x[4] = 0, x[4] * 1e3
    torch.set_num_threads(threads)
    try:
        for others in ({}, {"shift": None, "scale": None}, {"clip_ratio": draw(77, 1, seed=3).sigmoid()}):
            path = path_of(n1, n2, min(rank, n1 * n2), **others)
            exact, found = (PATHS[backend](x, path, num_bits=6) for backend in ("reference", "cpu"))
            assert (exact[2] is None) == (rank == 0)
            assert_same(found, exact)
    finally:
        torch.set_num_threads(before)
    assert len(calls) == 3


def test_a_branch_that_is_taken_from_the_weight_leaves_the_input(dots, monkeypatch):
    calls, x, path = counted(monkeypatch), draw(20, 192).bfloat16(), path_of(12, 16, 5)
    without, found = (
        PATHS["cpu"](x, path._replace(**parts), num_bits=6) for parts in ({"low_rank_basis": None}, {"deflates": False})
    )
    assert torch.equal(found[0], without[0])
    assert torch.equal(found[1], without[1])
    assert torch.equal(found[2], PATHS["cpu"](x, path, num_bits=6)[2])
    assert len(calls) == 3


@pytest.mark.parametrize("rank", [0, 3])
def test_means_are_subtracted_after_the_rotation(rank, dots, monkeypatch):
    calls, x, path = counted(monkeypatch), draw(50, 192).bfloat16(), path_of(12, 16, rank)
    codes = torch.randint(-128, 128, (6, 192), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    means = QuantizedMeans(codes, draw(6, 1).abs() / 50, torch.arange(50, dtype=torch.int32) % 6)
    exact, found = (PATHS[backend](x, path, num_bits=4, means=means) for backend in ("reference", "cpu"))
    assert torch.equal(found[0], exact[0])
    assert torch.equal(found[1], exact[1])
    assert len(calls) == 1


def test_numbers_that_are_not_finite(dots, monkeypatch):
    calls, x = counted(monkeypatch), draw(6, 192).bfloat16()
    x[1, 7], x[2, 7], x[3] = torch.nan, torch.inf, 1e38
    exact, found = (PATHS[backend](x, path_of(12, 16), num_bits=6) for backend in ("reference", "cpu"))
    torch.testing.assert_close(found[1], exact[1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[0], exact[0])
    assert bool(found[1][1].isnan())
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("x", "path"),
    [
        (draw(20, 192), path_of(12, 16)),
        (draw(20, 192).half(), path_of(12, 16)),
        (draw(20, 192).bfloat16(), path_of(12, 16, left=None, right=draw(192, 192))),
        (draw(20, 195).bfloat16(), path_of(13, 15)),
        (draw(20, 180).bfloat16(), path_of(12, 15)),
        (draw(0, 192).bfloat16(), path_of(12, 16)),
        (draw(192, 20).bfloat16().t(), path_of(12, 16)),
        (draw(2, 2 * LONGEST_ROW).bfloat16(), path_of(256, LONGEST_ROW // 128)),
        (draw(2, 516).bfloat16(), path_of(2, 258)),
        (draw(2, 1200).bfloat16(), path_of(24, 50, HIGHEST_RANK + 1)),
        (draw(2, 768).bfloat16(), path_of(24, 32, 1)),
    ],
    ids=["fp32", "fp16", "one factor", "odd orders", "an odd order", "no rows", "columns apart", "long rows"]
    + ["a large order", "a high rank", "rank 1 of a wide input"],
)
def test_other_inputs_are_left_to_pytorch(x, path, dots, monkeypatch):
    calls = counted(monkeypatch)
    exact, found = (PATHS[backend](x, path, num_bits=6) for backend in ("reference", "cpu"))
    assert torch.equal(found[0], exact[0])
    assert not calls


@pytest.mark.parametrize(
    "wrong",
    [
        {"shift": draw(191)},
        {"scale": draw(193)},
        {"left": draw(12, 14)},
        {"right": draw(16, 14)},
        {"left": draw(14, 14)},
        {"low_rank_basis": draw(190, 4).bfloat16()},
        {"clip_ratio": draw(7, 1)},
    ],
    ids=["shift", "scale", "left", "right", "order", "basis", "clip"],
)
def test_shapes_that_do_not_fit_are_an_error(wrong, dots):
    with pytest.raises(InvalidInputError, match="compiled passes: got a vector|activation path: got factors and basis"):
        PATHS["cpu"](draw(20, 192).bfloat16(), path_of(12, 16, 4, **wrong), num_bits=6)


@pytest.mark.parametrize(
    ("rows", "features"),
    [(torch.arange(20), 192), (torch.arange(20) % 3 - 1, 192), (torch.zeros(19), 192), (torch.zeros(20), 190)],
    ids=["6", "-1", "19", "190"],
)
def test_means_that_are_not_there_are_an_error(rows, features, dots):
    codes = torch.ones(6, features, dtype=torch.int8)
    means = QuantizedMeans(codes, torch.ones(6, 1), rows.int())
    with pytest.raises(InvalidInputError, match=r"means of cubes.*expected 192 features.*for 20 tokens"):
        PATHS["cpu"](draw(20, 192).bfloat16(), path_of(12, 16), num_bits=4, means=means)


def test_coefficients_of_an_odd_rank_are_contiguous(dots):
    found = PATHS["cpu"](draw(20, 192).bfloat16(), path_of(12, 16, 5), num_bits=6)[2]
    assert found.shape == (20, 5)
    assert found.is_contiguous()


def test_wide_branches_that_are_summed_otherwise_are_left_to_pytorch(dots, monkeypatch):
    calls, x, path = counted(monkeypatch), draw(40, 768).bfloat16(), path_of(24, 32, 4)
    monkeypatch.setattr(dots, "rotates_wide_branches", False)
    exact, found = (PATHS[backend](x, path, num_bits=6) for backend in ("reference", "cpu"))
    assert torch.equal(found[0], exact[0])
    PATHS["cpu"](x, path_of(24, 32), num_bits=6)
    assert len(calls) == 1
    monkeypatch.setattr(passes_module, "IN_ORDER", 256)
    assert not bits.paths_equal_torch(dots, bits.WIDE_PATHS)


def test_where_amx_multiplies_or_the_bits_differ_pytorch_rotates(dots, monkeypatch):
    fresh = Passes(dots._library)
    monkeypatch.setattr(fused, "features", lambda: features() | {"amx_bf16"})
    assert not fused._with_products(fresh).rotates
    assert fresh.adds_bf16_branches
    monkeypatch.setattr(fused, "features", lambda: features() - {"avx512_bf16"})
    fresh = fused._with_products(Passes(dots._library))
    assert (fresh.adds_branches, fresh.adds_bf16_branches, fresh.rotates) == (True, False, False)
    monkeypatch.undo()
    exact = Passes.activation_path

    def wrong(self, *arguments, codes, **options):
        exact(self, *arguments, codes=codes, **options)
        codes[-1, -1] ^= 1

    monkeypatch.setattr(Passes, "activation_path", wrong)
    assert not bits.paths_equal_torch(dots, bits.NARROW_PATHS)
    rescale = Passes.rescale

    def inexact(self, *tensors, branch=None, out):
        rescale(self, *tensors, branch=branch, out=out)
        out[-1, -1] *= 1 + 2**-7

    monkeypatch.setattr(Passes, "rescale", inexact)
    assert not bits.branches_equal_torch(dots, pairs=True)


@pytest.mark.parametrize("rank", [1, 2, 32, 33, 192])
@pytest.mark.parametrize("columns", [64, 100, SEGMENT, SEGMENT + 1, 4099])
def test_a_branch_of_bf16_is_added_in_pairs(rank, columns, dots, monkeypatch):
    given, rescale = [], Passes.rescale

    def heard(self, *tensors, branch=None, out):
        given.append(branch)
        rescale(self, *tensors, branch=branch, out=out)

    monkeypatch.setattr(Passes, "rescale", heard)
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-8, 8, (columns, 96), dtype=torch.int8, generator=generator)
    x = torch.randint(-32, 32, (300, 96), dtype=torch.int8, generator=generator)
    scales = draw(300, 1, seed=2).abs(), pack_codes(w, num_bits=4), draw(columns, seed=3).abs()
    low, weight = (draw(300, rank) * 1e3).bfloat16().float(), draw(columns, rank, seed=1).bfloat16()
    weight[0] = 0
    for branch, kind in (((low, weight), torch.int32), ((low + 1e-3, weight), torch.float32)):
        for dtype in (torch.float32, torch.bfloat16):
            given.clear()
            exact, found = (
                rescaled_int_matmul(x, *scales, None, *branch, x_bits=6, w_bits=4, out_dtype=dtype, backend=backend)
                for backend in ("reference", "cpu")
            )
            assert torch.equal(found, exact)
            assert {operand.dtype for joined in given for operand in joined} == {kind}


def test_pieces_of_a_weight_may_have_other_numbers_than_bf16(dots):
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randint(-8, 8, (rows, 96), dtype=torch.int8, generator=generator) for rows in (4099, 70))
    low, weight = draw(70, 8).bfloat16().float(), draw(4099, 8, seed=1).bfloat16().float()
    weight[4000] += 1e-4
    exact, found = (
        rescaled_int_matmul(
            x,
            draw(70, 1, seed=2).abs(),
            pack_codes(w, num_bits=4),
            draw(4099, seed=3).abs(),
            low_rank_input=low,
            low_rank_weight=weight,
            x_bits=6,
            w_bits=4,
            out_dtype=torch.bfloat16,
            backend=backend,
        )
        for backend in ("reference", "cpu")
    )
    assert torch.equal(found, exact)


@pytest.mark.parametrize(("n1", "n2", "rank"), [(256, 128, 0), (256, 128, 6), (12, 16, HIGHEST_RANK)])
def test_the_longest_rows_and_the_highest_rank(n1, n2, rank, dots, monkeypatch):
    calls, x = counted(monkeypatch), draw(9, n1 * n2).bfloat16()
    parts = {"low_rank_basis": draw(n1 * n2, rank, seed=5).bfloat16() / 200 if rank else None}
    exact, found = (PATHS[backend](x, path_of(n1, n2, **parts), num_bits=6) for backend in ("reference", "cpu"))
    assert_same(found, exact)
    assert len(calls) == 1


def test_pairs_have_the_first_number_in_the_lower_half(dots):
    whole = torch.arange(25.0).bfloat16()
    for matrix in (whole[:24].view(4, 6), whole[1:].view(4, 6), whole[:24].view(6, 4).t()):
        bits_of = matrix.float().contiguous().view(torch.int32) >> 16
        assert torch.equal(dots.row_pairs(matrix), bits_of[::2] | bits_of[1::2] << 16)
        assert torch.equal(column_pairs(matrix), bits_of[:, ::2] | bits_of[:, 1::2] << 16)


def test_numbers_that_bf16_does_not_have_make_no_pairs(dots):
    matrix = draw(5, 3).bfloat16().float()
    found = dots.reversed_pairs(matrix, segment=4)
    assert found.shape == (2, 2, 4)
    pairs = found.transpose(1, 2).reshape(8, 2).contiguous().view(torch.bfloat16).view(8, 2, 2).flip(2).flatten(1)
    assert torch.equal(pairs[:5, :3].float(), matrix)
    assert not bool(pairs[5:].any() or pairs[:, 3:].any())
    for place, wrong in ((4, 2), 1.0001), ((4, 2), 1 + 2**-20), ((0, 0), 1e-45):
        matrix[place] = wrong
        assert dots.reversed_pairs(matrix, segment=1) is None
        matrix[place] = torch.inf
        assert dots.reversed_pairs(matrix, segment=1) is not None
