"""Versions of the software that decides a result."""

import functools
import platform
from importlib import metadata

_DECIDING = ("s2q", "torch", "diffusers", "transformers")
WITH_KERNELS = (*_DECIDING, "triton")  # also what times depend on


def package_versions(packages: tuple[str, ...] = _DECIDING) -> dict[str, str | None]:
    """Return the versions of Python and of packages; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def is_installed(package: str) -> bool:
    """Return whether a package is installed, by its name on PyPI."""
    return _version(package) is not None


def _version(package: str) -> str | None:
    try:
        return _installed_version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _installed_version(package: str) -> str:
    """Read once: it parses a whole file. A package that is not installed may be installed later."""
    return metadata.version(package)
