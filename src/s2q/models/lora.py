"""LoRA adapters that are fused into a full-precision model when it is loaded.

A fused adapter is part of the weights W + s B A, so everything that is made from the model has it. diffusers reads the
file, in any layout that it knows for the pipeline. Adapters that it would apply in part or not at all are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
_FACTOR = re.compile(r"^transformer\.(?P<linear>.+)\.lora_(?P<factor>[AB])\.(?P<kind>weight|bias)$")
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

    @property
    def label(self) -> str:
        """The name of its file, or of its folder where the file has the name that all have."""
        return self.path.parent.name if self.path.name == _DEFAULT_FILE else self.path.name

    def to_dict(self) -> dict[str, Any]:
        """Return what identifies it, whatever folder it is in."""
        return {"file": self.path.name, "sha256": self.sha256, "scale": self.scale, "component": self.component}


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
    path = Path(given).expanduser()
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
    for lora in parsed:
        _check_fits(source, lora)
    return replace(source, loras=parsed)


def fuse_loras(pipe: DiffusionPipeline, loras: Iterable[Lora]) -> None:
    """Add adapters to the weights of a pipeline's transformers, in the dtype of the weights, one after the other."""
    for index, lora in enumerate(loras):
        name = f"lora_{index}"
        second = {"load_into_transformer_2": True} if lora.component != TRANSFORMERS[0] else {}
        pipe.load_lora_weights(str(lora.path), adapter_name=name, use_safetensors=True, **second)
        pipe.fuse_lora(components=[lora.component], lora_scale=lora.scale, adapter_names=[name], safe_fusing=True)
        pipe.unload_lora_weights()


def _check_fits(source: ModelSource, lora: Lora) -> None:
    """Check that every tensor of an adapter is a factor of a linear of the transformer."""
    if lora.component not in source.transformer_configs:
        raise InvalidInputError(f"lora {lora.path}: {source.given} has no {lora.component}")
    model = source.meta_transformer(lora.component)
    for name, tensor in _factors(source, lora).items():
        match = _FACTOR.match(name)
        if match is None:
            raise InvalidInputError(
                f"lora {lora.path}: its tensor {name} is not part of a transformer's LoRA; fuse it with the tool that "
                "made it, and quantize the result"
            )
        linear = _submodule(model, match["linear"])
        if linear is None:
            raise _of_another_model(source, lora, f"{source.given} has no linear {match['linear']}")
        side = 1 if match["factor"] == "A" else 0
        expected, got = linear.weight.shape[side], tensor.shape[side if match["kind"] == "weight" else 0]
        if got != expected:
            of = "output" if side == 0 else "input"
            raise _of_another_model(source, lora, f"{match['linear']} has {expected} {of} features, not {got}")


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
    try:
        factors: Mapping[str, Tensor] = pipeline_class.lora_state_dict(str(lora.path), use_safetensors=True)
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        raise InvalidInputError(
            f"lora {lora.path}: diffusers cannot read it for {pipeline_class.__name__} ({error})"
        ) from error
    return factors


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return module if isinstance(getattr(module, "weight", None), Tensor) else None


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
