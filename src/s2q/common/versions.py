"""Versions of the software that decides a result."""

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
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
