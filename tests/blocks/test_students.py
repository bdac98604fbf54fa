"""The students of a block as they start: the search for α, and the tokens that it judges by."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from s2q.blocks.students import ALPHAS, make_students
from s2q.blocks.task import BlockTask, BlockWork
from s2q.calibration.input_statistics import InputStatistics
from s2q.models import FAMILIES, linears_of_block
from s2q.planning.resolve import resolve
from s2q.recipes.load import load_recipe
from schemes import scheme

GROUP = ("q", "k")
FAMILY = FAMILIES["CogVideoXTransformer3DModel"]
SCHEME = scheme(4, 4)


@pytest.fixture(scope="module")
def case():
    """Two linears of 48 features that read one input; a few channels of it are large."""
    torch.manual_seed(0)
    block = nn.ModuleDict({"q": nn.Linear(48, 40), "k": nn.Linear(48, 36, bias=False)}).requires_grad_(False)
    x = torch.randn(200, 48)
    x[:, :3] *= 30
    statistics = InputStatistics(48, torch.device("cpu"), moments=True, kept=200)
    statistics.add(x, timestep=0)
    return SimpleNamespace(block=block, x=x, statistics=statistics)


def students(case, *overrides):
    """The block with its students under the recipe at W4A4."""
    recipe = load_recipe("svdquant-w4a4", overrides=overrides)
    linears = linears_of_block(case.block, "block", FAMILY)
    group = tuple(replace(linear, scheme=SCHEME) for linear in resolve(recipe, linears))
    task = BlockTask(
        block=case.block,
        linears=group,
        recipe=recipe,
        family=FAMILY,
        index=0,
        seed=0,
    )
    made = make_students(BlockWork(task=task, teacher=case.block), group, statistics=case.statistics)
    return dict(zip(GROUP, made, strict=True))


def error(case, *overrides):
    """The squared error of both outputs, weights rounded to nearest."""
    student = students(case, *overrides)
    differences = [student[name](case.x) - case.block[name](case.x) for name in GROUP]
    return sum(float(one.double().square().sum()) for one in differences)


@pytest.mark.parametrize(
    "rest",
    [
        (),
        ("transforms.low_rank_from=input",),
        ("transforms.low_rank=0", "transforms.low_rank_from=input", "transforms.rotation=hadamard"),
    ],
)
def test_the_alpha_that_is_found_is_the_best_of_the_grid(case, rest):
    fixed = [error(case, *rest, f"transforms.alpha={alpha}") for alpha in ALPHAS]
    assert error(case, *rest) == pytest.approx(min(fixed), rel=1e-6)
    assert min(fixed) < 0.9 * max(fixed)


def test_linears_that_share_an_input_share_the_branch_of_their_weights(case):
    student = students(case, "transforms.alpha=0.5")
    source = student["q"].source
    assert source is student["k"].source
    assert not source.deflates
    assert source.low_rank_basis.shape == (48, 3)  # a 12th of 36


def test_kept_rows_are_evenly_spaced_over_each_call():
    statistics = InputStatistics(2, torch.device("cpu"), moments=False, kept=3)
    rows = torch.arange(14.0).reshape(1, 7, 2)
    statistics.add(rows, timestep=0)
    statistics.add(100 + rows[:, :2], timestep=1)
    assert statistics.rows()[:, 0].tolist() == [0, 6, 12, 100, 102]
    assert statistics.rows().dtype == rows.dtype
