"""The benchmark: list the cases, measure the missing ones, and write each result at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from s2q.benchmark import micro
from s2q.benchmark.calibration_block import calibration_case
from s2q.benchmark.case import (
    BACKENDS,
    OPS,
    Case,
    Settings,
    check_recipes,
)
from s2q.benchmark.machine import hardware, measuring_obstacle, versions
from s2q.benchmark.pipeline_steps import pipeline_step_case
from s2q.benchmark.results import ResultsFile
from s2q.benchmark.shapes import (
    Subject,
    attention_shapes,
    layer_shapes,
    resolve_subject,
    subject_rows,
)
from s2q.benchmark.steps import synthetic_step_case
from s2q.common.arguments import device_name
from s2q.common.errors import (
    ResourceError,
    first_line,
    is_out_of_memory,
    unknown_name,
)
from s2q.common.progress import Progress, silent
from s2q.common.torch_state import in_fresh_torch_state
from s2q.models.synthetic import SYNTHETIC_PREFIX, SyntheticModel, synthetic_names

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "shapes-cogvideox"
"""Whose denoising step and calibration are measured without a model."""


def check_names(kind: str, names: Sequence[str] | None, options: Sequence[str]) -> tuple[str, ...]:
    """Return names in the order of the options; all of them where none is given.

    Args:
        kind: What is named, in the singular.
        names: The names; may be None.
        options: Those that there are.

    Raises:
        InvalidInputError: If a name is unknown.
    """
    for name in names or ():
        if name not in options:
            raise unknown_name(kind, name, options)
    return tuple(name for name in options if not names or name in names)


def check_backends(names: Sequence[str] | None, device: str) -> tuple[str, ...]:
    """Return the backends to measure, in the order of `BACKENDS`.

    Args:
        names: What was asked for; None is "auto".
        device: Where.

    Raises:
        InvalidInputError: If a name is unknown.
        ResourceError: If one cannot run here.
    """
    wanted = check_names("backend", names or ["auto"], BACKENDS)
    for name in wanted:
        reason = measuring_obstacle(name, device)
        if reason is not None:
            raise ResourceError(f"backend {name!r} cannot run here: {reason}; remove it")
    return wanted


@in_fresh_torch_state
def make_cases(model: str | None, ops: Sequence[str], settings: Settings, *, variant: str | None = None) -> list[Case]:
    """List what is to be measured.

    Args:
        model: What to measure; None takes the shapes of all published models and the step of the embedded one.
        ops: Those of `OPS`.
        settings: What was asked for.
        variant: Variant of the model's weights.

    Raises:
        InvalidInputError: If there is no such model.
    """
    check_recipes(settings.recipes)
    names = [SYNTHETIC_PREFIX + name for name in synthetic_names()] if model is None else [model]
    subjects = [resolve_subject(name, variant=variant) for name in names]
    whole = resolve_subject(DEFAULT_MODEL) if model is None else subjects[0]
    single = [op for op in ops if op in OPS[:4]]
    rows = subject_rows(subjects, tokens=settings.tokens, device=settings.device) if single else None
    cases: list[Case] = []
    for op in ops:
        if op == "attention_colsum":
            cases += micro.attention_cases(attention_shapes(subjects, rows=rows), settings)
        elif op in single:
            cases += micro.linear_cases(op, layer_shapes(subjects, rows=rows), settings)
        elif op == "denoising_step":
            cases.append(_step_case(whole, settings))
        else:
            cases.append(calibration_case(whole, settings))
    return [case for case in cases if case.wanted]


def open_results(path: Path, *, device: str, again: bool) -> ResultsFile:
    """Open or begin a results file for this machine.

    Args:
        path: The file.
        device: Where it is measured.
        again: See `ResultsFile`.

    Raises:
        InvalidInputError: See `ResultsFile`.
        ResourceError: If there is no such device.
    """
    return ResultsFile(path, hardware=hardware(device_name(device)), versions=versions(), again=again)


def missing_cases(cases: Sequence[Case], results: ResultsFile) -> list[Case]:
    """Return what is left to measure: cases without the results that the file has.

    Args:
        cases: All that is wanted.
        results: What there is.
    """
    left = (replace(case, wanted=tuple(one for one in case.wanted if not results.has(one))) for case in cases)
    return [case for case in left if case.wanted]


@in_fresh_torch_state
def run_cases(cases: Sequence[Case], results: ResultsFile, *, progress: Progress = silent) -> None:
    """Measure; each case's results are written at once.

    Args:
        cases: What to measure.
        results: Where to.
        progress: Called with "bench", the cases done and the cases to do.

    Raises:
        ResourceError: If a case does not fit in memory; after all others have been measured.
    """
    failures: list[str] = []
    for done, case in enumerate(cases):
        progress("bench", done, len(cases))
        try:
            found = case.measure(case.wanted)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failures.append(f"{case.label}: out of memory ({first_line(error)})")
            logger.warning(failures[-1])
            continue
        results.add(found)
        logger.info("%s: measured", case.label)
    if cases:
        progress("bench", len(cases), len(cases))
    if failures:
        raise ResourceError(f"{'; '.join(failures)}; use fewer tokens or omit this; the other results are written")


def _step_case(subject: Subject, settings: Settings) -> Case:
    if isinstance(subject, SyntheticModel):
        return synthetic_step_case(subject, settings)
    return pipeline_step_case(subject, settings)
