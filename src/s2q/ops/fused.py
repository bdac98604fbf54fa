"""Elementwise passes on the CPU, fused into one each where there is a C compiler (`fused.c`), with PyTorch's bits.

PyTorch takes three to seven operations for scaling, quantization, unpacking and rescaling each, many more for trainable
quantization, and every one reads and writes all its data. Kronecker products with AVX-512 are passes as well. Gradients
that are sums, towards clip ratios, largest magnitudes and factors, have an order of their own, the same for any number
of threads. The compiler runs once, for about a second. The library is cached in $XDG_CACHE_HOME/s2q or ~/.cache/s2q, by
a hash of source, flags and processor, and runs in PyTorch's OpenMP threads. Where there is no compiler, or a result
differs from PyTorch's in a bit, or in more than the order of a sum, `passes` returns None and callers use PyTorch's
operations. S2Q_FUSED=0 in the environment has the same effect.

Shapes: `M` tokens, `I` in features, `O` out features, `P` packed bytes of a row.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from s2q.common.processor import features, is_x86
from s2q.common.torch_state import in_fresh_torch_state
from s2q.core.codebook import nearest_level, scaled_levels, table_and_scale
from s2q.core.memo import saved_as_usual
from s2q.core.packing import pack_codes, unpack_codes
from s2q.core.qparams import code_range, fake_quantize_rows, quantize_per_token

SOURCE = Path(__file__).with_name("fused.c")
VARIABLE = "S2Q_FUSED"
_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}
DTYPES = tuple(_NAMES)
"""Dtypes that `quantize` reads and `rescale` writes."""

PANEL = 2048
"""Out features of `rescale` with a branch, at most."""

RANKS = range(1, 193)
"""Ranks of such a branch: BLAS sums over more of them in pieces."""

_FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    f"-DPANEL={PANEL}",
)

SMALLEST_BRANCH = 64
"""Rows and out features of `rescale` with a branch, at least: BLAS sums products of few rows in other orders."""

ORDERS = range(12, 65)
"""Orders of factors that `kronecker` takes: BLAS sums smaller products otherwise, and larger ones leave the caches."""

_PIECE, _PIECES = 32, 64  # rows whose gradients are summed in one thread, at least, and how many such sums at most
_SECONDS = 60

logger = logging.getLogger(__name__)


class Passes:
    """The functions of the library; tensors are contiguous on the CPU, and vectors fp32, unless it says otherwise.

    Attributes:
        multiplies: Whether there are products (with AVX-512), whose bits are those of PyTorch's BLAS.
        adds_branches: Whether `rescale` can add a low-rank branch, with the same bits.

    Args:
        library: `fused.c`, loaded.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.multiplies = hasattr(library, "s2q_kronecker") and _products_equal_torch(self)
        self.adds_branches = self.multiplies and _branches_equal_torch(self)

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
        name = f"quantize_{_NAMES[y.dtype]}"
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
        both fp32, whose product is added before the last rounding; O is at most `PANEL`.
        """
        name, vectors = _NAMES[out.dtype], (sums, w_scale, x_scale, bias)
        if branch is None:
            self._call(f"rescale_{name}", *vectors, out, out.stride(0), *sums.shape)
        else:
            self._call(f"rescale_branch_{name}", *vectors, *branch, len(branch[1]), out, out.stride(0), *sums.shape)

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
        name = f"nearest_{_NAMES[y.dtype]}"
        self._call(name, y, y.stride(0), scale, bounds, levels, len(levels), out, *y.shape)

    def _call(self, name: str, *arguments: Tensor | int | float | None) -> None:
        """Call a function: tensors are pointers, whole numbers int64, others fp32; each always gets the same kinds."""
        function = getattr(self._library, f"s2q_{name}")
        if function.argtypes is None:
            kinds = {int: ctypes.c_int64, float: ctypes.c_float}
            function.argtypes = [kinds.get(type(value), ctypes.c_void_p) for value in arguments]
        function(*[value.data_ptr() if isinstance(value, Tensor) else value for value in arguments])


def _qmax(num_bits: int) -> float:
    return float(code_range(num_bits)[1])


def vector(value: Tensor | None, length: int, *, missing: float) -> Tensor:
    """Return a vector as the passes read it, contiguous fp32, or one of a constant: made once for all chunks."""
    if value is None:
        return torch.full((length,), missing, dtype=torch.float32, device="cpu")
    return value.reshape(-1).float().contiguous()


def passes() -> Passes | None:
    """Return the compiled passes; None where they cannot be compiled or differ from PyTorch's operations."""
    return compiled()[0]


@functools.cache
def compiled() -> tuple[Passes | None, str | None]:
    """Return the compiled passes, or None and the reason in a few words."""
    reason = _obstacle()
    if reason is None:
        try:
            loaded = Passes(_library())
            if _equals_torch(loaded):
                return loaded, None
            reason = "their bits differ from PyTorch's here"
        except (OSError, subprocess.SubprocessError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"
    logger.debug("elementwise passes run in PyTorch, not fused: %s", reason)
    return None, reason


def _obstacle() -> str | None:
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE}=0"
    if sys.platform != "linux":
        return f"not supported on {sys.platform}"
    return None if _compiler() else "no C compiler"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")


def _flags() -> list[str]:
    """Flags of the compiler, without instructions that PyTorch may not use here (`common.processor`)."""
    if not is_x86():
        return [*_FLAGS, "-mcpu=native"]
    return [*_FLAGS, "-march=native", *(["-mprefer-vector-width=512"] if "avx512" in features() else ["-mno-avx512f"])]


def _library() -> ctypes.CDLL:
    """Load the library from the cache, or compile it: into the cache if that is this user's alone, else for once."""
    compiler, flags = _compiler(), _flags()
    assert compiler is not None
    parts = (SOURCE.read_bytes(), repr((flags, os.path.realpath(compiler), platform.machine(), _processor())).encode())
    name = f"fused-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s2q"
    with contextlib.suppress(OSError, RuntimeError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_private(folder):
            if not (folder / name).exists():
                with tempfile.TemporaryDirectory(dir=folder) as temporary:
                    os.replace(_compile(compiler, flags, Path(temporary)), folder / name)
            if _is_private(folder / name):
                return ctypes.CDLL(str(folder / name))
    with tempfile.TemporaryDirectory() as temporary:
        return ctypes.CDLL(str(_compile(compiler, flags, Path(temporary))))


def _is_private(path: Path) -> bool:
    """Whether only this user, or root, can have written it."""
    status = path.stat()
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o022


def _compile(compiler: str, flags: list[str], folder: Path) -> Path:
    """Compile in two steps, to use the OpenMP that PyTorch has loaded, and no other."""
    compiled, library = folder / "fused.o", folder / "fused.so"
    for command in (
        [compiler, *flags, "-c", str(SOURCE), "-o", str(compiled)],
        [compiler, "-shared", "-nostdlib", str(compiled), "-o", str(library)],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
    return library


def _processor() -> str:
    """Return the processor's model and instructions, which `-march=native` depends on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))
    return platform.processor()


@in_fresh_torch_state
@torch.no_grad()
def _equals_torch(passes: Passes) -> bool:
    """Compare every function with PyTorch's operations, bit for bit, on numbers with ties, zeros and many sizes."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()

    rows, columns = 5, 131
    x, vectors, clip = draw(rows, columns), draw(2, columns), draw(rows, 1).sigmoid()
    x[0], x[1, ::2] = 0, x[1, ::2].round()
    half = x.bfloat16()
    checks = [
        torch.equal(
            passes.scale(half, *vectors, out=half.clone()), ((half.float() - vectors[0]) * vectors[1]).bfloat16()
        )
    ]
    table = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    found = passes.look_up(half.contiguous(), table.flip(0), out=torch.empty_like(half))
    checks.append(torch.equal(found.view(torch.int16), half.view(torch.int16).bitwise_not()))
    for y in (x, half):
        codes, scale = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, 1)
        passes.quantize(y, clip.flatten(), num_bits=4, codes=codes, scale=scale)
        expected = quantize_per_token(y, num_bits=4, clip_ratio=clip)
        checks += [torch.equal(codes, expected[0]), torch.equal(scale, expected[1])]
    sums = torch.randint(-(1 << 22), 1 << 22, (rows, columns), dtype=torch.int32, generator=generator)
    for dtype in _NAMES:
        for bias in (vectors[1] * 1e6, None):
            out, total = torch.empty(rows, columns, dtype=dtype), sums.float() * vectors[0]
            passes.rescale(sums, vectors[0], clip, vector(bias, columns, missing=-0.0), out=out)
            expected_out = total * clip if bias is None else torch.addcmul(bias, total, clip)
            checks.append(torch.equal(out, expected_out.to(dtype)))
    w = torch.randint(-8, 8, (rows, 2 * columns), dtype=torch.int8, generator=generator)
    unpacked = torch.empty_like(w)
    packed = pack_codes(w, num_bits=4)
    passes.unpack(packed, out=unpacked)
    return (
        all(checks)
        and torch.equal(unpacked, w)
        and _levels_equal_torch(passes, packed, x)
        and all(_gradients_equal_torch(passes, x, clip, of_weight=of_weight) for of_weight in (False, True))
    )


def _levels_equal_torch(passes: Passes, packed: Tensor, x: Tensor) -> bool:
    """The same for the passes of levels."""
    levels = torch.arange(-128, 128, 4).remainder(113).sub(50).to(torch.int8)  # four tables
    group_scale = torch.tensor([[127], [-128], [0], [66], [-3]], dtype=torch.int8)
    codes = unpack_codes(packed, num_bits=4, in_features=2 * packed.shape[1])
    values, (table, scale) = torch.empty_like(codes), table_and_scale(group_scale)
    passes.values(packed, levels, group_scale, out=values)
    looked_up = levels[codes.int() + 8 + 16 * table.int()]
    checks = [torch.equal(values, scaled_levels(looked_up, scale).to(torch.int8))]
    levels = torch.arange(-127, 128, 17, dtype=torch.int8)
    wide, scales = levels.float(), x.abs().amax(dim=1, keepdim=True) / 100
    for y in (x, x.bfloat16()):
        found = torch.empty(y.shape, dtype=torch.int8)
        passes.nearest(y, scales, wide, (wide[1:] + wide[:-1]) / 2, out=found)
        expected = wide[nearest_level(y.float() / torch.where(scales == 0, 1.0, scales), wide)]
        checks.append(torch.equal(found, expected.to(torch.int8)))
    return all(checks)


@torch.enable_grad()
def _gradients_equal_torch(passes: Passes, x: Tensor, clip: Tensor, *, of_weight: bool) -> bool:
    """The same for fake quantization; gradients of scales are sums of another order, compared up to rounding."""
    inputs, num_bits = (x.clone().requires_grad_(), clip.clone().requires_grad_()), 4
    grad = x.roll(1, dims=0).contiguous()
    with saved_as_usual():  # the first call may be in a function that is called again in the backward pass
        values = fake_quantize_rows(inputs[0], num_bits=num_bits, clip_ratio=inputs[1], of_weight=of_weight)
        expected = torch.autograd.grad(values, inputs, grad)
    out, grad_x = torch.empty_like(x), torch.empty_like(x)
    amax, scale, grad_clip = torch.empty(3, len(x))
    ratio, of_rows = clip.flatten(), {"grad_x": grad_x, "grad_clip": grad_clip}
    passes.fake_quantize(x, ratio, num_bits=num_bits, of_weight=of_weight, out=out, amax=amax, scale=scale)
    passes.fake_quantize_gradient(x, grad, amax, scale, ratio, num_bits=num_bits, of_weight=of_weight, **of_rows)
    found, smaller = (grad_x, grad_clip.unsqueeze(1)), x.abs() < amax.unsqueeze(1)
    return (
        torch.equal(out, values)
        and torch.equal(grad_x[smaller], expected[0][smaller])
        and all(_is_close(one, other) for one, other in zip(found, expected, strict=True))
    )


@in_fresh_torch_state
@torch.no_grad()
def _products_equal_torch(passes: Passes) -> bool:
    """Compare the Kronecker products with PyTorch's, bit for bit, on orders with and without a rest.

    Gradients that are sums over rows have another order and are compared up to rounding.
    """
    generator = torch.Generator().manual_seed(0)
    for n1, n2 in ((12, 12), (12, 16), (24, 32), (33, 49)):
        x, grad = torch.randn(2, 5, n1 * n2, generator=generator)
        scale, left, right = (torch.randn(size, generator=generator) for size in ((n1 * n2,), (n1, n1), (n2, n2)))
        half, out, grad_x = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        passes.kronecker(x, scale, left, right, half=half, out=out)
        sums = passes.kronecker_gradient(x, scale, left, right, half, grad, grad_x=grad_x)
        scaled, grads = (x * scale).view(-1, n1, n2), grad.view(-1, n1, n2)
        first, rotated = scaled @ right, left @ grads
        back = (rotated.reshape(-1, n2) @ right.t()).view(x.shape)
        exact = (half, first), (out, left.t() @ first), (grad_x, back * scale)
        if not all(torch.equal(one.view_as(other), other) for one, other in exact):
            return False
        expected = (back * x).sum(dim=0), (first @ grads.mT).sum(dim=0), (scaled.mT @ rotated).sum(dim=0)
        if not all(_is_close(one, other) for one, other in zip(sums, expected, strict=True)):
            return False
    return True


@in_fresh_torch_state
@torch.no_grad()
def _branches_equal_torch(passes: Passes) -> bool:
    """Compare rescaling with a branch with PyTorch's operations, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns, rank in ((300, 192, 32), (67, 131, RANKS[-1]), (SMALLEST_BRANCH, PANEL, 7)):
        sums = torch.randint(-(1 << 20), 1 << 20, (rows, columns), dtype=torch.int32, generator=generator)
        (w_scale, bias), x_scale = torch.rand(2, columns, generator=generator), torch.rand(rows, 1, generator=generator)
        low, weight = (torch.randn(size, generator=generator) * 1e5 for size in ((rows, rank), (columns, rank)))
        expected = torch.addcmul(bias, sums.float() * w_scale, x_scale).addmm_(low, weight.t())
        for dtype in DTYPES:
            out = torch.empty(rows, columns, dtype=dtype)
            passes.rescale(sums, w_scale, x_scale, bias, branch=(low, weight.t().contiguous()), out=out)
            if not torch.equal(out, expected.to(dtype)):
                return False
    return True


def _is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether sums of the same terms differ by their order alone."""
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())
