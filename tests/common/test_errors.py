import contextlib
import errno
import os

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from s2q.common.errors import (
    BusyError,
    InvalidInputError,
    ResourceError,
    S2QError,
    UsageError,
    first_line,
    is_out_of_memory,
    memory_errors,
    nearest_names,
    short_repr,
    unknown_name,
)

RECIPES = ("rtn-w8a8", "rtn-w4a8", "rtn-w4a6", "rtn-w4a4", "rtn-w4a16")


def test_exit_codes_are_those_of_the_command_line():
    codes = {S2QError: 1, UsageError: 2, InvalidInputError: 3, ResourceError: 4, BusyError: 5}
    assert {error: error("x").exit_code for error in codes} == codes


@pytest.mark.parametrize("name", ["rtn-w4a7", "RTN-W4A6", "rtn_w4a6", "rtnw4a6"])
def test_misspelt_names_find_their_neighbours(name):
    assert "rtn-w4a6" in nearest_names(name, RECIPES)
    assert len(nearest_names(name, RECIPES)) <= 3


def test_the_nearest_comes_first():
    assert nearest_names("rtn_w8a8", RECIPES)[0] == "rtn-w8a8"


def test_nothing_near_gives_nothing():
    assert nearest_names("zzz", RECIPES) == []
    assert nearest_names("rtn", []) == []


def test_unknown_name_lists_the_nearest_and_all():
    error = unknown_name("recipe", "rtn-w4a7", RECIPES)
    assert isinstance(error, InvalidInputError)
    assert str(error).startswith("unknown recipe 'rtn-w4a7': nearest names are ")
    assert all(name in str(error) for name in RECIPES)
    assert "nearest" not in str(unknown_name("recipe", "zzz", RECIPES))
    assert str(unknown_name("recipe", "x", ())).endswith("all: none")


def test_the_first_line_of_somebody_elses_error():
    assert first_line(ValueError("\nwhat went wrong\nand much more")) == "what went wrong"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(OSError("x" * 300)) == "x" * 200 + "…"


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no")


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value] * 9
    return value


@pytest.mark.parametrize(
    "value",
    ["x" * 10**7, b"x" * 10**7, 10**5000, -(10**20000), nested(12), list(range(10**6)), {i: i for i in range(10**5)}]
    + [Unprintable(), {"a": Unprintable()}, "\n" * 1000, "é\u2028" * 1000, nested(10**3)],
    ids=lambda value: type(value).__name__,
)
def test_short_reprs_are_short_and_one_line(value):
    text = short_repr(value)
    assert 0 < len(text) <= 80
    assert "\n" not in text


def test_short_reprs_of_short_values_are_their_reprs():
    for value in (None, True, 0, -1.5, "a", "it's", [1, "a"], {"a": [1]}, ("x",), {1}):
        assert short_repr(value) == repr(value)


def test_messages_are_bounded():
    for error in (S2QError, UsageError, InvalidInputError, ResourceError, BusyError):
        assert len(str(error("x" * 10**7))) == 4001
        assert str(error("short")) == "short"
    assert len(str(unknown_name("recipe", "x" * 10**7, RECIPES))) < 300


NO_MEMORY = (
    MemoryError(),
    MemoryError("std::bad_alloc"),
    np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype("float32")),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4"
    ),
    RuntimeError("unable to mmap 1024 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("can't start new thread"),
    RuntimeError("could not create a primitive"),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    SafetensorError("Error while deserializing header: Cannot allocate memory (os error 12)"),
    ImportError("libfoo.so: failed to map segment from shared object: cannot allocate memory"),
)
OTHERS = (
    RuntimeError("shape mismatch"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    SafetensorError("invalid header"),
    ValueError("12"),
    InvalidInputError("the prompt says: out of memory"),
    KeyError("memory"),
)


def raising(error):
    def fail():
        raise error

    return fail


def wrapped(error):
    """The error as libraries hide it: as the cause of another, or as what was being handled."""
    try:
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(raising(OSError("Unable to load weights from checkpoint file")))
                raise error
        except OSError as other:
            raise InvalidInputError("download the model again") from other
    except InvalidInputError as last:
        return last


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_lack_of_memory_is_told_whichever_way_it_is_put(error):
    assert is_out_of_memory(error)
    assert is_out_of_memory(wrapped(error))
    for raised in (error, wrapped(error)):
        with pytest.raises(ResourceError, match="^out of memory while computing; use less$"):
            memory_errors("computing", remedy="use less")(lambda one: (_ for _ in ()).throw(one).__next__())(raised)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_other_errors_are_not_lack_of_memory(error):
    assert not is_out_of_memory(error)
    assert not is_out_of_memory(wrapped(error))
    with pytest.raises(type(error)), memory_errors("computing", remedy="use less"):
        raise error


def test_a_handled_lack_of_memory_is_not_told_again():
    error = ValueError("another")
    error.__context__, error.__suppress_context__ = MemoryError(), True
    assert not is_out_of_memory(error)


def test_cyclic_causes_do_not_loop():
    one, other = ValueError("a"), ValueError("b")
    one.__cause__, other.__cause__ = other, one
    assert not is_out_of_memory(one)
