"""Names of devices; checked without importing torch."""

import re

_NAMES = re.compile(r"cpu|cuda(:[0-9]+)?")
_OTHERS = {
    "mps": "an Apple GPU, which is not supported",
    "xpu": "an Intel GPU, which is not supported",
    "npu": "an NPU, which is not supported",
    "xla": "a TPU, which is not supported",
    "rocm": "an AMD GPU, which PyTorch calls cuda",
    "hip": "an AMD GPU, which PyTorch calls cuda",
}


def is_device_name(name: str) -> bool:
    """Tell whether a name is "cpu", "cuda" or "cuda:N"."""
    return _NAMES.fullmatch(name) is not None


def kind_of_device(name: str) -> str | None:
    """Return what a name that s2q does not compute on means to PyTorch or to its users; None if it means nothing."""
    return _OTHERS.get(name.partition(":")[0])
