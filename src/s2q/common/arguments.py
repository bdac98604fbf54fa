"""Arguments of the Python verbs, normalised or refused on entry, before any compute.

Values that are equal in meaning give the same result (`torch.device("cpu")` and "cpu", `np.int64(1)` and 1). Values
that only look right are refused in one line (True or 1.0 for a seed, one string for a list of prompts).
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch

from s2q.common.device_names import is_device_name
from s2q.common.devices import check_device
from s2q.common.errors import InvalidInputError, UsageError, short_repr, unknown_name
from s2q.common.memory import Offload

_T = TypeVar("_T")
MAX_SEED = 2**63 - 1
DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Names of the compute dtypes that a model may be loaded in."""


def device_name(device: str | torch.device | int, *, check: bool = True) -> str:
    """Return the name of a device, "cpu", "cuda" or "cuda:1", which this machine must have unless `check` is off."""
    if isinstance(device, str | torch.device):
        name = "cpu" if isinstance(device, torch.device) and device.type == "cpu" else str(device)
    elif _is_whole(device):
        name = f"cuda:{int(device)}"
    else:
        raise InvalidInputError(f"device={short_repr(device)} is unknown; use cpu, cuda or cuda:N")
    kind, separator, index = name.partition(":")
    if index.isascii() and index.isdigit():
        name = f"{kind}{separator}{int(index)}"  # cuda:01
    if check or not is_device_name(name):
        check_device(name)
    return name


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the one of `DTYPES` that a dtype or its name ("bfloat16", "torch.bfloat16") means; None for None."""
    if dtype is None:
        return None
    if not isinstance(dtype, str | torch.dtype):
        raise InvalidInputError(f"dtype: got {short_repr(dtype)}; expected one of {', '.join(DTYPES)}, or None")
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    return DTYPES[name]


def offload_name(offload: Any, *, device: str) -> Offload | Literal["auto"]:
    """Return a way to offload a pipeline (`generation.offload`) or "auto"; a CPU has nothing to offload to."""
    known: tuple[Offload | Literal["auto"], ...] = ("auto", *get_args(Offload))
    for name in known:
        if offload == name:
            if name in ("model", "group") and torch.device(device).type == "cpu":
                raise UsageError(f"offload={name} (--offload): {device} computes in host memory; use auto or none")
            return name
    raise unknown_name("offload", offload, known)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


MAX_PROMPT = 1 << 15
"""Characters of a prompt; text encoders read some hundred tokens."""


def whole_number(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """Return a whole number as an int: Python's or NumPy's, not a bool, not 1.0, not "1"."""
    if not _is_whole(value):
        raise InvalidInputError(f"{name}: got {short_repr(value)}; expected a whole number")
    number = int(value)
    if least is not None and number < least:
        raise InvalidInputError(f"{name}: got {short_repr(number)}; expected at least {least}")
    if most is not None and number > most:
        raise InvalidInputError(f"{name}: got {short_repr(number)}; expected at most {most}")
    return number


def finite_number(name: str, value: Any) -> float:
    """Return a finite number from 0 as a float: Python's or NumPy's, not a bool, not text."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise InvalidInputError(f"{name}: got {short_repr(value)}; expected a finite number, at least 0")
    return float(value)


def positive_number(name: str, value: Any) -> float:
    """Return a finite number above 0 as a float; see `finite_number`."""
    if not (number := finite_number(name, value)):
        raise InvalidInputError(f"{name}: got {short_repr(value)}; expected a number above 0")
    return number


def optional(check: Callable[..., _T], name: str, value: Any, **limits: Any) -> _T | None:
    """Return None for None, else what one of the checks of this module returns."""
    return None if value is None else check(name, value, **limits)


def flag(name: str, value: Any) -> bool:
    """Return a switch; "no" and 0 are refused, since Python takes the former for True."""
    if not isinstance(value, bool):
        raise InvalidInputError(f"{name}: got {short_repr(value)}; expected True or False")
    return value


def seed_number(seed: Any) -> int:
    """Return a seed as an int from 0 to 2⁶³ − 1; see `whole_number`."""
    return whole_number("seed", seed, least=0, most=MAX_SEED)


def seed_numbers(seeds: Iterable[Any]) -> tuple[int, ...]:
    """Return the seeds of a list, a range or an array as ints."""
    if _is_whole(seeds):
        raise InvalidInputError(f"seeds: got {seeds}; pass a list of seeds, [{seeds}] or range({seeds})")
    numbers = tuple(seed_number(seed) for seed in items_of("seeds", seeds, of="seeds"))
    if not numbers:
        raise InvalidInputError("seeds: got none; pass at least one seed")
    if len(set(numbers)) != len(numbers):
        raise InvalidInputError(f"seeds: got {short_repr(list(numbers))}; each seed may appear once")
    return numbers


def plain_text(name: str, text: Any) -> str:
    """Return a text, which may be empty, of the length of a prompt."""
    if not isinstance(text, str):
        raise InvalidInputError(f"{name}: got {short_repr(text)}; expected text")
    _check_length(name, text)
    return str(text)


def name_list(name: str, values: Iterable[Any]) -> tuple[str, ...]:
    """Return a list of names as a tuple of texts."""
    names = tuple(items_of(name, values, of="names"))
    for value in names:
        if not isinstance(value, str):
            raise InvalidInputError(f"{name}: got {short_repr(value)}; expected text")
    return names


def path_list(name: str, values: Iterable[Any]) -> tuple[str, ...]:
    """Return a list of paths, as text or `pathlib.Path`, as a tuple of texts."""
    return tuple(str(path_argument(name, value)) for value in items_of(name, values, of="paths"))


def path_argument(name: str, path: Any) -> Path:
    """Return a path of a file or folder, "~" expanded."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise InvalidInputError(f"{name}: got {short_repr(path)}; expected a path, as text or pathlib.Path")
    text = os.fspath(path)
    if not text or "\0" in text:
        raise InvalidInputError(f"{name}: got {short_repr(text)}; expected a path")
    _check_unicode(name, text)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # no such user
        raise InvalidInputError(f"{name}: {short_repr(text)}: {error}") from error


def word(name: str, text: Any) -> str:
    """Return a word of letters, digits, "_", "." and "-"."""
    if not (isinstance(text, str) and re.fullmatch(r"[\w.-]+", text)):
        raise InvalidInputError(f"{name}: got {short_repr(text)}; expected a word, or None")
    return text


def model_argument(name: str, model: Any) -> Any:
    """Return a model given by name, folder or Hub id (a string or a Path), as a pipeline or as a resolved source."""
    if isinstance(model, str | os.PathLike):
        path = path_argument(name, model)
        return model if isinstance(model, str) else path
    known = any(hasattr(model, attribute) for attribute in ("transformer", "transformer_configs"))
    if not known or isinstance(model, type):
        raise InvalidInputError(
            f"{name}: got {short_repr(model)}; expected a name, a folder, a Hub id or a loaded pipeline"
        )
    if hasattr(model, "load_components"):
        raise InvalidInputError(
            f"{name}: got a {type(model).__name__}, a list of steps; pass the folder or the Hub id of its model"
        )
    return model


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def items_of(name: str, values: Any, *, of: str) -> Sequence[Any]:
    """Return the items of something that has an order; `of` names them in messages."""
    if isinstance(values, str):
        raise InvalidInputError(f"{name}: got one string; pass a list of {of}")
    unordered = isinstance(values, Mapping | Set | bytes | bytearray)
    if unordered or not isinstance(values, Iterable):
        raise InvalidInputError(f"{name}: got {short_repr(values)}; pass a list of {of}")
    return tuple(values)


def _check_unicode(name: str, text: str) -> None:
    surrogate = re.search("[\ud800-\udfff]", text)
    if surrogate is not None:
        raise InvalidInputError(
            f"{name}: got {short_repr(text)}; character {surrogate.start() + 1} is not Unicode text, write it in UTF-8"
        )


def _check_length(name: str, text: str) -> None:
    """Refuse text longer than a prompt can be, and what is no Unicode text."""
    if len(text) > MAX_PROMPT:
        raise InvalidInputError(f"{name} has {len(text)} characters; expected at most {MAX_PROMPT}: {short_repr(text)}")
    _check_unicode(name, text)
