"""Contents of a checkpoint: quantized linears with scheme and bytes on disk, totals, hashes."""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from s2q.checkpoint.config import S2QConfig
from s2q.checkpoint.load import REMEDY, read_configs, read_transformer_config, stored_transformers
from s2q.checkpoint.manifest import MANIFEST, read_manifest, verify_manifest
from s2q.common.components import encoder_state, full_name
from s2q.common.errors import InvalidInputError
from s2q.common.files import read_json
from s2q.common.foreign_code import component_entries
from s2q.common.headers import DTYPES, TensorInfo, read_headers
from s2q.common.meta import build_model, meta_model, plain_config
from s2q.common.records import CONVERSION_RECORD, INSPECTION_VERSION, REPORT
from s2q.common.torch_state import in_fresh_torch_state
from s2q.common.weight_files import weight_files
from s2q.core.input_path import InputPath
from s2q.core.packing import packed_width
from s2q.core.schemes import LinearScheme, PerGroup, num_groups
from s2q.core.storage import BF16_BYTES, EncoderStorage, LinearStorage
from s2q.core.stored_form import file_dtypes
from s2q.pipelines import read_index


@dataclass(frozen=True, kw_only=True)
class CheckpointReport:
    """Contents of a checkpoint, as returned by `inspect_checkpoint`.

    Attributes:
        format_version: The newer where its transformers differ.
        compute_dtype: Dtype of the model when it was quantized.
        transformer_class: Class of the transformer, the first where there are two.
        storage: Bytes of all transformers: `full_precision_bytes` (all of it in bf16), `quantized_bytes` (on disk;
            `packed_bytes` in quantized linears), and their `ratio`.
        layers: Every quantized linear; names of those in a second transformer begin with "transformer_2.".
        simulated: Whether some of them are computed in floating point, for want of an integer kernel.
        attention: Names of the attention modules that run with int8 queries and keys.
        text_encoders: Those that are quantized, with their bytes; `storage` does not count them.
        converted: `tool`, `tool_version` and `writer` of a checkpoint of `s2q convert`; None for another checkpoint.
        files: Bytes and SHA-256 by relative path, as the manifest has them; empty if there is no manifest.
        verified: Whether every file equals the manifest; None if that was not asked for.
        problems: What differs, one line each, beginning with the file.
    """

    schema_version: int
    path: str
    format_version: int
    recipe: str
    compute_dtype: str
    transformer_class: str
    storage: Mapping[str, int | float]
    layers: tuple[LinearStorage, ...]
    simulated: bool
    attention: tuple[str, ...]
    converted: Mapping[str, Any] | None
    files: Mapping[str, Mapping[str, Any]]
    verified: bool | None
    problems: tuple[str, ...]
    text_encoders: tuple[EncoderStorage, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


@in_fresh_torch_state
def inspect_checkpoint(path: str | Path, *, variant: str | None = None, verify: bool = False) -> CheckpointReport:
    """Look into a checkpoint without loading it, in a variant that diffusers may have saved it again with.

    With `verify`, every file is hashed; those that differ from the manifest are in the report's `problems` (and
    `storage` and `layers` are what the headers say, where they can be read).
    """
    folder = Path(path)
    configs = read_configs(folder)
    problems = tuple(verify_manifest(folder)) if verify else ()
    layers: tuple[LinearStorage, ...] = ()
    storage: dict[str, int | float] = {}
    text_encoders: tuple[EncoderStorage, ...] = ()
    try:
        text_encoders = _text_encoders(folder, variant=variant)
        packed: tuple[LinearStorage, ...] = ()
        num_bytes, values = 0, 0
        for component in stored_transformers(folder):
            tensors = read_headers(weight_files(folder / component, variant=variant))
            linears, stored_values = _linears(
                component, read_transformer_config(folder, component), max_tensors=len(tensors)
            )
            num_bytes, values = num_bytes + sum(info.num_bytes for info in tensors.values()), values + stored_values
            if component in configs:  # others are in full precision
                packed += _layers(component, configs[component], linears=linears, tensors=tensors)
        layers = packed
        storage = {
            "full_precision_bytes": values * BF16_BYTES,
            "quantized_bytes": num_bytes,
            "packed_bytes": sum(layer.bytes for layer in layers),
            "ratio": values * BF16_BYTES / num_bytes,
        }
    except InvalidInputError:
        if not problems:
            raise
    config, *_ = configs.values()
    return CheckpointReport(
        schema_version=INSPECTION_VERSION,
        path=str(folder),
        format_version=max(config.format_version for config in configs.values()),
        recipe=config.recipe,
        compute_dtype=config.compute_dtype,
        transformer_class=str(read_transformer_config(folder).get("_class_name", "")),
        storage=storage,
        layers=layers,
        simulated=any(
            quantized.simulated
            for config in configs.values()
            for quantized in (*config.layer_schemes().values(), *config.layer_paths().values())
        ),
        attention=tuple(
            full_name(component, name) for component, config in configs.items() for name in config.attention_modules()
        ),
        converted=_converted(folder),
        files=read_manifest(folder) if (folder / MANIFEST).is_file() else {},
        verified=not problems if verify else None,
        problems=problems,
        text_encoders=text_encoders,
    )


def _text_encoders(folder: Path, *, variant: str | None) -> tuple[EncoderStorage, ...]:
    """The quantized text encoders on disk, their tensors compared with their configurations."""
    import transformers

    from s2q.checkpoint.text_encoders import check_encoder_files, encoder_configs, pack_encoder

    storage = []
    for component, config in encoder_configs(folder).items():
        _, class_name = component_entries(read_index(folder, remedy=REMEDY))[component]
        content = plain_config(read_json(folder / component / "config.json", remedy=REMEDY))
        tensors = read_headers(weight_files(folder / component, library="transformers", variant=variant))
        model = meta_model(
            functools.partial(build_model, getattr(transformers, class_name), content),
            path=folder / component / "config.json",
            name=class_name,
            max_tensors=len(tensors),
            remedy=REMEDY,
        )
        values = sum(tensor.numel() for tensor in encoder_state(model).values())
        pack_encoder(model, config)
        check_encoder_files(model, tensors)
        storage.append(
            EncoderStorage(
                component=component,
                class_name=class_name,
                scheme=", ".join(config.schemes),
                linears=len(config.layers),
                full_precision_bytes=values * BF16_BYTES,
                quantized_bytes=sum(info.num_bytes for info in tensors.values()),
            )
        )
    return tuple(storage)


def _converted(folder: Path) -> dict[str, Any] | None:
    """The tool whose format was converted, its version, and the writer that the files named."""
    path = folder / CONVERSION_RECORD
    if not path.is_file():
        return None
    record = read_json(path, remedy="download it again")
    return {key: record.get(key) for key in ("tool", "tool_version", "writer")}


def _layers(
    component: str, config: S2QConfig, *, linears: Mapping[str, nn.Linear], tensors: Mapping[str, TensorInfo]
) -> tuple[LinearStorage, ...]:
    """The quantized linears of a transformer on disk, by full name."""
    paths = config.layer_paths()
    layers = (
        _layer(name, scheme, paths.get(name, InputPath()), linears=linears, tensors=tensors, wide=config.wide)
        for name, scheme in config.layer_schemes().items()
    )
    return tuple(replace(layer, name=full_name(component, layer.name)) for layer in layers)


def _linears(component: str, config: Mapping[str, Any], *, max_tensors: int) -> tuple[dict[str, nn.Linear], int]:
    """The linears of a full-precision transformer, without memory, and its number of stored values."""
    import diffusers

    class_name = str(config.get("_class_name"))
    plain = plain_config(config)
    transformer = meta_model(
        lambda: getattr(diffusers, class_name).from_config(plain),
        path=Path(component) / "config.json",
        name=class_name,
        max_tensors=max_tensors,
        remedy="download it again",
    )
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    return linears, sum(tensor.numel() for tensor in transformer.state_dict().values())


def _layer(
    name: str,
    scheme: LinearScheme,
    path: InputPath,
    *,
    linears: Mapping[str, nn.Linear],
    tensors: Mapping[str, TensorInfo],
    wide: bool,
) -> LinearStorage:
    linear = linears.get(name)
    if linear is None:
        raise InvalidInputError(f"{name} is in quantization_config, but the transformer has no such linear")
    out_features, in_features = linear.out_features, linear.in_features
    weight = scheme.weight
    grouped = (out_features, num_groups(weight, in_features))
    per_group = isinstance(weight.granularity, PerGroup) and not weight.has_table
    shapes: dict[str, tuple[int, ...]] = {
        "weight": (out_features, packed_width(weight.num_bits, in_features)),
        "weight_scale": grouped if per_group else (out_features,),
        **({"weight_group_scale": grouped} if weight.has_table else {}),
        **path.shapes(in_features, out_features),
    }
    dtypes, names_of = file_dtypes(wide=wide), {dtype: text for text, dtype in DTYPES.items()}
    for tensor, shape in shapes.items():
        info, dtype = tensors.get(f"{name}.{tensor}"), names_of[dtypes[tensor]]
        if info is None:
            raise InvalidInputError(f"{name}.{tensor} is missing from the checkpoint; download it again")
        if (info.dtype, info.shape) != (dtype, shape):
            raise InvalidInputError(
                f"{name}.{tensor}: got {info.dtype} {list(info.shape)}, expected {dtype} {list(shape)}; "
                "download or quantize the model again"
            )
    names = (f"{name}.{tensor}" for tensor in (*shapes, "bias"))
    num_bytes = sum(tensors[tensor].num_bytes for tensor in names if tensor in tensors)
    return LinearStorage(name=name, shape=(out_features, in_features), scheme=scheme.name, bytes=num_bytes)


def fused_loras(folder: Path) -> list[dict[str, Any]]:
    """Return the adapters that were fused into a checkpoint's model before it was quantized; see `s2q.models.lora`.

    Raises:
        InvalidInputError: If the record is damaged.
    """
    if not (folder / REPORT).is_file():
        return []
    loras = read_json(folder / REPORT, remedy=REMEDY).get("loras", [])
    keys = {"file": str, "sha256": str, "scale": float, "component": str}
    for lora in loras if isinstance(loras, list) else [None]:
        if not isinstance(lora, dict) or {key: type(value) for key, value in lora.items()} != keys:
            raise InvalidInputError(f"{folder / REPORT}: its adapters are not readable; {REMEDY}")
    return list(loras)
