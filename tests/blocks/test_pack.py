"""What the Hessians of a block are made of."""

import pytest
import torch

from s2q.blocks.pack import _quantized_by
from s2q.core.memo import memoization
from s2q.core.tokens import TokenGrid, token_grid
from s2q.nn import StudentInput
from s2q.recipes.load import load_recipe


@pytest.mark.parametrize(("recipe", "lengths"), [("s2q-w4a6", [10, 10, 4]), ("deltaquant-w4a4", [16, 8])])
def test_inputs_are_quantized_in_pieces_of_whole_cubes(recipe, lengths):
    source = StudentInput(load_recipe(recipe).linear_scheme().activation)
    x = torch.randn(1, 24, 8)
    with token_grid(TokenGrid(frames=3, height=2, width=4)), memoization():
        pieces = list(_quantized_by(source, 10)(x))
        whole = source(x).quantized
    assert [piece.shape[1] for piece in pieces] == lengths
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
