"""Elementwise passes on the CPU, fused into one each where there is a C compiler (`fused.c`), with PyTorch's bits.

PyTorch takes three to seven operations for scaling, quantization, unpacking and rescaling each, many more for trainable
quantization, and every one reads and writes all its data. Kronecker products with AVX-512 are passes as well, and so
are rotations and low-rank branches of bf16 with AVX512-BF16 (`dots.c`). Gradients that are sums, towards clip ratios,
largest magnitudes and factors, have an order of their own, the same for any number of threads.

The compiler runs once, for two seconds. The library is cached in $XDG_CACHE_HOME/s2q or ~/.cache/s2q, by a hash of
source, flags and processor, and runs in PyTorch's OpenMP threads. Where there is no compiler, or a pass differs from
PyTorch's operations in a bit, `passes` returns None and callers use those operations. S2Q_FUSED=0 in the environment
has the same effect. Products that differ are left out alone (`Passes.multiplies` and the like).
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

from s2q.common.processor import features, is_x86
from s2q.ops import bits
from s2q.ops.passes import PANEL, SEGMENT, Passes

SOURCES = tuple(Path(__file__).with_name(name) for name in ("fused.c", "dots.c", "rows.h"))
"""Sources of the library, hashed together; those that end in .c are compiled."""

VARIABLE = "S2Q_FUSED"

_FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *(f"-DPANEL={PANEL}", f"-DSEGMENT={SEGMENT}"),
)

_SECONDS = 60

logger = logging.getLogger(__name__)


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
            if bits.equals_torch(loaded):
                return _with_products(loaded), None
            reason = "their bits differ from PyTorch's here"
        except (OSError, subprocess.SubprocessError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"
    logger.debug("elementwise passes run in PyTorch, not fused: %s", reason)
    return None, reason


def _with_products(passes: Passes) -> Passes:
    """Allow the products that have PyTorch's bits here; those of bf16 only where AMX does not multiply faster."""
    passes.multiplies = passes.has("kronecker") and bits.products_equal_torch(passes)
    passes.adds_branches = passes.multiplies and bits.branches_equal_torch(passes)
    if passes.has("activation_path") and "avx512_bf16" in features():
        passes.adds_bf16_branches = passes.adds_branches and bits.branches_equal_torch(passes, pairs=True)
        passes.rotates = "amx_bf16" not in features() and bits.paths_equal_torch(passes, bits.NARROW_PATHS)
        passes.rotates_wide_branches = passes.rotates and bits.paths_equal_torch(passes, bits.WIDE_PATHS)
    return passes


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
    sources = b"".join(source.read_bytes() for source in SOURCES)
    parts = (sources, repr((flags, os.path.realpath(compiler), platform.machine(), _processor())).encode())
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
    """Compile and link in steps, to use the OpenMP that PyTorch has loaded, and no other."""
    objects = {source: str(folder / f"{source.stem}.o") for source in SOURCES if source.suffix == ".c"}
    library = folder / "fused.so"
    for command in (
        *([compiler, *flags, "-c", str(source), "-o", path] for source, path in objects.items()),
        [compiler, "-shared", "-nostdlib", *objects.values(), "-o", str(library)],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
    return library


def _processor() -> str:
    """Return the processor's model and instructions, which `-march=native` depends on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))
    return platform.processor()
