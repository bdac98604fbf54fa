"""The benchmark: list the cases, measure the missing ones, and write each result at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from s2q.benchmark import micro
from s2q.benchmark.calibration_block import calibration_case
from s2q.benchmark.case import BACKENDS, OPS, Case, Settings, check_recipes
from s2q.benchmark.machine import hardware, measuring_obstacle, versions
from s2q.benchmark.pipeline_steps import pipeline_step_case
from s2q.benchmark.results import ResultsFile
from s2q.benchmark.shapes import attention_shapes, layer_shapes, resolve_subject, subject_rows
from s2q.benchmark.steps import synthetic_step_case
from s2q.benchmark.timing import TimingOptions
from s2q.common.arguments import (
    device_name,
    finite_number,
    flag,
    model_argument,
    name_list,
    optional,
    path_argument,
    whole_number,
    word,
)
from s2q.common.errors import InvalidInputError, ResourceError, first_line, is_out_of_memory, unknown_name
from s2q.common.outputs import output_lock
from s2q.common.progress import Progress, silent
from s2q.common.torch_state import in_fresh_torch_state
from s2q.generation.defaults import generation_defaults
from s2q.models.attention import check_attention_backend
from s2q.models.synthetic import SYNTHETIC_PREFIX, SyntheticModel, synthetic_names
from s2q.recipes.load import load_recipe

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "shapes-cogvideox"
"""Whose denoising step and calibration are measured without a model."""

DEFAULT_RECIPES = ("s2q-w4a6", "s2q-w4a4")


def bench(
    model: str | Path | None = None,
    *,
    out: str | Path,
    ops: Sequence[str] = (),
    recipes: Sequence[str] = DEFAULT_RECIPES,
    backends: Sequence[str] = ("auto",),
    attention_backend: str | None = None,
    tokens: int | None = None,
    blocks: int = 1,
    repeats: int = 10,
    seconds: float = 10.0,
    device: str | torch.device | int = "cpu",
    variant: str | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure speed and memory against bf16: single operations, denoising steps, calibration.

    Args:
        model: "synthetic:NAME" (random weights), an embedded name, a folder or a Hub id; None takes the layers of all
            published models and the step of shapes-cogvideox.
        out: JSON file to write; results that are in it are not measured again.
        attention_backend: Attention of the quantized contenders of a denoising step, as diffusers names it.
        tokens: Rows of an op, video tokens of a block; None takes the model's, on a CPU 2048 and 1024.
        blocks: Blocks of a synthetic model to build and time.
        seconds: No new round starts after this time, from the third on.
        again: Whether to measure results that the file has again.
        progress: Called with "bench", the cases done and the cases to do.

    Returns:
        The content of `bench.json`: `schema_version`, `hardware`, `versions` and `results`.

    Raises:
        InvalidInputError: A name is unknown, there is nothing to measure, or `out` is of another machine.
        ResourceError: A device or a backend is not there, or a case does not fit in memory; the others are written.
        BusyError: Another process writes `out`.
    """
    chosen, path = check_names("op", name_list("ops", ops), OPS), path_argument("out", out)
    device, variant, again = device_name(device), optional(word, "variant", variant), flag("again", again)
    repeats = whole_number("repeats", repeats, least=1)
    model = None if model is None else model_argument("model", model)
    if attention_backend is not None:
        check_attention_backend(attention_backend)
    settings = Settings(
        device=device,
        backends=_check_backends(name_list("backends", backends), device),
        recipes=tuple(load_recipe(recipe) for recipe in name_list("recipes", recipes)),
        options=TimingOptions(repeats=repeats, seconds=finite_number("seconds", seconds)),
        tokens=optional(whole_number, "tokens", tokens, least=1),
        blocks=whole_number("blocks", blocks, least=1),
        attention=attention_backend,
        generation=generation_defaults(model or DEFAULT_MODEL),
    )
    cases = make_cases(None if model is None else str(model), chosen, settings, variant=variant)
    if not cases:
        raise InvalidInputError(
            f"nothing to measure: none of {', '.join(chosen)} runs here with {', '.join(settings.backends)}, or "
            "applies to the recipes"
        )
    with output_lock(path):
        results = ResultsFile(path, hardware=hardware(device), versions=versions(), again=again)
        run_cases(missing_cases(cases, results), results, progress=progress or silent)
    return dict(results.content)


def check_names(kind: str, names: Sequence[str], options: Sequence[str]) -> tuple[str, ...]:
    """Return names in the order of the options; all of them where none is given."""
    for name in names:
        if name not in options:
            raise unknown_name(kind, name, options)
    return tuple(name for name in options if not names or name in names)


def _check_backends(names: Sequence[str], device: str) -> tuple[str, ...]:
    wanted = check_names("backend", names, BACKENDS)
    for name in wanted:
        reason = measuring_obstacle(name, device)
        if reason is not None:
            raise ResourceError(f"backend {name!r} cannot run here: {reason}; remove it")
    return wanted


@in_fresh_torch_state
def make_cases(model: str | None, ops: Sequence[str], settings: Settings, *, variant: str | None = None) -> list[Case]:
    """List what is to be measured; `model` as `bench` takes it."""
    check_recipes(settings.recipes)
    names = [SYNTHETIC_PREFIX + name for name in synthetic_names()] if model is None else [model]
    subjects = [resolve_subject(name, variant=variant) for name in names]
    whole = resolve_subject(DEFAULT_MODEL) if model is None else subjects[0]
    single = [op for op in ops if op in micro.OP_BACKENDS]
    rows = subject_rows(subjects, tokens=settings.tokens, device=settings.device) if single else None
    cases: list[Case] = []
    for op in ops:
        if op in micro.ATTENTION:
            cases += micro.attention_cases(op, attention_shapes(subjects, rows=rows), settings)
        elif op in single:
            cases += micro.linear_cases(op, layer_shapes(subjects, rows=rows), settings)
        elif op == "calibration_block":
            cases.append(calibration_case(whole, settings))
        elif isinstance(whole, SyntheticModel):
            cases.append(synthetic_step_case(whole, settings))
        else:
            cases.append(pipeline_step_case(whole, settings))
    return [case for case in cases if case.wanted]


def missing_cases(cases: Sequence[Case], results: ResultsFile) -> list[Case]:
    """Return what is left to measure: cases without the results that the file has."""
    left = [replace(case, wanted=tuple(entry for entry in case.wanted if not results.has(entry))) for case in cases]
    return [case for case in left if case.wanted]


@in_fresh_torch_state
def run_cases(cases: Sequence[Case], results: ResultsFile, *, progress: Progress = silent) -> None:
    """Measure; each case's results are written at once. Running out of memory is raised after all other cases."""
    failures: list[str] = []
    for done, case in enumerate(cases):
        progress("bench", done, len(cases))
        try:
            results_of_case = case.measure(case.wanted)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failures.append(f"{case.label}: out of memory ({first_line(error)})")
            logger.warning(failures[-1])
            continue
        results.add(results_of_case)
        logger.info("%s: measured", case.label)
    if cases:
        progress("bench", len(cases), len(cases))
    if failures:
        raise ResourceError(f"{'; '.join(failures)}; use fewer tokens or omit this; the other results are written")
