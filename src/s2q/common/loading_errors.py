"""Errors of loading a pipeline: one for each cause, with its own remedy."""

import re
from importlib import metadata
from pathlib import Path

from s2q.common.errors import InvalidInputError, ResourceError, S2QError, first_line, is_out_of_memory

_PIP = re.compile(r"pip install (?:(?:-U|--upgrade) )?['\"]?([A-Za-z0-9][\w.-]*(?:\[[\w,-]+\])?)")
_LIBRARY = re.compile(r"requires the (\w+) library")
_CONFIGURATION = (AttributeError, IndexError, KeyError, NameError, TypeError)
_NO_CLASS = "has no class"
LESS_MEMORY = "use dtype bfloat16, a quantized checkpoint or a larger device, or free some"
_UNKNOWN_METHOD = "Unknown quantization type"

PACKAGES = {
    "auto-round": "auto-round",
    "bitsandbytes": "bitsandbytes",
    "gguf": "gguf",
    "modelopt": "nvidia-modelopt",
    "quanto": "optimum-quanto",
    "sdnq": "sdnq",
    "torchao": "torchao",
}
"""Packages that diffusers and transformers need to load quantized components, by `quant_method`."""


def loading_error(folder: Path, error: Exception, *, remedy: str) -> S2QError:
    """Build (not raise) the error for a pipeline that diffusers could not load; errors of s2q are unchanged.

    It is a `ResourceError` where memory or a package is missing; the remedy is for files that are at fault.
    """
    cause = first_line(error)
    if isinstance(error, S2QError):
        return error
    if is_out_of_memory(error):
        return ResourceError(f"{folder}: out of memory while it was loaded; {LESS_MEMORY}")
    if isinstance(error, ImportError):
        package = missing_package(error)
        do = "install what it names" if package is None else f"pip install {package}"
        return ResourceError(f"{folder}: a component needs a package that is not installed ({cause}); {do}")
    if _UNKNOWN_METHOD in cause:
        return InvalidInputError(
            f"{folder}: a component is quantized by a method that the installed diffusers and transformers do not know "
            f"({cause}); upgrade them, or load the pipeline with the tool that made it"
        )
    if isinstance(error, _CONFIGURATION) or _NO_CLASS in cause:
        return InvalidInputError(
            f"{folder}: its index or a configuration does not fit diffusers {metadata.version('diffusers')} and "
            f"transformers {metadata.version('transformers')} ({type(error).__name__}: {cause}); upgrade them, or save "
            "the model again"
        )
    return InvalidInputError(f"{folder}: cannot be loaded as a diffusers pipeline ({cause}); {remedy}")


def missing_package(error: ImportError) -> str | None:
    """Return the name by which pip installs what an import lacked; None if the error does not tell."""
    text = str(error)
    match = _PIP.search(text) or _LIBRARY.search(text)
    if match is not None:
        return match[1]
    name = None if error.name is None else error.name.partition(".")[0]
    return None if name is None else PACKAGES.get(name, name)
