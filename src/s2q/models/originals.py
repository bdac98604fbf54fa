"""Transformers from one file in their original layout, as their makers and ComfyUI publish them: "FILE@BASE".

The file has the weights of a transformer, BASE (a folder, Hub id or embedded name) its configuration and the other
components. A pipeline with two transformers takes "FILE,transformer_2=FILE@BASE", or one of the two. diffusers converts
the names; a file with those of diffusers is taken unchanged. Of a file that has the other components too, the
transformer alone is read. Everything is checked by the header before weights are read.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from s2q.common.cards import files_and_base
from s2q.common.components import TRANSFORMERS, full_name
from s2q.common.errors import InvalidInputError, first_line, unknown_name
from s2q.common.files import atomic_write_json
from s2q.common.fp32_modules import is_within, kept_in_fp32
from s2q.common.headers import DTYPES, TensorInfo, read_header
from s2q.common.temporaries import scratch_folder
from s2q.models.families import family_of

if TYPE_CHECKING:
    from s2q.models.source import ModelSource

EXPECTED = "FILE.safetensors@BASE, BASE the diffusers pipeline (folder or Hub id) with the other components"
_FURTHER = re.compile(r",(?P<component>[A-Za-z]\w*)=")
_FLOATS = ("BF16", "F16", "F32", "F64")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_SHOWN, _INDEX = 3, "model_index.json"


def parse_originals(text: str) -> tuple[dict[str, Path], str] | None:
    """Return the files, by the transformer that each is for, and the base of "FILE@BASE"; None for other texts.

    Raises:
        InvalidInputError: If a file does not exist, is for a component that no pipeline has, or is the second for one.
    """
    listed, base = (None, text) if Path(text).expanduser().exists() else files_and_base(text)
    if listed is None or not base:
        return None
    first, *further = _FURTHER.split(listed)
    alone = re.match(r"(?P<component>transformer\w*)=", first)
    start = (TRANSFORMERS[0], first) if alone is None else (alone["component"], first[alone.end() :])
    files: dict[str, Path] = {}
    for component, name in (start, *zip(further[::2], further[1::2], strict=True)):
        if component not in TRANSFORMERS:
            raise unknown_name("component of a file", component, TRANSFORMERS)
        if component in files:
            raise InvalidInputError(f"{text}: names two files for {component}; expected one")
        path = Path(name).expanduser().absolute()  # workers may be in other folders
        if not path.is_file():
            raise InvalidInputError(f"{name}: no such file; expected {EXPECTED}")
        files[component] = path
    return files, base


def file_alone(path: Path) -> InvalidInputError:
    """Build (not raise) the error for a file without a base, or of a format that is quantized."""
    if path.suffix.lower() == ".gguf":
        return InvalidInputError(
            f"{path}: GGUF files are quantized; pass the full-precision model that it was made from: a pipeline's "
            f"folder, a Hub id, or {EXPECTED}"
        )
    return InvalidInputError(
        f"{path} is a file; expected the folder of a diffusers pipeline, which has a model_index.json, or {EXPECTED} "
        "(s2q convert reads quantized files of ComfyUI)"
    )


def with_originals(base: ModelSource, files: Mapping[str, Path], *, given: str) -> ModelSource:
    """Return the pipeline of a base with transformers from files, after a check that they fit it.

    Raises:
        InvalidInputError: As `check_original`, or if the pipeline has no such transformer.
    """
    for component, path in files.items():
        if component not in base.transformer_configs:
            raise InvalidInputError(f"{path}: {base.given} has no {component}; it has one transformer")
        check_original(path, component, base.meta_transformer(component), base=base.given)
    name = f"{'+'.join(path.name for path in files.values())}@{base.name}"
    return replace(base, name=name, kind="file", given=given, originals=files)


def originals_text(files: Mapping[str, Path], base: str) -> str:
    """Return the text that `parse_originals` reads, with absolute paths."""
    return f"{','.join(f'{component}={path}' for component, path in files.items())}@{base}"


def original_headers(path: Path) -> dict[str, TensorInfo]:
    """Return the header of the transformer in a file, by the names of the file."""
    tensors = read_header(path)
    prefix = _prefix_of(tensors)
    return {name: info for name, info in tensors.items() if name.startswith(prefix)}


def check_original(path: Path, component: str, transformer: nn.Module, *, base: str) -> None:
    """Check by the header that a file has a transformer's weights, whole and in full precision.

    Args:
        transformer: On the meta device.
        base: What the user named it.

    Raises:
        InvalidInputError: If it is quantized, of another layout or of another size; the tensor is named.
    """
    headers = original_headers(path)
    quantized = [name for name, info in headers.items() if info.dtype not in _FLOATS]
    if quantized:
        name = quantized[0]
        raise InvalidInputError(
            f"{path}: {name} is {headers[name].dtype}, quantized; pass the same model in float32, float16 or bfloat16 "
            f"(its publisher's file, or {base}); s2q convert reads quantized files of ComfyUI"
        )
    with torch.device("meta"):
        tensors = {name: torch.empty(info.shape, dtype=DTYPES[info.dtype]) for name, info in headers.items()}
    found, expected = _by_diffusers_names(path, tensors, transformer), transformer.state_dict()
    where = f"{path}: as the {component} of {base}"
    if missing := [name for name in expected if name not in found]:
        layout = f"in its original layout or that of diffusers; expected the weights of a {type(transformer).__name__}"
        raise InvalidInputError(f"{where}: has no {_listed(missing)} {layout}")
    if strange := [name for name in found if name not in expected]:
        raise InvalidInputError(f"{where}: {_listed(strange)} belong to another model; pass the base of this one")
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise InvalidInputError(
                f"{where}: {full_name(component, name)} has shape {list(found[name].shape)}, expected "
                f"{list(value.shape)}; pass a base of the same size"
            )


@contextlib.contextmanager
def other_components(source: ModelSource) -> Iterator[Path]:
    """Give a folder with the components of a pipeline that come from no file; its index has no others.

    `from_pretrained` reads the folder's weights of an optional component, Wan's transformer, even if it is given one.
    """
    if not source.originals:
        yield source.folder
        return
    with scratch_folder("base") as folder:
        for path in source.folder.iterdir():
            if path.name not in (*source.originals, _INDEX):
                (folder / path.name).symlink_to(path.absolute())
        index = dict(source.index) | dict.fromkeys(source.originals, [None, None])
        atomic_write_json(folder / _INDEX, index)
        yield folder


def load_originals(source: ModelSource, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Load the transformers of a model that have files, in the dtype, or fp32 where their class keeps that."""
    from accelerate import init_empty_weights

    loaded = {}
    for component, path in source.originals.items():
        with init_empty_weights():  # of parameters; buffers that no file has are computed
            transformer = source.transformer_type(component).from_config(source.plain_config(component))
        loaded[component] = _with_weights(transformer, path, dtype)
    return loaded


def _with_weights(transformer: nn.Module, path: Path, dtype: torch.dtype) -> nn.Module:
    """Give a transformer, its parameters on the meta device, the weights of a file that is checked."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in original_headers(path)}
    kept = kept_in_fp32(transformer)
    state = {
        name: tensor.to(torch.float32 if is_within(name, kept) else dtype).contiguous()
        for name, tensor in _by_diffusers_names(path, tensors, transformer).items()
    }
    transformer.load_state_dict(state, assign=True)
    return transformer.eval()


def from_original(
    class_name: str, tensors: Mapping[str, Tensor], *, suffixes: Collection[str] = ()
) -> dict[str, Tensor]:
    """Convert tensors of the original layout by diffusers' own converter.

    Args:
        class_name: Of the transformer.
        suffixes: Last parts of names of tensors that a linear has beside its weight and bias; the converter sees them
            as weights.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    convert: Callable[..., dict[str, Any]] = SINGLE_FILE_LOADABLE_CLASSES[class_name]["checkpoint_mapping_fn"]
    plain = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in suffixes}
    converted: dict[str, Tensor] = dict(convert(checkpoint=plain))
    for suffix in suffixes:
        end = f".{suffix}"
        named = {f"{name.removesuffix(end)}.weight": tensor for name, tensor in tensors.items() if name.endswith(end)}
        for name, tensor in convert(checkpoint=named).items():
            converted[f"{name.removesuffix('.weight')}{end}"] = tensor
    return converted


def _by_diffusers_names(path: Path, tensors: Mapping[str, Tensor], transformer: nn.Module) -> dict[str, Tensor]:
    """The tensors of a transformer by the names of diffusers, without those that its class ignores."""
    prefix, class_name = _prefix_of(tensors), type(transformer).__name__
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if not transformer.state_dict().keys() <= named.keys():
        for pattern, replacement in family_of(class_name).original_names:
            named = {re.sub(pattern, replacement, name): tensor for name, tensor in named.items()}
        try:
            named = from_original(class_name, named)
        except Exception as error:  # the converter takes a stranger's names
            from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

            why = f"diffusers cannot convert it ({type(error).__name__}: {first_line(error)})"
            if class_name not in SINGLE_FILE_LOADABLE_CLASSES:
                why = f"diffusers knows no original layout of {class_name}"
            raise InvalidInputError(
                f"{path}: {why}; expected the weights of a {class_name}, in its original layout or that of diffusers"
            ) from error
    ignored = getattr(transformer, "_keys_to_ignore_on_load_unexpected", None) or ()
    return {name: tensor for name, tensor in named.items() if not any(re.search(part, name) for part in ignored)}


def _prefix_of(names: Iterable[str]) -> str:
    """The beginning of the names of a transformer in a file, where it is not the only component or ComfyUI wrote it."""
    names = list(names)
    return next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in names)), "")


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
