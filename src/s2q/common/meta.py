"""Build a model on the meta device: names, shapes and dtypes of its tensors, without memory and in bounded time.

Configurations come from strangers: building stops after more calls of torch than the tensors in the model's files need.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from s2q.common.errors import InvalidInputError, S2QError, first_line, is_out_of_memory
from s2q.common.headers import TensorInfo

_MAX_TENSORS = 100_000
_CALLS_PER_TENSOR = 64
_SPARE_CALLS = 10_000
_MAX_BUFFER_BYTES = 1 << 32  # of positional embeddings and the like, which files do not have


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a model without that of its quantization."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def build_model(model_class: Any, config: Mapping[str, Any]) -> nn.Module:
    """Build a model of diffusers or transformers from its plain configuration, on the current device."""
    if hasattr(model_class, "config_class"):
        model: nn.Module = model_class(model_class.config_class.from_dict(dict(config)))
    else:
        model = model_class.from_config(dict(config))
    return model


def meta_model(
    build: Callable[[], nn.Module], *, path: Path, name: str, max_tensors: int = _MAX_TENSORS, remedy: str
) -> nn.Module:
    """Return what `build` builds, on the meta device.

    Args:
        build: Builds the model of a configuration.
        path: The file of the configuration, for messages.
        name: The name of the model's class, for messages.
        max_tensors: Tensors in the model's files.

    Raises:
        InvalidInputError: If the configuration is not one of the model, or of one that is larger than its files.
    """
    try:
        with torch.device("meta"), _LimitedCalls(_CALLS_PER_TENSOR * max_tensors + _SPARE_CALLS):
            model = build()
        size = sum(buffer.nbytes for buffer in model.buffers())
    except S2QError:
        raise
    except _TooManyCallsError:
        raise InvalidInputError(
            f"{path}: describes a {name} with more than the {max_tensors} tensors of its files; {remedy}"
        ) from None
    except Exception as error:  # of any kind, as the arguments are a stranger's
        if is_out_of_memory(error):
            raise
        raise InvalidInputError(
            f"{path}: is no configuration of {name} ({type(error).__name__}: {first_line(error)}); {remedy}"
        ) from error
    if size > _MAX_BUFFER_BYTES:
        raise InvalidInputError(f"{path}: describes a {name} with {size / 2**30:.0f} GiB of buffers; {remedy}")
    return model


def check_tensors(
    tensors: Mapping[str, TensorInfo], expected: Mapping[str, Tensor], *, folder: Path, remedy: str
) -> None:
    """Refuse tensors in a component's files that have another shape, or another kind of dtype, than expected.

    A name that is only on one side is not looked at: the loaders rename tensors of older versions, and tie some.
    """
    for name, info in tensors.items():
        value = expected.get(name)
        if value is None:
            continue
        if info.shape != tuple(value.shape):
            raise InvalidInputError(
                f"{folder}: {name}: got shape {list(info.shape)}, expected {list(value.shape)} of config.json; {remedy}"
            )
        if info.dtype.startswith(("F", "BF")) != value.is_floating_point():
            raise InvalidInputError(f"{folder}: {name}: got dtype {info.dtype}, expected {value.dtype}; {remedy}")


class _TooManyCallsError(Exception):
    pass


class _LimitedCalls(TorchFunctionMode):
    """Counts the calls of torch in this thread; raises after too many."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._left = limit

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._left -= 1
        if self._left < 0:
            raise _TooManyCallsError
        return func(*args, **(kwargs or {}))
