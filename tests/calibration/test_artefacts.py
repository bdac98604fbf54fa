import json

import pytest
import torch

from s2q.calibration.artefacts import Argument
from s2q.common.errors import InvalidInputError

STEPS, BRANCHES = 3, 2
ROWS = torch.arange(BRANCHES * 4.0).reshape(BRANCHES, 4)
TABLE = torch.arange(6.0).reshape(3, 2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([ROWS] * STEPS, lambda step, branch: ROWS[branch][None]),
        ([ROWS + step for step in range(STEPS)], lambda step, branch: (ROWS + step)[branch][None]),
        ([TABLE] * STEPS, lambda step, branch: TABLE),
        ([(TABLE, -TABLE)] * STEPS, lambda step, branch: (TABLE, -TABLE)),
        ([{"scale": 1.5}] * STEPS, lambda step, branch: {"scale": 1.5}),
        ([None] * STEPS, lambda step, branch: None),
    ],
    ids=["rows", "rows of each step", "shared", "tuple", "plain", "none"],
)
def test_an_argument_is_the_same_after_storing(values, expected):
    argument = Argument.of("x", values, branches=BRANCHES)
    record = json.loads(json.dumps(argument.to_record()))
    stored = Argument.load("x", record, argument.tensors("x"))
    for step in range(STEPS):
        for branch in (0, 1, -1):
            torch.testing.assert_close(stored.at(step, branch), expected(step, branch), rtol=0, atol=0)


def test_an_argument_that_changes_without_rows_is_refused():
    with pytest.raises(InvalidInputError, match="argument x changes between steps and has no row"):
        Argument.of("x", [TABLE, TABLE + 1], branches=BRANCHES)
