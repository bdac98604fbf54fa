"""Architectures of two models, which must agree to be compared: transformers and classes of the other components.

A checkpoint is judged against the model that it was made from. A comparison with another model, or of a pipeline with
two transformers against one, would give figures that mean nothing, so every verb that compares asks here first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2q.common.components import transformers_of
from s2q.common.errors import InvalidInputError
from s2q.common.meta import plain_config
from s2q.models.source import ModelSource

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

_EXCHANGEABLE = ("Extractor", "Guid", "Processor", "Scheduler", "Tokenizer")
_REMEDY = "compare it with the model that it was made from"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A pipeline without its weights: configurations by component with `_class_name`, classes of the components."""

    label: str
    transformers: Mapping[str, Mapping[str, Any]]
    components: Mapping[str, str]
    scheduler: Mapping[str, Any]


def architecture_of(model: ModelSource | DiffusionPipeline, *, label: str) -> Architecture:
    """Return the architecture of a resolved or loaded model, which messages call `label`."""
    if isinstance(model, ModelSource):
        transformers: Mapping[str, Mapping[str, Any]] = model.transformer_configs
        classes = {name: class_name for name, (_, class_name) in model.component_classes.items()}
        scheduler = model.scheduler_config()
    else:
        transformers = {
            name: {**part.config, "_class_name": type(part).__name__} for name, part in transformers_of(model).items()
        }
        parts = {name: part for name, part in model.components.items() if part is not None}
        classes = {name: type(part).__name__ for name, part in parts.items()}
        scheduler = {**model.scheduler.config, "_class_name": type(model.scheduler).__name__}
    return Architecture(
        label=label,
        transformers={name: _plain(config) for name, config in transformers.items()},
        components={
            name: class_name
            for name, class_name in classes.items()
            if name not in transformers and not any(word in class_name for word in _EXCHANGEABLE)
        },
        scheduler=_plain(scheduler),
    )


def check_comparable(model: Architecture, reference: Architecture) -> None:
    """Check that a model was made from one of the reference's classes and dimensions."""
    if model.transformers.keys() != reference.transformers.keys():
        ours, theirs = (" and ".join(side.transformers) for side in (model, reference))
        raise InvalidInputError(f"{model.label} has {ours}, the reference {reference.label} has {theirs}; {_REMEDY}")
    for component, config in model.transformers.items():
        base = reference.transformers[component]
        if config["_class_name"] != base["_class_name"]:
            raise _incomparable(
                model, reference, component, f"is a {config['_class_name']}", f"a {base['_class_name']}"
            )
        key = _difference(config, base)
        if key is not None:
            raise _incomparable(model, reference, component, f"has {key}={config[key]}", base[key])
    for component in sorted(model.components.keys() | reference.components.keys()):
        ours, theirs = (side.components.get(component, "none") for side in (model, reference))
        if ours != theirs:
            raise _incomparable(model, reference, component, f"is {ours}", theirs)


def warn_of_scheduler(model: Architecture, reference: Architecture) -> None:
    """Warn where another scheduler than the reference's would be judged together with the quantization."""
    ours, theirs = model.scheduler, reference.scheduler
    key = "_class_name" if ours.get("_class_name") != theirs.get("_class_name") else _difference(ours, theirs)
    if key is not None:
        logger.warning(
            "%s: its scheduler has %s=%s, that of the reference %s %s; the video metrics include the effect of both",
            *(model.label, key.strip("_"), ours.get(key), reference.label, theirs.get(key)),
        )


def _incomparable(
    model: Architecture, reference: Architecture, component: str, ours: str, theirs: object
) -> InvalidInputError:
    whose = f"that of the reference {reference.label}"
    return InvalidInputError(f"{model.label}: its {component} {ours}, {whose} {theirs}; {_REMEDY}")


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first key that both configurations have with different values; what one leaves out is a default."""
    shared = (key for key in sorted(ours.keys() & theirs.keys()) if not key.startswith("_"))
    return next((key for key in shared if key != "quantization_config" and ours[key] != theirs[key]), None)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as config.json would have it, with lists for tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(plain_config(config), default=str))
    return plain
