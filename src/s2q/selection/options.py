"""The options of calibration: what is generated, and which denoising steps of it become samples."""

from dataclasses import dataclass, field
from typing import Any, Literal

from s2q.common.options import Options
from s2q.selection.selection import SELECTIONS


def recipe_key(setting: str) -> str:
    """Return the key of a recipe for a setting by its name in `GenerationSettings`."""
    return f"calibration.{'steps' if setting == 'num_inference_steps' else setting}"


@dataclass(frozen=True, kw_only=True)
class Calibration(Options):
    """Candidates (the denoising steps of a few prompts), and the selection of samples among them.

    Attributes:
        n_prompts: Prompts to generate; the first ones, where more are given.
        steps: Denoising steps of each; None takes the model's default, as for all down to `width`.
        guidance_scale: Weight of classifier-free guidance; at most 1 runs one branch, without guidance.
        guidance_scale_2: Weight in the steps of a second transformer; None takes `guidance_scale`.
        scheduler: Class name of a scheduler of diffusers, with the configuration of the model's.
        shift: Shift of the scheduler's sigmas, `shift` or `flow_shift` of its class.
        negative_prompt: Text of the unconditional branch.
        max_sequence_length: Tokens of a prompt that the transformer reads.
        num_frames: Frames of each. Fewer and smaller ones cost less.
        height: Height of a frame in pixels.
        width: Width of a frame in pixels.
        max_tokens: Most video tokens of each; a video of the sizes above that has more gets fewer frames, then smaller
            ones. Attention to 118,800 tokens, HunyuanVideo's recommended size, takes days.
        selection: How they are taken; one of `SELECTIONS`.
        branches: Which guidance branch of a candidate is the sample: "alternate" takes the conditional and the
            unconditional one in turn, over the samples; "both" makes two samples of each.
        trajectory_2: Model that generates the samples of a second transformer: in full precision, or with the first
            transformer quantized, which takes the first steps. The latter collects after the first is quantized.
        precision: The dtype that blocks are calibrated in: fp32, bf16, which takes half of the memory, or the model's
            own; "auto" leaves it to the device and the widths (`Recipe.calibration_dtype`). What is learned, and the
            sums behind GPTQ, are in fp32 in all of them.
    """

    n_prompts: int = field(default=10, metadata={"ge": 1})
    steps: int | None = field(default=None, metadata={"ge": 1})
    guidance_scale: float | None = field(default=None, metadata={"ge": 0})
    guidance_scale_2: float | None = field(default=None, metadata={"ge": 0})
    scheduler: str | None = None
    shift: float | None = field(default=None, metadata={"gt": 0})
    negative_prompt: str | None = None
    max_sequence_length: int | None = field(default=None, metadata={"ge": 1})
    num_frames: int | None = field(default=None, metadata={"ge": 1})
    height: int | None = field(default=None, metadata={"ge": 1})
    width: int | None = field(default=None, metadata={"ge": 1})
    max_tokens: int | None = field(default=None, metadata={"ge": 1})
    samples: int = field(default=40, metadata={"ge": 1})
    selection: str = field(default="sds", metadata={"choices": SELECTIONS})
    branches: Literal["alternate", "conditional", "both"] = "alternate"
    trajectory_2: Literal["full_precision", "quantized"] = "full_precision"
    precision: Literal["auto", "float32", "bfloat16", "model"] = "auto"

    @property
    def sizes(self) -> dict[str, int | None]:
        """Frames, height and width by the names of the pipeline's arguments; None is the model's default."""
        return {"num_frames": self.num_frames, "height": self.height, "width": self.width}

    @property
    def generation(self) -> dict[str, Any]:
        """Settings of the videos besides their sizes, those that are not None, by the names of `GenerationSettings`."""
        values = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "guidance_scale_2": self.guidance_scale_2,
            "scheduler": self.scheduler,
            "shift": self.shift,
            "negative_prompt": self.negative_prompt,
            "max_sequence_length": self.max_sequence_length,
        }
        return {name: value for name, value in values.items() if value is not None}

    @property
    def requested(self) -> dict[str, Any]:
        """The settings of `generation` and the sizes that are not None."""
        return self.generation | {name: size for name, size in self.sizes.items() if size is not None}
