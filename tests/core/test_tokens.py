"""Where the video tokens lie: the grid of a call, and of an input by its length."""

import json
from dataclasses import replace

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.core.tokens import TokenGrid, TokenLayout, cut_tokens


def call(*shape, text=None, **arguments):
    texts = {} if text is None else {"encoder_hidden_states": torch.empty(2, text, 8)}
    return {"hidden_states": torch.empty(shape), **texts, **arguments}


def test_the_grid_of_a_call():
    before = TokenLayout(latents="frames first", patch=(1, 2, 2), text="before")
    expected = TokenGrid(frames=13, height=3, width=5, text_tokens=7, text="before")
    assert before.grid(call(2, 13, 16, 6, 10, text=7)) == expected
    last = TokenLayout(latents="channels last", patch=(1, 2, 2), text="apart")
    assert last.grid(call(1, 3, 4, 8, 5)) == TokenGrid(frames=3, height=2, width=4)
    in_time = TokenLayout(latents="frames first", patch=(2, 2, 2), text="before")
    assert in_time.grid(call(1, 4, 16, 6, 10, text=7)).frames == 2
    after = TokenLayout(latents="channels first", patch=(1, 2, 2), text="after")
    expected = TokenGrid(frames=13, height=3, width=5, text_tokens=7, text="after")
    assert after.grid(call(2, 16, 13, 6, 10, text=7)) == expected
    tokens = TokenLayout(latents="tokens", patch=(1, 1, 1), text="apart")
    sizes = {"num_frames": 2, "height": 3, "width": 5}
    assert tokens.grid(call(1, 30, 8, text=7, **sizes)) == TokenGrid(frames=2, height=3, width=5)


@pytest.mark.parametrize(
    ("latents", "arguments"),
    [
        ("tokens", call(1, 30, 8)),
        ("tokens", call(1, 31, 8, num_frames=2, height=3, width=5)),
        ("frames first", call(1, 30, 8)),
        ("channels first", {}),
    ],
)
def test_a_call_that_does_not_say_is_refused(latents, arguments):
    layout = TokenLayout(latents=latents, patch=(1, 1, 1), text="apart")
    with pytest.raises(InvalidInputError, match="do not define frames, rows and columns"):
        layout.grid(arguments)


def test_an_input_is_told_by_its_length():
    before = TokenGrid(frames=2, height=2, width=3, text_tokens=5, text="before")
    after = TokenGrid(frames=2, height=2, width=3, text_tokens=5, text="after")
    apart = TokenGrid(frames=2, height=2, width=3)
    assert [grid.offset(12) for grid in (before, after, apart)] == [0, 0, 0]
    assert [grid.offset(17) for grid in (before, after, apart)] == [5, 0, None]
    assert [grid.offset(5) for grid in (before, after, apart)] == [None, None, None]


def test_cubes_stay_whole_where_a_sequence_is_cut():
    grid = TokenGrid(frames=5, height=2, width=3, text_tokens=4, text="before")

    def cut(length, sizes, **options):
        return [(size, None if one is None else one.frames) for size, one in cut_tokens(length, sizes, **options)]

    assert cut(34, grid, piece=16, cube_frames=2) == [(4, None), (12, 2), (12, 2), (6, 1)]
    assert cut(34, replace(grid, text="after"), piece=16, cube_frames=2) == [(12, 2), (12, 2), (6, 1), (4, None)]
    assert cut(30, grid, piece=25, cube_frames=2) == [(24, 4), (6, 1)]
    assert cut(30, grid, piece=3, cube_frames=2) == [(12, 2), (12, 2), (6, 1)]  # a cube has two frames however large
    assert cut(30, grid, piece=100, cube_frames=2) == [(30, 5)]
    assert cut_tokens(34, grid, piece=34, cube_frames=2) == [(34, grid)]
    assert cut(7, grid, piece=3, cube_frames=2) == [(3, None), (3, None), (1, None)]
    assert cut(30, None, piece=16, cube_frames=2) == [(16, None), (14, None)]
    pieces = [piece for _, piece in cut_tokens(34, grid, piece=16, cube_frames=2) if piece is not None]
    assert all(piece.offset(piece.tokens) == 0 and piece.offset(piece.tokens + 4) is None for piece in pieces)


def test_a_layout_survives_json_and_refuses_what_is_not_valid():
    layout = TokenLayout(latents="channels first", patch=(1, 2, 2), text="apart")
    content = json.loads(json.dumps(layout.to_dict()))
    assert TokenLayout.from_dict(content) == layout
    for change, message in (
        ({"latents": "frames last"}, "unknown latents of a token layout 'frames last'"),
        ({"text": None}, "unknown text of a token layout"),
        ({"patch": [1, 2]}, "expected three whole numbers"),
        ({"patch": [1, 2, 0]}, "expected three whole numbers"),
        ({"patch": 2}, "expected three whole numbers"),
        ({"more": 2}, "unknown key of a token layout 'more'"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            TokenLayout.from_dict({**content, **change})
    with pytest.raises(InvalidInputError, match="expected a mapping"):
        TokenLayout.from_dict({"latents": "tokens"})
