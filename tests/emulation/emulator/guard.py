"""Builds and loads guard.cpp, once for a version of PyTorch; the library is kept in the folder for temporary files."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DEVICES = 2
"""How many GPUs are emulated."""

_SOURCE = Path(__file__).with_name("guard.cpp")


class GuardUnavailableError(Exception):
    """The emulator cannot run here; the message is the reason."""


def _compiler() -> str:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found is None:
        raise GuardUnavailableError("no C++ compiler (c++, g++ or clang++) to build the emulated device guard")
    return found


def _build(torch_root: Path) -> Path:
    """Compile the guard if that was not done before; return the library."""
    source = _SOURCE.read_text(encoding="utf-8")
    version = (torch_root / "version.py").read_text(encoding="utf-8")
    name = hashlib.sha256(f"{torch_root}\n{version}\n{DEVICES}\n{source}".encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"s2q-emulated-cuda-{os.getuid()}-{name}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "guard.so"
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-attributes", f"-DDEVICES={DEVICES}"]
        paths = [f"-I{torch_root}/include", f"-L{torch_root}/lib", "-lc10", "-ltorch_cpu"]
        command = [_compiler(), str(_SOURCE), "-o", str(built), *flags, *paths]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            line = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            raise GuardUnavailableError(f"the emulated device guard does not compile: {line}")
        partial = library.with_suffix(f".{os.getpid()}")  # a process beside this one may build too
        shutil.copyfile(built, partial)
        partial.replace(library)
    return library


def load() -> ctypes.CDLL:
    """Register the guard and hooks of CUDA; before torch is imported, which asks for the hooks then and only once.

    Returns:
        The library, with `emulated_current_device` and `emulated_set_device`.

    Raises:
        GuardUnavailableError: If torch is a CUDA build or was imported before, or there is no compiler.
    """
    if "torch" in sys.modules:
        raise GuardUnavailableError("torch was imported before the emulator")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise GuardUnavailableError("torch is not installed")
    root = Path(spec.origin).parent
    if (root / "lib" / "libtorch_cuda.so").exists():
        raise GuardUnavailableError("this build of torch has CUDA; the emulator needs one for the CPU")
    path = _build(root)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(root / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))
