"""The instruction set of the CPU, as far as oneDNN may use it.

oneDNN, which multiplies matrices of int8 and half precision for PyTorch, uses no more than ONEDNN_MAX_CPU_ISA allows.
What it may not use counts as missing here: results stay exact for users who cap it, and the kernels of an older CPU can
be tested on any newer one.
"""

import functools
import os
import platform
import re
from pathlib import Path

import torch

CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that limit oneDNN, the stronger one first."""

_AVX2 = frozenset({"avx2"})
_AVX512 = _AVX2 | {"avx512"}
_AVX512_BF16 = _AVX512 | {"avx512_vnni", "avx512_bf16"}
_AVX512_FP16 = _AVX512_BF16 | {"avx512_fp16", "avx_vnni"}
_AMX = _AVX512_FP16 | {"amx_int8", "amx_bf16"}
_ALLOWED: dict[str, frozenset[str]] = {
    "sse41": frozenset(),
    "avx": frozenset(),
    "avx2": _AVX2,
    "avx2_vnni": _AVX2 | {"avx_vnni"},
    "avx2_vnni_2": _AVX2 | {"avx_vnni"},
    "avx512_core": _AVX512,
    "avx512_core_vnni": _AVX512 | {"avx512_vnni"},
    "avx512_core_bf16": _AVX512_BF16,
    "avx512_core_fp16": _AVX512_FP16,
    "avx10_1_512": _AVX512_FP16,
    "avx512_core_amx": _AMX,
    "avx10_1_512_amx": _AMX,
}
"""Instructions that oneDNN may use under a cap; other values (all, default, newer ones) cap nothing."""

_AVX512_PARTS = ("f", "bw", "dq", "vl")
_X86 = ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "amx_fp16")
_ARM = ("bf16", "i8mm")


def is_x86() -> bool:
    """Whether the CPU is an x86 one."""
    return platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


@functools.cache
def features() -> frozenset[str]:
    """Return the instructions that matter here: names of Linux, "avx512" for F, BW, DQ and VL together.

    Empty where neither PyTorch nor the system tells.
    """
    detected, cap = _detected(), _cap()
    return detected if cap is None else detected & _ALLOWED.get(cap.partition("=")[2].lower(), detected)


def has_int8_dot() -> bool:
    """Whether PyTorch and oneDNN add int8 products up in 32 bits, where none can saturate: AVX-512 VNNI.

    PyTorch does not ask for the VNNI of CPUs without AVX-512.
    """
    return "avx512_vnni" in features()


def has_arithmetic(dtype: torch.dtype) -> bool:
    """Tell whether the CPU multiplies a floating dtype itself; one that it emulates is much slower than fp32."""
    if dtype == torch.bfloat16:
        return bool(features() & {"avx512_bf16", "amx_bf16", "bf16"})
    if dtype == torch.float16:
        return bool(features() & {"avx512_fp16", "amx_fp16"})
    return True


def instruction_set() -> str:
    """Return the name of what the CPU computes with here: "AVX-512 VNNI + bf16", "AVX2"."""
    usable = features()
    if not is_x86():
        return " + ".join((platform.machine(), *sorted(usable)))
    base = "AVX-512" if "avx512" in usable else "AVX2" if "avx2" in usable else "SSE"
    vnni = " VNNI" if usable & {"avx512_vnni", "avx_vnni"} else ""
    halves = [name for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)) if has_arithmetic(dtype)]
    return " + ".join((base + vnni, *(["AMX"] if "amx_int8" in usable else []), *halves))


def limited_by() -> str | None:
    """Return the setting that keeps oneDNN from instructions that the CPU has; None without one."""
    return None if features() == _detected() else _cap()


def _cap() -> str | None:
    """Return the setting that limits oneDNN, "ONEDNN_MAX_CPU_ISA=AVX2"; None without one."""
    names = CAPS if is_x86() else ()
    return next((f"{name}={os.environ[name]}" for name in names if os.environ.get(name)), None)


def _detected() -> frozenset[str]:
    flags = _flags()
    if not is_x86():
        return flags & frozenset(_ARM)
    complete = all(flags & {f"avx512{part}", f"avx512_{part}"} for part in _AVX512_PARTS)
    return flags & frozenset(_X86) | frozenset({"avx512"} if complete else ())


def model_name() -> str:
    """Return what the system calls the CPU: "Intel(R) Xeon(R) Processor"."""
    match = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), flags=re.MULTILINE)
    return (match[1].strip() if match else platform.processor()) or "unknown"


@functools.cache
def _flags() -> frozenset[str]:
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        return frozenset(name for name, value in ask().items() if value is True)
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), flags=re.MULTILINE)
    return frozenset() if match is None else frozenset(match[1].split())


def _cpuinfo() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
