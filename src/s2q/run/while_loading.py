"""Quantizing while loading: `from_pretrained(…, quantization_config=s2q.Config("table-w4a8"))`.

For recipes that need no samples. Linears that read one input are quantized as soon as their weights have been read, and
the weights are dropped: never is more in memory than the packed model, a file of weights, and one such group. Where the
recipe corrects biases, adaLN linears and those outside the blocks wait for the embeddings of timesteps, which give the
mean input of adaLN linears. A transformer equals what `s2q.quantize` gives, number by number, and is saved and loaded
as that is. Text encoders of transformers are quantized weight-only, as `text_encoder` of the recipe says, or else with
its weights, and are saved and loaded likewise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto as diffusers_auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn
from transformers.quantizers import auto as transformers_auto

from s2q.blocks.data_free import folded
from s2q.blocks.pack import pack_nearest
from s2q.blocks.task import BlockTask, input_groups
from s2q.checkpoint import S2QConfig, S2QQuantizer
from s2q.common import arguments
from s2q.common.arguments import dtype_name
from s2q.common.components import TEXT_ENCODER, TRANSFORMERS, split_name
from s2q.common.errors import InvalidInputError, unknown_name
from s2q.common.files import read_json
from s2q.common.torch_state import in_fresh_torch_state
from s2q.models import OUTSIDE, block_names, family_of, token_layout
from s2q.models.quantized import already_quantized, full_precision_origin
from s2q.models.timesteps import mean_timestep_row, timestep_parameters
from s2q.nn import replace_module
from s2q.planning.resolve import LinearPlan, quantized_attention, recipe_linears, resolve
from s2q.recipes.load import checked_overrides, load_recipe, recipe_names
from s2q.recipes.schema import Recipe
from s2q.run import text_encoders


class QuantMethod(StrEnum):
    """Name of a `Config` among the quantizers of diffusers and transformers; no checkpoint has it."""

    RECIPE = "s2q_recipe"


class Config(PipelineQuantizationConfig, QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of `from_pretrained`, for a pipeline, a transformer or a text encoder.

    Attributes:
        recipe: The validated recipe.
        seed: Of rotations, as in `s2q.quantize`.
        components_to_quantize: Components of a pipeline; None for its transformers and text encoders.
        component: The one that it is for, which a pipeline sets.
        stored_method: The `quant_method` of a transformer that is already quantized, which is refused.

    Args:
        recipe: Name, file or content of a recipe that needs no samples.
        overrides: Changes of its fields, "transforms.rotation=identity".
        components: Names of components of a pipeline, "transformer", "text_encoder".

    Raises:
        InvalidInputError: If there is no such recipe, it is not valid, or it calibrates.
    """

    def __init__(
        self,
        recipe: str | Path | Mapping[str, Any] | Recipe,
        *,
        overrides: Sequence[str] = (),
        components: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.recipe = load_recipe(recipe, overrides=checked_overrides(overrides))
        if self.recipe.calibrates:
            free = ", ".join(name for name in recipe_names() if not load_recipe(name).calibrates)
            raise InvalidInputError(
                f"Config: recipe {self.recipe.name} calibrates, so it cannot quantize while loading; run s2q.quantize "
                f"and load the result, or use one of {free}"
            )
        self.seed = arguments.whole_number("seed", seed, least=0)
        self.quant_method = QuantMethod.RECIPE
        self.quant_backend, self.quant_kwargs, self.quant_mapping = None, {}, None
        self.components_to_quantize = (
            None if components is None else list(arguments.name_list("components", components))
        )
        for name in self.components_to_quantize or ():
            if name not in TRANSFORMERS and not name.startswith(TEXT_ENCODER):
                raise unknown_name("component", name, (*TRANSFORMERS, TEXT_ENCODER))
        self.component = TRANSFORMERS[0]
        self.stored_method: str | None = None
        self.is_granular, self.config_mapping = False, {}
        _register()

    def _resolve_quant_config(self, is_diffusers: bool = True, module_name: str | None = None) -> Config | None:
        """Return the configuration of a component of a pipeline, which knows its name; None if it is not quantized."""
        name, chosen = module_name or "", self.components_to_quantize
        if chosen is None:
            chosen = [*TRANSFORMERS, *([name] if name.startswith(TEXT_ENCODER) else [])]
        if name not in chosen:
            return None
        resolved = copy.copy(self)
        resolved.component = name
        return resolved

    def to_dict(self) -> dict[str, Any]:
        """Return what identifies it, for logs; a saved transformer has an `S2QConfig` instead."""
        return {"quant_method": self.quant_method.value, "recipe": self.recipe.name, "seed": self.seed}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same as `to_dict`."""
        return self.to_dict()

    def __repr__(self) -> str:
        return f"Config({self.recipe.name!r})"


class RecipeQuantizer(S2QQuantizer):
    """Quantizes a transformer as its weights come in; afterwards it is the quantizer of an s2q checkpoint."""

    requires_calibration = False

    def __init__(self, quantization_config: Config, **kwargs: Any) -> None:
        DiffusersQuantizer.__init__(self, quantization_config, **kwargs)
        self._source = quantization_config
        self._pending: dict[str, _Group] = {}
        self._waiting: list[_Group] = []  # for the mean input of adaLN linears

    @property
    def supports_parallel_loading(self) -> bool:
        """Read files one after the other, to have the weights of one in memory."""
        return False

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Accept the files of any model in full precision; the first that diffusers tells a quantizer of the folder."""
        if (method := self._source.stored_method) is not None:
            folder = Path(checkpoint_files[0]).parent
            config = read_json(folder / "config.json", remedy="download or save the model again")
            origin = full_precision_origin(folder.parent, config)
            raise already_quantized("from_pretrained", self._source.component, method, origin=origin)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        recipe, component, family = self._source.recipe, self._source.component, family_of(model)
        self._plans = _plans(recipe, model, component=component)
        self._attention = [split_name(name)[1] for name in quantized_attention(recipe, {component: model})]
        self._embeddings = timestep_parameters(model) if recipe.corrects_biases else []
        self._mean_row: Tensor | None = None
        groups: list[_Group] = []
        for index, name in enumerate(block_names(model, family)):
            linears = [plan for plan in self._plans if plan.block == index]
            sharing = input_groups(linears, family)
            for group in (*sharing, *((plan,) for plan in linears if plan.role == "modulation")):
                groups.append(_Group(model, group, block=name))
        groups += [_Group(model, (plan,)) for plan in self._plans if plan.block == OUTSIDE]
        self._pending = {name: group for group in groups for name in group.missing}

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: Mapping[str, Tensor], **kwargs: Any
    ) -> bool:
        """Tell whether a tensor belongs to a linear that is quantized; called for each tensor that is read."""
        return param_name in self._pending

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str,
        state_dict: Mapping[str, Tensor],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep a weight or bias until its group is complete, then quantize that, and what waits for nothing more."""
        group = self._pending.pop(param_name)
        group.add(param_name, param_value.to(target_device))
        if not group.missing:
            self._waiting.append(group)
            self._quantize_complete(model)

    @in_fresh_torch_state
    def _quantize_complete(self, model: nn.Module) -> None:
        """Quantize complete groups, except those that need, or are part of, embeddings that have not been read."""
        waits = self._mean_row is None and bool(self._embeddings)
        if waits and not self._unread_embeddings(model):
            self._mean_row, waits = mean_timestep_row(model), False
        complete = [group for group in self._waiting if not waits or group.role == "linear"]
        self._waiting = [group for group in self._waiting if group not in complete]
        for group in complete:
            group.quantize(self._source, mean_row=self._mean_row)

    def _unread_embeddings(self, model: nn.Module) -> list[str]:
        """Parameters of the embeddings of timesteps that have not been read; until the mean row is computed."""
        return [name for name in self._embeddings if model.get_parameter(name).is_meta]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        unread = set(self._pending)
        if self._waiting:
            unread.update(self._unread_embeddings(model))
        if unread:
            first = ", ".join(sorted(unread)[:3])
            raise InvalidInputError(
                f"Config: {len(unread)} tensors were not read into memory, {first} among them; linears that are left "
                "on the disk (device_map) are not quantized while loading: run s2q.quantize and load the result"
            )
        self._quantize_complete(model)
        layout = token_layout(model, family_of(model)) if any(plan.needs_grid for plan in self._plans) else None
        config = S2QConfig.from_schemes(
            {plan.name: plan.scheme for plan in self._plans},
            recipe=self._source.recipe.name,
            compute_dtype=dtype_name(model.dtype),
            paths={plan.name: plan.path for plan in self._plans if not plan.path.empty},
            tokens=layout,
            attention=self._attention,
        )
        S2QQuantizer.__init__(self, config, pre_quantized=True)
        model.register_to_config(quantization_config=config)
        model.quantization_method = config.quant_method
        return super()._process_model_after_weight_loading(model, **kwargs)


def _plans(recipe: Recipe, model: nn.Module, *, component: str) -> list[LinearPlan]:
    """Plan one transformer, with names in it; patterns of `skip` that name another one are not about it."""
    linears = recipe_linears(recipe, {component: model})
    skip = [
        pattern
        for pattern in recipe.skip
        if split_name(pattern)[0] == component or any(fnmatchcase(linear.name, pattern) for linear in linears)
    ]
    plans = resolve(recipe.model_copy(update={"skip": tuple(skip)}), linears)
    return [replace(plan, name=split_name(plan.name)[1]) for plan in plans]


class _Group:
    """Linears that are quantized together, and the names of their tensors that are still to come."""

    def __init__(self, model: nn.Module, linears: tuple[LinearPlan, ...], *, block: str | None = None) -> None:
        self.linears, self.role = linears, linears[0].role
        self.model, self.module = model, model if block is None else model.get_submodule(block)
        self.missing = {f"{linear.name}.weight" for linear in linears}
        self.missing |= {f"{linear.name}.bias" for linear in linears if linear.has_bias}

    def add(self, name: str, value: Tensor) -> None:
        """Put a tensor into its linear."""
        layer, _, tensor = name.rpartition(".")
        setattr(self.model.get_submodule(layer), tensor, nn.Parameter(value, requires_grad=False))
        self.missing.discard(name)

    def quantize(self, config: Config, *, mean_row: Tensor | None) -> None:
        """Replace its linears, whose tensors are all there, by packed ones; see `BlockTask` for the mean row."""
        for inner_name, packed in self._packed(config, mean_row).items():
            replace_module(self.module, inner_name, packed)

    def _packed(self, config: Config, mean_row: Tensor | None) -> Mapping[str, nn.Module]:
        device = str(self.module.get_submodule(self.linears[0].inner_name).weight.device)
        if self.role == "outer":
            return pack_nearest(self.module, self.linears, device=device)
        task = BlockTask(
            block=self.module,
            linears=self.linears,
            recipe=config.recipe,
            family=family_of(self.model),
            index=self.linears[0].block,
            seed=config.seed,
            device=device,
            mean_row=mean_row,
        )
        return folded(task)


def _merged(merge: Callable[..., Any], prefix: str, stored: Any, given: Any) -> Any:
    """Choose between the configuration of a quantized model and a given one as the library does, but refuse a `Config`.

    Otherwise diffusers ignores the `Config` with a warning, and transformers raises. A transformer is refused once its
    folder is known, which names the full-precision model; a text encoder (by the prefix of component names) at once.
    """
    if not isinstance(given, Config):
        return merge(stored, given)
    method = stored.get("quant_method") if isinstance(stored, Mapping) else stored.quant_method
    if prefix == TEXT_ENCODER:
        component = given.component if given.component.startswith(prefix) else prefix
        raise already_quantized("from_pretrained", component, method)
    refused = copy.copy(given)
    refused.stored_method = str(getattr(method, "value", method))
    return refused


def _register() -> None:
    """Make `from_pretrained` of diffusers and transformers know `Config`; idempotent."""
    diffusers_auto.AUTO_QUANTIZER_MAPPING[QuantMethod.RECIPE.value] = RecipeQuantizer
    diffusers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.RECIPE.value] = Config
    loaders = {
        TRANSFORMERS[0]: diffusers_auto.DiffusersAutoQuantizer,
        TEXT_ENCODER: transformers_auto.AutoHfQuantizer,
    }
    for prefix, loader in loaders.items():
        if getattr(loader.merge_quantization_configs, "func", None) is not _merged:
            loader.merge_quantization_configs = staticmethod(
                partial(_merged, loader.merge_quantization_configs, prefix)
            )
    text_encoders.register(QuantMethod.RECIPE.value, Config)
