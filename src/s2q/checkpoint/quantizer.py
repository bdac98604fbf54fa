"""The quantizer that diffusers' loader calls, so that plain `from_pretrained` gives a transformer with packed linears.

The loader casts floating tensors to the model's dtype before it hands them over; packed codes and scales are
therefore taken from the state dict, where they are still what the file has. Everything is checked on the way: diffusers
only warns of missing tensors and knows nothing of the layers' input paths.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from s2q.checkpoint.config import QuantMethod, S2QConfig
from s2q.checkpoint.manifest import check_component
from s2q.checkpoint.values import check_finite, value_problem
from s2q.common.components import ADAPTED, adapter_tensor, has_adapter
from s2q.common.errors import InvalidInputError, UsageError, counted
from s2q.common.fp32_modules import is_within, kept_in_fp32
from s2q.core.input_path import stored_tensors
from s2q.core.stored_form import file_dtypes, file_form, from_file, packed_dtypes
from s2q.nn import (
    PackedLinear,
    follow_tokens,
    look_up_activations,
    quantize_attention,
    replace_module,
    restore_activations,
    restore_attention,
    share_inputs,
    unfollow_tokens,
)

QUANT_METHOD: str = QuantMethod.S2Q.value
"""Value of `quantization_config.quant_method` in s2q checkpoints."""

_SCALE = "weight_scale"
_REMEDY = "download the checkpoint again, or quantize the model again"
_NOT_OFFLOADED = "nothing was changed, load it without offloading"


class S2QQuantizer(DiffusersQuantizer):
    """Builds packed linears before the weights are loaded, and checks them as they come in.

    Raises:
        InvalidInputError: If a full-precision model is to be quantized while it loads, which needs a run of its own.
    """

    requires_calibration = True
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: S2QConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise InvalidInputError(
                "quantization_config of an s2q checkpoint given for a full-precision model; run s2q.quantize (or `s2q "
                'quantize`) and load the result, or pass s2q.Config("table-w4a8") to quantize while loading'
            )
        super().__init__(quantization_config, **kwargs)
        self._schemes = quantization_config.layer_schemes()
        self._paths = quantization_config.layer_paths()
        self._tokens = quantization_config.token_layout()
        self._wide = quantization_config.wide
        self._attention = quantization_config.attention_modules()
        self._keep_in_fp32: tuple[list[str], list[str]] | None = None
        self._model = _Reference(None)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Accept every device, dtype and device map."""

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Refuse files that are altered or pickled, with an adapter, or with layers that are not configured.

        This is the first that diffusers tells a quantizer of the files; the manifest is that of their checkpoint.
        """
        for file in checkpoint_files:
            if not str(file).endswith(".safetensors"):
                raise InvalidInputError(f"{file}: pickled weights, which can run code and are not read; {_REMEDY}")
        check_component(checkpoint_files)
        if (adapted := adapter_tensor(loaded_keys)) is not None:
            raise InvalidInputError(
                f"{adapted}: the checkpoint was saved with an adapter attached; save it again after "
                "unload_lora_weights(), or quantize the model again, and attach the adapter after loading"
            )
        for key in loaded_keys:
            layer, _, tensor = key.rpartition(".")
            if tensor == _SCALE and layer not in self._schemes:
                raise InvalidInputError(f"{layer} is packed in the file but not in quantization_config; {_REMEDY}")
            if tensor in stored_tensors() and layer not in self._paths:
                raise InvalidInputError(f"{key} is in the file but not in quantization_config; {_REMEDY}")
        return loaded_keys

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse a checkpoint that lacks tensors; diffusers would only warn and leave them uninitialised."""
        if missing_keys:
            first = ", ".join(sorted(missing_keys)[:3])
            raise InvalidInputError(
                f"checkpoint lacks {counted(len(missing_keys), 'tensor')}, {first} among them; {_REMEDY}"
            )
        return missing_keys

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: Mapping[str, Tensor], **kwargs: Any
    ) -> bool:
        """Tell whether a tensor belongs to the packed part of a layer."""
        layer, _, tensor = param_name.rpartition(".")
        return layer in self._schemes and tensor in packed_dtypes()

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Refuse packed data of the wrong size; called where the shapes differ."""
        layer, _, tensor = param_name.rpartition(".")
        raise InvalidInputError(
            f"{param_name}: got shape {list(loaded_param.shape)}, expected {list(current_param.shape)} "
            f"for {self._schemes[layer].name}; {_REMEDY}"
        )

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
        """Put a packed tensor into its layer, with the values that the file has."""
        layer, _, tensor = param_name.rpartition(".")
        value = state_dict[param_name]
        expected = file_dtypes(wide=self._wide)[tensor]
        if value.dtype != expected:
            raise InvalidInputError(f"{param_name}: got dtype {value.dtype}, expected {expected}; {_REMEDY}")
        linear, value = model.get_submodule(layer), from_file(value, packed_dtypes()[tensor])
        if problem := value_problem(tensor, value, self._schemes[layer], in_features=linear.in_features):
            raise InvalidInputError(f"{param_name}: {problem}; {_REMEDY}")
        parameter = nn.Parameter(value.to(target_device), requires_grad=False)
        setattr(linear, tensor, parameter)

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        device_map: Mapping[str, Any] | None = None,
        keep_in_fp32_modules: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.pack(model)
        self._check_places(device_map or {})
        # A tensor that goes to the disk (device_map, offload_folder) does not pass through create_quantized_param. The
        # loader's own list of what to keep in fp32 covers that path; it is put back as it was after the loading.
        if keep_in_fp32_modules is not None:
            added = [
                name
                for name, dtype in packed_dtypes().items()
                if dtype == torch.float32 and name not in keep_in_fp32_modules
            ]
            keep_in_fp32_modules.extend(added)
            self._keep_in_fp32 = (keep_in_fp32_modules, added)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the tensors that `save_pretrained` writes: those of packed linears as files have them."""
        packed = {name: tensor for name, tensor in state_dict.items() if name.rpartition(".")[0] in self._schemes}
        return state_dict | file_form(packed, wide=self._wide), {}

    def pack(self, model: nn.Module) -> None:
        """Replace the quantized linears of a model, in place, by packed ones without values."""
        modules = dict(model.named_modules())
        for layer, scheme in self._schemes.items():
            linear = modules.get(layer)
            if not isinstance(linear, nn.Linear):
                raise InvalidInputError(
                    f"{layer} is in quantization_config, but {type(model).__name__} has no such linear; {_REMEDY}"
                )
            packed = PackedLinear(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                scheme=scheme,
                path=self._paths.get(layer),
                dtype=linear.weight.dtype,
                device="meta",
            )
            replace_module(model, layer, packed)
        for name in self._attention:
            if name not in modules:
                raise InvalidInputError(
                    f"{name} is in quantization_config, but {type(model).__name__} has no such attention; {_REMEDY}"
                )

    def _check_places(self, device_map: Mapping[str, Any]) -> None:
        """Refuse to leave a low-rank branch on the disk: the loader casts its basis there, which is not its value."""
        if self._wide or not isinstance(device_map, Mapping):
            return
        below = tuple(f"{name}." if name else "" for name, place in device_map.items() if place == "disk")
        for layer, path in self._paths.items():
            if path.low_rank is not None and f"{layer}.".startswith(below):
                raise InvalidInputError(
                    f"{layer}: has a low-rank branch, which device_map cannot leave on the disk; use "
                    "enable_group_offload with offload_to_disk_path, or enable_model_cpu_offload"
                )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self._keep_in_fp32 is not None:
            names, added = self._keep_in_fp32
            for name in added:
                names.remove(name)
            self._keep_in_fp32 = None
        if not getattr(model, "hf_device_map", None):
            left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
            if left:
                first = ", ".join(left[:3])
                raise InvalidInputError(
                    f"checkpoint lacks {counted(len(left), 'tensor')}, {first} among them; {_REMEDY}"
                )
        check_finite(model, remedy=_REMEDY)
        self.prepare(model)
        return model

    def prepare(self, model: nn.Module) -> None:
        """Make a model whose linears are packed ready to run, in place: all that is not in its files."""
        self._model = _Reference(model)
        for layer in self._schemes:
            model.get_submodule(layer).name = layer  # type: ignore[assignment]
        floating = [name for name, dtype in packed_dtypes().items() if dtype.is_floating_point]
        # diffusers takes the first floating parameter that is not named here for the dtype of the model.
        model._keep_in_fp32_modules = [*kept_in_fp32(type(model)), *floating]  # type: ignore[assignment]
        if not hasattr(model, "peft_config"):  # diffusers would take an adapter that was refused for attached
            model.peft_config = {}  # type: ignore[assignment]
        share_inputs(model)
        look_up_activations(model)
        if self._tokens is not None:
            follow_tokens(model, self._tokens)
        quantize_attention(model, self._attention)

    def _dequantize(self, model: nn.Module) -> nn.Module:
        if any(_is_group_offloaded(module) for module in model.modules()):
            raise UsageError(f"{type(model).__name__}: dequantize() of an offloaded model; {_NOT_OFFLOADED}")
        kept = kept_in_fp32(type(model))
        # Nothing is changed before everything has been computed.
        linears = {}
        for layer in self._schemes:
            name, packed = _below_adapters(model, layer)
            linears[name] = packed.dequantized_linear(torch.float32 if is_within(layer, kept) else model.dtype)
        for name, linear in linears.items():
            replace_module(model, name, linear)
        unfollow_tokens(model)
        restore_activations(model)
        restore_attention(model)
        model.__dict__.pop("_keep_in_fp32_modules", None)
        config = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = FrozenDict(config)
        return model

    @property
    def is_serializable(self) -> bool:
        """Whether a loaded model can be saved again; one with an adapter would give a folder that cannot be loaded."""
        model = self._model.get()
        if model is not None and has_adapter(model):
            raise UsageError(
                f"{type(model).__name__}: a quantized model is not saved with an adapter attached; keep the "
                "adapter with save_lora_weights() of the pipeline, call its unload_lora_weights(), and save again"
            )
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed codes have no gradient; adapters beside them do."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The packed forward is plain PyTorch."""
        return True


def attach_config(transformer: nn.Module, config: S2QConfig) -> None:
    """Make a transformer whose linears were packed in memory equal to one that was loaded, in place.

    The configuration goes into the model's config.json when it is saved.
    """
    for layer in config.layers:
        if not isinstance(transformer.get_submodule(layer), PackedLinear):
            raise InvalidInputError(f"{layer} is in quantization_config but not packed")
    quantizer = S2QQuantizer(config, pre_quantized=True)
    quantizer.prepare(transformer)
    transformer.register_to_config(quantization_config=config)
    transformer.is_quantized = True
    transformer.quantization_method = config.quant_method
    transformer.hf_quantizer = quantizer


def file_tensors(transformer: nn.Module) -> dict[str, Tensor]:
    """Return what `save_pretrained` of a transformer writes, by name: shapes and dtypes, on the meta device."""
    tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in transformer.state_dict().items()}
    quantizer = getattr(transformer, "hf_quantizer", None)
    if quantizer is None:
        return tensors
    written: dict[str, Tensor] = quantizer.get_state_dict_and_metadata(tensors)[0]
    return written


def _is_group_offloaded(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("group_offloading") is not None


def _below_adapters(model: nn.Module, layer: str) -> tuple[str, PackedLinear]:
    """Find a packed linear by its name in the checkpoint; return its name in the model, and itself."""
    name, module = layer, model.get_submodule(layer)
    while isinstance(wrapped := getattr(module, ADAPTED, None), nn.Module):
        name, module = f"{name}.{ADAPTED}", wrapped
    if not isinstance(module, PackedLinear):
        raise UsageError(
            f"{name}: got {type(module).__name__} where the checkpoint has a packed linear; nothing was dequantized, "
            "load the checkpoint again"
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise UsageError(f"{name}: dequantize() of an offloaded linear; {_NOT_OFFLOADED}")
    return name, module


class _Reference:
    """A weak reference to a model; in a copy of the model it is one to the copy, in a pickled one there is none."""

    def __init__(self, model: nn.Module | None) -> None:
        self._model = None if model is None else weakref.ref(model)

    def get(self) -> nn.Module | None:
        return None if self._model is None else self._model()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reference:
        return _Reference(memo.get(id(self.get())))

    def __reduce__(self) -> tuple[type[_Reference], tuple[None]]:
        return _Reference, (None,)


def register() -> None:
    """Make diffusers' `from_pretrained` know checkpoints of this package (it has two dicts for that); idempotent."""
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = S2QQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = S2QConfig
