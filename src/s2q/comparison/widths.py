"""The width of a checkpoint, "w4a8": entries of one width are ranked together, whoever made them.

Other tools' widths are read off the `quantization_config` that diffusers loads them by. What computes on unquantized
activations is "w4a16", whatever its 16 bits are. A method that is not known here is a group of its own, by its name.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

NOT_QUANTIZED = "not quantized"
_BITS = re.compile(r"(?:u?int|float|fp|nf|mxfp|nvfp)(\d+)", re.IGNORECASE)


def recipe_width(recipe: Mapping[str, Any]) -> str:
    """Return the width of a resolved recipe."""
    activations = recipe.get("activations")
    return _width(recipe["weights"]["num_bits"], activations["num_bits"] if activations else 16)


def foreign_width(config: Mapping[str, Any] | None) -> str:
    """Return the width that a `quantization_config` of another tool tells, else the name of its method."""
    if config is None:
        return NOT_QUANTIZED
    method = str(config.get("quant_method", "unknown method"))
    read = _METHODS.get(method)
    try:
        width = None if read is None else read(config)
    except (AttributeError, KeyError, TypeError, ValueError):  # a configuration of another version
        width = None
    return width or method


def _width(weights: int, activations: int) -> str:
    return f"w{weights}a{activations}"


def _bits(name: Any) -> int | None:
    """The bits in the name of a dtype: 4 of "uint4", "nf4" and "float4_e2m1fn"."""
    match = _BITS.search(str(name))
    return int(match[1]) if match else None


def _named(weights: Any, activations: Any) -> str | None:
    bits = _bits(weights)
    return None if bits is None else _width(bits, _bits(activations) or 16)


def _bitsandbytes(config: Mapping[str, Any]) -> str | None:
    if config.get("load_in_4bit"):
        return _width(4, 16)
    return _width(8, 8) if config.get("load_in_8bit") else None  # LLM.int8 quantizes activations too


def _sdnq(config: Mapping[str, Any]) -> str | None:
    product = (config.get("quantized_matmul_dtype") or "int8") if config.get("use_quantized_matmul") else None
    return _named(config.get("weights_dtype"), product)


def _modelopt(config: Mapping[str, Any]) -> str | None:
    weights, _, activations = str(config["quant_type"]).partition("_")
    return _named(weights, None if config.get("weight_only") else activations)


def _torchao(config: Mapping[str, Any]) -> str | None:
    kind = config["quant_type"]
    if isinstance(kind, Mapping):  # an AOBaseConfig as JSON: {"default": {"_type": "Int8WeightOnlyConfig", …}}
        kind = next(iter(kind.values())) if "_type" not in kind else kind
        kind = kind["_type"]
    name = str(kind).replace("_", "").lower()
    activations, separator, weights = re.sub("(dynamic|static)activation", "|", name).partition("|")
    return _named(weights, activations) if separator else _named(name, None)


def _bits_alone(config: Mapping[str, Any]) -> str | None:
    return _width(int(config["bits"]), int(config.get("act_bits") or 16))


_METHODS: Mapping[str, Callable[[Mapping[str, Any]], str | None]] = {
    "auto-round": _bits_alone,
    "awq": _bits_alone,
    "bitsandbytes": _bitsandbytes,
    "gptq": _bits_alone,
    "modelopt": _modelopt,
    "nunchaku_lite": lambda config: _width(4, 4 if config.get("svdq_w4a4") else 16),
    "quanto": lambda config: _named(config.get("weights_dtype") or config.get("weights"), config.get("activations")),
    "sdnq": _sdnq,
    "torchao": _torchao,
}
