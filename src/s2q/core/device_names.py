"""Names of devices; checked without importing torch."""

import re

_NAMES = re.compile(r"cpu|cuda(:\d+)?")
_UNSUPPORTED = {
    "mps": "Apple GPUs are not supported",
    "xpu": "Intel GPUs are not supported",
    "npu": "NPUs are not supported",
    "xla": "TPUs are not supported",
    "rocm": "PyTorch calls AMD GPUs cuda, too",
    "hip": "PyTorch calls AMD GPUs cuda, too",
}


def device_name_problem(name: str, *, expected: str = "cpu, cuda or cuda:N") -> str | None:
    """Say what is wrong with the name of a device; None if nothing is.

    Args:
        name: "cpu", "cuda" and "cuda:N" are right.
        expected: What to say is.
    """
    if _NAMES.fullmatch(name):
        return None
    reason = _UNSUPPORTED.get(name.partition(":")[0])
    return f"expected {expected}" if reason is None else f"{reason}; use {expected}"
