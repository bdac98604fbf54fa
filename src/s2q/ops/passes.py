"""The functions of `fused.c` and `dots.c`, with tensors as arguments (`ops.fused` compiles and loads them).

Shapes: `M` tokens, `I` in features, `O` out features, `C` cubes, `P` packed bytes of a row, `n1`, `n2` orders of the
factors of a rotation, `r` rank of a low-rank branch.
"""

import ctypes

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.core.input_path import InputTensors
from s2q.core.qparams import code_range

NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}
DTYPES = tuple(NAMES)
"""Dtypes that `quantize` reads and `rescale` writes."""

PANEL = 2048
"""Out features of `rescale` with a branch in fp32, at most."""

SEGMENT = 192
"""Out features of a branch in pairs that are multiplied at a time."""

RANKS = range(1, 193)
"""Ranks of a branch: BLAS sums over more of them in pieces."""

SMALLEST_BRANCH = 64
"""Rows and out features of `rescale` with a branch, at least: BLAS sums products of few rows in other orders."""

ORDERS = range(12, 65)
"""Orders of factors that `kronecker` takes: BLAS sums smaller products otherwise, and larger ones leave the caches."""

ROTATED_ORDERS = range(2, 257, 2)
"""Orders of the factors of `activation_path`; `ops.bits` compares the smallest and largest."""

IN_ORDER, _FEW = 512, 1024
"""Terms that oneDNN sums in order. It sums up to `_FEW` in pieces of `IN_ORDER`, and more in those of `_FEW`."""

LONGEST_ROW, HIGHEST_RANK = 1 << 15, 256
"""In features and rank of `activation_path`, at most: eight rows lie on a thread's stack, in 0.8 MiB."""

_PIECE, _PIECES = 32, 64  # rows whose gradients are summed in one thread, at least, and how many such sums at most


class Passes:
    """The functions of the library; tensors are contiguous on the CPU, and vectors fp32, unless it says otherwise.

    Attributes:
        multiplies: Whether there are products (with AVX-512), whose bits are those of PyTorch's BLAS.
        adds_branches: Whether `rescale` can add a low-rank branch, with the same bits.
        adds_bf16_branches: Whether `rescale` takes a branch in pairs of bf16 (with AVX512-BF16), with the same bits.
        rotates: Whether there is `activation_path` (with AVX512-BF16), whose bits are those of oneDNN.
        rotates_wide_branches: Whether that holds for low-rank branches of more than `IN_ORDER` in features too.

    Args:
        library: `fused.c` and `dots.c`, loaded.
    """

    multiplies = adds_branches = adds_bf16_branches = rotates = rotates_wide_branches = False

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def has(self, name: str) -> bool:
        """Whether the library has a function: some need instructions that a CPU may not have."""
        return hasattr(self._library, f"s2q_{name}")

    def scale(self, x: Tensor, shift: Tensor, scale: Tensor, *, out: Tensor) -> Tensor:
        """Write (x - shift) · scale, rounded once, to `out`; both bf16 [M, I], rows of x may be strided."""
        self._call("scale_bf16", x, x.stride(0), shift, scale, out, *x.shape)
        return out

    def quantize(self, y: Tensor, clip: Tensor, *, num_bits: int, codes: Tensor, scale: Tensor) -> None:
        """Quantize tokens y [M, I], bf16 or fp32; see `core.qparams.quantize_per_token`.

        Args:
            clip: [1] or [M].
            codes: Written, int8 [M, I].
            scale: Written, fp32 [M, 1].
        """
        name = f"quantize_{NAMES[y.dtype]}"
        self._call(name, y, clip, int(len(clip) > 1), _qmax(num_bits), codes, scale, *y.shape)

    def fake_quantize(
        self, x: Tensor, clip: Tensor, *, num_bits: int, of_weight: bool, out: Tensor, amax: Tensor, scale: Tensor
    ) -> None:
        """Write x [M, I], fake-quantized by row, to `out`, and the largest magnitudes and scales [M]; all fp32.

        `clip` has one element or M; the scales of a weight are rounded to bfloat16; see `ops.fake_quantize`.
        """
        options = int(len(clip) > 1), _qmax(num_bits), int(of_weight)
        self._call("fake_quantize", x, clip, *options, out, amax, scale, *x.shape)

    def fake_quantize_gradient(
        self,
        x: Tensor,
        grad: Tensor,
        amax: Tensor,
        scale: Tensor,
        clip: Tensor,
        *,
        num_bits: int,
        of_weight: bool,
        grad_x: Tensor,
        grad_clip: Tensor,
    ) -> None:
        """Write the gradients of `fake_quantize` towards x and the clip ratio of each row [M]."""
        options = int(len(clip) > 1), _qmax(num_bits), int(of_weight)
        self._call("fake_quantize_gradient", x, grad, amax, scale, clip, *options, grad_x, grad_clip, *x.shape)

    def kronecker(self, x: Tensor, scale: Tensor, left: Tensor, right: Tensor, *, half: Tensor, out: Tensor) -> None:
        """Write (x ⊙ scale) (1 ⊗ right) to `half` and that by (left ⊗ 1) to `out`, all fp32 [M, I]; see `ORDERS`."""
        orders = left.shape[0], right.shape[0]
        self._call("kronecker", x, scale, left, right, half, out, *orders, *x.shape)

    def kronecker_gradient(
        self,
        x: Tensor,
        scale: Tensor,
        left: Tensor,
        right: Tensor,
        half: Tensor,
        grad: Tensor,
        *,
        grad_x: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients towards scale, left and right; write that towards x [M, I], unless it is None.

        The order of their sums depends on M and I alone.
        """
        (n1, n2), (rows, columns) = (left.shape[0], right.shape[0]), x.shape
        piece = max(-(-rows // _PIECES), _PIECE)
        sizes = (n1 * n1, n2 * n2, columns)
        sums = x.new_empty(-(-rows // piece), sum(sizes))
        factors = left, right.t().contiguous(), half
        self._call("kronecker_gradient", x, scale, *factors, grad, grad_x, sums, piece, n1, n2, rows, columns)
        of_left, of_right, of_scale = torch.split_with_sizes(sums.sum(dim=0), sizes)
        return of_scale, of_left.view(n1, n1), of_right.view(n2, n2)

    def rescale(
        self,
        sums: Tensor,
        w_scale: Tensor,
        x_scale: Tensor,
        bias: Tensor,
        *,
        branch: tuple[Tensor, Tensor] | None = None,
        out: Tensor,
    ) -> None:
        """Write sums · w_scale · x_scale + bias, int32 [M, O], to `out`, bf16 or fp32 [M, O], rows may be strided.

        A bias of -0 changes nothing, not even the sign of zero. A branch is coefficients [M, r] and a weight [r, O],
        whose product is added before the last rounding. Both are fp32, with O at most `PANEL`, or `reversed_pairs`: of
        [M, r] in segments of 1 and of [O, r] in those of `SEGMENT`.
        """
        name, vectors = NAMES[out.dtype], (sums, w_scale, x_scale, bias)
        if branch is None:
            self._call(f"rescale_{name}", *vectors, out, out.stride(0), *sums.shape)
            return
        kind = "branch" if branch[0].is_floating_point() else "pairs"
        self._call(f"rescale_{kind}_{name}", *vectors, *branch, branch[1].shape[-2], out, out.stride(0), *sums.shape)

    def row_pairs(self, matrix: Tensor) -> Tensor:
        """Return each two rows of a bf16 matrix [2K, N] as pairs, int32 [K, N], the first in the lower half."""
        out = torch.empty(len(matrix) // 2, matrix.shape[1], dtype=torch.int32, device="cpu")
        self._call("row_pairs", matrix.contiguous(), out, *out.shape)
        return out

    def reversed_pairs(self, matrix: Tensor, *, segment: int) -> Tensor | None:
        """Return pairs of columns of a matrix [N, r], fp32, for `rescale`; None if they are not all numbers of bf16."""
        rows, columns = matrix.shape
        shape = (-(-rows // segment), -(-columns // 2), segment)
        out, rest = (torch.empty(size, dtype=torch.int32, device="cpu") for size in (shape, 1))
        self._call("reversed_pairs", matrix, segment, out, rest, rows, columns)
        return None if rest.item() else out.squeeze(2) if segment == 1 else out

    def activation_path(
        self,
        x: Tensor,
        path: InputTensors,
        clip: Tensor,
        *,
        num_bits: int,
        means: tuple[Tensor, Tensor] | None = None,
        codes: Tensor,
        scale: Tensor,
        coefficients: Tensor | None,
    ) -> None:
        """Quantize x [M, I], bf16, on a path with both factors of a rotation; see `ops.activation_path`.

        Args:
            x: Rows may be strided.
            path: n1 and n2 are in `ROTATED_ORDERS`, r is even and at most `HIGHEST_RANK`, I at most `LONGEST_ROW`.
            clip: [1] or [M].
            means: fp32 [C, I] and the row of each token there, int32 [M], subtracted after the rotation.
            codes: Written, int8 [M, I].
            scale: Written, fp32 [M, 1].
            coefficients: Written where there is a basis, fp32 [M, r].

        Raises:
            InvalidInputError: If shapes do not fit, or a token's mean is not there: the pass would read beyond them.
        """
        (rows, size), left, right, basis = x.shape, path.left, path.right, path.low_rank_basis
        assert left is not None
        assert right is not None
        n1, n2, rank = len(left), len(right), 0 if basis is None else basis.shape[1]
        shapes = [tuple(factor.shape) for factor in (left, right, basis) if factor is not None]
        if n1 * n2 != size or shapes != [(n1, n1), (n2, n2), (size, rank)][: len(shapes)]:
            raise InvalidInputError(
                f"activation path: got factors and basis {shapes}; expected those of {size} features"
            )
        of_branch: tuple[Tensor | None, Tensor | None] = None, None
        if basis is not None:
            basis = basis.bfloat16()
            directions = column_pairs(basis).t().contiguous() if path.deflates else None
            of_branch = self.row_pairs(basis), directions
        piece = IN_ORDER if size <= _FEW else _FEW
        vectors = vector(path.shift, size, missing=0.0), vector(path.scale, size, missing=1.0)
        factors = column_pairs(left.bfloat16().t()), self.row_pairs(right.bfloat16()), n1, n2
        of_means = (None, None) if means is None else _checked_means(*means, x.shape)
        quantized = clip, int(len(clip) > 1), _qmax(num_bits), codes, scale, coefficients
        sizes = rank, piece // 2, *factors
        self._call("activation_path", x, x.stride(0), *vectors, *of_branch, *sizes, *of_means, *quantized, rows, size)

    def look_up(self, x: Tensor, table: Tensor, *, out: Tensor) -> Tensor:
        """Write the values of x [M, I] in a table [65536] by the bits of x, all bf16, to `out`."""
        self._call("look_up_bf16", x, table, out, *x.shape)
        return out

    def unpack(self, packed: Tensor, *, out: Tensor) -> None:
        """Unpack codes of up to 4 bits, uint8 [O, P], to int8 [O, 2P]; see `core.packing.unpack_codes`."""
        self._call("unpack", packed, out, *packed.shape)

    def values(self, packed: Tensor, levels: Tensor, group_scale: Tensor, *, out: Tensor) -> None:
        """Look up the levels of packed codes, int8 [O, 2P], scaled by group of whole bytes; see `ops.level_values`."""
        self._call("values", packed, levels, group_scale, group_scale.shape[1], out, *packed.shape)

    def nearest(self, y: Tensor, scale: Tensor, levels: Tensor, bounds: Tensor, *, out: Tensor) -> None:
        """Write the levels, fp32 [2^N], that are nearest to tokens y over their scales [M, 1]; see `ops.token_levels`.

        y is bf16 or fp32 [M, I], rows may be strided; out is int8. Bounds are halfway between levels.
        """
        name = f"nearest_{NAMES[y.dtype]}"
        self._call(name, y, y.stride(0), scale, bounds, levels, len(levels), out, *y.shape)

    def _call(self, name: str, *arguments: Tensor | int | float | None) -> None:
        """Call a function: tensors are pointers, whole numbers int64, others fp32; each always gets the same kinds.

        Raises:
            InvalidInputError: If a tensor is not on the CPU.
        """
        for value in arguments:
            if isinstance(value, Tensor) and not value.is_cpu:
                raise InvalidInputError(f"compiled pass {name}: got a tensor on {value.device}; expected the CPU")
        function = getattr(self._library, f"s2q_{name}")
        if function.argtypes is None:
            kinds = {int: ctypes.c_int64, float: ctypes.c_float}
            function.argtypes = [kinds.get(type(value), ctypes.c_void_p) for value in arguments]
        function(*[value.data_ptr() if isinstance(value, Tensor) else value for value in arguments])


def _qmax(num_bits: int) -> float:
    return float(code_range(num_bits)[1])


def _checked_means(values: Tensor, rows: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    lowest, highest = rows.aminmax()
    if (len(rows), values.shape[1]) != shape or lowest < 0 or highest >= len(values):
        raise InvalidInputError(
            f"means of cubes: got {list(values.shape)} and rows {int(lowest)} to {int(highest)} of {len(rows)} tokens; "
            f"expected {shape[1]} features and rows of these means for {shape[0]} tokens"
        )
    return values, rows


def column_pairs(matrix: Tensor) -> Tensor:
    """Return each two columns of a bf16 matrix [N, 2K] as pairs, int32 [N, K]."""
    matrix = matrix.contiguous()
    return (matrix.clone() if matrix.storage_offset() % 2 else matrix).view(torch.int32)


def vector(value: Tensor | None, length: int, *, missing: float, single: bool = False) -> Tensor:
    """Return a vector as the passes read it, contiguous fp32 [length]: made once for all chunks.

    Args:
        value: Of any shape; None is a vector of constants.
        missing: The constant.
        single: Whether one number for all, [1], will do.

    Raises:
        InvalidInputError: If there are not as many numbers; the passes would read beyond them.
    """
    if value is None:
        return torch.full((1 if single else length,), missing, dtype=torch.float32, device="cpu")
    if value.numel() != length and not (single and value.numel() == 1):
        raise InvalidInputError(
            f"compiled passes: got a vector {list(value.shape)}; expected {length} numbers{' or one' if single else ''}"
        )
    return value.reshape(-1).float().contiguous()
