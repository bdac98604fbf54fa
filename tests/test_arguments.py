"""Verbs × odd arguments: everything is refused on entry, before a model is loaded and before anything is written."""

import importlib
import math
import os

import numpy as np
import pytest
import torch

import s2q
from s2q.common.errors import S2QError

MODEL = "shapes-cogvideox"


VALID = {
    "quantize": {"model": MODEL, "recipe": "rtn-w4a6", "out": "out"},
    "generate": {"model": MODEL, "prompts": ["a"]},
    "evaluate": {"model": MODEL, "reference": MODEL, "prompts": ["a"], "seeds": [0]},
    "compare": {"entries": ["rtn-w4a6"], "model": MODEL, "out": "out", "prompts": ["a"]},
    "plan": {"model": MODEL, "recipe": "rtn-w4a6"},
    "bench": {"model": MODEL, "out": "out.json", "ops": ["gemm"]},
    "load": {"model": MODEL},
    "inspect": {"model": "out"},
}

DEVICES = (None, True, 1.0, -1, "", "gpu", "CPU", b"cpu", ["cpu"], torch.device("meta"), 99)
DTYPES = (7, True, "float61", torch.int8, torch.float64, np.float32, b"float32", ["float32"])
SEEDS = (True, 1.0, "0", -1, 2**63, None, math.nan, [0], np.float64(1))
PROMPTS = ("a cat", b"a", 7, {"a"}, {"a": 1}, ["a", ""], ["a", None], [7], [b"a"], ["\udcff"])
PATHS = (7, True, b"out", "", "a\0b", "\udcff", ["out"])
MODELS = (None, 7, b"a", [MODEL], {}, object(), "", "a\0b", "\udcff")
NUMBERS = (True, 0, -1, 1.5, "2", math.nan, math.inf, [1])
WORKERS = tuple(number for number in NUMBERS if number != "2") + ("many", "2", None)
DEVICE_LISTS = ("cpu", [], [7], ["gpu"], ["cuda:99"], 7)
ENGINES = (None, 7, "rays", "dask")
WORDS = (7, True, b"auto", ["auto"])
SWITCHES = (None, 0, 1, "no", "true")
OVERRIDES = ("weights.num_bits=8", {"weights.num_bits": 8}, 7, [7], ["weights.num_bits"], None)
RECIPES = (None, 7, b"rtn-w4a6", ["rtn-w4a6"], "rtn-w4a7", "", {}, {"name": 7})
VARIANTS = (7, True, "", "a/b", "../x", b"fp16", ["fp16"])
SIZES = (True, 0, -1, 1.5, "", "lots", "10XB", None, ["10GB"], math.nan)
BACKENDS = (7, True, "", "tritn", b"cpu", ["cpu"])
GENERATION = {
    **dict.fromkeys(("num_frames", "height", "width", "num_inference_steps"), (*NUMBERS, 9.0)),
    "guidance_scale": (True, -1, "2", math.nan, math.inf, [1]),
}

CASES = {
    "quantize": {
        "variant": VARIANTS,
        "model": MODELS,
        "recipe": RECIPES,
        "out": PATHS,
        "prompts": PROMPTS,
        "seed": SEEDS,
        "device": DEVICES,
        "dtype": DTYPES,
        "overrides": OVERRIDES,
        "resume": SWITCHES,
        "overwrite": SWITCHES,
        "dry_run": SWITCHES,
        "samples": NUMBERS,
        "max_shard_size": SIZES,
        "memory_budget": [size for size in SIZES if size is not None],
        "workers": WORKERS,
        "devices": DEVICE_LISTS,
        "engine": ENGINES,
        "ray_address": WORDS,
    },
    "generate": {
        "variant": VARIANTS,
        "model": MODELS,
        "prompts": [*PROMPTS, None, []],
        "seeds": [*([seed] for seed in SEEDS), 0, "0", None, [], {0}, [0, 0]],
        **GENERATION,
        "batch_size": NUMBERS,
        "device": DEVICES,
        "dtype": DTYPES,
        "verify": [0, 1, "no"],
        "backend": BACKENDS,
        "attention_backend": BACKENDS,
        "workers": WORKERS,
        "devices": DEVICE_LISTS,
        "engine": ENGINES,
        "ray_address": WORDS,
    },
    "evaluate": {
        "variant": VARIANTS,
        "model": MODELS,
        "reference": MODELS,
        "prompts": [*PROMPTS, ["a", "a"], []],
        "seeds": [*([seed] for seed in SEEDS), 0, "0", None, [], {0}, [0, 0]],
        "metrics": ("psnr", 7, [7], ["psrn"]),
        **GENERATION,
        "batch_size": NUMBERS,
        "device": DEVICES,
        "dtype": DTYPES,
        "lpips_weights": PATHS,
        "clip": PATHS,
        "workers": WORKERS,
        "devices": DEVICE_LISTS,
        "engine": ENGINES,
        "ray_address": WORDS,
        "trajectory_bytes": [number for number in NUMBERS if number not in (0, True) or number is True],
    },
    "compare": {
        "variant": VARIANTS,
        "entries": ("rtn-w4a6", [], [7], None, {"rtn-w4a6"}),
        "model": MODELS,
        "out": [*PATHS, None],
        "prompts": [*PROMPTS, ["a", "a"], []],
        "calibration_prompts": PROMPTS,
        "num_prompts": NUMBERS,
        "seeds": [*([seed] for seed in SEEDS), 2, "0", None, [], {0}, [0, 0]],
        "workers": WORKERS,
        "devices": DEVICE_LISTS,
        "engine": ENGINES,
        "ray_address": WORDS,
        "samples": NUMBERS,
        "seed": SEEDS,
        "verify": [0, 1, "no"],
        "device": DEVICES,
        "dtype": DTYPES,
        "overrides": OVERRIDES,
        "metrics": ("psnr", 7, [7], ["psrn"]),
        **GENERATION,
        "resume": SWITCHES,
        "overwrite": SWITCHES,
        "dry_run": SWITCHES,
        "lpips_weights": PATHS,
        "clip": PATHS,
    },
    "plan": {
        "variant": VARIANTS,
        "model": MODELS,
        "recipe": RECIPES,
        "overrides": OVERRIDES,
        "dtype": DTYPES,
        "device": DEVICES,
        "device_memory": [size for size in SIZES if size is not None],
        "memory_budget": [size for size in SIZES if size is not None],
    },
    "bench": {
        "variant": VARIANTS,
        "model": [model for model in MODELS if model is not None],
        "out": [*PATHS, None],
        "ops": ("gemm", 7, [7], ["gem"], None),
        "recipes": ("rtn-w4a6", 7, [7], ["rtn-w4a7"], None),
        "backends": ("cpu", 7, [7], ["tritn"]),
        "attention_backend": BACKENDS,
        "device": DEVICES,
        "tokens": NUMBERS,
        "blocks": NUMBERS,
        "repeats": NUMBERS,
        "seconds": (True, -1, "2", math.nan, math.inf, [1]),
        "again": SWITCHES,
    },
    "load": {
        "model": MODELS,
        "device": DEVICES,
        "dtype": DTYPES,
        "verify": [0, 1, "no"],
        "variant": VARIANTS,
        "backend": BACKENDS,
        "attention_backend": BACKENDS,
    },
    "inspect": {"model": MODELS, "verify": [0, 1, "no", None], "variant": VARIANTS},
}


@pytest.fixture
def nothing_is_computed(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded although an argument is wrong")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module("s2q.evaluation.measure"), "load_pipeline", refuse)
    monkeypatch.setattr("s2q.models.source.ModelSource.load_pipeline", refuse)
    monkeypatch.setattr("s2q.run.stages.load_teacher", refuse)
    monkeypatch.setattr(importlib.import_module("s2q.comparison.compare"), "quantize", refuse)
    monkeypatch.setattr(importlib.import_module("s2q.benchmark.bench"), "run_cases", refuse)
    yield
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb, cases in CASES.items() for name in cases])
def test_wrong_arguments_are_refused_on_entry(nothing_is_computed, verb, name):
    for value in CASES[verb][name]:
        with pytest.raises(S2QError) as caught:
            getattr(s2q, verb)(**VALID[verb] | {name: value})
            pytest.fail(f"{verb}({name}={value!r}) was accepted")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 2500


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), torch.device("cpu", 0)])
@pytest.mark.parametrize("dtype", ["float32", "torch.float32", torch.float32])
def test_arguments_of_one_meaning_give_one_result(tiny_model, tmp_path, device, dtype):
    given = {"device": device, "dtype": dtype, "seed": np.int64(3), "prompts": ("a",), "max_shard_size": 10**10}
    report = s2q.quantize(tiny_model, recipe="rtn-w4a6", out=tmp_path / "out", **given)
    assert (report.device, report.dtype, report.seed, report.n_prompts) == ("cpu", "float32", 3, 1)
    assert type(report.seed) is int
