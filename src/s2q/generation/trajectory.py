"""Trajectories: every call of the full-precision transformers while a pipeline generates, with inputs and output.

A trajectory is what calibration samples from (S²Q-VDiT, section 3.2: every denoising step of a few prompts) and what
the velocity error is measured on: a student called on exactly these inputs sees neither its own earlier errors nor the
guidance that would amplify them.

Guidance runs both branches in one call, `[unconditional videos; conditional videos]` along the batch, so a call has
`R = branches · B` rows, and video `b` owns the rows `b, B + b, …`. Where a pipeline runs them in two calls, the two are
merged into such a call. Of two whose texts have different lengths, the conditional one is kept.

Legend: `B` videos, `R` rows of a call, `f` latent frames, `C` latent channels, `h`, `w` latent height and width, `N_t`
text tokens, `E` text width.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from s2q.common.components import TRANSFORMERS, transformers_of
from s2q.common.progress import Tick
from s2q.generation.denoise import denoise
from s2q.generation.exclusive import exclusive
from s2q.generation.settings import GenerationSettings, check_prompts
from s2q.models import family_of


@dataclass(frozen=True, kw_only=True)
class TransformerCall:
    """One call of a transformer.

    Attributes:
        transformer: Which one, by its component of the pipeline.
        timestep: The scheduler's timestep, 0 (clean) to 1000 (noise).
        inputs: The keyword arguments of the call, tensors on the CPU: `hidden_states [R, f, C, h, w]` (channels first
            where the family has them so; more channels, behind those of the latent, where it takes an image too),
            `encoder_hidden_states [R, N_t, E]`, `timestep [R]`, and what else there is, such as `image_rotary_emb`.
        output: The transformer's prediction, of the shape of the latent, compute dtype, on the CPU.
    """

    timestep: float
    inputs: Mapping[str, Any]
    output: torch.Tensor
    transformer: str = TRANSFORMERS[0]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Inputs and outputs of the transformers during the generation of a batch of videos.

    Attributes:
        calls: One call a denoising step, in order, from noise to video.
        latents: Final latents `[B, f, C, h, w]`, float32, on the CPU.
        frames: Decoded videos `[B, F, H, W, 3]`, uint8; None when they were not decoded.
    """

    prompts: tuple[str, ...]
    calls: tuple[TransformerCall, ...]
    latents: torch.Tensor
    frames: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the recorded latents and predictions; text embeddings are shared between calls."""
        return sum(call.inputs["hidden_states"].nbytes + call.output.nbytes for call in self.calls)

    def branches(self, call: TransformerCall) -> int:
        """Return how many guidance branches the call runs: 2 with classifier-free guidance, else 1."""
        rows, videos = call.output.shape[0], len(self.prompts)
        assert rows % videos == 0, (rows, videos)
        return rows // videos

    def rows_of(self, call: TransformerCall, video: int) -> list[int]:
        """Return the rows of a call that belong to one video, unconditional branch first."""
        return [branch * len(self.prompts) + video for branch in range(self.branches(call))]


def record_trajectory(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    settings: GenerationSettings,
    decode: bool = False,
    steps: int | None = None,
    step_done: Tick = lambda: None,
) -> Trajectory:
    """Generate one batch and record every call of the transformers, on the CPU; of the first `steps` if that is given.

    The text embeddings and rotary tables are stored once for all calls.
    """
    check_prompts(pipe, prompts, settings)
    with exclusive(pipe), recorded_calls(transformers_of(pipe)) as calls:
        result = denoise(pipe, prompts, seeds=seeds, settings=settings, decode=decode, steps=steps, step_done=step_done)
    return Trajectory(
        prompts=tuple(prompts),
        calls=tuple(_merge_branches(calls, pipe, steps=steps or settings.num_inference_steps)),
        latents=result.latents,
        frames=result.frames,
    )


@contextmanager
def recorded_calls(transformers: Mapping[str, torch.nn.Module]) -> Iterator[list[TransformerCall]]:
    """Yield a list that gets one `TransformerCall` for every call of the transformers, by component.

    A pipeline may pass the latents by position, all else by keyword.
    """
    calls: list[TransformerCall] = []
    shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def remember(
        component: str, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        assert len(args) <= 1, "the pipeline passed more than the latents to its transformer by position"
        kwargs = kwargs | dict(zip(("hidden_states",), args, strict=False))
        inputs = {
            name: _to_cpu(value, shared if name != "hidden_states" else {})
            for name, value in kwargs.items()
            if name not in ("return_dict", "attention_kwargs") and value is not None
        }
        prediction = prediction_of(output)
        timestep = _timestep_of(kwargs)
        answer = prediction.detach().to("cpu", copy=True)
        calls.append(TransformerCall(transformer=component, timestep=timestep, inputs=inputs, output=answer))

    with ExitStack() as stack:
        for component, transformer in transformers.items():
            hook = functools.partial(remember, component)
            stack.callback(transformer.register_forward_hook(hook, with_kwargs=True).remove)
        yield calls


def _timestep_of(arguments: Mapping[str, Any]) -> float:
    """The timestep of the video in a call, 0 (clean) to 1000 (noise); tokens of an image have 0."""
    if "timestep_indices" in arguments:  # a packed sequence, the video at its end, with timesteps from 0 (noise) to 1
        last = arguments["timestep"][arguments["timestep_indices"][-1]]
        return 1000 * (1 - float(last))
    return float(arguments["timestep"].max())


def prediction_of(output: Any) -> torch.Tensor:
    """Return the prediction in what a transformer returns: a tuple, a tensor, or an output with `sample`."""
    if isinstance(output, torch.Tensor):
        return output
    prediction: torch.Tensor = output[0] if isinstance(output, tuple) else output.sample
    return prediction


def _merge_branches(calls: Sequence[TransformerCall], pipe: Any, *, steps: int) -> Sequence[TransformerCall]:
    """Merge the two calls of each step where guidance takes two, the unconditional rows first."""
    unbatched = family_of(pipe.transformer).unbatched
    guidance = family_of(pipe.transformer).guidance
    if guidance == "batched" or len(calls) == steps:
        return calls
    assert len(calls) == 2 * steps, (len(calls), steps)
    if guidance == "apart":
        return calls[::2]
    shared: dict[tuple[int, int], torch.Tensor] = {}
    merged = []
    for conditional, other in zip(calls[::2], calls[1::2], strict=True):
        assert (conditional.timestep, conditional.transformer) == (other.timestep, other.transformer)
        inputs = {}
        for name, value in conditional.inputs.items():
            if name in unbatched:
                inputs[name] = value
            elif isinstance(value, torch.Tensor) and value.ndim and len(value) == len(conditional.output):
                key = id(other.inputs[name]), id(value)
                if key not in shared:
                    shared[key] = torch.cat([other.inputs[name], value])
                inputs[name] = shared[key]
            else:
                inputs[name] = value
        output = torch.cat([other.output, conditional.output])
        merged.append(replace(conditional, inputs=inputs, output=output))
    return merged


def _to_cpu(value: Any, shared: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """Copy tensors to the CPU; a tensor object that was copied before is not copied again."""
    if isinstance(value, (tuple, list)):
        return tuple(_to_cpu(item, shared) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) not in shared:
        # keeps the original, so its id is not reused
        shared[id(value)] = (value, value.detach().to("cpu", copy=True))
    return shared[id(value)][1]
