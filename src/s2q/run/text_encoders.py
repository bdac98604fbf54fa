"""Text encoders, models of transformers, quantized weight-only: as a run assembles them, and while they load.

Every linear of `planning.text_encoders` is rounded to nearest. While loading, that is as soon as its weight has been
read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from s2q.blocks.pack import pack_nearest
from s2q.checkpoint import S2QConfig
from s2q.checkpoint.text_encoders import attach_encoder_config
from s2q.common.arguments import dtype_name
from s2q.common.fp32_modules import is_within, kept_in_fp32
from s2q.common.torch_state import in_fresh_torch_state
from s2q.nn import EncoderLinear, replace_module
from s2q.planning.resolve import LinearPlan
from s2q.planning.text_encoders import encoder_linears


class EncoderQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizes the linears of a text encoder while transformers loads it; afterwards it is that of a checkpoint."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plans: dict[str, LinearPlan] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        recipe = self.quantization_config.recipe
        name, weights = ("weights", recipe.weights)
        if recipe.text_encoder is not None:
            name, weights = ("text_encoder", recipe.text_encoder)
        linears = encoder_linears(
            model,
            weights.scheme(),
            component=f"Config: recipe {recipe.name}",
            remedy=f"change {name}.group_size, or name other components",
        )
        self.plans = {f"{linear.name}.weight": linear for linear in linears}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Tell whether a parameter is the weight of a linear that is quantized."""
        return param_name in self.plans

    def get_quantize_ops(self) -> ConversionOps:
        """Return what is done with such a weight."""
        return _Quantize(self)

    @in_fresh_torch_state
    def quantize(self, model: nn.Module, linear: LinearPlan) -> None:
        """Replace a linear that has its weight, and its bias if it has one, in place."""
        replace_encoder_linear(model, linear)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for linear in self.plans.values():  # those whose bias came after their weight
            if isinstance(model.get_submodule(linear.name), nn.Linear):
                self.quantize(model, linear)
        configure_encoder(model, self.plans.values(), recipe=self.quantization_config.recipe.name)
        return model

    def is_serializable(self) -> bool:
        """Tell that the model is saved as that of a checkpoint."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed codes have no gradient."""
        return False


class _Quantize(ConversionOps):  # type: ignore[misc]
    def __init__(self, quantizer: EncoderQuantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        model: nn.Module,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Put a weight into its linear and quantize that; nothing is left to set."""
        (value,) = input_dict.values()
        plan = self.hf_quantizer.plans[full_layer_name]
        weight = value[0] if isinstance(value, list) else value
        linear = model.get_submodule(plan.name)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        if linear.bias is None or not linear.bias.is_meta:
            self.hf_quantizer.quantize(model, plan)
        return {}


def replace_encoder_linear(model: nn.Module, linear: LinearPlan) -> None:
    """Round a linear of a text encoder to nearest and replace it by the packed one, in place."""
    weight = model.get_submodule(linear.name).weight
    (packed,) = pack_nearest(model, [linear], device=str(weight.device)).values()
    in_fp32 = is_within(linear.name, kept_in_fp32(model))
    replace_module(model, linear.name, EncoderLinear(packed, in_fp32=in_fp32))


def configure_encoder(model: nn.Module, linears: Iterable[LinearPlan], *, recipe: str) -> None:
    """Give a text encoder with packed linears its quantization configuration, in place."""
    schemes = {linear.name: linear.scheme for linear in linears}
    config = S2QConfig.from_schemes(schemes, recipe=recipe, compute_dtype=dtype_name(model.dtype))
    attach_encoder_config(model, config)


def register(method: str, config: type) -> None:
    """Make transformers know a configuration; idempotent."""
    auto.AUTO_QUANTIZER_MAPPING[method] = EncoderQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config
