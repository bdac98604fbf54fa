"""Text encoders, models of transformers, quantized weight-only while they load.

Every linear is rounded to nearest by the recipe's weights as soon as its weight has been read. Its input is not
quantized: an encoder runs once a video, and memory is what counts. Left in full precision are output layers, weights
that are tied, and linears whose in features no group divides.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert

from s2q.blocks.pack import pack_nearest
from s2q.common.errors import InvalidInputError, UsageError
from s2q.common.torch_state import in_fresh_torch_state
from s2q.core.schemes import LinearScheme
from s2q.models import OUTSIDE
from s2q.nn import PackedLinear, replace_module
from s2q.planning.resolve import LinearPlan, check_groups

PREFIX = "text_encoder"
"""Of the names of a pipeline's text encoders."""

logger = logging.getLogger(__name__)


class _NoTensor:
    """In place of a weight that is not to be read, and that transformers is not to draw anew."""

    _is_hf_initialized = True


class EncoderLinear(nn.Module):
    """A packed linear whose codes nobody takes for a weight: T5 casts its input to the dtype of the tensor `wo.weight`.

    Attributes:
        packed: The linear.
        weight: No tensor.
    """

    weight = _NoTensor()

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.packed = packed
        self._is_hf_initialized = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Linear)
        """Apply the linear to [..., I], floating."""
        output: Tensor = self.packed(input)
        return output


class EncoderQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizes the linears of a text encoder while transformers loads it."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plans: dict[str, LinearPlan] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        scheme = LinearScheme(weight=self.quantization_config.recipe.weights.scheme(), activation=None)
        kept = set(get_keys_to_not_convert(model))
        for name, module in model.named_modules():
            if type(module) is not nn.Linear or any(name == key or name.startswith(f"{key}.") for key in kept):
                continue
            plan = _plan(name, module, scheme)
            try:
                check_groups(plan, scheme)
            except InvalidInputError as error:
                logger.warning("%s; it stays in full precision", error)
                continue
            self.plans[f"{name}.weight"] = plan
        if not self.plans:
            raise InvalidInputError(
                f"Config: recipe {self.quantization_config.recipe.name} fits none of the linears of the text encoder; "
                "change weights.group_size, or name other components"
            )

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Tell whether a parameter is the weight of a linear that is quantized."""
        return param_name in self.plans

    def get_quantize_ops(self) -> ConversionOps:
        """Return what is done with such a weight."""
        return _Quantize(self)

    @in_fresh_torch_state
    def quantize(self, model: nn.Module, plan: LinearPlan) -> None:
        """Replace a linear that has its weight, and its bias if it has one, in place."""
        dense = model.get_submodule(plan.name)
        (packed,) = pack_nearest(model, [plan], device=str(dense.weight.device)).values()
        packed.name = plan.name
        for parameter in packed.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        packed._is_hf_initialized = True  # type: ignore[assignment]
        replace_module(model, plan.name, EncoderLinear(packed))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for plan in self.plans.values():  # those whose bias came after their weight
            if isinstance(model.get_submodule(plan.name), nn.Linear):
                self.quantize(model, plan)
        return model

    def is_serializable(self) -> bool:
        """Refuse saving: no loader reads a packed text encoder."""
        raise UsageError(
            "a text encoder that was quantized while loading is not saved; save the pipeline's transformer, and load "
            "with the same quantization_config again"
        )

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


def register(method: str, config: type) -> None:
    """Make transformers know a configuration; idempotent."""
    auto.AUTO_QUANTIZER_MAPPING[method] = EncoderQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config


def _plan(name: str, linear: nn.Linear, scheme: LinearScheme) -> LinearPlan:
    return LinearPlan(
        name=name,
        inner_name=name,
        block=OUTSIDE,
        role="outer",
        in_features=linear.in_features,
        out_features=linear.out_features,
        has_bias=linear.bias is not None,
        scheme=scheme,
    )
