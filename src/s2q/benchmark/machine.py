"""The machine: what it is, which backends it has, how much memory a call takes, how fast it multiplies integers."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s2q.common import processor
from s2q.common.devices import default_dtype, peak_memory_bytes, reset_peak_memory, resident_bytes
from s2q.common.versions import WITH_KERNELS, package_versions
from s2q.ops import scratch
from s2q.ops.dispatch import backend_obstacle, is_interpreting
from s2q.ops.int_matmul import cpu


def hardware(device: str) -> dict[str, Any]:
    """Describe what computes.

    Returns:
        `device` ("cpu" or "cuda"), `processor`, `instruction_set` (and `limited_by`, what keeps it from more), `cores`,
        `threads`, `machine`; for a GPU also `gpu`, `capability`, `memory_bytes`.
    """
    kind = torch.device(device).type
    described: dict[str, Any] = {
        "device": kind,
        "processor": processor.model_name(),
        "instruction_set": processor.instruction_set(),
        "limited_by": processor.limited_by(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
        }
    return described


def versions(packages: tuple[str, ...] = WITH_KERNELS) -> dict[str, str | None]:
    """Return the versions that a time depends on, or those of other packages; None for what is not installed."""
    return {"cuda": torch.version.cuda, **package_versions(packages)}


def measuring_obstacle(backend: str, device: str) -> str | None:
    """Say in a few words why a backend cannot be measured here; None if it can."""
    if backend == "triton" and is_interpreting():
        return "TRITON_INTERPRET=1 runs kernels on the CPU, whose times say nothing"
    return backend_obstacle(backend, torch.empty(0, dtype=torch.bfloat16, device=device))


def full_precision(device: str) -> dict[str, torch.dtype]:
    """Return the full-precision contenders: bf16, and on a CPU fp32 too; the faster one is the baseline."""
    both = {"bf16": torch.bfloat16, "fp32": torch.float32}
    return both if torch.device(device).type == "cpu" else {"bf16": torch.bfloat16}


def quantized_dtype(device: str) -> torch.dtype:
    """Return the compute dtype of quantized contenders: that of a bf16 model (`common.devices.default_dtype`)."""
    return default_dtype(torch.bfloat16, device)


def has_int8_gemm(device: str) -> bool:
    """Tell whether a device has a fast plain int8 product, `int8_gemm`."""
    return torch.device(device).type == "cuda" or cpu.is_fast(x_bits=8, w_bits=4)


def int8_gemm(w_codes: Tensor, rows: int) -> Callable[[Tensor], object]:
    """Return the plain int8 product with a weight on its device, a function of x [M, K].

    Args:
        w_codes: int8 [N, K], within 4 bits.
    """
    if w_codes.is_cuda or cpu.adds_in_32_bits():
        out = torch.empty(rows, len(w_codes), dtype=torch.int32, device=w_codes.device)
        return lambda x: torch._int_mm(x, w_codes.t(), out=out)
    prepacked, ones = cpu.prepack(w_codes), torch.ones(len(w_codes))
    return lambda x: cpu.multiply_pairs(x.view(torch.uint8), prepacked, ones, x_bits=8)


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """Return the highest memory during a call above that before it, in bytes; None where it cannot be measured.

    Args:
        device: On a GPU memory is what PyTorch allocates there; on a CPU the resident set of the process (Linux only),
            which includes the scratch memory of libraries.
    """
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        before: int | None = torch.cuda.memory_allocated(device)
    else:
        scratch.release()  # what the ops kept from earlier calls is memory of this call too
        _return_free_memory()
        before = resident_bytes()
    if not reset_peak_memory(device) or before is None:
        return None
    call()
    if on_gpu:
        torch.cuda.synchronize(device)
    return max(0, peak_memory_bytes(device) - before)


def _return_free_memory() -> None:
    """Give what malloc keeps back to the system: memory that is held already would not count as a call's."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
