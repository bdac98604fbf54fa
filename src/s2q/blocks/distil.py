"""Distillation of one block: transforms and clipping ratios of its linears are learned, weights are fixed.

The student is the block with its linears replaced (`s2q.nn.StudentLinear`); its targets are what the full-precision
block returns for the same inputs (S²Q-VDiT, section 3.3). Samples are taken one at a time in random order, AdamW
follows a cosine to a thousandth of the learning rate, and the loss is divided by its own detached value before the
gradient is taken (FlatQuant), so that a noisy step does not count for more than a clean one.

Where the rounding of weights is learned (`s2q.rounding.adaround`), steps see it soft; every loss that is reported or
compared is that of the weights as they would be rounded, so that the best state is the best one to pack.

Legend: `B` samples, `N_k` tokens of stream k, `d` channels.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2q.calibration.samples import BlockSample, BlockSamples
from s2q.common.errors import S2QError
from s2q.common.progress import Tick
from s2q.core.memo import PIECE, checkpointed, in_pieces, memoization
from s2q.core.tokens import token_grid
from s2q.distillation.loss import weighted_token_loss
from s2q.distillation.options import Distillation, Refinement, is_evaluated
from s2q.distillation.temporal import temporal_loss
from s2q.nn import RefinedLinear, StudentInput, StudentLinear
from s2q.rounding import roundings_of, soft_rounding

logger = logging.getLogger(__name__)

_LAST_RATE = 1e-3  # of the learning rate, at the end of the cosine
_ACTIVATIONS = {"proj_mlp": "act_mlp"}
"""Linears of single-stream blocks in diffusers, and the module that is applied to what they return."""
_FEED_FORWARD = "FeedForward"
"""End of the class names of feed-forwards, which treat each token by itself."""
_NORMS = ("LayerNorm", "RMSNorm")
"""Ends of the class names of norms over the channels of a token; some compute in fp32."""
_ROUNDING_EPS = 1e-15  # far below a gradient that is shared by all weights of a block


@dataclass(frozen=True, kw_only=True)
class DistillationReport:
    """Losses and epochs of a distillation.

    Attributes:
        initial_loss: Mean loss over the samples before the first step.
        loss: The same of the state that was kept, at most `initial_loss`.
        best_epoch: Epoch after which that state was reached; 0 is the initial one.
        epochs: Epochs that were run; fewer than asked for where the loss stopped being finite.
        history: Mean loss by epoch, where it was evaluated.
    """

    initial_loss: float
    loss: float
    best_epoch: int
    epochs: int
    history: Mapping[str, float]


@torch.no_grad()
def block_loss(block: nn.Module, samples: BlockSamples, *, temporal: float = 0.0) -> float:
    """Compute the mean loss of a block over samples."""
    with memoization():
        losses = [_loss(block, sample, temporal) for sample in _ahead(samples, range(len(samples)))]
    return math.fsum(torch.stack(losses).tolist()) / len(losses)


class Optimization:
    """The steps of a distillation, one for each sample in every epoch: AdamW, its learning rates on a cosine."""

    def __init__(
        self,
        student: nn.Module,
        *,
        options: Distillation | Refinement,
        samples: int,
        temporal: float = 0.0,
        penalty: Callable[[float], None] = lambda progress: None,
    ) -> None:
        groups = _learnable(student, options)
        if not groups:
            raise S2QError("distillation: the student has nothing to learn; expected a learnable transform or clip")
        self.student, self.temporal, self.penalty = student, temporal, penalty
        self.total = total = options.epochs * samples
        self._roundings = roundings_of(student)
        self.learnable = [parameter for group in groups for parameter in group["params"]]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: _cosine(step, total))

    def step(self, sample: BlockSample) -> Tensor:
        """Learn from a sample; return its loss, on the device, so that nothing waits for it."""
        loss = self.gradient(sample)
        self.penalty(self._scheduler.last_epoch / self.total)
        self._optimizer.step()
        self._scheduler.step()
        return loss

    def gradient(self, sample: BlockSample) -> Tensor:
        """Compute the gradient of a step, except that of the penalty; return the loss."""
        with soft_rounding(self._roundings), memoization():
            loss = _loss(self.student, sample, self.temporal)
            value = loss.detach()
            self._optimizer.zero_grad(set_to_none=True)
            (loss / value.clamp_min(torch.finfo(value.dtype).tiny)).backward()
        return value


def distil(
    student: nn.Module,
    samples: BlockSamples,
    *,
    options: Distillation | Refinement,
    temporal: float = 0.0,
    seed: int,
    initial: float | None = None,
    penalty: Callable[[float], None] = lambda progress: None,
    epoch_done: Tick = lambda: None,
) -> DistillationReport:
    """Optimise the learnable parts of a student, in place; it ends in the best state seen, the initial one included.

    What requires gradients is transforms, clips, called `theta`, and learned rounding, called `logits`. The penalty is
    called in each step with the share of steps taken and adds the gradient of what else is to be small, beside a loss
    of 1. The loss of the initial state is computed unless it is given.
    """
    optimization = Optimization(student, options=options, samples=len(samples), temporal=temporal, penalty=penalty)
    learnable = optimization.learnable
    initial = block_loss(student, samples, temporal=temporal) if initial is None else initial
    if not math.isfinite(initial):
        raise S2QError(f"distillation: the loss is {initial} before the first step; check the model's activations")
    generator = torch.Generator().manual_seed(seed)
    best, best_loss, best_epoch, epoch = _snapshot(learnable), initial, 0, 0
    history = {"0": initial}
    for epoch in range(1, options.epochs + 1):
        order = torch.randperm(len(samples), generator=generator).tolist()
        losses = [optimization.step(sample) for sample in _ahead(samples, order)]
        if not bool(torch.isfinite(torch.stack(losses)).all()):
            logger.warning("distillation: the loss is not finite in epoch %d; the best state before is kept", epoch)
            break
        if is_evaluated(epoch, options.epochs):
            loss = block_loss(student, samples, temporal=temporal)
            if not math.isfinite(loss):
                logger.warning("distillation: the loss is not finite after epoch %d; the best state is kept", epoch)
                break
            history[str(epoch)] = loss
            if loss < best_loss:
                best, best_loss, best_epoch = _snapshot(learnable), loss, epoch
        epoch_done()
    with torch.no_grad():
        for parameter, value in zip(learnable, best, strict=True):
            parameter.copy_(value)
    return DistillationReport(
        initial_loss=initial, loss=best_loss, best_epoch=best_epoch, epochs=epoch, history=history
    )


@contextmanager
def checkpoint_parts(student: nn.Module, *, piece: int = PIECE, enabled: bool = True) -> Iterator[None]:
    """Have the parts of a student (attention, feed-forward) and its quantized weights computed again in each backward.

    A step then keeps the inputs of the parts and the inside of one at a time, for about a third more compute. Parts
    that treat every token, or every cube of tokens, by itself do so for `piece` tokens at a time. Only the order of
    sums changes.
    """
    if not enabled:
        yield
        return
    linears = [inner for inner in student.modules() if isinstance(inner, StudentLinear | RefinedLinear)]
    inputs = [inner for inner in student.modules() if isinstance(inner, StudentInput)]
    replaced = _recomputing(student, piece)
    before = {module: module.__dict__["forward"] for module in replaced if "forward" in module.__dict__}
    try:
        for linear in linears:
            linear.recomputes = True
        for source in inputs:
            source.piece = piece
        for module, forward in replaced.items():
            module.forward = forward
        yield
    finally:
        for linear in linears:
            linear.recomputes = False
        for source in inputs:
            source.piece = None
        for module in replaced:
            module.__dict__.pop("forward", None)
        for module, forward in before.items():
            module.forward = forward


def _recomputing(student: nn.Module, piece: int) -> dict[nn.Module, Callable[..., Any]]:
    """Return what parts of a student, and norms outside of feed-forwards, compute instead within `checkpoint_parts`."""
    linears = StudentLinear | RefinedLinear
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for name, part in student.named_children():
        inside = list(part.modules())
        pointwise = isinstance(part, linears) or type(part).__name__.endswith(_FEED_FORWARD)
        if not pointwise or any(getattr(inner, "needs_grid", False) for inner in inside):
            if any(isinstance(inner, linears) for inner in inside):
                forwards[part] = functools.partial(checkpointed, part.forward)
            norms = [inner for inner in inside if type(inner).__name__.endswith(_NORMS)]
            forwards |= {norm: functools.partial(_piece_by_piece, norm.forward, piece=piece) for norm in norms}
            continue
        forward, activation = part.forward, getattr(student, _ACTIVATIONS.get(name, ""), None)
        if activation is not None:
            forward = functools.partial(_one_after_the_other, forward, activation.forward)
            forwards[activation] = _unchanged
        cubes = [inner.cube_frames for inner in inside if isinstance(inner, StudentInput) and inner.cube_frames]
        cube_frames = math.lcm(*cubes) if cubes else None
        forwards[part] = functools.partial(_piece_by_piece, forward, piece=piece, cube_frames=cube_frames)
    return forwards


def _one_after_the_other(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return second(first(x))


def _unchanged(x: Tensor) -> Tensor:
    return x


def _piece_by_piece(forward: Callable[..., Tensor], x: Tensor, *, piece: int, cube_frames: int | None = None) -> Tensor:
    """Apply a part to pieces of a sequence, [B, N, ...]; each is computed again in the backward pass by itself."""
    outputs = list(in_pieces(forward, x, piece=piece, cube_frames=cube_frames))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _ahead(samples: BlockSamples, order: Iterable[int]) -> Iterator[BlockSample]:
    """Go through samples; for a GPU, the next one is read into host memory while one is worked on.

    The device holds one sample at a time. On a CPU a second thread that computes would only take cores from the first.
    """
    if torch.device(samples.device).type == "cpu":
        yield from (samples.to_device(samples.read(index)) for index in order)
        return
    with ThreadPoolExecutor(max_workers=1) as reader:
        upcoming: Future[BlockSample] | None = None
        for index in order:
            read, upcoming = upcoming, reader.submit(samples.read, index)
            if read is not None:
                yield samples.to_device(read.result())
        if upcoming is not None:
            yield samples.to_device(upcoming.result())


def _loss(block: nn.Module, sample: BlockSample, temporal: float) -> Tensor:
    with token_grid(sample.grid):
        output = block(**sample.inputs)
    outputs = output if isinstance(output, tuple) else (output,)
    loss = weighted_token_loss(outputs, sample.outputs, weights=sample.weights)
    if temporal == 0:
        return loss
    assert sample.grid is not None
    video, channels = sample.video, sample.outputs[sample.video].shape[-1]
    grid, of_video = sample.grid, (outputs[video], sample.outputs[video])
    first = grid.offset(of_video[0].shape[1])  # behind the text where both are one stream
    place = slice(None) if first is None else slice(first, first + grid.tokens)
    parts = (tokens[:, place] for tokens in of_video)
    return loss + temporal * channels * temporal_loss(*parts, frames=grid.frames)


def _learnable(student: nn.Module, options: Distillation | Refinement) -> list[dict[str, Any]]:
    """The parameters that learn, by learning rate, as an optimizer takes them."""
    groups: dict[str, dict[str, Any]] = {"": {"lr": options.lr}, "theta": {"lr": options.clip_lr}}
    if isinstance(options, Distillation):
        groups["logits"] = {"lr": options.rounding_lr, "eps": _ROUNDING_EPS}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            groups.get(name.rpartition(".")[2], groups[""]).setdefault("params", []).append(parameter)
    return [group for group in groups.values() if "params" in group]


def _snapshot(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _cosine(step: int, total: int) -> float:
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(step, total) / total))
