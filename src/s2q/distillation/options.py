"""The options of learning on a block: AdamW, cosine schedule, one sample at a time (`s2q.blocks.distil`)."""

from dataclasses import dataclass, field

from s2q.common.options import Options

_EVALUATIONS = 5


def evaluations(epochs: int) -> int:
    """Return how often learning looks at all samples without learning from them, after the first step."""
    return sum(is_evaluated(epoch, epochs) for epoch in range(1, epochs + 1))


def is_evaluated(epoch: int, epochs: int) -> bool:
    """Return whether all samples are looked at after an epoch, counted from 1."""
    return epoch % max(1, epochs // _EVALUATIONS) == 0 or epoch == epochs


@dataclass(frozen=True, kw_only=True)
class Refinement(Options):
    """Options of the refinement of scales, biases, low-rank weights and clips after rounding; codes do not change.

    Attributes:
        epochs: Passes over the samples.
        lr: Learning rate, in units of what it changes.
        clip_lr: Learning rate of clips.
    """

    epochs: int = field(default=5, metadata={"ge": 1})
    lr: float = field(default=1e-3, metadata={"gt": 0})
    clip_lr: float = field(default=1e-2, metadata={"gt": 0})


@dataclass(frozen=True, kw_only=True)
class Distillation(Options):
    """Options of the distillation of transforms, clips and rounding.

    Attributes:
        epochs: Passes over the samples.
        lr: Learning rate of transforms.
        clip_lr: Learning rate of clips.
        rounding_lr: Learning rate of rounding.
    """

    epochs: int = field(default=15, metadata={"ge": 1})
    lr: float = field(default=5e-3, metadata={"gt": 0})
    clip_lr: float = field(default=5e-2, metadata={"gt": 0})
    rounding_lr: float = field(default=3e-2, metadata={"gt": 0})
