"""Text encoders: which linears are quantized, weight-only and to nearest, and what that saves.

An encoder runs once a video, so memory is what counts, and inputs are not quantized. Output layers, weights that are
tied, and linears whose in features no group divides stay in full precision.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from s2q.common.components import encoder_state, has_adapter
from s2q.common.errors import InvalidInputError
from s2q.common.fp32_modules import is_within, kept_in_fp32
from s2q.common.log import log_once
from s2q.core.schemes import LinearScheme, QuantScheme
from s2q.core.storage import BF16_BYTES, EncoderStorage
from s2q.models import OUTSIDE
from s2q.models.quantized import already_quantized, quantization_method
from s2q.planning.resolve import LinearPlan, check_groups
from s2q.recipes.schema import Recipe

logger = logging.getLogger(__name__)


def encoder_linears(model: nn.Module, weight: QuantScheme, *, component: str, remedy: str) -> list[LinearPlan]:
    """Plan the linears of a text encoder, which may be on the meta device; names are those in it.

    Raises:
        InvalidInputError: If there is none that the scheme fits.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    scheme = LinearScheme(weight=weight, activation=None)
    kept = tuple(get_keys_to_not_convert(model))
    plans: list[LinearPlan] = []
    unfit: list[str] = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or f"{name}.".startswith(tuple(f"{key}." for key in kept)):
            continue
        plan = LinearPlan(
            name=name,
            inner_name=name,
            block=OUTSIDE,
            role="outer",
            in_features=module.in_features,
            out_features=module.out_features,
            has_bias=module.bias is not None,
            scheme=scheme,
        )
        try:
            check_groups(plan, scheme)
        except InvalidInputError as error:
            unfit.append(str(error))
        else:
            plans.append(plan)
    if not plans:
        raise InvalidInputError(f"{component}: {scheme.name} fits none of the linears of the text encoder; {remedy}")
    if unfit:
        message = "%s: %s linears stay in full precision, the first because of %s"
        log_once(logger, logging.WARNING, message, component, str(len(unfit)), unfit[0])
    return plans


def recipe_encoder_linears(recipe: Recipe, model: nn.Module, *, component: str) -> list[LinearPlan]:
    """Plan the linears of a text encoder that a recipe with `text_encoder` quantizes."""
    assert recipe.text_encoder is not None
    remedy = "change text_encoder.group_size, or set text_encoder=null"
    return encoder_linears(model, recipe.text_encoder.scheme(), component=component, remedy=remedy)


def plan_encoders(
    recipe: Recipe, models: Mapping[str, nn.Module], *, dtype: torch.dtype | None
) -> tuple[EncoderStorage, ...]:
    """Return the bytes of each text encoder before and after; none for recipes that leave them untouched.

    Args:
        models: Text encoders by component, with or without values.
        dtype: In which the checkpoint stores what is not quantized; None takes the dtypes of the models.
    """
    if recipe.text_encoder is None:
        return ()
    storage = []
    for component, model in models.items():
        linears = recipe_encoder_linears(recipe, model, component=component)
        sizes, values = _tensor_sizes(model, dtype)
        quantized = {f"{linear.name}.weight" for linear in linears}
        rest = sum(size for name, size in sizes.items() if name not in quantized)
        storage.append(
            EncoderStorage(
                component=component,
                class_name=type(model).__name__,
                scheme=linears[0].scheme.name,
                linears=len(linears),
                full_precision_bytes=values * BF16_BYTES,
                quantized_bytes=rest + sum(linear.weight_bytes for linear in linears),
            )
        )
    return tuple(storage)


def check_encoder(name: str, component: str, model: nn.Module) -> None:
    """Refuse a text encoder that is quantized, offloaded or has an adapter."""
    if (method := quantization_method(model)) is not None:
        raise already_quantized(name, component, method)
    if has_adapter(model):
        raise InvalidInputError(f"{name}: its {component} has an adapter; remove it, or set text_encoder=null")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InvalidInputError(f"{name}: its {component} is offloaded; load the pipeline without offloading")


def _tensor_sizes(model: nn.Module, dtype: torch.dtype | None) -> tuple[dict[str, int], int]:
    """Bytes of the tensors that files of a text encoder have, by name, and their number of values."""
    kept = kept_in_fp32(model) if dtype == torch.float16 else frozenset()
    kept |= frozenset(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    sizes, values = {}, 0
    for name, tensor in encoder_state(model).items():
        itemsize = tensor.itemsize
        if dtype is not None and tensor.is_floating_point():
            itemsize = (torch.float32 if is_within(name, kept) else dtype).itemsize
        sizes[name], values = tensor.numel() * itemsize, values + tensor.numel()
    return sizes, values
