"""The hardware, the versions and the command of a measurement, to be stored beside its figures."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

from s2q.common.processor import instruction_set, model_name
from s2q.common.versions import package_versions

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "s2q")


def environment() -> dict[str, Any]:
    """``hardware``, ``versions`` and ``command`` of this process."""
    return {
        "hardware": {
            "processor": model_name(),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "instruction_set": instruction_set(),
        },
        "versions": package_versions(PACKAGES),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
