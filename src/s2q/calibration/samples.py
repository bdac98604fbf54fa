"""The calibration samples of a block: inputs, targets and token weights of each, read one at a time.

Legend: `N_k` tokens of stream k, `d` channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from s2q.calibration.stream import TeacherStream
from s2q.common.memory import to_device
from s2q.common.tensor_store import TensorStore
from s2q.core.tokens import TokenGrid


@dataclass(frozen=True, kw_only=True)
class BlockSample:
    """One call of a block.

    Attributes:
        inputs: Keyword arguments of the call.
        outputs: What the full-precision block returns, [1, N_k, d] for each stream.
        weights: λ, [1, N_k] for each stream; None weights every token with 1.
        grid: Positions of the video tokens; None if nothing needs them.
        video: Which of the streams is the video.
    """

    inputs: Mapping[str, Any]
    outputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...] | None = None
    grid: TokenGrid | None = None
    video: int = 0


class BlockSamples:
    """The samples of a block: inputs from the stream, targets and weights from a store; on the device.

    `cast` brings what has tensors to the device, in the dtype of calibration.
    """

    def __init__(self, stream: TeacherStream, targets: TensorStore, cast: Callable[[Any], Any]) -> None:
        self.stream, self.targets, self.cast = stream, targets, cast
        self.device = stream.device

    def __len__(self) -> int:
        return len(self.stream)

    @property
    def streams(self) -> tuple[str, ...]:
        """Keyword arguments that the block returns anew, in that order."""
        return self.stream.streams

    def inputs(self, index: int) -> dict[str, Any]:
        """Return the keyword arguments of a call of the block."""
        inputs: dict[str, Any] = self.cast(self.stream.inputs(index))
        return inputs

    def read(self, index: int) -> BlockSample:
        """Return a sample as it is stored, in host memory."""
        stored = self.targets.get(index)
        weights = tuple(stored[f"weights.{name}"] for name in self.streams) if len(stored) > len(self.streams) else None
        return BlockSample(
            inputs=self.stream.inputs(index),
            outputs=tuple(stored[name] for name in self.streams),
            weights=weights,
            grid=self.stream.grid(index),
            video=self.streams.index(self.stream.family.block_argument("hidden_states")),
        )

    def to_device(self, sample: BlockSample) -> BlockSample:
        """Return a sample on the device, its inputs in the dtype of calibration."""
        return replace(
            sample,
            inputs=self.cast(sample.inputs),
            outputs=to_device(sample.outputs, self.device),
            weights=to_device(sample.weights, self.device),
        )

    def __getitem__(self, index: int) -> BlockSample:
        return self.to_device(self.read(index))
