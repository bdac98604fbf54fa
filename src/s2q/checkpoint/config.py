"""The `quantization_config` of a checkpoint: everything that is needed to build the packed layers before loading them.

In JSON, schemes are written once and layers name theirs, so that a model with hundreds of layers stays readable:
`{"quant_method": "s2q", "format_version": 1, "schemes": {"w4a6": {...}}, "layers": {"blocks.0.to_q": "w4a6"}, ...}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from s2q.core.errors import InvalidInputError, unknown_name
from s2q.core.schemes import LinearScheme

FORMAT_VERSION = 1
"""The version that this package writes, and the only one that it reads."""

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
        **fields: `quant_method` and `format_version` as they stand in a file; anything else is refused.

    Raises:
        InvalidInputError: If the format version is not ours, a field is unknown, or a layer names no scheme.
    """

    def __init__(
        self,
        *,
        layers: Mapping[str, str] | None = None,
        schemes: Mapping[str, Mapping[str, Any]] | None = None,
        recipe: str = "",
        compute_dtype: str = "float32",
        **fields: Any,
    ) -> None:
        method = fields.pop("quant_method", QuantMethod.S2Q)
        if method != QuantMethod.S2Q:
            raise InvalidInputError(f"quantization_config: quant_method={method!r}; expected 's2q'")
        version = fields.pop("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise InvalidInputError(
                f"quantization_config: format_version={version!r}; this s2q reads version {FORMAT_VERSION}; "
                "upgrade s2q, or quantize the model again with this one"
            )
        for field in fields:
            raise unknown_name("key in quantization_config", field, ("layers", "schemes", "recipe", "compute_dtype"))
        if not isinstance(layers, Mapping) or not isinstance(schemes, Mapping) or not layers:
            raise InvalidInputError(
                "quantization_config: layers or schemes is missing; download or save the model again"
            )
        if compute_dtype not in COMPUTE_DTYPES:
            raise unknown_name("compute_dtype in quantization_config", str(compute_dtype), COMPUTE_DTYPES)
        self.quant_method = QuantMethod.S2Q
        self.format_version = FORMAT_VERSION
        self.recipe = recipe
        self.compute_dtype = compute_dtype
        self.schemes = {name: LinearScheme.from_dict(scheme).to_dict() for name, scheme in schemes.items()}
        for layer, scheme in layers.items():
            if scheme not in self.schemes:
                raise unknown_name(f"scheme of {layer} in quantization_config", str(scheme), self.schemes)
        self.layers = dict(layers)

    @classmethod
    def from_schemes(cls, schemes: Mapping[str, LinearScheme], *, recipe: str, compute_dtype: str) -> S2QConfig:
        """Build the configuration from the scheme of each linear.

        Args:
            schemes: Scheme by full name of the linear.
            recipe: Name of the recipe.
            compute_dtype: Dtype of the model, "bfloat16".

        Returns:
            The configuration.
        """
        return cls(
            layers={layer: scheme.name for layer, scheme in schemes.items()},
            schemes={scheme.name: scheme.to_dict() for scheme in schemes.values()},
            recipe=recipe,
            compute_dtype=compute_dtype,
        )

    def layer_schemes(self) -> dict[str, LinearScheme]:
        """Return the scheme of each quantized linear by full name."""
        schemes = {name: LinearScheme.from_dict(scheme) for name, scheme in self.schemes.items()}
        return {layer: schemes[name] for layer, name in self.layers.items()}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same as `to_dict`; diffusers' `__repr__` asks for it."""
        return self.to_dict()
