"""The options of calibration: what is generated, and which denoising steps of it become samples."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from s2q.common.options import Options
from s2q.selection.selection import SELECTIONS


@dataclass(frozen=True, kw_only=True)
class Calibration(Options):
    """Candidates (the denoising steps of a few prompts), and the selection of samples among them.

    Attributes:
        n_prompts: Prompts to generate; the first ones, where more are given.
        steps: Denoising steps of each; None takes the model's default.
        num_frames: Frames of each; None takes the model's default. Fewer and smaller ones cost less.
        height: Height of a frame in pixels, likewise.
        width: Width of a frame in pixels, likewise.
        max_tokens: Most video tokens of each; a video of the sizes above that has more gets fewer frames, then smaller
            ones. Attention to 118,800 tokens, HunyuanVideo's recommended size, takes days.
        selection: How they are taken; one of `SELECTIONS`.
        branches: Which guidance branch of a candidate is the sample: "alternate" takes the conditional and the
            unconditional one in turn, over the samples; "both" makes two samples of each.
        precision: The dtype that blocks are calibrated in: fp32, bf16, which takes half of the memory, or the model's
            own. What is learned, and the sums behind GPTQ, are in fp32 in all of them.
    """

    n_prompts: int = field(default=10, metadata={"ge": 1})
    steps: int | None = field(default=None, metadata={"ge": 1})
    num_frames: int | None = field(default=None, metadata={"ge": 1})
    height: int | None = field(default=None, metadata={"ge": 1})
    width: int | None = field(default=None, metadata={"ge": 1})
    max_tokens: int | None = field(default=None, metadata={"ge": 1})
    samples: int = field(default=40, metadata={"ge": 1})
    selection: str = field(default="sds", metadata={"choices": SELECTIONS})
    branches: Literal["alternate", "conditional", "both"] = "alternate"
    precision: Literal["float32", "bfloat16", "model"] = "float32"

    def dtype(self, model: torch.dtype) -> torch.dtype:
        """Return the dtype that blocks are calibrated in, from that of the model."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "model": model}[self.precision]

    @property
    def sizes(self) -> dict[str, int | None]:
        """Frames, height and width by the names of the pipeline's arguments; None is the model's default."""
        return {"num_frames": self.num_frames, "height": self.height, "width": self.width}
