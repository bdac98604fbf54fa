"""Positions of the video tokens in a linear's input: a grid of frames, rows and columns, beside text tokens.

A transformer cuts latents into patches and reads them as a sequence, frame by frame and row by row. Some linears see
that sequence alone, others the joint one, with the text before or after it. Which of them an input is, is told by its
length.

The grid of a call belongs to the call: `token_grid` sets it in this thread, `current_grid` returns the innermost one.

Shapes: `B` samples, `N` tokens of an input, `C` channels, `f`, `h`, `w` latent frames, rows and columns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Literal, TypeGuard

import torch

from s2q.common.errors import InvalidInputError, UsageError, short_repr, unknown_name

LATENTS = ("frames first", "channels first", "channels last", "tokens", "packed")
TEXT = ("before", "after", "apart")


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """The video tokens of one call of a transformer, along time, a column and a row.

    Attributes:
        text_tokens: Text tokens of a joint sequence; 0 where no linear sees one.
        text: Whether they come "before" or "after" the video in it; "apart" where no linear sees one.
    """

    frames: int
    height: int
    width: int
    text_tokens: int = 0
    text: Literal["before", "after", "apart"] = "apart"

    @property
    def tokens(self) -> int:
        """Number of video tokens."""
        return self.frames * self.height * self.width

    def offset(self, length: int) -> int | None:
        """Return where the video tokens of a sequence begin; None if it is neither the video nor the joint sequence."""
        if length == self.tokens:
            return 0
        if self.text == "apart" or length != self.tokens + self.text_tokens:
            return None
        return self.text_tokens if self.text == "before" else 0


def cut_tokens(
    length: int, grid: TokenGrid | None, *, piece: int, cube_frames: int
) -> list[tuple[int, TokenGrid | None]]:
    """Cut a sequence of tokens into pieces of about so many, in order; return the length and grid of each.

    One that is not longer is one piece. Of others, text and video are in pieces of their own. The video is cut between
    frames, after multiples of `cube_frames`, so that cubes of so many frames stay whole; a piece has that many frames
    even where they are more tokens than `piece`. The grid is None for text, and if that of the sequence is unknown.

    Example: 4 tokens of text, then 5 frames of 2 x 3, cubes of 2 frames, pieces of 16: [4 | 12 | 12 | 6].
    """
    if length <= piece:
        return [(length, grid)]
    offset = None if grid is None else grid.offset(length)
    if grid is None or offset is None:
        return [(size, None) for size in _sizes(length, piece)]
    frames = frames_of_piece(grid.height * grid.width, piece=piece, cube_frames=cube_frames)
    video = [replace(grid, frames=size, text_tokens=0, text="apart") for size in _sizes(grid.frames, frames)]
    before, after = (_sizes(text, piece) for text in (offset, length - offset - grid.tokens))
    return [
        *((size, None) for size in before),
        *((inside.tokens, inside) for inside in video),
        *((size, None) for size in after),
    ]


def frames_of_piece(frame: int, *, piece: int, cube_frames: int) -> int:
    """Return the frames, of so many tokens each, that `cut_tokens` has in a piece of video."""
    return max(piece // (cube_frames * frame), 1) * cube_frames


def _sizes(total: int, most: int) -> list[int]:
    return [min(most, total - start) for start in range(0, total, most)]


@dataclass(frozen=True)
class _Call:
    grid: TokenGrid | None
    backward_pass: int
    outer: _Call | None


_THREAD = threading.local()  # torch.compile traces neither a ContextVar nor a class of one's own


def begin_call(grid: TokenGrid | None) -> None:
    """Set the grid (None: unknown) of the calls of layers that follow in this thread, until `end_call`."""
    _THREAD.call = _Call(grid, _backward_pass(), _call())


def end_call() -> None:
    """Restore the grid of the call around the one that ends."""
    call = _call()
    _THREAD.call = None if call is None else call.outer


@contextmanager
def token_grid(grid: TokenGrid | None) -> Iterator[None]:
    """Set the grid of the calls of layers within, in this thread."""
    begin_call(grid)
    try:
        yield
    finally:
        end_call()


def current_grid() -> TokenGrid | None:
    """Return the grid of the call at hand; None if it is unknown.

    Raises:
        UsageError: If there is no call in this thread, or the layer is called in a backward pass that the call is not
            part of (checkpointing by other means than the transformer's own). The grid is never guessed.
    """
    call = _call()
    if call is None or call.backward_pass != _backward_pass():
        raise UsageError(
            "a quantized layer that needs the positions of the video tokens was called outside its transformer; call "
            "the transformer, and checkpoint gradients with its enable_gradient_checkpointing()"
        )
    return call.grid


def carried_call() -> Callable[[], AbstractContextManager[None]]:
    """Return what makes contexts with the grid of the call at hand, for its recomputation in a backward pass."""
    call = _call()
    return nullcontext if call is None else partial(token_grid, call.grid)


def _call() -> _Call | None:
    return getattr(_THREAD, "call", None)


def _backward_pass() -> int:
    """Return the number of the backward pass that this thread is in, -1 outside; torch.compile traces none."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """Layout of a transformer's token sequence, from which the grid of any call follows.

    Attributes:
        latents: "frames first" [B, f, C, h, w], "channels first" [B, C, f, h, w], "channels last" [B, f, h, w, C], or
            "tokens" [B, f · h · w, C] with the arguments `num_frames`, `height` and `width`; "packed" the same without
            these, at the end of a sequence whose tokens have coordinates: `position_ids` [N, 3] of time, row and
            column, those of the video at `video_indices` [f · h · w].
        patch: Latent frames, rows and columns that make a token.
        text: Where the text lies in a joint sequence; see `TokenGrid`.
    """

    latents: Literal["frames first", "channels first", "channels last", "tokens", "packed"]
    patch: tuple[int, int, int]
    text: Literal["before", "after", "apart"]

    def __post_init__(self) -> None:
        """Check the values."""
        for name, options in (("latents", LATENTS), ("text", TEXT)):
            if getattr(self, name) not in options:
                raise unknown_name(f"{name} of a token layout", str(getattr(self, name)), options)
        if not is_triple(self.patch):
            raise InvalidInputError(
                f"token layout: patch={short_repr(self.patch)}; expected three whole numbers from 1"
            )

    def grid(self, arguments: Mapping[str, Any]) -> TokenGrid:
        """Return the grid of a call of the transformer; InvalidInputError if the arguments do not define it."""
        if self.latents == "packed":
            return _packed_grid(arguments)
        latents = arguments.get("hidden_states")
        shape = tuple(getattr(latents, "shape", ()))
        sizes: tuple[Any, ...] = ()
        if self.latents == "tokens":
            sizes = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
            known = len(shape) == 3 and is_triple(sizes) and sizes[0] * sizes[1] * sizes[2] == shape[1]
        else:
            known = len(shape) == 5
            frames, rows, columns = {"frames first": (1, 3, 4), "channels last": (1, 2, 3)}.get(self.latents, (2, 3, 4))
            sizes = (shape[frames], shape[rows], shape[columns]) if known else ()
        if not known:
            raise InvalidInputError(
                f"transformer: called with latents {list(shape)} and sizes {list(sizes)}, which do not define frames, "
                f"rows and columns (expected latents {self.latents}), as this recipe requires"
            )
        patch = (1, 1, 1) if self.latents == "tokens" else self.patch
        frames, height, width = (int(size) // step for size, step in zip(sizes, patch, strict=True))
        text = getattr(arguments.get("encoder_hidden_states"), "shape", (0, 0))[1]
        return TokenGrid(
            frames=frames,
            height=height,
            width=width,
            text_tokens=0 if self.text == "apart" else int(text),
            text=self.text,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self) | {"patch": list(self.patch)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TokenLayout:
        """Read what `to_dict` wrote; InvalidInputError if a field is missing, unknown or not valid."""
        names = [field.name for field in fields(cls)]
        if not isinstance(content, Mapping) or set(names) - set(content):
            raise InvalidInputError(
                f"token layout: got {short_repr(content)}; expected a mapping with {', '.join(names)}"
            )
        for name in content:
            if name not in names:
                raise unknown_name("key of a token layout", str(name), names)
        patch = content["patch"]
        return cls(
            latents=content["latents"], patch=tuple(patch) if isinstance(patch, list) else patch, text=content["text"]
        )


def _packed_grid(arguments: Mapping[str, Any]) -> TokenGrid:
    positions, video = arguments.get("position_ids"), arguments.get("video_indices")
    if isinstance(positions, torch.Tensor) and isinstance(video, torch.Tensor):
        before = len(positions) - len(video)
        frames, height, width = (len(torch.unique(axis)) for axis in positions[video].unbind(1))
        if frames * height * width == len(video) and bool((video == torch.arange(len(video)).to(video) + before).all()):
            return TokenGrid(frames=frames, height=height, width=width, text_tokens=before, text="before")
    raise InvalidInputError(
        "transformer: called without positions of one video at the end of the sequence, which this recipe requires"
    )


def is_triple(value: Any) -> bool:
    """Tell whether something is a tuple of three positive whole numbers."""
    return isinstance(value, tuple) and len(value) == 3 and all(is_whole(size) and size >= 1 for size in value)


def is_whole(value: object) -> TypeGuard[int]:
    """Tell whether something is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)
