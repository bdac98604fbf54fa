"""Diagnosis of an installation: devices, backends with self-tests, versions, and what is missing and why it matters.

Nothing is downloaded, and nothing is written except what a compiler caches.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from s2q.benchmark.machine import hardware, versions
from s2q.benchmark.self_test import FAILED, PASSED, UNAVAILABLE, SelfTest, self_tests
from s2q.common.devices import device_memory_bytes
from s2q.common.errors import first_line
from s2q.common.records import DIAGNOSIS_VERSION
from s2q.common.versions import WITH_KERNELS, is_installed
from s2q.ops import fused
from s2q.planning import device_products

PACKAGES = (*WITH_KERNELS, "accelerate", "safetensors", "huggingface_hub", "ray", "peft")


@dataclass(frozen=True, kw_only=True)
class Need:
    """Something outside the required packages that a part of s2q uses.

    Attributes:
        obstacle: Says in a few words why it cannot be used; None if it can.
        purpose: What uses it.
        without: What happens without it.
        remedy: What to do.
        optional: Whether it is a package that many installations do without.
    """

    obstacle: Callable[[], str | None]
    purpose: str
    without: str
    remedy: str
    optional: bool = False


def _package(name: str) -> Callable[[], str | None]:
    return lambda: None if is_installed(name) else "not installed"


def _ffmpeg_obstacle() -> str | None:
    import imageio_ffmpeg

    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        return first_line(error)
    return None


def _has_gpu() -> bool:
    """Tell whether this machine has a GPU, or NVIDIA's driver for one."""
    return torch.cuda.is_available() or shutil.which("nvidia-smi") is not None


def _triton_obstacle() -> str | None:
    return _package("triton")() if _has_gpu() else None


def _gpu_obstacle() -> str | None:
    """Say why a GPU with a driver is not used; None if it is, or if there is none."""
    if torch.cuda.is_available() or not _has_gpu():
        return None
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built for CPUs only"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "PyTorch finds no GPU" + ("" if hidden is None else f" with CUDA_VISIBLE_DEVICES={hidden}")


NEEDS: dict[str, Need] = {
    "CUDA": Need(
        obstacle=_gpu_obstacle,
        purpose="NVIDIA GPUs",
        without="this machine has NVIDIA's driver, but everything runs on the CPU",
        remedy="install a CUDA build of PyTorch (https://pytorch.org/get-started)",
    ),
    "triton": Need(
        obstacle=_triton_obstacle,
        purpose="kernels on NVIDIA GPUs",
        without="quantized linears run in PyTorch there, slower than full precision",
        remedy="pip install 's2q[triton]'",
    ),
    "C compiler": Need(
        obstacle=lambda: fused.compiled()[1],
        purpose="fused passes on the CPU",
        without="quantization and rescaling run in PyTorch, slower with the same bits",
        remedy="install gcc, or name a compiler in CC; S2Q_FUSED=0 switches the passes off",
    ),
    "ffmpeg": Need(
        obstacle=_ffmpeg_obstacle,
        purpose="mp4 files of generate, demo and compare",
        without="they fail when the first video is encoded",
        remedy="pip install --force-reinstall imageio-ffmpeg",
    ),
    "ray": Need(
        obstacle=_package("ray"),
        purpose="--engine ray: runs on several machines",
        without="runs use the processes of one machine",
        remedy="pip install 's2q[ray]'",
        optional=True,
    ),
    "peft": Need(
        obstacle=_package("peft"),
        purpose="LoRA adapters: --lora, and load_lora_weights of pipelines",
        without="both are refused before any compute",
        remedy="pip install 's2q[lora]'",
        optional=True,
    ),
    "gradio": Need(
        obstacle=_package("gradio"),
        purpose="s2q ui: two models side by side in the browser",
        without="it is refused",
        remedy="pip install 's2q[ui]'",
        optional=True,
    ),
    "ftfy": Need(
        obstacle=_package("ftfy"),
        purpose="prompts of diffusers' Wan pipelines",
        without="image-to-video pipelines of Wan are refused",
        remedy="pip install ftfy",
        optional=True,
    ),
    "av": Need(
        obstacle=_package("av"),
        purpose="images of diffusers' LTX-2 pipelines",
        without="image-to-video pipelines of LTX-2 are refused",
        remedy="pip install av",
        optional=True,
    ),
}


def all_devices() -> list[str]:
    """Return the CPU and every visible GPU."""
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def diagnose(devices: Sequence[str]) -> dict[str, Any]:
    """Describe the installation and run the self-tests.

    Args:
        devices: "cpu", "cuda:0", …, which are here (`common.devices.check_device`).

    Returns:
        `versions`, `devices` (hardware, memory, integer products), `backends` (one row a device and backend), `needs`,
        `self_tests`, and `passed`: whether no self-test failed.
    """
    tests = [test for device in devices for test in self_tests(device)]
    return {
        "schema_version": DIAGNOSIS_VERSION,
        "passed": all(test.status != FAILED for test in tests),
        "versions": versions(PACKAGES),
        "devices": [_described(device) for device in devices],
        "backends": _backends(tests),
        "needs": [
            {
                "name": name,
                "obstacle": need.obstacle(),
                "purpose": need.purpose,
                "without": need.without,
                "remedy": need.remedy,
                "optional": need.optional,
            }
            for name, need in NEEDS.items()
        ],
        "self_tests": [asdict(test) for test in tests],
    }


def _described(device: str) -> dict[str, Any]:
    products = device_products(device)
    return {
        "name": device,
        "memory_bytes": device_memory_bytes(device),
        **hardware(device),
        "products": None if products is None else asdict(products),
    }


def _backends(tests: Sequence[SelfTest]) -> list[dict[str, Any]]:
    """Summarize the tests of each backend of each device; one that some ops lack is that of the others."""
    groups: dict[tuple[str, str], list[SelfTest]] = {}
    for test in tests:
        groups.setdefault((test.device, test.backend), []).append(test)
    rows = []
    for (device, backend), group in groups.items():
        ran = [test for test in group if test.status != UNAVAILABLE]
        failed = [test for test in ran if test.status == FAILED]
        blamed = (failed or group)[0] if failed or not ran else None
        errors = [test.error for test in ran if test.error is not None]
        rows.append(
            {
                "device": device,
                "backend": backend,
                "status": FAILED if failed else PASSED if ran else UNAVAILABLE,
                "passed": len(ran) - len(failed),
                "tests": len(ran),
                "largest_error": max(errors, default=None),
                "reason": None if blamed is None else f"{blamed.op}: {blamed.reason}" if failed else blamed.reason,
            }
        )
    return rows
