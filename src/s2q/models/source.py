"""Where a model comes from: an embedded name, a diffusers pipeline folder, or a Hub id.

Resolving checks what can be checked without loading weights. The network is used only when a Hub id is given.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from s2q.core.components import TRANSFORMERS
from s2q.core.errors import InvalidInputError, first_line, unknown_name
from s2q.core.headers import read_folder_headers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Names of the compute dtypes that a model may be loaded in."""

_HEADER_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_SETUP_PATTERNS = ("*.json", "*/*.json", "*.md", "LICENSE*")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A resolved model.

    Attributes:
        name: What to call it: the embedded name, the Hub id, or the folder's name.
        kind: Where it comes from.
        folder: The pipeline folder with its configuration files; for a Hub id a cached copy that may lack weights.
        transformer_configs: Contents of config.json of each transformer, by component; `_class_name` is always there.
    """

    name: str
    kind: Literal["embedded", "folder", "hub"]
    folder: Path
    transformer_configs: Mapping[str, Mapping[str, Any]] = field(repr=False)

    @property
    def transformer_config(self) -> Mapping[str, Any]:
        """Contents of transformer/config.json."""
        return self.transformer_configs[TRANSFORMERS[0]]

    @property
    def transformer_class(self) -> str:
        """Class name of the transformer, the first where there are two."""
        return str(self.transformer_config["_class_name"])

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The first `quantization_config` of a transformer, or None for a full-precision model."""
        configs = (config.get("quantization_config") for config in self.transformer_configs.values())
        return next((config for config in configs if isinstance(config, Mapping)), None)

    @property
    def is_quantized(self) -> bool:
        """Whether a transformer is stored quantized (by any method)."""
        return any(config.get("quantization_config") is not None for config in self.transformer_configs.values())

    def weights_dtype(self) -> torch.dtype | None:
        """Return the floating dtype that most of the transformers' stored weights have; None if no file tells.

        Raises:
            InvalidInputError: If the header of a weight file cannot be read.
        """
        return _stored_dtype(self.folder, list(self.transformer_configs))

    def stored_dtype(self) -> torch.dtype:
        """Return the same of a complete model, float32 if no file tells; for a Hub id, this downloads its weights.

        Raises:
            InvalidInputError: If the download fails, or the header of a weight file cannot be read.
        """
        return _stored_dtype(self._pipeline_folder, list(self.transformer_configs)) or torch.float32

    @cached_property
    def _pipeline_folder(self) -> Path:
        return _hub_pipeline_folder(self.name) if self.kind == "hub" else self.folder

    def complete_folder(self) -> Path:
        """Return the folder with all its files; for a Hub id, this downloads those that the cache lacks.

        Raises:
            InvalidInputError: If the download fails.
        """
        return _hub_folder(self.name, patterns=None) if self.kind == "hub" else self.folder

    def meta_transformer(self, component: str = TRANSFORMERS[0]) -> nn.Module:
        """Build a full-precision transformer on the meta device: all shapes, no memory.

        Args:
            component: Which one.

        Raises:
            InvalidInputError: If the configuration does not fit the class.
        """
        import diffusers

        stored = self.transformer_configs[component]
        config = {key: value for key, value in stored.items() if key != "quantization_config"}
        try:
            with torch.device("meta"):
                return getattr(diffusers, config["_class_name"]).from_config(config)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise InvalidInputError(
                f"{self.folder / component / 'config.json'}: does not describe a {config['_class_name']} "
                f"({first_line(error)}); download or save the model again"
            ) from error

    def meta_transformers(self) -> dict[str, nn.Module]:
        """Build all transformers on the meta device; by component.

        Raises:
            InvalidInputError: If a configuration does not fit its class.
        """
        return {component: self.meta_transformer(component) for component in self.transformer_configs}

    def meta_pipeline(self, components: Mapping[str, nn.Module]) -> DiffusionPipeline:
        """Build the pipeline with transformers and autoencoder on the meta device and without text encoders.

        It knows the sizes of videos, and has no weights.

        Args:
            components: Its transformers, from `meta_transformers`.

        Raises:
            OSError: If a configuration is missing.
            AttributeError: If diffusers lacks a class.
            TypeError: If the pipeline cannot do without a component.
        """
        import diffusers
        import transformers

        index = _read_json(self.folder / "model_index.json")
        parts: dict[str, Any] = {}
        for name, entry in index.items():
            if isinstance(entry, list) and len(entry) == 2 and not name.startswith("_") and name not in components:
                parts[name] = None
                if entry[0] == "transformers":
                    part_class = getattr(transformers, entry[1])  # there, and in memory as it will be
                    if "Tokenizer" in entry[1]:
                        parts[name] = part_class.from_pretrained(self.folder / name)
                if entry[0] == "diffusers" and name != "vae":
                    parts[name] = getattr(diffusers, entry[1]).from_pretrained(self.folder, subfolder=name)
        vae_class = getattr(diffusers, index["vae"][1])
        with torch.device("meta"):
            parts["vae"] = vae_class.from_config(vae_class.load_config(self.folder, subfolder="vae"))
        return getattr(diffusers, index["_class_name"])(**parts, **components)

    def component_bytes(self) -> int | None:
        """Return the bytes of the stored weights of all components but transformers; None if none is there."""
        folders = [path for path in self.folder.iterdir() if path.is_dir() and path.name not in TRANSFORMERS]
        sizes = [path.stat().st_size for folder in folders for path in folder.glob("*.safetensors")]
        return sum(sizes) if sizes else None

    def load_pipeline(self, *, dtype: torch.dtype | str | None = None, device: str = "cpu") -> DiffusionPipeline:
        """Load the whole pipeline.

        Args:
            dtype: Compute dtype, or its name; None takes the dtype that the transformers are stored in.
            device: Where to put the pipeline.

        Returns:
            The pipeline, its progress bar switched off.

        Raises:
            InvalidInputError: If a file is missing or damaged, or the dtype is unknown.
        """
        wanted = parse_dtype(dtype) or self.stored_dtype()
        if self.kind == "embedded":
            from s2q.shapes.embedded import embedded_pipeline

            pipe = embedded_pipeline(self.name, dtype=wanted)
            pipe.register_to_config(_name_or_path=self.name)  # not the folder, which the variants share
        else:
            pipe = _load_pipeline(self._pipeline_folder, wanted)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)


def recommended_generation(folder: Path | None) -> dict[str, Any]:
    """Return how the makers of a model generate, from the generation.json beside it, which the embedded models have.

    Args:
        folder: The pipeline's folder; None if there is none.
    """
    path = None if folder is None else folder / "generation.json"
    return {} if path is None or not path.is_file() else _read_json(path)


def resolve_model(model: str | Path) -> ModelSource:
    """Find a model by embedded name, folder or Hub id, and check that it is a pipeline with a transformer.

    Args:
        model: "shapes-cogvideox", a path of a diffusers pipeline folder, or "organisation/name" on the Hub.

    Returns:
        The source; no weights have been read.

    Raises:
        InvalidInputError: If the name is unknown (the message has the nearest embedded names), the folder is not a
            pipeline, or a configuration file is missing or damaged.
    """
    text = str(model)
    if isinstance(model, str) and "/" not in text and text in _embedded_names():
        from s2q.shapes.embedded import embedded_folder

        return _source_in(Path(embedded_folder(text)), name=text, kind="embedded")
    path = Path(model).expanduser()
    if path.is_dir():
        return _source_in(path, name=path.resolve().name, kind="folder")
    if path.exists():
        raise InvalidInputError(
            f"{path} is a file; expected the folder of a diffusers pipeline, which has a model_index.json (single "
            "files and GGUF are not read: load them with diffusers and save the pipeline)"
        )
    if isinstance(model, str) and HUB_ID.fullmatch(text):
        return _source_in(_hub_folder(text, patterns=_SETUP_PATTERNS), name=text, kind="hub")
    if "/" in text or isinstance(model, Path):
        raise InvalidInputError(
            f"{path} does not exist; expected a diffusers pipeline folder, a Hub id or an embedded model"
        )
    raise unknown_name("model", text, _embedded_names())


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that is meant by a dtype or its name ("bfloat16", "torch.bfloat16").

    Args:
        dtype: The dtype, its name, or None, which is passed through.

    Returns:
        One of `DTYPES`, or None.

    Raises:
        InvalidInputError: If it is no dtype to compute in.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _embedded_names() -> tuple[str, ...]:
    from s2q.shapes.embedded import EMBEDDED_NAMES

    return EMBEDDED_NAMES


def _source_in(folder: Path, *, name: str, kind: Literal["embedded", "folder", "hub"]) -> ModelSource:
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        raise InvalidInputError(
            f"{folder} is not a diffusers pipeline: it has no model_index.json; pass the pipeline's folder"
        )
    index = _read_json(index_path)
    classes = {component: class_name for component in TRANSFORMERS if (class_name := _class_in(index, component))}
    if TRANSFORMERS[0] not in classes:
        raise InvalidInputError(
            f"{index_path}: {index.get('_class_name', 'this pipeline')} has no transformer; "
            "expected a text-to-video pipeline with a diffusion transformer"
        )
    configs = {component: _component_config(folder, component, class_name) for component, class_name in classes.items()}
    return ModelSource(name=name, kind=kind, folder=folder, transformer_configs=configs)


def _class_in(index: Mapping[str, Any], component: str) -> str | None:
    """The class of a component, which model_index.json has as [library, class]; None if the pipeline has none."""
    entry = index.get(component)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] else None


def _component_config(folder: Path, component: str, class_name: str) -> dict[str, Any]:
    path = folder / component / "config.json"
    if not path.is_file():
        raise InvalidInputError(f"{path} is missing; download or save the model again")
    return {"_class_name": class_name, **_read_json(path)}


def _stored_dtype(folder: Path, components: Sequence[str]) -> torch.dtype | None:
    counts: dict[torch.dtype, int] = {}
    for component in components:
        for name, tensor in read_folder_headers(folder / component).items():
            dtype = _HEADER_DTYPES.get(tensor.dtype)
            if dtype is not None and not name.endswith(".weight_scale"):
                counts[dtype] = counts.get(dtype, 0) + math.prod(tensor.shape)
    return max(counts, key=lambda dtype: counts[dtype]) if counts else None


def _load_pipeline(folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True)  # never a pickle
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise InvalidInputError(
            f"{folder}: cannot be loaded as a diffusers pipeline ({first_line(error)}); download or save it again"
        ) from error


def _hub_folder(repo_id: str, *, patterns: Sequence[str] | None) -> Path:
    """The cached snapshot of a Hub repository, downloaded as far as the patterns say (None: all of it)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _not_on_hub(repo_id, error) from error


def _hub_pipeline_folder(repo_id: str) -> Path:
    """The cached snapshot of a Hub repository with the files, and only those, that its pipeline loads."""
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(repo_id, use_safetensors=True))
    except (OSError, ValueError) as error:
        raise _not_on_hub(repo_id, error) from error


def _not_on_hub(repo_id: str, error: Exception) -> InvalidInputError:
    return InvalidInputError(
        f"{repo_id}: no such folder here, and not to be had from the Hub ({first_line(error)}); "
        "check the id, the network, HF_TOKEN and HF_HUB_OFFLINE, or pass a folder or an embedded model"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{path}: cannot be read as JSON ({first_line(error)}); download or save the model again"
        ) from error
    if not isinstance(content, dict):
        raise InvalidInputError(f"{path}: got a JSON {type(content).__name__}; expected an object")
    return content
