"""Models that the page offers: what to call each, and whether two of them can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from s2q.common.errors import InvalidInputError
from s2q.generation.defaults import embedded_source
from s2q.generation.load import check_model, is_checkpoint
from s2q.models import ModelSource, family_of, resolve_model
from s2q.models.architecture import Architecture, architecture_of, check_comparable
from s2q.models.quantized import full_precision_origin
from s2q.shapes import embedded

DATA_FREE = ("table-w4a8", "rtn-w4a6", "rtn-w4a4")
"""Recipes without calibration; an embedded model is quantized with one of them in seconds, when it is first used."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A model that can be chosen.

    Attributes:
        label: What it is called on the page; unique.
        source: The model, or the full-precision model that `recipe` quantizes.
        recipe: Recipe to quantize it with when it is first used; None for a model that is loaded unchanged.
        quantized: Whether its transformer is quantized.
        needs_image: Whether its videos start from an image.
    """

    label: str
    source: ModelSource
    recipe: str | None = None
    quantized: bool
    needs_image: bool
    architecture: Architecture = field(repr=False)


def offered(models: Sequence[str | Path] = (), checkpoints: Sequence[str | Path] = ()) -> list[Offer]:
    """Return what the page offers; everything is checked, no weights are read.

    Args:
        models: Full-precision models; none takes those that the checkpoints were made from, or without checkpoints the
            embedded models.
        checkpoints: s2q checkpoints, by folder or Hub id.

    Raises:
        InvalidInputError: If a model is unknown or needs more than a prompt and an image, or if a checkpoint is none,
            is damaged, or was made from none of `models`.
    """
    quantized = list({offer.source.pinned: offer for offer in map(_checkpoint, checkpoints)}.values())
    sources = [resolve_model(model) for model in models] or _origins(quantized)
    if not (sources or quantized):
        sources = [resolve_model(name) for name in embedded.EMBEDDED_NAMES]
    full = [_offer(source, label=source.given) for source in _distinct(sources)]
    for source in sources:
        check_model(source)
    offers = full + quantized
    for offer in full:
        if offer.source.kind == "embedded" and not offer.quantized:
            offers += [_offer(offer.source, label=f"{offer.label}, {name}", recipe=name) for name in DATA_FREE]
    if models:
        for offer in quantized:
            _check_origin(offer, full)
    if len(offers) < 2:
        (alone,) = offers
        origin = _origin(alone) if alone.quantized else None
        model = "a full-precision model" if origin is None else f"the model that it was made from, {origin},"
        raise InvalidInputError(
            f"{alone.label}: has nothing to be compared with; pass {model} with -m MODEL, or a checkpoint"
        )
    return offers


def partners(offer: Offer, offers: Iterable[Offer]) -> list[Offer]:
    """Return the offers that can be compared with one: other models of its architecture."""
    return [other for other in offers if other is not offer and _comparable(offer, other)]


def check_pair(left: Offer, right: Offer) -> None:
    """Check that two offers are of one architecture.

    Raises:
        InvalidInputError: With what differs.
    """
    check_comparable(right.architecture, left.architecture)


def _comparable(one: Offer, other: Offer) -> bool:
    try:
        check_pair(one, other)
    except InvalidInputError:
        return False
    return True


def _check_origin(offer: Offer, models: Sequence[Offer]) -> None:
    """Refuse a checkpoint that none of the given full-precision models can be compared with."""
    if not any(_comparable(model, offer) for model in models):
        check_pair(models[0], offer)


def _checkpoint(path: str | Path) -> Offer:
    source = resolve_model(path)
    if not is_checkpoint(source):
        raise InvalidInputError(f"{path}: is not an s2q checkpoint; pass a full-precision model with -m {path}")
    check_model(source)
    return _offer(source, label=source.given)


def _origins(offers: Iterable[Offer]) -> list[ModelSource]:
    """Return the full-precision models that checkpoints were made from, those that are on this machine."""
    origins = []
    for offer in offers:
        name = embedded_source(offer.source) or _origin(offer)
        if name is not None and (name in embedded.EMBEDDED_NAMES or Path(name).is_dir()):
            origins.append(resolve_model(name))
    return origins


def _origin(offer: Offer) -> str | None:
    return full_precision_origin(offer.source.folder, *offer.source.transformer_configs.values())


def _distinct(sources: Iterable[ModelSource]) -> list[ModelSource]:
    return list({source.pinned: source for source in sources}.values())


def _offer(source: ModelSource, *, label: str, recipe: str | None = None) -> Offer:
    return Offer(
        label=label,
        source=source,
        recipe=recipe,
        quantized=recipe is not None or source.is_quantized,
        needs_image=_needs_image(source, label=label),
        architecture=architecture_of(source, label=label),
    )


def _needs_image(source: ModelSource, *, label: str) -> bool:
    """Whether videos start from an image; refuses a pipeline that needs what the page has no fields for."""
    family, bases = family_of(source.transformer_class), {base.__name__ for base in source.pipeline_type().__mro__}
    known = family.image_pipeline(bases)
    if known is None:
        if family.pipeline_class in bases:
            return False
        raise InvalidInputError(
            f"{label}: s2q ui generates from a prompt, or a prompt and an image, not with "
            f"{source.index['_class_name']}; load the model in Python and call the pipeline"
        )
    if known.videos:
        raise InvalidInputError(
            f"{label}: {known.pipeline_class} needs {' and '.join(known.videos)}, which the page has no fields for; "
            "use s2q eval with a .jsonl file of prompts"
        )
    return True
