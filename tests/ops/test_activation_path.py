import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quick import quick
from s2q.common.errors import InvalidInputError
from s2q.core.cubes import QuantizedMeans
from s2q.core.input_path import InputTensors
from s2q.core.qparams import quantize_per_token
from s2q.ops.activation_path import BACKENDS, activation_path, transform_input
from s2q.ops.kronecker import scaled_kronecker


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows, columns, seed=0):
    return torch.linalg.qr(draw(rows, columns, seed=seed))[0]


def vectors(features):
    return {"shift": draw(features, seed=1) * 0.3, "scale": draw(features, seed=2).exp()}


def test_reference_is_the_path_of_a_packed_linear():
    x, parts = draw(5, 24), vectors(24)
    left, right, basis = draw(4, 4, seed=3), draw(6, 6, seed=4), orthonormal(24, 2).bfloat16()
    codes, token_scale, coefficients = activation_path(
        x,
        InputTensors(**parts, left=left, right=right, low_rank_basis=basis, clip_ratio=torch.tensor([0.9])),
        num_bits=6,
        backend="reference",
    )
    scaled = (x - parts["shift"]) * parts["scale"]
    assert torch.equal(coefficients, scaled @ basis.float())
    rest = torch.addmm(scaled, coefficients, basis.float().t(), alpha=-1)
    rest = scaled_kronecker(rest, left=left, right=right)
    expected = quantize_per_token(rest, num_bits=6, clip_ratio=0.9)
    assert torch.equal(codes, expected[0])
    assert torch.equal(token_scale, expected[1])


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_deflating_the_codes_are_those_without_a_branch(rotates, dtype):
    x, parts, basis = (40 * draw(300, 192)).to(dtype), vectors(192), orthonormal(192, 4).bfloat16()
    parts |= {"left": orthonormal(12, 12), "right": orthonormal(16, 16)} if rotates else {}
    codes, token_scale, coefficients = activation_path(
        x, InputTensors(**parts, low_rank_basis=basis, deflates=False), num_bits=6, backend="reference"
    )
    expected = activation_path(x, InputTensors(**parts), num_bits=6, backend="reference")
    assert torch.equal(codes, expected[0])
    assert torch.equal(token_scale, expected[1])
    deflated = activation_path(x, InputTensors(**parts, low_rank_basis=basis), num_bits=6, backend="reference")
    assert torch.equal(coefficients, deflated[2])
    assert not torch.equal(codes, deflated[0])
    exact = ((x.double() - parts["shift"].double()) * parts["scale"].double()) @ basis.double()
    assert (coefficients.double() - exact).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-6) * exact.norm()
    on_cpu = activation_path(x, InputTensors(**parts, low_rank_basis=basis, deflates=False), num_bits=6, backend="cpu")
    assert torch.equal(on_cpu[0], codes)
    assert torch.equal(on_cpu[1], token_scale)
    torch.testing.assert_close(on_cpu[2], coefficients, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)


def test_products_of_bf16_are_off_by_their_rounding_alone():
    x, parts = (40 * draw(64, 192)).bfloat16(), vectors(192)
    matrices = {"left": orthonormal(12, 12), "right": orthonormal(16, 16), "low_rank_basis": orthonormal(192, 4)}
    found, coefficients = transform_input(x, InputTensors(**parts, **matrices))
    assert found.dtype == torch.bfloat16
    assert coefficients.dtype == torch.float32
    wide = {name: one.double() for name, one in (parts | matrices).items()}
    exact, _ = transform_input(x.double(), InputTensors(**wide))
    # What a rounded coefficient leaves in the input is in the branch as well: add it to compare.
    rest = (coefficients.double() - transform_input(x.double(), InputTensors(**wide))[1]) @ wide["low_rank_basis"].t()
    exact -= scaled_kronecker(rest, left=wide["left"], right=wide["right"])
    error = (found.double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert 1e-3 < error < 6e-3
    half, _ = transform_input(x.half(), InputTensors(**parts, **matrices))
    assert half.dtype == torch.float32


def test_reference_keeps_the_dtype_without_parts():
    x = draw(3, 7).bfloat16()
    codes, token_scale, coefficients = activation_path(x, InputTensors(), num_bits=4)
    assert coefficients is None
    assert torch.equal(codes, quantize_per_token(x, num_bits=4)[0])
    assert torch.equal(token_scale, quantize_per_token(x, num_bits=4)[1])


def test_an_unknown_backend_is_refused():
    with pytest.raises(InvalidInputError, match="unknown backend 'cuda'.*triton"):
        activation_path(draw(1, 4), InputTensors(), num_bits=4, backend="cuda")


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that torch makes, int8 codes apart."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_view = isinstance(result, torch.Tensor) and result._is_view()
        if isinstance(result, torch.Tensor) and not is_view and result.is_floating_point():
            self.elements = max(self.elements, result.numel())
        return result


class TestTriton:
    @pytest.fixture(autouse=True)
    def _needs_triton(self):
        pytest.importorskip("triton")

    def both(self, x, *, num_bits, **parts):
        path = InputTensors(**parts)
        return BACKENDS["triton"](x, path, num_bits=num_bits), BACKENDS["reference"](x, path, num_bits=num_bits)

    def assert_equal(self, found, expected):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])

    def assert_close(self, found, expected):
        """Sums in another order: a code beside it at a rounding boundary, rarely."""
        difference = (found[0].int() - expected[0].int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).double().mean() < 1e-3
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=0)

    @pytest.mark.parametrize("num_bits", quick([3, 4, 5, 6, 8], 3, 8))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("features", quick([1, 77, 192], 1, 77))
    def test_without_rotation_the_bits_are_equal(self, num_bits, dtype, features):
        x = (draw(4, features) * 3).to(dtype)
        x[1] = 0
        for parts in ({}, vectors(features), {"scale": draw(features)}, {"shift": draw(features)}):
            found, expected = self.both(x, num_bits=num_bits, **parts)
            assert (found[0].dtype, found[1].dtype) == (torch.int8, torch.float32)
            self.assert_equal(found, expected)

    def test_long_tokens_take_several_blocks(self):
        self.assert_equal(*self.both(draw(2, 5000), num_bits=8, **vectors(5000)))

    @pytest.mark.parametrize("clip", [torch.tensor([0.7]), torch.tensor([[0.1], [0.5], [1.0]]), torch.tensor(0.9)])
    def test_clip_ratios(self, clip):
        self.assert_equal(*self.both(draw(3, 40), num_bits=4, clip_ratio=clip))
        self.assert_close(*self.both(draw(3, 192), num_bits=4, clip_ratio=clip, left=orthonormal(12, 12)))

    def test_rounding_is_to_even_and_scales_may_be_tiny(self):
        x = torch.tensor(
            [[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, 6.5], [1e-44, 1e-45, 0, 0, 0, 0, 0], [1e38, -1e38, 5, 0, 0, 0, 0]]
        )
        found, expected = self.both(x, num_bits=4)
        assert found[0][0].tolist() == [7, 0, 2, 2, 0, -2, 6]
        self.assert_equal(found, expected)

    def test_a_nan_is_not_hidden_and_stays_in_its_token(self):
        x = draw(3, 192)
        x[1, 5] = math.nan
        for parts in ({}, {"left": orthonormal(12, 12), "right": orthonormal(16, 16)}):
            found, expected = self.both(x, num_bits=6, **parts)
            assert found[1].isnan().flatten().tolist() == [False, True, False]
            assert torch.equal(found[0][::2], expected[0][::2])

    @pytest.mark.parametrize("grid", [(12, 16), (24, 32), (3, 7), (1, 20), (40, 48)])
    @pytest.mark.parametrize("num_bits", [4, 8])
    def test_rotations(self, grid, num_bits):
        n1, n2 = grid
        x = draw(9, n1 * n2) * 2
        x[4] = 0
        found, expected = self.both(
            x,
            num_bits=num_bits,
            **vectors(n1 * n2),
            left=draw(n1, n1, seed=3),
            right=draw(n2, n2, seed=4),
            clip_ratio=torch.tensor([0.9]),
        )
        self.assert_close(found, expected)

    @pytest.mark.parametrize(("n1", "n2"), [(96, 128), (48, 64), (40, 48)])
    def test_the_widths_of_the_models(self, n1, n2):
        parts = {"left": orthonormal(n1, n1), "right": orthonormal(n2, n2)}
        self.assert_close(*self.both(draw(2, n1 * n2), num_bits=6, **vectors(n1 * n2), **parts))

    def test_one_factor_alone(self):
        self.assert_close(*self.both(draw(3, 192), num_bits=8, left=orthonormal(12, 12)))
        self.assert_close(*self.both(draw(3, 96), num_bits=8, right=orthonormal(96, 96)))

    def test_a_factor_too_large_for_a_program_is_applied_outside(self):
        parts = {"right": orthonormal(160, 160), **vectors(160)}
        self.assert_close(*self.both(draw(3, 160), num_bits=8, **parts))

    def test_bf16_rotations_are_off_by_their_rounding(self):
        # The interpreter truncates to bf16, which doubles the error of a GPU.
        x, parts = draw(9, 192).bfloat16(), {"left": orthonormal(12, 12), "right": orthonormal(16, 16)}
        for num_bits in (4, 8):
            found, expected = self.both(x, num_bits=num_bits, **vectors(192), **parts)
            assert (found[0].int() - expected[0].int()).abs().max() <= 1
            values = [codes.double() * scale for codes, scale, _ in (found, expected)]
            power = (values[1] ** 2).mean()
            assert (values[0] - values[1]).pow(2).mean() < power * (4e-3 if num_bits == 4 else 4e-4)
        exact, _ = self.both(x.float(), num_bits=8, **vectors(192), **parts)
        from s2q.ops.activation_path.triton import activation_path as on_triton

        self.assert_equal(on_triton(x, InputTensors(**vectors(192), **parts), num_bits=8, precision="tf32x3"), exact)

    @pytest.mark.parametrize("rotates", [False, True])
    @pytest.mark.parametrize("deflates", [False, True])
    def test_low_rank_branch(self, rotates, deflates, monkeypatch):
        from s2q.ops.activation_path import triton

        monkeypatch.setattr(triton, "PIECE_ROWS", 4)
        parts = {"left": orthonormal(12, 12), "right": orthonormal(16, 16)} if rotates else {}
        parts |= {**vectors(192), "low_rank_basis": orthonormal(192, 3).bfloat16(), "clip_ratio": draw(10, 1).sigmoid()}
        found, expected = self.both(draw(10, 192), num_bits=6, deflates=deflates, **parts)
        torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-5)
        self.assert_close(found, expected)

    @pytest.mark.parametrize("deflates", [False, True])
    @pytest.mark.parametrize(("features", "rank"), [(192, 20), (200, 1), (77, 70)])
    def test_low_rank_branch_of_bf16_in_a_kernel_is_off_by_its_rounding(self, features, rank, deflates):
        parts = {**vectors(features), "low_rank_basis": orthonormal(features, rank).bfloat16(), "deflates": deflates}
        found, expected = self.both(draw(19, 2 * features).bfloat16()[:, :features], num_bits=8, **parts)
        assert (found[2] - expected[2]).norm() < 1e-2 * expected[2].norm()
        values = [codes.double() * scale for codes, scale, _ in (found, expected)]
        # The interpreter truncates the coefficients, which leaves that much more or less of them in the rest.
        left = (found[2] - expected[2]).norm() if deflates else 0
        assert (values[0] - values[1]).norm() < left + 2e-2 * values[1].norm()

    def test_a_low_rank_branch_that_does_not_fit_in_registers(self):
        with pytest.raises(InvalidInputError, match=r"rank 300; expected at most 256; use backend='reference'"):
            self.both(draw(3, 320), num_bits=8, low_rank_basis=orthonormal(320, 300))

    def test_a_rotation_in_blocks(self):
        self.assert_close(*self.both(draw(9, 192), num_bits=8, right=orthonormal(16, 16), **vectors(192)))

    @pytest.mark.parametrize("rotates", [None, (12, 16), (3, 160)])
    @pytest.mark.parametrize("branch", [False, True])
    def test_means_of_cubes_are_subtracted(self, rotates, branch, monkeypatch):
        from s2q.ops.activation_path import triton

        monkeypatch.setattr(triton, "PIECE_ROWS", 4)
        n1, n2 = rotates or (12, 16)
        parts = {"left": orthonormal(n1, n1), "right": orthonormal(n2, n2)} if rotates else {}
        parts |= {"low_rank_basis": orthonormal(n1 * n2, 3)} if branch else {}
        codes = (draw(4, n1 * n2, seed=5) * 20).to(torch.int8)
        means = QuantizedMeans(codes, draw(4, 1, seed=6).abs() / 20, torch.arange(10, dtype=torch.int32) // 3)
        path = InputTensors(**parts, **vectors(n1 * n2), clip_ratio=torch.tensor([0.8]))
        found, expected, without = (
            BACKENDS[backend](draw(10, n1 * n2), path, num_bits=4, means=given)
            for backend, given in (("triton", means), ("reference", means), ("reference", None))
        )
        self.assert_close(found, expected)
        assert not torch.equal(expected[0], without[0])

    @pytest.mark.parametrize("dtype", quick([torch.float32, torch.float16, torch.bfloat16], torch.bfloat16))
    @pytest.mark.parametrize("branch", quick([None, True, False], True))
    def test_outside_the_kernel_rows_are_prepared_in_pieces(self, dtype, branch, monkeypatch):
        from s2q.ops.activation_path import triton

        n1, n2 = 80, 96  # of CogVideoX-2B's wide inputs: outside below compute capability 9.0
        x, parts = draw(21, n1 * n2).to(dtype), {"left": orthonormal(n1, n1), "right": orthonormal(n2, n2)}
        parts |= vectors(n1 * n2) | {"clip_ratio": draw(21, 1).sigmoid()}
        if branch is not None:
            parts |= {"low_rank_basis": orthonormal(n1 * n2, 3), "deflates": branch}
        at_once = BACKENDS["triton"](x, InputTensors(**parts), num_bits=6)
        monkeypatch.setattr(triton, "PIECE_ROWS", 8)
        with LargestTensor() as seen:
            in_pieces = BACKENDS["triton"](x, InputTensors(**parts), num_bits=6)
        assert seen.elements == 8 * n1 * n2  # of whole tensors there are the codes and nothing else
        self.assert_close(in_pieces, at_once)
        if branch is not None:
            torch.testing.assert_close(in_pieces[2], at_once[2], rtol=1e-2, atol=1e-3)

    def test_strided_rows_and_no_rows(self):
        wide = draw(5, 400)
        for x in (wide[:, :192], wide[::2, 8:200], draw(192, 5).t()):
            self.assert_equal(*self.both(x, num_bits=6))
            self.assert_close(*self.both(x, num_bits=6, left=orthonormal(12, 12), right=orthonormal(16, 16)))
        for deflates in (True, False):
            codes, token_scale, coefficients = BACKENDS["triton"](
                draw(0, 192),
                InputTensors(low_rank_basis=orthonormal(192, 2), deflates=deflates, left=orthonormal(12, 12)),
                num_bits=4,
            )
            assert (codes.shape, token_scale.shape, coefficients.shape) == ((0, 192), (0, 1), (0, 2))

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(InvalidInputError, match="order 12 and 10"):
            BACKENDS["triton"](draw(2, 192), InputTensors(left=draw(12, 12), right=draw(10, 10)), num_bits=4)
        with pytest.raises(InvalidInputError, match="clip ratios"):
            BACKENDS["triton"](draw(3, 8), InputTensors(clip_ratio=torch.ones(2, 1)), num_bits=4)
        with pytest.raises(InvalidInputError, match="float64.*use backend='reference'"):
            BACKENDS["triton"](draw(3, 8).double(), InputTensors(), num_bits=4)
