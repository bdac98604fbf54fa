"""The `quantization_config` of a checkpoint: everything that is needed to build the packed layers before loading them.

In JSON, schemes are written once and layers name theirs, so that a model with hundreds of layers stays readable:
`{"quant_method": "s2q", "format_version": 1, "schemes": {"w4a6": {...}}, "layers": {"blocks.0.to_q": "w4a6"}, ...}`.

Version 2 adds the layers' input paths in the same way: `"inputs": {"t0": {"scale": true, "left": 12, "right": 16,
"activation_clip": true}}, "layer_inputs": {"blocks.0.to_q": "t0"}`.

Version 3 adds `"deflates": false` to an input, whose low-rank branch is taken from the weight, and how the transformer
makes tokens of its arguments, for layers that have to know where those of the video lie:
`"tokens": {"latents": "channels first", "patch": [1, 2, 2], "text": "apart"}`.

Version 4 has the same keys, all of them optional, and those of attention modules that run with quantized queries and
keys: `"attention": {"num_bits": 8, "modules": ["blocks.0.attn1", ...]}`. Scales, shifts and transforms are in bfloat16
instead of fp32, bases of low-rank branches in float8 instead of bfloat16 (`core.stored_form`). It is the one that is
written, except for values of other programs that it would round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from s2q.common.errors import InvalidInputError, short_repr, unknown_name
from s2q.core.input_path import InputPath
from s2q.core.schemes import ATTENTION_BITS, LinearScheme
from s2q.core.tokens import TokenLayout

FORMAT_VERSION = 4
"""The version that this package writes; older ones are read too."""

_PLAIN_VERSION, _INPUT_VERSION, _TOKENS_VERSION = 1, 2, 3
_KEYS = ("layers", "schemes", "recipe", "compute_dtype")
_INPUT_KEYS = ("inputs", "layer_inputs")
_KEYS_OF = {
    _PLAIN_VERSION: _KEYS,
    _INPUT_VERSION: (*_KEYS, *_INPUT_KEYS),
    _TOKENS_VERSION: (*_KEYS, *_INPUT_KEYS, "tokens"),
    FORMAT_VERSION: (*_KEYS, *_INPUT_KEYS, "tokens", "attention"),
}

_MAX_RECIPE = 1000  # a name with the names of variants
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")


class QuantMethod(StrEnum):
    """Name of the method in `quantization_config`."""

    S2Q = "s2q"


class S2QConfig(QuantizationConfigMixin):
    """Configuration of a quantized transformer, as diffusers' loader wants it.

    Args:
        layers: For each quantized linear, by full name, the name of its scheme.
        schemes: Schemes by name, each as `LinearScheme.to_dict` writes it.
        recipe: Name of the recipe that made the checkpoint.
        compute_dtype: Dtype of the model when it was quantized, "bfloat16".
        **fields: `quant_method`, `format_version`; from version 2 on `inputs` (`InputPath.to_dict` by name) and
            `layer_inputs` (name by linear), from version 3 on `tokens` (`TokenLayout.to_dict`) and
            `attention`. Others are refused.

    Raises:
        InvalidInputError: If the format version is not ours, a field is unknown, or a layer names no scheme.
    """

    def __init__(
        self,
        *,
        layers: Mapping[str, str] | None = None,
        schemes: Mapping[str, Mapping[str, Any]] | None = None,
        recipe: str = "",
        compute_dtype: str = "",
        **fields: Any,
    ) -> None:
        method = fields.pop("quant_method", QuantMethod.S2Q)
        if method != QuantMethod.S2Q:
            raise InvalidInputError(f"quantization_config: quant_method={short_repr(method)}; expected 's2q'")
        version = fields.pop("format_version", _PLAIN_VERSION)
        if type(version) is not int or version not in _KEYS_OF:
            raise InvalidInputError(
                f"quantization_config: format_version={short_repr(version)}; this s2q reads versions {_PLAIN_VERSION} "
                f"to {FORMAT_VERSION}; upgrade s2q, or quantize the model again with this one"
            )
        known = _KEYS_OF[version]
        for field in fields:
            if field not in known:
                raise unknown_name("key in quantization_config", field, known)
        if not isinstance(layers, Mapping) or not isinstance(schemes, Mapping) or not layers:
            raise InvalidInputError(
                "quantization_config: layers or schemes is missing; download or save the model again"
            )
        if compute_dtype not in COMPUTE_DTYPES:
            raise unknown_name("compute_dtype in quantization_config", compute_dtype, COMPUTE_DTYPES)
        if not isinstance(recipe, str) or len(recipe) > _MAX_RECIPE:
            raise InvalidInputError(f"quantization_config: recipe={short_repr(recipe)}; expected the name of a recipe")
        self.quant_method = QuantMethod.S2Q
        self.format_version = version
        self.recipe = recipe
        self.compute_dtype = compute_dtype
        try:
            self.schemes = {name: LinearScheme.from_dict(scheme).to_dict() for name, scheme in schemes.items()}
        except InvalidInputError as error:
            raise InvalidInputError(f"quantization_config: {error}") from error
        for layer, scheme in layers.items():
            if not isinstance(scheme, str) or scheme not in self.schemes:
                raise unknown_name(f"scheme of {layer} in quantization_config", scheme, self.schemes)
        self.layers = dict(layers)
        if version in (_INPUT_VERSION, _TOKENS_VERSION) or any(key in fields for key in _INPUT_KEYS):
            self._set_inputs(fields.get("inputs"), fields.get("layer_inputs"))
        if "tokens" in fields:
            self.tokens = TokenLayout.from_dict(fields["tokens"]).to_dict()
        elif any(part.needs_grid for part in (*self.layer_schemes().values(), *self.layer_paths().values())):
            raise InvalidInputError(
                "quantization_config: tokens is missing, but a layer needs the positions of the video tokens; download "
                "or save the model again"
            )

        if "attention" in fields:
            self.attention = _checked_attention(fields["attention"])

    def _set_inputs(self, inputs: Any, layer_inputs: Any) -> None:
        if not isinstance(inputs, Mapping) or not isinstance(layer_inputs, Mapping):
            raise InvalidInputError(
                "quantization_config: inputs or layer_inputs is missing; download or save the model again"
            )
        try:
            paths = {name: InputPath.from_dict(path) for name, path in inputs.items()}
        except InvalidInputError as error:
            raise InvalidInputError(f"quantization_config: {error}") from error
        if self.format_version == _INPUT_VERSION and not all(path.deflates for path in paths.values()):
            raise InvalidInputError(
                f"quantization_config: deflates=false in format_version={_INPUT_VERSION}; expected {_TOKENS_VERSION}; "
                "download or save the model again"
            )
        self.inputs = {name: path.to_dict() for name, path in paths.items()}
        for layer, name in layer_inputs.items():
            if layer not in self.layers:
                raise unknown_name("layer in layer_inputs of quantization_config", layer, self.layers)
            if not isinstance(name, str) or name not in self.inputs:
                raise unknown_name(f"input of {layer} in quantization_config", name, self.inputs)
        self.layer_inputs = dict(layer_inputs)

    @classmethod
    def from_schemes(
        cls,
        schemes: Mapping[str, LinearScheme],
        *,
        recipe: str,
        compute_dtype: str,
        paths: Mapping[str, InputPath] | None = None,
        tokens: TokenLayout | None = None,
        attention: Sequence[str] = (),
        wide: bool = False,
    ) -> S2QConfig:
        """Build the configuration from scheme and input path (where there is one) of each linear, by full name.

        `attention` has the names of the attention modules that are quantized. `wide` takes version 3, whose scales and
        transforms are in fp32: for those of other programs, which version 4 would round.
        """
        extra: dict[str, Any] = {"format_version": FORMAT_VERSION}
        if wide:
            extra = {"format_version": _TOKENS_VERSION, "inputs": {}, "layer_inputs": {}}
        if paths:
            distinct = list(dict.fromkeys(paths.values()))
            extra |= {
                "inputs": {f"t{index}": path.to_dict() for index, path in enumerate(distinct)},
                "layer_inputs": {layer: f"t{distinct.index(path)}" for layer, path in paths.items()},
            }
        if tokens is not None:
            extra["tokens"] = tokens.to_dict()
        if attention:
            extra["attention"] = {"num_bits": ATTENTION_BITS, "modules": list(attention)}
        return cls(
            layers={layer: scheme.name for layer, scheme in schemes.items()},
            schemes={scheme.name: scheme.to_dict() for scheme in schemes.values()},
            recipe=recipe,
            compute_dtype=compute_dtype,
            **extra,
        )

    def layer_schemes(self) -> dict[str, LinearScheme]:
        """Return the scheme of each quantized linear by full name."""
        schemes = {name: LinearScheme.from_dict(scheme) for name, scheme in self.schemes.items()}
        return {layer: schemes[name] for layer, name in self.layers.items()}

    def layer_paths(self) -> dict[str, InputPath]:
        """Return the input paths by full name, of the quantized linears that have one."""
        inputs = {name: InputPath.from_dict(path) for name, path in getattr(self, "inputs", {}).items()}
        return {layer: inputs[name] for layer, name in getattr(self, "layer_inputs", {}).items()}

    @property
    def wide(self) -> bool:
        """Whether scales, shifts and transforms are in fp32."""
        return self.format_version < FORMAT_VERSION

    def token_layout(self) -> TokenLayout | None:
        """Return how the transformer makes tokens of its arguments, if a linear has to know where they lie."""
        return TokenLayout.from_dict(self.tokens) if hasattr(self, "tokens") else None

    def attention_modules(self) -> tuple[str, ...]:
        """Return the names of the attention modules that run with quantized queries and keys."""
        return tuple(self.attention["modules"]) if hasattr(self, "attention") else ()

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same as `to_dict`; diffusers' `__repr__` asks for it."""
        return self.to_dict()


def _checked_attention(given: Any) -> dict[str, Any]:
    problem = None
    if not isinstance(given, Mapping) or given.keys() != {"num_bits", "modules"}:
        problem = f"attention={short_repr(given)}; expected num_bits and modules"
    elif given["num_bits"] != ATTENTION_BITS:
        problem = f"attention.num_bits={short_repr(given['num_bits'])}; expected {ATTENTION_BITS}"
    elif not isinstance(given["modules"], list) or not all(isinstance(name, str) for name in given["modules"]):
        problem = f"attention.modules={short_repr(given['modules'])}; expected a list of names"
    if problem is not None:
        raise InvalidInputError(f"quantization_config: {problem}; download or save the model again")
    return dict(given)
