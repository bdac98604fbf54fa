"""Generation settings: sizes, steps, scheduler, guidance and text, checked against the pipeline before any compute.

Legend: `k` temporal factor of the VAE, `s` spatial factor of the VAE, `p` patch size of the transformer, `f` latent
frames. A video of `num_frames` frames has `f = (num_frames - 1) / k + 1` latent frames. A CogVideoX VAE decodes its
latent frames in groups of two, and a group that is not the first one grows by `k` per latent frame, so that only an odd
`f` (or `num_frames = 1`) comes back with the frames that were asked for.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from s2q.common.arguments import finite_number, plain_text, positive_number, whole_number, word
from s2q.common.errors import InvalidInputError, short_repr
from s2q.generation.conditioning import check_conditioning, check_size
from s2q.generation.exclusive import exclusive
from s2q.generation.guidance import guidance_obstacle, with_usable_guidance
from s2q.generation.prompts import prompt_list
from s2q.generation.schedulers import scheduler_of
from s2q.generation.sharing import steps_of_transformers
from s2q.models import family_of, token_patch


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Settings of a generated video besides model, prompt and seed; height and width in pixels.

    Attributes:
        guidance_scale: Weight of classifier-free guidance; at most 1 means one branch, without guidance.
        guidance_scale_2: Weight in the steps of a second transformer; None takes `guidance_scale`.
        scheduler: Class name of a scheduler of diffusers, with the configuration of the pipeline's; None is the
            pipeline's own.
        shift: Shift of its sigmas; None is that of the pipeline's own.
        negative_prompt: Text of the unconditional branch; None is an empty one.
        max_sequence_length: Tokens of a prompt that the transformer reads; None is as many as it can.
    """

    num_frames: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    scheduler: str | None = None
    shift: float | None = None
    negative_prompt: str | None = None
    max_sequence_length: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that are not None as a JSON-ready dict."""
        return {name: value for name, value in asdict(self).items() if value is not None}


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **{setting.name: partial(whole_number, least=1) for setting in fields(GenerationSettings)},
    "guidance_scale": finite_number,
    "guidance_scale_2": finite_number,
    "scheduler": word,
    "shift": positive_number,
    "negative_prompt": plain_text,
}
SETTINGS = frozenset(_CHECKS)
"""Names of the generation settings."""


def resolve_settings(
    pipe: Any, *, requested: Mapping[str, Any] | None = None, defaults: Mapping[str, Any] | None = None
) -> GenerationSettings:
    """Fill in and check the generation settings for a pipeline.

    A value comes from `requested`, else from `defaults` (what the model's makers recommend), else from the
    configuration of the transformer (sizes) and the pipeline's guider (guidance), else from the family's published
    models. `None` counts as absent. Values are by field name of `GenerationSettings`. Recommendations for a guidance
    that does not run are dropped. Waits while another thread generates, which changes guider and scheduler meanwhile.
    """
    asked, recommended = _checked(requested or {}), _checked(defaults or {})
    with exclusive(pipe):
        values = dict(family_of(pipe.transformer).defaults) | _size_defaults(pipe) | _guider_defaults(pipe)
        settings = GenerationSettings(**_checked(values | recommended | asked))
        settings = with_usable_guidance(pipe, settings, requested=asked)
        _check_steps(pipe, settings)
        _check_video(pipe, settings)
        _check_text(pipe, settings)
    return settings


def within_tokens(pipe: Any, settings: GenerationSettings, max_tokens: int) -> GenerationSettings:
    """Return settings of a video with at most so many tokens: of fewer frames, and of smaller ones if two are too many.

    Raises:
        InvalidInputError: If the smallest video of the model has more.
    """
    stride, first, least = _frame_counts(pipe)
    while video_tokens(pipe, settings) > max_tokens and settings.num_frames - stride >= least:
        settings = replace(settings, num_frames=(settings.num_frames - first - 1) // stride * stride + first)
    step, sides = _side_step(pipe), (settings.height, settings.width)
    smaller, eighths = settings, 8
    while video_tokens(pipe, smaller) > max_tokens and eighths > 1:
        eighths -= 1
        height, width = (max(step, side * eighths // 8 // step * step) for side in sides)
        smaller = replace(settings, height=height, width=width)
    if (tokens := video_tokens(pipe, smaller)) > max_tokens:
        raise InvalidInputError(
            f"calibration.max_tokens={max_tokens}: the smallest video has {tokens} tokens; raise it to that"
        )
    try:
        _check_video(pipe, smaller)
    except InvalidInputError as error:
        raise InvalidInputError(f"calibration.max_tokens={max_tokens}: {error}") from None
    return smaller


def requested_settings(
    *,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_scale_2: float | None = None,
    scheduler: str | None = None,
    shift: float | None = None,
    negative_prompt: str | None = None,
    max_sequence_length: int | None = None,
) -> dict[str, Any]:
    """Return the settings that are not None, by name; whether a model can take them is not checked."""
    return _checked(
        {
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_scale_2": guidance_scale_2,
            "scheduler": scheduler,
            "shift": shift,
            "negative_prompt": negative_prompt,
            "max_sequence_length": max_sequence_length,
        }
    )


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _CHECKS[name](name, value) for name, value in values.items() if value is not None}


def prompt_token_limit(pipe: Any) -> int:
    """Return the number of text tokens that the pipeline's transformer takes, end token included.

    A tokenizer for shorter texts than the family's declares its length, as that of `shapes-wan` does.
    """
    limit = getattr(pipe.transformer.config, "max_text_seq_length", None) or family_of(pipe.transformer).text_tokens
    return int(min(limit, getattr(pipe.tokenizer, "model_max_length", limit)))


def text_tokens(pipe: Any, settings: GenerationSettings) -> int:
    """Return the number of text tokens that the transformer reads of a prompt."""
    return settings.max_sequence_length or prompt_token_limit(pipe)


def check_prompts(pipe: Any, prompts: Sequence[str], settings: GenerationSettings) -> None:
    """Check that the pipeline can take every prompt whole, and what is given with it."""
    requests = prompt_list("prompts", prompts)
    for index, prompt in enumerate(requests, start=1):
        where = f"prompt {index} of {len(requests)}"
        _check_length(pipe, where, prompt, settings)
        check_conditioning(pipe, where, prompt, num_frames=settings.num_frames)
        if prompt.negative_prompt is not None:
            obstacle = guidance_obstacle(pipe, settings, "negative_prompt")
            if obstacle is not None:
                raise InvalidInputError(
                    f"{where}: negative_prompt: got {short_repr(prompt.negative_prompt)}; {obstacle}"
                )
            _check_length(pipe, f"{where}: negative_prompt", prompt.negative_prompt, settings)


def _check_length(pipe: Any, where: str, text: str, settings: GenerationSettings) -> None:
    """Refuse a text of more tokens than the transformer reads."""
    with exclusive(pipe):
        tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)  # of a processor of texts and images
        count = len(tokenizer(str(text), truncation=False).input_ids)
    if count > (limit := text_tokens(pipe, settings)):
        raise InvalidInputError(
            f"{where} has {count} tokens, but the transformer reads {limit}; shorten it: {short_repr(text)}"
        )


def _check_text(pipe: Any, settings: GenerationSettings) -> None:
    """Refuse a length of prompts that the transformer cannot read, and a negative prompt that is longer."""
    limit, length = prompt_token_limit(pipe), settings.max_sequence_length
    if length is not None:
        if family_of(pipe.transformer).guidance == "guider":
            raise InvalidInputError(
                f"max_sequence_length: got {length}; {type(pipe).__name__} has one length for all prompts, remove it"
            )
        is_fixed = getattr(pipe.transformer.config, "use_rotary_positional_embeddings", True) is False
        if length > limit or (is_fixed and length < limit):
            reads = "exactly" if is_fixed else "at most"
            raise InvalidInputError(
                f"max_sequence_length: got {length}; the transformer reads {reads} {limit} text tokens, use {limit}"
            )
        if length % (step := _text_step(pipe)):
            raise InvalidInputError(
                f"max_sequence_length: got {length}; {type(pipe).__name__} takes multiples of {step}, use "
                f"{length + -length % step}"
            )
    if settings.negative_prompt is not None:
        _check_length(pipe, "negative_prompt", settings.negative_prompt, settings)


def _text_step(pipe: Any) -> int:
    """The length of prompts is a multiple of it: of the registers that LTX-2's connectors fill padding with."""
    config = getattr(getattr(pipe, "connectors", None), "config", {})
    return math.lcm(*(config.get(f"{name}_connector_num_learnable_registers") or 1 for name in ("video", "audio")))


def video_tokens(pipe: Any, settings: GenerationSettings) -> int:
    """Return the number of video tokens that the transformer sees for one video."""
    step = _size_step(pipe)
    return token_frames(pipe, settings) * (settings.height // step) * (settings.width // step)


def token_frames(pipe: Any, settings: GenerationSettings) -> int:
    """Return the number of tokens along time of one video."""
    return latent_frames(pipe, settings) // patch_sizes(pipe)[0]


def latent_frames(pipe: Any, settings: GenerationSettings) -> int:
    """Return the number of latent frames, a reference's included, made up to whole patches as the pipelines do."""
    family = family_of(pipe.transformer)
    if (groups := family.frame_groups) is not None:
        frames = (settings.num_frames - groups.first_frames) // groups.frames * groups.latents + groups.first_latents
    else:
        frames = (settings.num_frames - 1) // vae_factors(pipe)[0] + 1 + family.reference_frames
    return frames + -frames % patch_sizes(pipe)[0]


def latent_channels(pipe: Any) -> int:
    """Return the channels of the latents: those that the transformer predicts (it may see those of an image too).

    Of a packed sequence they are those of a token.
    """
    config = pipe.transformer.config
    names = ("out_channels", "out_visual_dim", "in_channels")
    channels = int(next(value for value in (getattr(config, name, None) for name in names) if value))
    return channels * math.prod(token_patch(pipe.transformer)) if family_of(pipe.transformer).is_packed else channels


def patch_sizes(pipe: Any) -> tuple[int, int]:
    """Return how many latent frames, and how many latent rows and columns, make a token of the transformer."""
    frames, _rows, columns = token_patch(pipe.transformer)
    return frames, columns


def _size_defaults(pipe: Any) -> dict[str, Any]:
    config = pipe.transformer.config
    if getattr(config, "sample_frames", None) is not None:
        spatial = vae_factors(pipe)[1]
        return {
            "num_frames": config.sample_frames,
            "height": config.sample_height * spatial,
            "width": config.sample_width * spatial,
        }
    if getattr(config, "target_size", None) is not None:
        columns, rows = getattr(pipe, "default_aspect_ratio", (16, 9))  # image to video has none of its own
        height, width = pipe.video_processor.calculate_default_height_width(rows, columns, config.target_size)
        return {"height": height, "width": width}
    return {}


def _guider_defaults(pipe: Any) -> dict[str, Any]:
    """Guidance weight of the pipeline's guider, if it has one; 1 where it runs one branch."""
    if family_of(pipe.transformer).guidance != "guider":
        return {}
    guider = pipe.guider
    expected = {"start": 0.0, "stop": 1.0, "use_original_formulation": False}
    is_plain = all(guider.config.get(name) == value for name, value in expected.items())
    if type(guider).__name__ != "ClassifierFreeGuidance" or not is_plain:
        raise InvalidInputError(
            f"{type(pipe).__name__}: its guider, a {type(guider).__name__}, is not plain classifier-free guidance over "
            "all steps, the only kind that s2q supports; set pipe.guider = ClassifierFreeGuidance()"
        )
    return {"guidance_scale": guider.guidance_scale if guider.num_conditions > 1 else 1.0}


def _check_steps(pipe: Any, settings: GenerationSettings) -> None:
    """Refuse a scheduler that does not fit, more steps than it has timesteps, and steps that no transformer takes."""
    steps, limit = settings.num_inference_steps, scheduler_of(pipe, settings).config.get("num_train_timesteps")
    if limit is not None and steps > limit:
        raise InvalidInputError(f"num_inference_steps: got {steps}; the scheduler has {limit} timesteps, use fewer")
    steps_of_transformers(pipe, settings)


def vae_factors(pipe: Any) -> tuple[int, int]:
    """Return how many frames make a latent frame, and how many pixels a side a latent pixel."""
    for pattern in ("vae_scale_factor_{}", "vae_{}_scale_factor", "vae_{}_compression_ratio"):
        names = [pattern.format(side) for side in ("temporal", "spatial")]
        if all(hasattr(pipe, name) for name in names):
            temporal, spatial = (int(getattr(pipe, name)) for name in names)
            return temporal, spatial
    raise InvalidInputError(f"{type(pipe).__name__} does not define the compression factors of its VAE")


def _size_step(pipe: Any) -> int:
    return vae_factors(pipe)[1] * patch_sizes(pipe)[1]


def _check_video(pipe: Any, settings: GenerationSettings) -> None:
    _check_frames(pipe, settings.num_frames)
    _check_frame_size(pipe, settings)
    check_size(pipe, settings)
    _check_positions(pipe, settings)


def _check_frames(pipe: Any, num_frames: int) -> None:
    config = pipe.transformer.config
    if getattr(config, "use_learned_positional_embeddings", False) and num_frames != config.sample_frames:
        raise InvalidInputError(
            f"num_frames: got {num_frames}; the transformer has learned positions for {config.sample_frames} only"
        )
    groups = family_of(pipe.transformer).frame_groups
    if groups is not None and not groups.least <= num_frames <= groups.most:
        raise InvalidInputError(
            f"num_frames: got {num_frames}; {type(pipe).__name__} makes {groups.least} to {groups.most} frames"
        )
    stride, first, _ = _frame_counts(pipe)
    if (num_frames - first) % stride:
        lower = (num_frames - first) // stride * stride + first
        raise InvalidInputError(
            f"num_frames: got {num_frames}; this VAE decodes {stride} n + {first} frames: use {lower} or "
            f"{lower + stride}"
        )


def _frame_counts(pipe: Any) -> tuple[int, int, int]:
    """The k and the f of the numbers of frames that a VAE decodes, k n + f, and the least that has a motion."""
    groups = family_of(pipe.transformer).frame_groups
    if groups is not None:
        return groups.frames, groups.first_frames, groups.least
    stride = vae_factors(pipe)[0] * int(getattr(pipe.vae, "num_latent_frames_batch_size", 1))
    return stride, 1, stride + 1


def _side_step(pipe: Any) -> int:
    """Height and width are multiples of it: of a token, and of what the pipeline itself asks for."""
    return math.lcm(_size_step(pipe), family_of(pipe.transformer).size_multiple)


def _check_positions(pipe: Any, settings: GenerationSettings) -> None:
    """Refuse more tokens along a dimension than a transformer has rotary positions for."""
    limit = getattr(pipe.transformer.config, "rope_max_seq_len", None)
    step = _size_step(pipe)
    tokens = {
        "num_frames": token_frames(pipe, settings),
        "height": settings.height // step,
        "width": settings.width // step,
    }
    for name, count in tokens.items():
        if limit is not None and count > limit:
            raise InvalidInputError(
                f"{name}: got {getattr(settings, name)}, {count} tokens; the transformer has {limit} positions"
            )


def _check_frame_size(pipe: Any, settings: GenerationSettings) -> None:
    config = pipe.transformer.config
    spatial, step = vae_factors(pipe)[1], _side_step(pipe)
    for name, value in (("height", settings.height), ("width", settings.width)):
        trained = getattr(config, f"sample_{name}", 0) * spatial
        if getattr(config, "use_learned_positional_embeddings", False) and value != trained:
            raise InvalidInputError(
                f"{name}: got {value}; the transformer has learned positions for {trained} pixels only"
            )
        if value % step:
            lower = value // step * step
            nearest = f"{lower} or {lower + step}" if lower else f"{step}"
            raise InvalidInputError(
                f"{name}: got {value}; VAE and transformer take multiples of {step} pixels: use {nearest}"
            )
