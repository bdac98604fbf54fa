"""Text encoders with packed linears in checkpoints, as `from_pretrained` of transformers and diffusers loads them.

`quantization_config` in the component's config.json has the format of a transformer's, without what only those have.
The tensors of a linear are `NAME.packed.weight`, `NAME.packed.weight_scale` and so on, in the dtypes of
`core.stored_form`. transformers only warns of tensors that are missing or left over, and draws the missing ones anew;
here every tensor of the files is compared with the model before one is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from s2q.checkpoint.config import QuantMethod, S2QConfig
from s2q.checkpoint.manifest import check_component
from s2q.checkpoint.values import check_finite, value_problem
from s2q.common.components import TEXT_ENCODER, encoder_state
from s2q.common.errors import InvalidInputError, UsageError, counted
from s2q.common.files import read_json
from s2q.common.foreign_code import component_entries
from s2q.common.fp32_modules import is_within, kept_in_fp32
from s2q.common.headers import DTYPES, TensorInfo, read_headers
from s2q.core.stored_form import file_form
from s2q.nn import PACKED, EncoderLinear, PackedLinear, replace_module
from s2q.pipelines import find_index, read_index

_REMEDY = "download the checkpoint again, or quantize the model again"


class StoredEncoderQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds the packed linears of a text encoder before its weights are loaded, and checks them.

    Raises:
        InvalidInputError: If a full-precision model is to be quantized while it loads.
    """

    requires_calibration = True

    def __init__(self, quantization_config: S2QConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise InvalidInputError(
                "quantization_config of an s2q checkpoint given for a full-precision text encoder; pass "
                's2q.Config("table-w4a8") to quantize while loading'
            )
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        for file in checkpoint_files or ():
            if not str(file).endswith(".safetensors"):
                raise InvalidInputError(f"{file}: pickled weights, which can run code and are not read; {_REMEDY}")
        pack_encoder(model, self.quantization_config)
        if checkpoint_files:
            check_component(checkpoint_files)
            check_encoder_files(model, read_headers([Path(file) for file in checkpoint_files]))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        _prepare(model, self.quantization_config)
        for name, scheme in self.quantization_config.layer_schemes().items():
            packed = _linear(model, name).packed
            values = {**dict(packed.named_parameters()), "weight": packed.packed_weight}
            for tensor, value in values.items():
                if tensor == "bias" or value.is_meta:
                    continue
                if problem := value_problem(tensor, value, scheme, in_features=packed.in_features):
                    raise InvalidInputError(f"{name}.{PACKED}.{tensor}: {problem}; {_REMEDY}")
        check_finite(model, remedy=_REMEDY)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors that `save_pretrained` writes."""
        return _in_file_form(model.state_dict()), {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        linears, dtype = {}, dtype or model.dtype
        for name in self.quantization_config.layers:
            linears[name] = _linear(model, name)
            if any(parameter.is_meta for parameter in linears[name].parameters()):
                raise UsageError(f"{name}: dequantize() of an offloaded linear; load the model without offloading")
        for name, linear in linears.items():
            is_kept = linear.in_fp32 and dtype == torch.float16
            replace_module(model, name, linear.packed.dequantized_linear(torch.float32 if is_kept else dtype))
        return model

    def is_serializable(self) -> bool:
        """Whether a loaded model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed codes have no gradient."""
        return False


def pack_encoder(model: nn.Module, config: S2QConfig) -> None:
    """Replace the quantized linears of a text encoder, in place, by packed ones without values."""
    modules = dict(model.named_modules())
    for name, scheme in config.layer_schemes().items():
        linear = modules.get(name)
        if type(linear) is not nn.Linear:
            raise InvalidInputError(
                f"{name} is in quantization_config, but {type(model).__name__} has no such linear; {_REMEDY}"
            )
        packed = PackedLinear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            scheme=scheme,
            dtype=linear.weight.dtype,
            device="meta",
        )
        replace_module(model, name, EncoderLinear(packed, in_fp32=is_within(name, kept_in_fp32(model))))


def attach_encoder_config(model: nn.Module, config: S2QConfig) -> None:
    """Make a text encoder whose linears were packed in memory equal to one that was loaded, in place."""
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.hf_quantizer = StoredEncoderQuantizer(config, pre_quantized=True)
    _prepare(model, config)


def encoder_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what `save_pretrained` of a text encoder writes, by name; the model may be on the meta device."""
    return _in_file_form(encoder_state(model))


def check_encoder_files(model: nn.Module, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse files whose tensors are not those of a text encoder with packed linears, which has no values yet."""
    expected, known = encoder_tensors(model), model.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise InvalidInputError(
            f"checkpoint lacks {counted(len(missing), 'tensor')}, {', '.join(missing[:3])} among them; {_REMEDY}"
        )
    if left := sorted(tensors.keys() - known.keys()):
        raise InvalidInputError(f"{left[0]} is in the file but not in {type(model).__name__}; {_REMEDY}")
    names = {dtype: text for text, dtype in DTYPES.items()}
    for name, value in expected.items():
        info, dtype = tensors[name], names[value.dtype]
        if info.shape != tuple(value.shape):
            raise InvalidInputError(
                f"{name}: got shape {list(info.shape)}, expected {list(value.shape)} of quantization_config; {_REMEDY}"
            )
        is_free = value.is_floating_point() and not _is_packed(name)  # in any floating dtype
        if info.dtype != dtype and not (is_free and info.dtype in ("F16", "BF16", "F32")):
            raise InvalidInputError(f"{name}: got dtype {info.dtype}, expected {dtype}; {_REMEDY}")


def encoder_configs(folder: Path) -> dict[str, S2QConfig]:
    """Read the configurations of the text encoders of a checkpoint that s2q has quantized, by component."""
    configs: dict[str, S2QConfig] = {}
    components = component_entries(read_index(folder, remedy=_REMEDY)) if find_index(folder).is_file() else {}
    for path in sorted(folder.glob(f"{TEXT_ENCODER}*/config.json")):
        if path.parent.name not in components:
            continue  # what an earlier version left there
        config = read_json(path, remedy=_REMEDY).get("quantization_config")
        if isinstance(config, Mapping) and config.get("quant_method") == QuantMethod.S2Q.value:
            try:
                configs[path.parent.name] = S2QConfig.from_dict(dict(config))
            except InvalidInputError as error:
                raise InvalidInputError(f"{path}: {error}") from error
    return configs


def _prepare(model: nn.Module, config: S2QConfig) -> None:
    model._weight_conversions = []  # files have the names of the modules
    for name in config.layers:
        packed = _linear(model, name).packed
        packed.name = name
        for parameter in packed.parameters():
            parameter.requires_grad_(False)


def _linear(model: nn.Module, name: str) -> EncoderLinear:
    linear = model.get_submodule(name)
    if not isinstance(linear, EncoderLinear):
        raise InvalidInputError(f"{name} is in quantization_config but not packed")
    return linear


def _is_packed(name: str) -> bool:
    *_, parent, tensor = ("", *name.split("."))
    return parent == PACKED and tensor != "bias"


def _in_file_form(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, **file_form({name: tensor for name, tensor in tensors.items() if _is_packed(name)})}
