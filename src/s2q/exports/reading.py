"""Sources of `s2q convert`: SDNQ's pipeline folder or ComfyUI's file; anything else is refused with a remedy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from s2q.checkpoint import QUANT_METHOD
from s2q.common.components import TRANSFORMERS, full_name
from s2q.common.errors import InvalidInputError, UsageError, printable, short_repr
from s2q.common.files import read_json
from s2q.common.headers import read_headers
from s2q.common.records import EXPORT_RECORD
from s2q.common.weight_files import weight_files
from s2q.exports.comfyui import COMFYUI, COMFYUI_FORMAT, read_marked
from s2q.exports.layout import Layout, layout_of
from s2q.exports.sdnq import SDNQ_FORMAT, linear_options
from s2q.exports.source import SourceFormat
from s2q.models import ModelSource, resolve_model
from s2q.models.originals import from_original
from s2q.models.quantized import full_precision_origin

logger = logging.getLogger(__name__)

_REMEDY = "download or save the model again"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_READ = "a pipeline folder of sdnq, or a .safetensors of ComfyUI with --base"


@dataclass(frozen=True, kw_only=True)
class StoredTransformer:
    """A quantized transformer as files have it, by the names of diffusers.

    Attributes:
        plain: Tensors of everything that is not quantized.
        linears: Tensors of each quantized linear, and what the files say of it.
        files: The file of each tensor.
    """

    plain: Mapping[str, Tensor]
    linears: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Any]]]
    files: Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A quantized model of another program.

    Attributes:
        name: Name of the model.
        given: Argument of the user.
        path: Folder or file that is read.
        format: Format of the files.
        version: Version of the program, or None.
        writer: Writer named in the files, or None.
        transformers: The pipeline that has the configurations of the transformers.
        others: The pipeline that has the other components.
        origin: The full-precision model that it was made from, or None.
        components: Its quantized transformers.
        read: Reads one of them, given that in full precision on the meta device.
    """

    name: str
    given: str
    path: Path
    format: SourceFormat
    version: str | None
    writer: str | None
    transformers: ModelSource
    others: ModelSource
    origin: str | None
    components: tuple[str, ...]
    read: Callable[[str, nn.Module], StoredTransformer]


def find_conversion(model: str | Path, *, base: str | Path | None, variant: str | None) -> Conversion:
    """Find a quantized model and check that it is one that is read.

    Raises:
        InvalidInputError: If it is in full precision or of another format; the full-precision model is named.
        UsageError: If a file has no base.
    """
    path = Path(model).expanduser()
    conversion = _of_file(path, base, variant=variant) if path.is_file() else _of_folder(model, base, variant=variant)
    if conversion.version not in (None, conversion.format.version):
        logger.warning(
            "%s: was written by %s %s; the reader was compared with %s, so the outputs may differ",
            conversion.given,
            conversion.format.name,
            short_repr(conversion.version),
            conversion.format.version,
        )
    for component, method in conversion.others.quantization_methods().items():
        if component not in conversion.transformers.transformer_configs:
            raise InvalidInputError(
                f"{conversion.others.given}: its {component} is quantized by {method}, which is not read; pass --base "
                "MODEL (base=), a pipeline whose other components are in full precision"
            )
    ours, theirs = conversion.transformers.transformer_configs, conversion.others.transformer_configs
    for component in ours.keys() | theirs.keys():
        classes = [configs.get(component, {}).get("_class_name", "none") for configs in (ours, theirs)]
        if classes[0] != classes[1]:
            raise InvalidInputError(
                f"{conversion.others.given}: its {component} is {classes[1]}, that of {conversion.given} is "
                f"{classes[0]}; pass the pipeline that the model is of"
            )
    return conversion


def _of_folder(model: str | Path, base: str | Path | None, *, variant: str | None) -> Conversion:
    source = resolve_model(model, variant=variant, needs_variant=base is None)
    others = source
    if base is not None:
        others = resolve_model(base, variant=variant, needs_variant=source.variant is None)
    quantized = {
        component: config["quantization_config"]
        for component, config in source.transformer_configs.items()
        if isinstance(config.get("quantization_config"), Mapping)
    }
    origin = full_precision_origin(source.folder, *source.transformer_configs.values(), source.index)
    if not quantized:
        raise InvalidInputError(f"{source.given}: is not quantized; quantize it with s2q quantize")
    for component, config in quantized.items():
        method = config.get("quant_method")
        if method == QUANT_METHOD:
            raise InvalidInputError(f"{source.given}: is an s2q checkpoint already, which needs no conversion")
        if method != SDNQ_FORMAT.name:
            raise InvalidInputError(
                f"{source.given}: its {component} is quantized by {method}, which is not read; expected {_READ}; "
                f"quantize {full_precision(origin)} with s2q quantize"
            )
    folder = source.complete_folder()

    def read(component: str, plain: nn.Module) -> StoredTransformer:
        files = weight_files(folder / component, variant=source.variant)
        read_headers(files)
        read = {file: load_file(file) for file in files}
        tensors = {name: tensor for content in read.values() for name, tensor in content.items()}
        names = {name.rpartition(".")[0] for name in tensors.keys() - plain.state_dict().keys()}
        options = {name: linear_options(quantized[component], name) for name in names}
        return _stored(tensors, options, files={name: file for file, content in read.items() for name in content})

    version, record = next(iter(quantized.values())).get("sdnq_version"), folder / EXPORT_RECORD
    return Conversion(
        name=source.name,
        given=source.given,
        path=folder,
        format=SDNQ_FORMAT,
        version=None if version is None else str(version),
        writer=_line(f"s2q export of {read_json(record, remedy=_REMEDY).get('recipe')}") if record.is_file() else None,
        transformers=source,
        others=others,
        origin=origin or (None if others is source else others.name),
        components=tuple(quantized),
        read=read,
    )


def _of_file(path: Path, given_base: str | Path | None, *, variant: str | None) -> Conversion:
    if path.suffix != ".safetensors":
        raise InvalidInputError(
            f"{path}: is not read; expected {_READ}; quantize its full-precision model with s2q quantize"
        )
    if given_base is None:
        raise UsageError(
            f"{path}: is one transformer; pass --base MODEL (base=), the diffusers pipeline with its configuration "
            "and other components"
        )
    base = resolve_model(given_base, variant=variant)
    if len(base.transformer_configs) > 1:
        raise InvalidInputError(
            f"{base.given}: has two transformers, a file of {COMFYUI_FORMAT.name} one; quantize it with s2q quantize"
        )
    tensors, marks, writer = read_marked(path)

    def read(component: str, plain: nn.Module) -> StoredTransformer:
        layout = layout_of(plain, COMFYUI_FORMAT.name, remedy=f"quantize {base.given} with s2q quantize")
        names = _marked_names(plain, layout, marks)
        assert COMFYUI.file is not None
        converted = apart(from_original(type(plain).__name__, tensors, suffixes=COMFYUI.file.suffixes))
        return _stored(converted, names, files=dict.fromkeys(converted, path))

    return Conversion(
        name=path.stem,
        given=str(path),
        path=path,
        format=COMFYUI_FORMAT,
        version=None,
        writer=_line(writer or "") or None,
        transformers=base,
        others=base,
        origin=base.name,
        components=TRANSFORMERS[:1],
        read=read,
    )


def _line(text: str) -> str:
    """Return a stranger's text as a line of at most 200 printable characters."""
    return printable(" ".join(text.split()))[:200]


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each tensor memory of its own, as files need it: pieces of a fused linear share that of the whole."""
    return {
        name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in tensors.items()
    }


def _marked_names(model: nn.Module, layout: Layout, marks: Mapping[str, Any]) -> dict[str, Any]:
    """Return marks by the names of diffusers; refuse one of what is no linear of the model."""
    linears = {
        name: layout.linear_name(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    if strange := sorted(marks.keys() - set(linears.values())):
        raise InvalidInputError(
            f"{strange[0]}: is marked as quantized, but {type(model).__name__} has no such linear; check --base"
        )
    return {name: marks[original] for name, original in linears.items() if original in marks}


def _stored(
    tensors: Mapping[str, Tensor], options: Mapping[str, Mapping[str, Any]], *, files: Mapping[str, Path]
) -> StoredTransformer:
    """Split tensors into those of quantized linears, by the last part of their names, and others."""
    linears: dict[str, dict[str, Tensor]] = {name: {} for name in options}
    plain = {}
    for name, tensor in tensors.items():
        linear, _, part = name.rpartition(".")
        if linear in linears:
            linears[linear][part] = tensor
        else:
            plain[name] = tensor
    quantized = {name: (linears[name], options[name]) for name in sorted(options)}
    return StoredTransformer(plain=plain, linears=quantized, files=files)


def check_stored(stored: StoredTransformer, plain: nn.Module, *, component: str, conversion: Conversion) -> None:
    """Refuse tensors that are not those of a transformer in full precision, quantized weights apart.

    Raises:
        InvalidInputError: If one is missing or added, or has another shape, a dtype that is not fp32, fp16 or bf16, or
            values that are not finite; the file and the tensor are named.
    """
    expected, given = plain.state_dict(), conversion.given
    weights = {f"{name}.weight" for name, (tensors, _) in stored.linears.items() if "weight" in tensors}
    biases = {f"{name}.bias": tensors["bias"] for name, (tensors, _) in stored.linears.items() if "bias" in tensors}
    tensors = {**stored.plain, **biases}
    if strange := sorted(expected.keys() ^ (tensors.keys() | weights)):
        where = "missing" if strange[0] in expected else f"no tensor of {type(plain).__name__}"
        raise InvalidInputError(
            f"{given}: {full_name(component, strange[0])} is {where}; check --base, or download the model again"
        )
    for name, tensor in tensors.items():
        where = f"{stored.files[name]}: {full_name(component, name)}"
        if tensor.shape != expected[name].shape:
            raise InvalidInputError(
                f"{where}: got {list(tensor.shape)}, expected {list(expected[name].shape)}; check --base, or download "
                "the model again"
            )
        if expected[name].is_floating_point() and tensor.dtype not in _DTYPES:
            raise InvalidInputError(
                f"{where}: got {tensor.dtype} without scales that are read; expected float32, float16 or bfloat16; "
                f"quantize {full_precision(conversion.origin)} with s2q quantize"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidInputError(f"{where}: contains NaN or infinite values; download the model again")


def full_precision(origin: str | None) -> str:
    """Return words for the model that a quantized one was made from."""
    return origin or "the model that it was made from"
