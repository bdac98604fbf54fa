"""The options of the input path: a shift, a channel scale, a rotation, a low-rank branch and an estimator."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from s2q.common.errors import short_repr
from s2q.common.options import Options
from s2q.transforms.base import Transform, identity
from s2q.transforms.convrot import convrot
from s2q.transforms.hadamard import hadamard
from s2q.transforms.kronecker import STARTS, KroneckerTransform
from s2q.transforms.salience import SALIENCES

ROTATIONS: dict[str, Callable[..., Transform]] = {
    "identity": identity,
    "hadamard": hadamard,
    "kronecker": KroneckerTransform.build,
    "convrot": convrot,
}
"""Rotations that may follow the channel scale, by name; each is called as `rotation(in_features, seed=seed,
block_size=None)`."""

SEARCH = "search"

_WIDTH_PER_RANK = 12  # in a small linear the branch stays below two thirds of the bytes of 4-bit codes


@dataclass(frozen=True, kw_only=True)
class Transforms(Options):
    """Options of the transforms of inputs and weights: a shift, a channel scale, then a rotation.

    Attributes:
        shift: "mean" subtracts the mean of each channel over the calibration samples; the biases of the linears make up
            for it, so inputs of linears without a bias are not shifted.
        scale: "smooth" for SmoothQuant's scale; "columns" for that of weights alone (`s2q.transforms.column_scale`),
            which needs no samples.
        alpha: How much of the outliers goes from the input to the weight; "search" takes for each input of linears the
            value of a grid whose quantized outputs are nearest to the exact ones (`s2q.blocks.students`).
        salience: What the scale takes for the size of an input's channels; one of `SALIENCES`: the largest magnitude
            over all timesteps, or PTQ4DiT's weighted mean over timesteps.
        learn_scale: Whether distillation learns the scale.
        rotation: One of `ROTATIONS`; "kronecker" is learned if there is distillation; "convrot" acts in
            blocks of at most 256 channels, without signs, as ComfyUI and SDNQ rotate (`s2q.transforms.convrot`).
        start: Where a Kronecker rotation starts; one of `STARTS`.
        block_size: Channels of a block within which the rotation acts, at most, in linears with at least twice as many
            in as out features (the second of a feed-forward); 0 rotates all channels together. Blocks halve the time
            of the input path there.
        low_rank: How many directions bypass the quantizer in floating point; 0 for none. At most a 12th of the smaller
            side of a linear (see `rank`).
        low_rank_from: Which directions, and what is quantized without them: "input" for the largest of the input after
            shift and scale, "weight" for the top singular vectors of the weights that read it, scaled; "both" removes
            those of the input from the weights too.
        estimator: Whether distillation learns a correction of rank one of the output, with a scale for each frame
            (`s2q.nn.Estimator`).
    """

    shift: Literal["none", "mean"] = "none"
    scale: Literal["none", "smooth", "columns"] = "none"
    alpha: float | str = 0.5
    salience: str = field(default="max", metadata={"choices": SALIENCES})
    learn_scale: bool = True
    rotation: str = field(default="identity", metadata={"choices": ROTATIONS})
    start: str = field(default="hadamard", metadata={"choices": STARTS})
    block_size: int = field(default=0, metadata={"ge": 0})
    low_rank: int = field(default=0, metadata={"ge": 0})
    low_rank_from: Literal["input", "weight", "both"] = "input"
    estimator: bool = False

    def __post_init__(self) -> None:
        """Check alpha, and that the options go together."""
        super().__post_init__()
        if self.alpha != SEARCH and (isinstance(self.alpha, str) or not 0 <= self.alpha <= 1):
            raise self.invalid(f"alpha={short_repr(self.alpha)}; expected 0 to 1, or {SEARCH}")
        if self.alpha == SEARCH and self.scale != "smooth":
            raise self.invalid("alpha=search needs a scale; set transforms.scale=smooth")
        if self.salience != "max" and self.scale != "smooth":
            raise self.invalid(f"salience={self.salience} needs a scale; set transforms.scale=smooth")
        if self.block_size > 0 and self.rotation == "identity":
            raise self.invalid(f"block_size={self.block_size} needs a rotation; set transforms.rotation=kronecker")
        if self.low_rank_from != "input" and self.low_rank == 0:
            raise self.invalid(f"low_rank_from={self.low_rank_from} needs a branch; set transforms.low_rank=32")

    @property
    def deflates(self) -> bool:
        """Whether the low-rank branch is removed from the input; if not, it is removed from the weight."""
        return self.low_rank_from != "weight"

    def rotation_block(self, in_features: int, out_features: int) -> int | None:
        """Return the block size of a linear's rotation, or None if it acts on all channels."""
        return self.block_size if self.block_size > 0 and in_features >= 2 * out_features else None

    def rank(self, in_features: int, out_features: int) -> int | None:
        """Return the rank of a linear's low-rank branch, or None if it has none."""
        return min(self.low_rank, min(in_features, out_features) // _WIDTH_PER_RANK) or None
