"""LoRA adapters that are fused into a full-precision model when it is loaded.

A fused adapter is part of the weights W + s B A, so everything that is made from the model has it. diffusers reads the
file, in any layout that it knows for the pipeline. Adapters that it would apply in part or not at all are refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from s2q.common.components import TRANSFORMERS
from s2q.common.errors import InvalidInputError, ResourceError, UsageError, unknown_name
from s2q.common.files import sha256_file
from s2q.common.headers import read_header
from s2q.common.versions import is_installed

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from s2q.models.source import ModelSource

_DEFAULT_FILE = "pytorch_lora_weights.safetensors"
_FACTOR = re.compile(r"^transformer\.(?P<linear>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias)$")
_USUAL = re.compile(r"\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)\.(.+\.)?(weight|bias)$|\.alpha$")
_COMPONENT = re.compile(r"(transformer\w*)=(.+)")
_MAGNITUDES = ("dora_scale", "lora_magnitude_vector")
_EXPECTED = "expected [transformer_2=]FILE.safetensors[:SCALE]"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """An adapter of a transformer: its file, SHA-256 and scale s; `component` is the transformer that it is for."""

    path: Path
    sha256: str
    scale: float = 1.0
    component: str = TRANSFORMERS[0]

    def __str__(self) -> str:
        """Text that `parse_lora` reads, with an absolute path."""
        return f"{self.component}={self.path}:{self.scale}"

    @property
    def label(self) -> str:
        """The name of its file, or of its folder where the file has the name that all have."""
        return self.path.parent.name if self.path.name == _DEFAULT_FILE else self.path.name

    def to_dict(self) -> dict[str, Any]:
        """Return its record in reports and manifests; `effect_of` identifies it by this."""
        return {"file": self.path.name, "sha256": self.sha256, "scale": self.scale, "component": self.component}


def effect_of(loras: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """Return what identifies adapters together, by their records: component, SHA-256 and scale of each, sorted.

    Neither the names of files nor the order of adapters count; `fuse_loras` adds them in this order.
    """
    return sorted([lora["component"], lora["sha256"], lora["scale"]] for lora in loras)


def parse_lora(text: str) -> Lora:
    """Read "[COMPONENT=]FILE[:SCALE]", where FILE may be a folder with `pytorch_lora_weights.safetensors`.

    Raises:
        UsageError: If the scale is not a finite number.
        InvalidInputError: If there is no such component or file, or the file is not of safetensors.
    """
    given, component, scale = text, TRANSFORMERS[0], 1.0
    if prefixed := _COMPONENT.match(given):
        component, given = prefixed.groups()
        if component not in TRANSFORMERS:
            raise unknown_name("component of a lora", component, TRANSFORMERS)
    file, colon, number = given.rpartition(":")
    if colon and not Path(given).exists():
        given, scale = file, _scale(number, text)
    path = Path(given).expanduser().absolute()  # workers may be in other folders
    path = path / _DEFAULT_FILE if path.is_dir() else path
    if not path.is_file():
        raise InvalidInputError(f"lora {text}: {path} does not exist; {_EXPECTED}, of a file on this machine")
    if not read_header(path):
        raise InvalidInputError(f"lora {text}: {path} contains no tensors")
    return Lora(path=path, sha256=sha256_file(path), scale=scale, component=component)


def with_loras(source: ModelSource, loras: Sequence[str]) -> ModelSource:
    """Return a full-precision model that is loaded with adapters fused, after a check that they fit it.

    Raises:
        InvalidInputError: If the model is quantized or its pipeline has no adapters, or an adapter is for another model
            or of a kind that cannot be fused.
        ResourceError: If the package peft is not installed.
        UsageError: As `parse_lora`.
    """
    if not loras:
        return source
    parsed = tuple(parse_lora(text) for text in loras)
    if source.is_quantized:
        raise InvalidInputError(
            f"{source.given}: is quantized, so an adapter cannot be fused; quantize the full-precision model with "
            "--lora, or attach the adapter by load_lora_weights() of the loaded pipeline"
        )
    if not is_installed("peft"):
        raise ResourceError("lora: needs the package peft, which is not installed; pip install peft")
    transformer = functools.cache(source.meta_transformer)
    for lora in parsed:
        _check_fits(source, lora, transformer)
    return replace(source, loras=parsed)


def fuse_loras(pipe: DiffusionPipeline, loras: Iterable[Lora]) -> None:
    """Add adapters to the weights of a pipeline's transformers, in the dtype of the weights, in an order of their own.

    So the order in which they are given changes no bit.

    Raises:
        InvalidInputError: If a file is not what it was when it was checked, or diffusers cannot fuse it.
    """
    for index, lora in enumerate(sorted(loras, key=lambda lora: effect_of([lora.to_dict()]))):
        name = f"lora_{index}"
        second = {"load_into_transformer_2": True} if lora.component != TRANSFORMERS[0] else {}
        if not lora.path.is_file() or sha256_file(lora.path) != lora.sha256:
            raise InvalidInputError(f"lora {lora.path}: has changed since it was checked; run the command again")
        try:
            pipe.load_lora_weights(str(lora.path), adapter_name=name, use_safetensors=True, **second)
            pipe.fuse_lora(components=[lora.component], lora_scale=lora.scale, adapter_names=[name], safe_fusing=True)
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            raise InvalidInputError(f"lora {lora.path}: diffusers cannot fuse it ({error})") from error
        pipe.unload_lora_weights()


def _check_fits(source: ModelSource, lora: Lora, transformer: Callable[[str], nn.Module]) -> None:
    """Check that an adapter is whole, finite, and of linears that the transformer has."""
    if lora.component not in source.transformer_configs:
        raise InvalidInputError(f"lora {lora.path}: {source.given} has no {lora.component}")
    model, linears = transformer(lora.component), dict[str, dict[str, Tensor]]()
    for name, tensor in _factors(source, lora).items():
        match = _FACTOR.match(name)
        if match is None:
            raise _in_part(lora, f"its tensor {name} is not a factor of a linear of a transformer")
        if not bool(tensor.isfinite().all()):
            raise InvalidInputError(f"lora {lora.path}: {name} contains NaN or infinite values; download it again")
        linears.setdefault(match["linear"], {})[match["part"]] = tensor
    for name, parts in linears.items():
        _check_linear(source, lora, model, name, parts)


def _check_linear(source: ModelSource, lora: Lora, model: nn.Module, name: str, parts: Mapping[str, Tensor]) -> None:
    """Check the factors A [r, I, ...] and B [O, r, ...] of a linear or convolution, and the bias [O] of B."""
    module = _submodule(model, name)
    if module is None:
        raise _of_another_model(source, lora, f"{source.given} has no linear {name}")
    if not {"A.weight", "B.weight"} <= parts.keys():
        raise _in_part(lora, f"{name} has only the factor{'s' * (len(parts) > 1)} {', '.join(sorted(parts))}")
    down, up = parts["A.weight"], parts["B.weight"]
    if down.ndim != module.weight.ndim or up.ndim != module.weight.ndim or down.shape[0] != up.shape[1]:
        raise _in_part(lora, f"the factors of {name} have shapes {list(down.shape)} and {list(up.shape)}")
    sides = {"input": (module.weight.shape[1], down.shape[1]), "output": (module.weight.shape[0], up.shape[0])}
    for side, (expected, got) in sides.items():
        if got != expected:
            raise _of_another_model(source, lora, f"{name} has {expected} {side} features, not {got}")
    bias = parts.get("B.bias")
    if bias is not None and bias.shape != module.weight.shape[:1]:
        raise _of_another_model(source, lora, f"{name} has {module.weight.shape[0]} output features, not {len(bias)}")


def _factors(source: ModelSource, lora: Lora) -> Mapping[str, Tensor]:
    """The tensors of an adapter under the names that diffusers gives them."""
    pipeline_class = source.pipeline_type()
    if not hasattr(pipeline_class, "lora_state_dict"):
        raise InvalidInputError(f"lora {lora.path}: {pipeline_class.__name__} takes no LoRA in diffusers")
    if magnitude := next((name for name in read_header(lora.path) if any(mark in name for mark in _MAGNITUDES)), None):
        raise InvalidInputError(
            f"lora {lora.path}: is a DoRA (has {magnitude}), which diffusers would apply without its magnitudes; fuse "
            "it with the tool that made it, and quantize the result"
        )
    tensors = load_file(lora.path)
    convert: Callable[..., dict[str, Tensor]] = pipeline_class.lora_state_dict
    try:
        factors, traced = convert(dict(tensors)), convert(_traced(tensors))
    except (KeyError, IndexError, ValueError, RuntimeError, OSError) as error:
        raise InvalidInputError(
            f"lora {lora.path}: diffusers cannot read it for {pipeline_class.__name__} ({error})"
        ) from error
    kept = {float(value) for tensor in traced.values() for value in tensor.flatten()[:1]}
    for index, name in enumerate(_beside_factors(tensors)):
        if _mark(index) not in kept and bool(tensors[name].any()):
            raise _in_part(lora, f"diffusers would leave out its tensor {name}")
    return factors


def _beside_factors(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are neither factors nor their alpha: changes of biases and norms, `diff_b` and `diff`."""
    return [name for name in tensors if not _USUAL.search(name)]


def _mark(index: int) -> float:
    return -1e6 - index  # exact in fp32


def _traced(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a mark in place of the values of each that is no factor, to see whether diffusers keeps it."""
    marks = enumerate(_beside_factors(tensors))
    return {**tensors, **{name: torch.full(tensors[name].shape, _mark(index)) for index, name in marks}}


def _submodule(model: nn.Module, name: str) -> nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) else None


def _in_part(lora: Lora, difference: str) -> InvalidInputError:
    return InvalidInputError(
        f"lora {lora.path}: {difference}, so it would be applied in part; fuse it with the tool that made it, and "
        "quantize the result"
    )


def _of_another_model(source: ModelSource, lora: Lora, difference: str) -> InvalidInputError:
    return InvalidInputError(
        f"lora {lora.path}: is for another model than {source.given}: {difference}; use the adapter of this model"
    )


def _scale(text: str, given: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = float("nan")
    if not abs(scale) < float("inf"):
        raise UsageError(f"lora {given}: got the scale {text!r}; {_EXPECTED}, SCALE a finite number")
    return scale
