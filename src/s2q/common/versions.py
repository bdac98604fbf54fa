"""Versions of the software that decides a result."""

import platform
from importlib import metadata

_PACKAGES = ("s2q", "torch", "diffusers", "transformers")


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the result."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}
