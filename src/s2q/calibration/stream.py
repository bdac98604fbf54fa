"""The teacher's stream: what each block of the full-precision model is called with, for every sample, block by block.

Only one block's inputs exist at a time. They are those of the first block, found by running the transformer until it
gets there, and go through one block after another from then on; a block that was calibrated before (resumed) costs one
pass. Where a model adds something between its blocks, each block's inputs are found as those of the first. Since every
block sees the teacher's stream, the inputs of a block do not depend on what became of the others.

Tensors that host memory has no room for are on the disk, in the run folder.
"""

import contextlib
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from s2q.common.components import TRANSFORMERS, full_name
from s2q.common.errors import InvalidInputError
from s2q.common.hooks import capture_calls, first_not_finite
from s2q.common.memory import on_device, outside, paged, release_page_locked, to_device
from s2q.common.progress import Tick
from s2q.common.tensor_store import HostMemory, TensorStore
from s2q.core.tokens import TokenGrid, TokenLayout
from s2q.models.family import Family, token_layout


class TeacherStream:
    """The inputs of one block after another, for every sample.

    Args:
        calls: A function for each sample that returns the transformer's keyword arguments.
        names: What messages call the samples.
        steps: Index of the denoising step that each sample is of.
        timesteps: The same as `calls`, for calls whose timestep alone counts; see `timestep_inputs`.
        family: Of the transformer; tells which arguments of a block it returns anew.
        folder: Where tensors go that memory has no room for.
        memory: Host memory for the inputs of one block and what else is kept for it; None does not limit it.
        page_out: Called with a block that will not be read for a while.
        component: Which transformer of the pipeline it is, for messages.
        tokens: How the transformer makes tokens of its arguments; None if nothing needs their positions.
        prefix: Of the names of files, where several streams share the folder.
        pages: Whether blocks that run before the one at hand are on the device one at a time (group offload).
    """

    def __init__(
        self,
        transformer: nn.Module,
        block_names: Sequence[str],
        *,
        calls: Sequence[Callable[[], dict[str, Any]]],
        names: Sequence[str],
        steps: Sequence[int],
        timesteps: Sequence[Callable[[], dict[str, Any]]] = (),
        family: Family,
        folder: Path,
        device: str = "cpu",
        memory: HostMemory | None = None,
        page_out: Callable[[nn.Module], None] = lambda module: None,
        component: str = TRANSFORMERS[0],
        tokens: TokenLayout | None = None,
        prefix: str = "",
        pages: bool = False,
    ) -> None:
        self.transformer, self.block_names = transformer, list(block_names)
        self.calls, self.names = calls, list(names)
        self.steps, self.timesteps = tuple(steps), timesteps
        self.family, self.device, self.prefix = family, device, prefix
        self.folder, self.memory = folder, memory or HostMemory(sys.maxsize)
        self.page_out, self.component, self.tokens, self.pages = page_out, component, tokens, pages
        self._moving = self.store("stream")
        self._grids: list[TokenGrid] = []
        self._fixed: list[dict[str, Any]] = []
        self._conditioning: list[dict[str, Any]] = []
        self._tokens: list[dict[str, int]] = []
        self._position: int | None = None
        self._layouts: dict[int, tuple[TokenGrid | None, int]] = {}

    def __len__(self) -> int:
        return len(self.calls)

    @property
    def streams(self) -> tuple[str, ...]:
        """Keyword arguments that the block at hand returns anew, in that order; at first, those of the first block."""
        return self.family.streams_of(self.block_names[self._position or 0])

    def store(self, name: str) -> TensorStore:
        """Make a store for what belongs to the block at hand, with the memory of this stream."""
        pinned = torch.device(self.device).type == "cuda"
        return TensorStore(self.folder, f"{self.prefix}{name}", memory=self.memory, pinned=pinned)

    def advance(self, block: int) -> None:
        """Go to the inputs of a block; backwards means from the start."""
        try:
            if self._position is None or block < self._position or (block > self._position and not self.family.chained):
                self._start(0 if self.family.chained else block)
            assert self._position is not None
            while self._position < block:
                self._pass()
                self._position += 1
        except BaseException:
            self._position = None  # some samples are moved, others are not
            raise

    def inputs(self, sample: int) -> dict[str, Any]:
        """Return the keyword arguments that the block at hand is called with."""
        return self._renamed({**self._fixed[sample], **self._moving.get(sample)})

    def grid(self, sample: int) -> TokenGrid | None:
        """Return the positions of the video tokens of a sample; None if nothing needs them."""
        return None if self.tokens is None else self._grids[sample]

    def video_grid(self, sample: int) -> TokenGrid | None:
        """Return the same for reports, whether or not anything needs it; None if the call does not define it."""
        return self._layout_of(sample)[0]

    def text_tokens(self, sample: int) -> int:
        """Return the text tokens at the start of a packed sequence; 0 of another."""
        return self._layout_of(sample)[1]

    def _layout_of(self, sample: int) -> tuple[TokenGrid | None, int]:
        """Grid and text tokens of a sample, whose call is read from the run folder once for all blocks."""
        if sample not in self._layouts:
            arguments, grid = self.calls[sample](), None
            with contextlib.suppress(InvalidInputError):
                grid = (self.tokens or token_layout(self.transformer, self.family)).grid(arguments)
            self._layouts[sample] = grid, len(arguments.get("text_indices", ()))
        return self._layouts[sample]

    def timestep_inputs(self) -> Iterator[dict[str, Any]]:
        """Go through keyword arguments of the block at hand that have the conditioning of one timestep after another.

        What is not conditioning, the streams, is that of the first sample throughout, cut or filled to the tokens of
        the call: it says nothing, and is there because a block is not called without it.
        """
        for conditioning, tokens in zip(self._conditioning, self._tokens, strict=True):
            streams = {name: _with_tokens(value, tokens[name]) for name, value in self._moving.get(0).items()}
            yield self._renamed({**conditioning, **streams})

    def check(self, outputs: Sequence[Tensor], *, sample: int, module: nn.Module, run: Tick) -> None:
        """Refuse NaN and infinite values in what the block at hand returns; `run` calls it again to find the layer."""
        assert self._position is not None
        for name, output in zip(self.streams, outputs, strict=True):
            if not bool(torch.isfinite(output).all()):
                block_name = full_name(self.component, self.block_names[self._position])
                first = first_not_finite({block_name: module}, run)
                where = "" if first is None else f", first in {first}"
                raise InvalidInputError(
                    f"{block_name}: its {name} for {self.names[sample]} contain NaN or infinite values{where}; "
                    "check the model, or use another dtype (float16 overflows where bfloat16 does not)"
                )

    def close(self) -> None:
        """Remove what is on the disk and return page-locked memory."""
        self._moving.clear()
        if torch.device(self.device).type == "cuda":
            release_page_locked()

    @torch.no_grad()
    def _start(self, block: int) -> None:
        """Find the inputs of a block by running the transformer until it gets there."""
        self._position = block
        reached = self.transformer.get_submodule(self.block_names[block])
        self._moving.clear()
        self._fixed, self._conditioning, self._tokens, self._grids = [], [], [], []
        distinct = _Distinct()
        blocks = [self.transformer.get_submodule(name) for name in self.block_names]
        paged_blocks = blocks[:block] if self.pages else []
        with (
            on_device(outside(self.transformer, [*paged_blocks, *blocks[block:]]), self.device),
            paged(paged_blocks, self.device),
        ):
            for sample, call in enumerate(self.calls):
                given = call()
                if self.tokens is not None:
                    self._grids.append(self.tokens.grid(given))
                arguments = to_device(given, self.device)
                moving, fixed = self._split(_first_call(self.transformer, reached, arguments))
                self._moving.put(sample, moving)
                self._fixed.append(distinct(fixed))
            for call in self.timesteps:
                arguments = _first_call(self.transformer, reached, to_device(call(), self.device))
                moving, conditioning = self._split(arguments)
                self._conditioning.append(distinct(conditioning))
                self._tokens.append({name: value.shape[1] for name, value in moving.items()})

    def _split(self, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Separate the streams from the arguments that are the same for all blocks."""
        missing = [name for name in self.streams if name not in arguments]
        assert not missing, f"blocks are called without {missing}"
        fixed = {name: value for name, value in arguments.items() if name not in self.streams}
        return {name: arguments[name] for name in self.streams}, fixed

    def _renamed(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Give arguments the names that the block at hand has for them: those at the same place, in another list."""
        assert self._position is not None
        if not self.family.chained:
            return dict(arguments)
        blocks = (self.transformer.get_submodule(self.block_names[index]) for index in (0, self._position))
        names = dict(zip(*(_parameters(type(block)) for block in blocks), strict=False))
        return {names.get(name, name): value for name, value in arguments.items()}

    @torch.no_grad()
    def _pass(self) -> None:
        assert self._position is not None
        block = self.transformer.get_submodule(self.block_names[self._position])
        with on_device(block.modules(), self.device):
            for sample in range(len(self)):
                call = functools.partial(block, **to_device(self.inputs(sample), self.device))
                outputs = call()
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                self.check(outputs, sample=sample, module=block, run=call)
                self._moving.put(sample, dict(zip(self.streams, outputs, strict=True)))
        self.page_out(block)


def _with_tokens(stream: Tensor, tokens: int) -> Tensor:
    """A stream [B, N, ...] with the first tokens of its own, and zeros behind them if it has fewer."""
    missing = tokens - stream.shape[1]
    if missing <= 0:
        return stream[:, :tokens]
    return torch.cat([stream, stream.new_zeros(stream.shape[0], missing, *stream.shape[2:])], dim=1)


class _Distinct:
    """Arguments of many calls with every tensor held once, however many calls have it: rotary tables, texts."""

    _PROBE = 64  # values that tell most tensors apart

    def __init__(self) -> None:
        self._held: dict[Any, list[Tensor]] = {}

    def __call__(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        place = itertools.count()
        result: dict[str, Any] = tree_map_only(
            Tensor, lambda value: self._held_once(next(place), value), dict(arguments)
        )
        return result

    def _held_once(self, place: int, value: Tensor) -> Tensor:
        held = self._held.setdefault((place, value.shape, value.dtype), [])
        for tensor in held:
            starts = (values.reshape(-1)[: self._PROBE] for values in (tensor, value))
            if torch.equal(*starts) and torch.equal(tensor, value):
                return tensor
        held.append(value)
        return value


def _first_call(transformer: nn.Module, block: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run the transformer until it calls a block; return the arguments of that call by name."""
    with capture_calls(block, only_first=True) as calls:
        transformer(**arguments, return_dict=False)
    assert calls, "the transformer never called the block"
    return named_arguments(block, *calls[0])


@functools.cache
def _parameters(block_class: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a class of blocks, in order."""
    _self, *parameters = inspect.signature(block_class.forward).parameters.values()
    return tuple(
        parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    )


def named_arguments(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a block's call by name.

    Blocks of one model that differ in what they use are called alike and swallow the rest in `*args`; a tensor there
    would be something that this block does use.
    """
    names = _parameters(type(block))
    swallowed = [value for value in args[len(names) :] if isinstance(value, Tensor)]
    assert not swallowed, f"{type(block).__name__} is called with {len(swallowed)} tensors that have no name"
    return {**dict(zip(names, args, strict=False)), **kwargs}
