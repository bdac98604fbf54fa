"""The hardware, the versions and the command of a measurement, to be stored beside its figures."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from s2q.common.processor import instruction_set

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "s2q")


def environment() -> dict[str, object]:
    """``hardware``, ``versions`` and ``command`` of this process."""
    return {
        "hardware": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "instruction_set": instruction_set(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
