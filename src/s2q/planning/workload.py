"""Number of calibration tokens, from a model's configuration alone or from a loaded pipeline."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from s2q.common.errors import InvalidInputError
from s2q.generation.settings import (
    GenerationSettings,
    prompt_token_limit,
    resolve_settings,
    takes_prompts_alone,
    token_frames,
    video_tokens,
    within_tokens,
)
from s2q.models import ModelSource, family_of
from s2q.models.source import recommended_generation
from s2q.models.synthetic import SyntheticModel
from s2q.planning.cost import Workload
from s2q.selection.options import Calibration

logger = logging.getLogger(__name__)


def calibration_settings(pipe: Any, group: Calibration, *, recommended: Mapping[str, Any]) -> GenerationSettings:
    """Return the settings of the videos of calibration."""
    requested = group.sizes | {"num_inference_steps": group.steps}
    settings = resolve_settings(pipe, requested=requested, defaults=dict(recommended))
    return settings if group.max_tokens is None else within_tokens(pipe, settings, group.max_tokens)


def workload_of(
    pipe: Any, group: Calibration, *, recommended: Mapping[str, Any], component_bytes: int | None
) -> Workload | None:
    """Return what calibration computes on; None for a pipeline that it does not run."""
    if not takes_prompts_alone(pipe):
        return None
    settings = calibration_settings(pipe, group, recommended=recommended)
    guided = settings.guidance_scale > 1 and not getattr(pipe.transformer.config, "guidance_embeds", False)
    branches = 2 if guided else 1
    return Workload(
        tokens=video_tokens(pipe, settings),
        frames=token_frames(pipe, settings),
        text_tokens=prompt_token_limit(pipe),
        audio_tokens=_audio_tokens(pipe, settings),
        branches=branches,
        rows=branches if family_of(pipe.transformer).guidance == "batched" else 1,
        component_bytes=component_bytes,
        steps=settings.num_inference_steps,
    )


def _audio_tokens(pipe: Any, settings: GenerationSettings) -> int:
    """Tokens of the sound of a video, as the pipeline counts them; 0 of a pipeline without sound."""
    if getattr(pipe, "audio_vae", None) is None:
        return 0
    rate = pipe.audio_sampling_rate / pipe.audio_hop_length / pipe.audio_vae_temporal_compression_ratio
    return round(settings.num_frames / family_of(pipe.transformer).frame_rate * rate)


def workload_of_source(
    source: ModelSource, group: Calibration, *, transformers: Mapping[str, nn.Module]
) -> Workload | None:
    """Return the same of a model whose weights are not loaded; None if its pipeline cannot be built without them."""
    try:
        pipe = source.meta_pipeline(transformers)
    except (AttributeError, ImportError, OSError, TypeError, ValueError) as error:
        logger.info("%s: the pipeline cannot be built without weights (%s); memory is not planned", source.name, error)
        return None
    return workload_of(
        pipe, group, recommended=recommended_generation(source.folder), component_bytes=source.component_bytes()
    )


def workload_of_synthetic(model: SyntheticModel, group: Calibration) -> Workload:
    """Return the same of the dimensions of a published model, for videos of the recommended size."""
    sizes = [name for name, size in group.sizes.items() if size is not None]
    if sizes:
        raise InvalidInputError(
            f"{model.label}: has no pipeline to fit {', '.join(sizes)} to; plan with the recommended size, or plan the "
            "model's own folder"
        )
    frames, of_frame = model.frames, model.tokens // model.frames
    if group.max_tokens is not None and group.max_tokens < model.tokens:
        frames = max(2, group.max_tokens // of_frame)
        if frames * of_frame > group.max_tokens:
            raise InvalidInputError(
                f"calibration.max_tokens={group.max_tokens}: two frames of {model.label} have {2 * of_frame} tokens; "
                "use more, or plan the model's own folder, which fits the size of frames"
            )
    return Workload(
        tokens=frames * of_frame,
        frames=frames,
        text_tokens=model.text_tokens,
        audio_tokens=model.audio_tokens,
        branches=model.batch * model.calls,
        rows=model.batch,
        component_bytes=None,
        steps=group.steps or int(model.family.defaults["num_inference_steps"]),
    )
