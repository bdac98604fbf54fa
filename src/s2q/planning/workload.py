"""Number of calibration tokens, from a model's configuration alone or from a loaded pipeline."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from s2q.common.components import TRANSFORMERS, text_encoders_of, transformers_of
from s2q.common.errors import InvalidInputError
from s2q.common.log import log_once
from s2q.core.storage import BF16_BYTES
from s2q.generation.conditioning import image_tokens, is_supported
from s2q.generation.defaults import generation_defaults
from s2q.generation.exclusive import exclusive
from s2q.generation.guidance import recorded_branches
from s2q.generation.offload import layers_of, model_parts
from s2q.generation.schedulers import described, distilled_name, scheduler_of
from s2q.generation.settings import (
    SETTINGS,
    GenerationSettings,
    resolve_settings,
    text_tokens,
    token_frames,
    video_tokens,
    within_tokens,
)
from s2q.generation.sharing import steps_of_transformers
from s2q.models import ModelSource, family_of
from s2q.models.source import recommended_generation
from s2q.models.synthetic import SyntheticModel
from s2q.planning.cost import PartBytes, Workload
from s2q.recipes.schema import Recipe
from s2q.selection.options import Calibration, recipe_key

logger = logging.getLogger(__name__)

_SYNTHETIC = ("num_inference_steps", "guidance_scale")
"""Settings that can be planned from dimensions alone."""


def calibration_settings(pipe: Any, group: Calibration, *, recommended: Mapping[str, Any]) -> GenerationSettings:
    """Return the settings of the videos of calibration; errors name them as recipes do."""
    try:
        settings = resolve_settings(pipe, requested=group.requested, defaults=dict(recommended))
    except InvalidInputError as error:
        name = next((name for name in SETTINGS if re.match(rf"{name}\b", str(error))), None)
        if name is None:
            raise
        raise InvalidInputError(recipe_key(name) + str(error).removeprefix(name)) from None
    return settings if group.max_tokens is None else within_tokens(pipe, settings, group.max_tokens)


def workload_of(
    pipe: Any, group: Calibration, *, recommended: Mapping[str, Any], components: Mapping[str, PartBytes] | None
) -> Workload | None:
    """Return what calibration computes on; None for a pipeline that it does not run."""
    if not is_supported(pipe):
        return None
    with exclusive(pipe):
        settings = calibration_settings(pipe, group, recommended=recommended)
        scheduler = described(scheduler_of(pipe, settings))
        called = steps_of_transformers(pipe, settings)
    branches = recorded_branches(pipe, settings)
    return Workload(
        tokens=video_tokens(pipe, settings),
        frames=token_frames(pipe, settings),
        text_tokens=text_tokens(pipe, settings),
        image_tokens=image_tokens(pipe),
        audio_tokens=_audio_tokens(pipe, settings),
        branches=branches,
        rows=branches if family_of(pipe.transformer).guidance == "batched" else 1,
        components=components,
        steps=settings.num_inference_steps,
        called=called,
        generation=settings.to_dict() | scheduler,
    )


def _audio_tokens(pipe: Any, settings: GenerationSettings) -> int:
    """Tokens of the sound of a video, as the pipeline counts them; 0 of a pipeline without sound."""
    if getattr(pipe, "audio_vae", None) is None:
        return 0
    if hasattr(pipe, "audio_tokens"):
        return int(pipe.audio_tokens(settings.num_frames))
    rate = pipe.audio_sampling_rate / pipe.audio_hop_length / pipe.audio_vae_temporal_compression_ratio
    return round(settings.num_frames / family_of(pipe.transformer).frame_rate * rate)


def workload_of_recipe(
    pipe: Any,
    recipe: Recipe,
    *,
    names: Sequence[str],
    recommended: Mapping[str, Any],
    components: Mapping[str, PartBytes] | None,
    warn: bool = True,
) -> Workload | None:
    """Return what calibration computes on by a recipe; None if it does not calibrate, or not on such a pipeline.

    Settings that a recipe without calibration ignores are checked all the same. Warnings are logged once a process.

    Args:
        names: The model and the adapters in it, by which a step-distilled one is recognised.
        warn: Whether to warn of ignored settings, and of guidance with a step-distilled model.
    """
    group = recipe.calibration
    if not (recipe.calibrates or group.requested):
        return None
    workload = workload_of(pipe, group, recommended=recommended, components=components)
    if not recipe.calibrates:
        workload = None
        if warn:
            _warn_of_ignored(recipe)
    elif warn and workload is not None:
        _warn_of_guidance(pipe, workload, *names)
    return workload


def _warn_of_ignored(recipe: Recipe) -> None:
    """Warn of the generation settings of a recipe that does not calibrate."""
    if names := list(map(recipe_key, recipe.calibration.requested)):
        text = "%s: recipe %s needs no calibration, ignored; pass them to generate"
        log_once(logger, logging.WARNING, text, ", ".join(names), recipe.name)


def _warn_of_guidance(pipe: Any, workload: Workload, *names: str) -> None:
    """Warn where a model looks step-distilled and calibration runs guidance; `names` are those that the model has."""
    if workload.branches == 1:
        return
    settings = workload.generation
    paths = (str(getattr(part, "name_or_path", "") or "") for part in transformers_of(pipe).values())
    origins = ("/".join(Path(path).parts[-2:]) for path in paths)  # a Hub id, or a model's folder and the component's
    if (name := distilled_name(settings["scheduler"], *names, *origins)) is not None:
        log_once(
            logger,
            logging.WARNING,
            "%s looks step-distilled, but calibration runs guidance with a weight of %s in %s steps; for a model that "
            "is run without, use --guidance-scale 1 and --steps (calibration.guidance_scale=1, calibration.steps=4)",
            *(name, f"{settings['guidance_scale']:g}", str(settings["num_inference_steps"])),
        )


def workload_of_source(
    source: ModelSource, recipe: Recipe, *, transformers: Mapping[str, nn.Module]
) -> Workload | None:
    """Return the same of a model whose weights are not loaded; None too if its pipeline needs them."""
    if not (recipe.calibrates or recipe.calibration.requested):
        return None
    pipe = source.meta_pipeline(transformers)
    if pipe is None:
        logger.info("%s: memory is not planned", source.name)
        return None
    return workload_of_recipe(
        pipe,
        recipe,
        names=source_names(source),
        recommended=recommended_for(source),
        components=_components_of(source),
    )


def loaded_components(pipe: Any) -> dict[str, PartBytes]:
    """Return the weights of a pipeline's components besides transformers, which may be on the meta device."""
    encoders = text_encoders_of(pipe)
    others = {name: part for name, part in model_parts(pipe).items() if name not in TRANSFORMERS}
    return {name: _part_bytes(part, layers_of(part) if name in encoders else ()) for name, part in others.items()}


def _part_bytes(part: nn.Module, layers: Iterable[nn.Module], *, stored: int | None = None) -> PartBytes:
    """Weights of a component with layers that are paged; scaled to what its files have, if that is given."""
    whole, *blocks = (sum(tensor.nbytes for tensor in module.parameters()) for module in (part, *layers))
    scale = 1 if stored is None or not whole else stored / whole
    return PartBytes.of(int(scale * whole), [int(scale * block) for block in blocks])


def _components_of(source: ModelSource) -> dict[str, PartBytes] | None:
    """Weights of a model's components besides transformers, by its files; None if none is there."""
    stored = source.component_bytes()
    try:
        encoders = source.meta_text_encoders()
    except InvalidInputError:  # quantized by another tool
        encoders = {}
    parts = {name: PartBytes.of(size) for name, size in stored.items()}
    paged = {
        name: _part_bytes(encoder, layers_of(encoder), stored=stored[name])
        for name, encoder in encoders.items()
        if name in stored
    }
    return (parts | paged) or None


def recommended_for(source: ModelSource) -> dict[str, Any]:
    """Return the settings that a model's makers recommend; empty if they say nothing."""
    return recommended_generation(source.folder) or generation_defaults(source)


def source_names(source: ModelSource) -> tuple[str, ...]:
    """Return the names of a model and of the adapters in it."""
    return source.name, *(lora.label for lora in source.loras)


def workload_of_synthetic(model: SyntheticModel, recipe: Recipe) -> Workload | None:
    """Return the same of the dimensions of a published model, for videos of the recommended size."""
    group, asked = recipe.calibration, recipe.calibration.requested
    if unplanned := [recipe_key(name) for name in asked if name not in _SYNTHETIC]:
        raise InvalidInputError(
            f"{model.label}: has no pipeline to fit {', '.join(unplanned)} to; plan without, for the recommended size, "
            "or plan the model's own folder"
        )
    if not recipe.calibrates:
        _warn_of_ignored(recipe)
        return None
    frames, of_frame = model.frames, model.tokens // model.frames
    if group.max_tokens is not None and group.max_tokens < model.tokens:
        frames = max(2, group.max_tokens // of_frame)
        if frames * of_frame > group.max_tokens:
            raise InvalidInputError(
                f"calibration.max_tokens={group.max_tokens}: two frames of {model.label} have {2 * of_frame} tokens; "
                "use more, or plan the model's own folder, which fits the size of frames"
            )
    settings = {name: asked.get(name, model.family.defaults[name]) for name in _SYNTHETIC}
    guided = settings["guidance_scale"] > 1
    return Workload(
        tokens=frames * of_frame,
        frames=frames,
        text_tokens=model.text_tokens,
        image_tokens=model.image_tokens,
        audio_tokens=_audio_tokens_of(model, frames),
        branches=model.batch * model.calls if guided else 1,
        rows=model.batch if guided else 1,
        components={
            name: PartBytes(whole=BF16_BYTES * sizes[0], paged=BF16_BYTES * sizes[-1])
            for name, sizes in model.components.items()
        },
        steps=int(settings["num_inference_steps"]),
        generation=settings,
    )


def _audio_tokens_of(model: SyntheticModel, frames: int) -> int:
    """Tokens of the sound of a video with so many tokens along time; the first of these is one frame."""
    if not model.audio_tokens:
        return 0
    recommended = model.family.defaults["num_frames"]
    stride = (recommended - 1) / (model.frames - 1)
    return round(model.audio_tokens * (1 + stride * (frames - 1)) / recommended)
