import math
from pathlib import Path

import numpy as np
import pytest
import torch

from s2q.common.arguments import (
    MAX_SEED,
    device_name,
    dtype_name,
    finite_number,
    flag,
    model_argument,
    name_list,
    optional,
    parse_dtype,
    path_argument,
    seed_number,
    seed_numbers,
    whole_number,
)
from s2q.common.errors import InvalidInputError, ResourceError


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("cpu", "cpu"),
        (torch.device("cpu"), "cpu"),
        (torch.device("cpu", 0), "cpu"),
        ("cuda", "cuda"),
        (torch.device("cuda"), "cuda"),
        ("cuda:1", "cuda:1"),
        ("cuda:01", "cuda:1"),
        (torch.device("cuda", 1), "cuda:1"),
        (1, "cuda:1"),
        (np.int64(0), "cuda:0"),
    ],
)
def test_devices_of_one_meaning_have_one_name(two_gpus, device, name):
    assert device_name(device) == name


@pytest.mark.parametrize(
    "device",
    [
        None,
        True,
        1.0,
        -1,
        "",
        "CPU",
        "cpu ",
        "gpu",
        "mps",
        "cuda:x",
        "cuda:-1",
        "cuda:²",
        b"cpu",
        ["cpu"],
        torch.device("meta"),
    ],
)
def test_device_names_of_other_forms_are_refused(two_gpus, device):
    with pytest.raises(
        InvalidInputError, match="is (unknown|an Apple GPU, which is not supported); use cpu, cuda or cuda:N"
    ):
        device_name(device)


@pytest.mark.parametrize("device", ["cuda:2", 2, torch.device("cuda", 2)])
def test_a_gpu_that_is_not_there(two_gpus, device):
    with pytest.raises(ResourceError, match="this machine has cuda:0, cuda:1; use one of these"):
        device_name(device)


def test_dtypes_are_parsed_and_others_refused():
    assert parse_dtype(None) is None
    assert parse_dtype("bfloat16") is parse_dtype("torch.bfloat16") is parse_dtype(torch.bfloat16) is torch.bfloat16
    assert dtype_name(torch.float32) == "float32"
    for dtype, message in {
        "bfloat61": "unknown dtype 'bfloat61': nearest names are bfloat16",
        torch.int8: "unknown dtype 'int8'",
        torch.float64: "unknown dtype 'float64'",
        7: "dtype: got 7",
        np.float32: "dtype: got",
        float: "dtype: got",
        True: "dtype: got True",
    }.items():
        with pytest.raises(InvalidInputError, match=message):
            parse_dtype(dtype)


NO_WHOLE_NUMBERS = [
    True,
    False,
    1.0,
    "1",
    "",
    None,
    b"1",
    [1],
    math.nan,
    math.inf,
    np.float64(1),
    np.bool_(True),
    1 + 0j,
]


@pytest.mark.parametrize("value", [*NO_WHOLE_NUMBERS, -1, 2**63, 2**64, -(2**63), np.int64(-1), 10**100])
def test_other_seeds_are_refused(value):
    for read in (seed_number, lambda one: seed_numbers([one]), lambda one: seed_numbers([3, one])):
        with pytest.raises(InvalidInputError, match="seed: got"):
            read(value)


@pytest.mark.parametrize("seed", [0, 1, MAX_SEED, np.int64(7), np.uint8(7), np.int32(0)])
def test_seeds_are_plain_ints(seed):
    assert seed_number(seed) == int(seed)
    assert type(seed_number(seed)) is int


@pytest.mark.parametrize("seeds", [[0, 1], (0, 1), range(2), np.arange(2), iter([0, 1]), [np.int64(0), 1]])
def test_seeds_come_as_a_tuple(seeds):
    assert seed_numbers(seeds) == (0, 1)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        (3, r"pass a list of seeds, \[3\] or range\(3\)"),
        (np.int64(3), r"pass a list of seeds, \[3\]"),
        ("012", "got one string; pass a list of seeds"),
        (b"012", "pass a list of seeds"),
        ({0, 1}, "pass a list of seeds"),
        ({0: 1}, "pass a list of seeds"),
        ({0: 1}.keys(), "pass a list of seeds"),
        (None, "pass a list of seeds"),
        (1.5, "pass a list of seeds"),
        ([], "pass at least one seed"),
        ([1, np.int64(1)], "each seed may appear once"),
    ],
)
def test_what_is_no_list_of_seeds(seeds, message):
    with pytest.raises(InvalidInputError, match=message):
        seed_numbers(seeds)


@pytest.mark.parametrize("value", NO_WHOLE_NUMBERS)
def test_what_is_no_whole_number(value):
    with pytest.raises(InvalidInputError, match="n: got .*expected a whole number"):
        whole_number("n", value, least=1)


def test_ranges_of_whole_numbers():
    assert whole_number("n", np.int16(3), least=3, most=3) == 3
    for value, message in {2: "at least 3", 4: "at most 3"}.items():
        with pytest.raises(InvalidInputError, match=message):
            whole_number("n", value, least=3, most=3)


@pytest.mark.parametrize("value", [True, "1", None, math.nan, math.inf, -math.inf, -0.5, 1j, [1.0], np.float32("nan")])
def test_what_is_no_finite_number(value):
    with pytest.raises(InvalidInputError, match="x: got .*expected a finite number, at least 0"):
        finite_number("x", value)


@pytest.mark.parametrize("value", [0, 1, 2.5, np.float32(2.5), np.int64(3)])
def test_finite_numbers_are_floats(value):
    assert finite_number("x", value) == float(value)
    assert type(finite_number("x", value)) is float


@pytest.mark.parametrize("value", [0, 1, "no", "", None, "true", np.bool_(True)])
def test_switches_are_true_or_false(value):
    assert flag("x", True) is True
    assert flag("x", False) is False
    with pytest.raises(InvalidInputError, match="expected True or False"):
        flag("x", value)


def test_lists_of_names_come_as_a_tuple_and_others_are_refused():
    assert name_list("metrics", ["psnr"]) == name_list("metrics", ("psnr",)) == ("psnr",)
    for names in ("psnr", None, {"psnr"}, [7], [None]):
        with pytest.raises(InvalidInputError, match="metrics: "):
            name_list("metrics", names)


@pytest.mark.parametrize(
    "path", [None, 7, True, b"out", "", "a\0b", "\udcff", Path("a\udcffb"), ["out"], "~nobody-of-this-name/x"]
)
def test_other_paths_are_refused(path):
    with pytest.raises(InvalidInputError, match="out: "):
        path_argument("out", path)


def test_paths_expand_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_argument("out", "~/a") == path_argument("out", Path("~/a")) == tmp_path / "a"
    assert optional(path_argument, "out", None) is None


@pytest.mark.parametrize("model", [None, 7, b"a", ["a"], {}, object(), int, "", "a\0", torch.nn.Linear(1, 1)])
def test_other_models_are_refused(model):
    with pytest.raises(InvalidInputError, match="model: "):
        model_argument("model", model)


def test_models_are_names_paths_or_pipelines():
    class Pipeline:
        transformer = None

    pipe = Pipeline()
    assert model_argument("model", pipe) is pipe
    assert model_argument("model", "shapes-wan") == "shapes-wan"
    assert model_argument("model", Path("a")) == Path("a")
    with pytest.raises(InvalidInputError, match="expected a name"):
        model_argument("model", Pipeline)
