"""Sources of models: an embedded name, a diffusers pipeline folder, or a Hub id with a revision.

Resolving checks what can be checked without loading weights. The network is used only when a Hub id is given. Weights
are those that diffusers would load (`s2q.common.weight_files`), of the variant that was asked for.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from s2q.common.arguments import parse_dtype
from s2q.common.components import TEXT_ENCODER, TRANSFORMERS, check_no_adapter, transformers_of
from s2q.common.errors import InvalidInputError, ResourceError, first_line, unknown_name
from s2q.common.files import read_json
from s2q.common.foreign_code import check_folder, check_index
from s2q.common.headers import TensorInfo, read_headers
from s2q.common.loading_errors import PACKAGES, loading_error
from s2q.common.meta import build_model, check_tensors, meta_model, plain_config
from s2q.common.temporaries import scratch_folder
from s2q.common.versions import is_installed
from s2q.common.weight_files import has_variant, names_in, variants_in, weight_files
from s2q.core.storage import BF16_BYTES
from s2q.models.hub import HubId, parse_hub_id
from s2q.models.lora import Lora, fuse_loras
from s2q.models.originals import (
    file_alone,
    load_originals,
    original_headers,
    originals_text,
    other_components,
    parse_originals,
    with_originals,
)
from s2q.models.quantized import CONVERTED, already_quantized, full_precision_origin
from s2q.pipelines import find_index, load_pipeline, pipeline_type, read_index

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

_HEADER_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_REMEDY = "download or save the model again"
_ADAPTER_FILES = ("adapter_config.json", "pytorch_lora_weights.safetensors")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A resolved model.

    Attributes:
        name: What to call it: the embedded name, the Hub id without its revision, or the folder's name.
        given: What the user wrote.
        folder: The pipeline folder with its configuration files; for a Hub id a cached copy that may lack weights.
        index: Contents of model_index.json.
        transformer_configs: Contents of config.json of each transformer, by component; `_class_name` is always there.
        variant: Variant of the weights to load, "fp16".
        hub: The repository at the commit that was resolved; None for models that are not on the Hub.
        hub_names: Names of all files of the repository; None where they are not known.
        loras: Adapters that are fused when it is loaded.
        originals: Files that transformers are loaded from, by component; the rest is from the folder.
    """

    name: str
    kind: Literal["embedded", "folder", "hub", "file"]
    given: str
    folder: Path
    index: Mapping[str, Any] = field(repr=False)
    transformer_configs: Mapping[str, Mapping[str, Any]] = field(repr=False)
    variant: str | None = None
    hub: HubId | None = None
    hub_names: frozenset[str] | None = field(default=None, repr=False)
    loras: tuple[Lora, ...] = ()
    originals: Mapping[str, Path] = field(default_factory=dict)

    @property
    def pinned(self) -> str:
        """The name that loads the same model anywhere: embedded name, absolute folder, or Hub id at a commit."""
        if self.originals:
            return originals_text(self.originals, str(self.hub or self.folder.resolve()))
        if self.kind == "folder":
            return str(self.folder.resolve())
        return self.name if self.hub is None else str(self.hub)

    @property
    def revision(self) -> str | None:
        """The commit of a model on the Hub; None for other models."""
        return None if self.hub is None else self.hub.revision

    @property
    def component_classes(self) -> dict[str, tuple[str, str]]:
        """Library and class of each component that the pipeline has, as model_index.json names them."""
        return _component_classes(self.index)

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

    def plain_config(self, component: str) -> dict[str, Any]:
        """Return the configuration of a transformer as in full precision."""
        return plain_config(self.transformer_configs[component])

    def transformer_type(self, component: str) -> Any:
        """Return the class of a transformer, of diffusers."""
        import diffusers

        return getattr(diffusers, self.transformer_configs[component]["_class_name"])

    def pipeline_type(self) -> Any:
        """Return the class of the pipeline (`s2q.pipelines`)."""
        return pipeline_type(self.index["_class_name"])

    def file_names(self, component: str) -> set[str]:
        """Return the names of the files of a component, downloaded or not."""
        if self.hub_names is not None:
            start = f"{component}/"
            return {name.removeprefix(start) for name in self.hub_names if name.startswith(start)}
        return names_in(self.folder / component)

    def weight_files(self, component: str) -> tuple[Path, ...]:
        """Return the files that the weights of a component are loaded from; none if it has no weights."""
        library, _ = self.component_classes[component]
        return weight_files(
            self.folder / component, library=library, variant=self.variant, names=self.file_names(component)
        )

    def weights_dtype(self) -> torch.dtype | None:
        """Return the floating dtype that most of the transformers' stored weights have; None if no file tells."""
        counts: dict[torch.dtype, int] = {}
        for name, tensor in self._headers().items():
            dtype = _HEADER_DTYPES.get(tensor.dtype)
            if dtype is not None and not name.endswith(".weight_scale"):
                counts[dtype] = counts.get(dtype, 0) + math.prod(tensor.shape)
        return max(counts, key=lambda dtype: counts[dtype]) if counts else None

    def storage(self) -> dict[str, int | float] | None:
        """Return the transformers' bytes in bf16 and on disk, with their ratio; None if the weights are not here."""
        stored = sum(tensor.num_bytes for tensor in self._headers().values())
        if not stored:
            return None
        states = (transformer.state_dict() for transformer in self.meta_transformers().values())
        full = sum(tensor.numel() for state in states for tensor in state.values()) * BF16_BYTES
        return {"full_precision_bytes": full, "quantized_bytes": stored, "ratio": full / stored}

    def component_bytes(self) -> dict[str, int]:
        """Return the bytes of the stored weights that are here of each component but transformers."""
        others = (component for component in self.component_classes if component not in self.transformer_configs)
        files = {component: [path for path in self.weight_files(component) if path.is_file()] for component in others}
        return {component: sum(path.stat().st_size for path in paths) for component, paths in files.items() if paths}

    def weight_bytes(self) -> int:
        """Return the bytes of all stored weights that are here."""
        return sum(tensor.num_bytes for tensor in self._headers().values()) + sum(self.component_bytes().values())

    def stored_dtype(self) -> torch.dtype:
        """Return the same of a complete model, float32 if no file tells; for a Hub id, this downloads its weights."""
        return self._downloaded.weights_dtype() or torch.float32

    @cached_property
    def _downloaded(self) -> ModelSource:
        if self.hub is None:
            return self
        folder = self.hub.pipeline_folder(self.variant, index=self.index, without=self.originals)
        return replace(self, folder=folder, hub_names=None)

    def complete_folder(self) -> Path:
        """Return the folder with all its files; for a Hub id, this downloads those that the cache lacks."""
        return self.folder if self.hub is None else self.hub.snapshot(complete=True)

    @contextlib.contextmanager
    def weights_folder(self, dtype: torch.dtype, *, pipe: DiffusionPipeline | None = None) -> Iterator[Path]:
        """Give a folder with the weights of the transformers as `load_pipeline` loads them in a dtype.

        It is the model's folder, unless they are not there: read from files, adapters fused, outlier channels added.
        `pipe` is what `load_pipeline` returned in that dtype, if it is loaded already; its transformers are not needed
        inside the context.
        """
        from s2q.shapes.embedded import has_outliers

        if not (self.loras or self.originals or (self.kind == "embedded" and has_outliers(self.name))):
            yield self.complete_folder()
            return
        with scratch_folder("weights") as folder:
            _save_transformers(pipe or self.load_pipeline(dtype=dtype), folder, variant=self.variant)
            yield folder

    def scheduler_config(self) -> dict[str, Any]:
        """Return the contents of the scheduler's configuration, with its `_class_name`; empty if there is none."""
        path = self.folder / "scheduler" / "scheduler_config.json"
        return read_json(path, remedy=_REMEDY) if path.is_file() else {}

    def check_packages(self) -> None:
        """Refuse a model with a component whose quantization method needs a package that is not installed."""
        for component, method in self.quantization_methods().items():
            package = PACKAGES.get(method)
            if package is not None and not is_installed(package):
                converts = ", or run s2q convert" if method in CONVERTED and component in TRANSFORMERS else ""
                raise ResourceError(
                    f"{self.given}: its {component} is quantized by {method}, which needs a package that is not "
                    f"installed; pip install {package}{converts}"
                )

    def meta_transformer(self, component: str = TRANSFORMERS[0]) -> nn.Module:
        """Build a full-precision transformer on the meta device: all shapes, no memory."""
        config = self.plain_config(component)
        return meta_model(
            lambda: self.transformer_type(component).from_config(config),
            path=self.folder / component / "config.json",
            name=config["_class_name"],
            remedy=_REMEDY,
        )

    def meta_transformers(self) -> dict[str, nn.Module]:
        """Build all transformers on the meta device; by component."""
        return {component: self.meta_transformer(component) for component in self.transformer_configs}

    def meta_text_encoders(self) -> dict[str, nn.Module]:
        """Build the text encoders that are models of transformers on the meta device; by component.

        Raises:
            InvalidInputError: If one is already quantized.
        """
        import transformers

        encoders = {}
        for component, (library, class_name) in self.component_classes.items():
            model_class = getattr(transformers, class_name, None) if library == "transformers" else None
            if component.startswith(TEXT_ENCODER) and hasattr(model_class, "config_class"):
                path = self.folder / component / "config.json"
                encoders[component] = _meta_encoder(self.name, model_class, path)
        return encoders

    def meta_pipeline(self, components: Mapping[str, nn.Module]) -> DiffusionPipeline | None:
        """Build the pipeline around transformers of `meta_transformers`, without weights and text encoders.

        It knows the sizes of videos and the lengths of prompts.

        Returns:
            The pipeline; None, with the reason in the log, if it cannot be built without weights.
        """
        check_folder(self.folder, self.index)
        try:
            pipeline_class = self.pipeline_type()
            taken = inspect.signature(pipeline_class).parameters.keys() & self.index.keys() - components.keys()
            parts = {name: self._meta_part(name, self.index[name]) for name in taken}
            pipe: DiffusionPipeline = pipeline_class(**parts, **components)
        except (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            logger.info("%s: the pipeline cannot be built without weights (%s)", self.name, first_line(error))
            return None
        return pipe

    def _meta_part(self, name: str, entry: Any) -> Any:
        """Return what the pipeline gets for an entry of model_index.json; an option, such as `boundary_ratio`, is kept.

        A module of diffusers, or of one of its pipelines, is built on the meta device, a tokenizer or scheduler is
        read; other components, such as text encoders, are None.
        """
        import diffusers
        import transformers

        if not (isinstance(entry, list) and len(entry) == 2):
            return entry
        library, class_name = entry
        if library is None or class_name is None:
            return None
        if library == "transformers":
            part_class = getattr(transformers, class_name)  # there, and in memory as it will be
            return part_class.from_pretrained(self.folder / name) if "Tokenizer" in class_name else None
        module = diffusers if library == "diffusers" else getattr(diffusers.pipelines, library)
        part_class = getattr(module, class_name)
        if not issubclass(part_class, nn.Module):
            return part_class.from_pretrained(self.folder, subfolder=name)
        with torch.device("meta"):
            return part_class.from_config(part_class.load_config(self.folder, subfolder=name))

    def load_pipeline(self, *, dtype: torch.dtype | str | None = None, device: str = "cpu") -> DiffusionPipeline:
        """Load the whole pipeline, its adapters fused, in a dtype (None: as the transformers are stored)."""
        wanted = parse_dtype(dtype)
        self.check_packages()
        wanted = wanted or self.stored_dtype()
        if self.kind == "embedded":
            from s2q.shapes.embedded import embedded_pipeline

            pipe = embedded_pipeline(self.name, dtype=wanted)
            pipe.register_to_config(_name_or_path=self.name)  # not the folder, which the variants share
        else:
            pipe = self._downloaded._load(wanted)
            if self.originals:
                pipe.register_to_config(_name_or_path=self.name)
        fuse_loras(pipe, self.loras)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)

    def _load(self, dtype: torch.dtype) -> DiffusionPipeline:
        check_folder(self.folder, self.index)
        for component in self.component_classes.keys() - self.originals.keys():
            tensors = read_headers(self.weight_files(component))  # a truncated file is named
            if component in TRANSFORMERS:
                check_no_adapter(self.folder / component, tensors)
            if component in self.transformer_configs and not self.is_quantized:
                expected = self.meta_transformer(component).state_dict()
                check_tensors(tensors, expected, folder=self.folder / component, remedy=_REMEDY)
        methods = self.quantization_methods().items()
        foreign = [f"{component} is quantized by {method}" for component, method in methods]
        remedy = f"{', '.join(foreign)}: see what that needs" if foreign else _REMEDY
        try:
            with other_components(self) as folder:
                originals = load_originals(self, dtype)
                return load_pipeline(folder, self.index, dtype=dtype, variant=self.variant, components=originals)
        except Exception as error:
            raise loading_error(self.folder, error, remedy=remedy) from error

    def _headers(self) -> dict[str, TensorInfo]:
        """The headers of the transformers' weights; none if they are not all on this machine."""
        stored = self.transformer_configs.keys() - self.originals.keys()
        files = [path for component in stored for path in self.weight_files(component)]
        tensors = read_headers(files) if all(path.is_file() for path in files) else {}
        for component, path in self.originals.items():
            tensors |= {f"{component}.{name}": info for name, info in original_headers(path).items()}
        check_no_adapter(self.folder, tensors)
        return tensors

    def quantization_methods(self) -> dict[str, str]:
        """Return the `quant_method` in the config.json of each component that has one."""
        methods = {}
        for component in self.component_classes:
            path = self.folder / component / "config.json"
            config = read_json(path, remedy=_REMEDY).get("quantization_config") if path.is_file() else None
            if isinstance(config, Mapping) and config.get("quant_method") is not None:
                methods[component] = str(config["quant_method"])
        return methods


def _save_transformers(pipe: DiffusionPipeline, folder: Path, *, variant: str | None) -> None:
    for component, transformer in transformers_of(pipe).items():
        transformer.save_pretrained(folder / component, variant=variant)


def _meta_encoder(name: str, model_class: Any, path: Path) -> nn.Module:
    config = read_json(path, remedy=_REMEDY)
    if (quantization := config.get("quantization_config")) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise already_quantized(name, path.parent.name, method)
    return meta_model(lambda: build_model(model_class, config), path=path, name=model_class.__name__, remedy=_REMEDY)


def recommended_generation(folder: Path | None) -> dict[str, Any]:
    """Return how the makers of a model generate, from generation.json in its folder, which embedded models have."""
    path = None if folder is None else folder / "generation.json"
    return {} if path is None or not path.is_file() else read_json(path, remedy=_REMEDY)


def resolve_model(
    model: str | Path | ModelSource, *, variant: str | None = None, needs_variant: bool = True
) -> ModelSource:
    """Find a model by embedded name, folder or Hub id, and check that it is a pipeline with a transformer.

    Args:
        model: "shapes-cogvideox", a path of a diffusers pipeline folder, "organisation/name" or
            "organisation/name@revision" on the Hub, or "FILE.safetensors@" and one of these, for the weights of a
            transformer from a file; a resolved source is returned unchanged.
        variant: Variant of the weights to load, "fp16"; components without it are loaded without.
        needs_variant: Whether a model without the variant in any component is refused, or loaded without.
    """
    from s2q.shapes.embedded import EMBEDDED_NAMES, embedded_folder

    if isinstance(model, ModelSource):
        return model
    text = str(model)
    if isinstance(model, str) and "/" not in text and text in EMBEDDED_NAMES:
        source = _source_in(Path(embedded_folder(text)), name=text, kind="embedded")
        return _with_variant(source, variant, needed=needs_variant)
    if isinstance(model, str) and (parsed := parse_originals(text)) is not None:
        base = resolve_model(parsed[1], variant=variant, needs_variant=needs_variant)
        check_full_precision(base)
        return with_originals(base, parsed[0], given=text)
    path = Path(model).expanduser()
    if path.is_dir():
        source = replace(_source_in(path, name=path.resolve().name, kind="folder"), given=text)
        return _with_variant(source, variant, needed=needs_variant)
    if path.exists():
        raise file_alone(path)
    hub = parse_hub_id(text) if isinstance(model, str) else None
    if hub is not None:
        folder = hub.snapshot(complete=False)
        hub = hub.at(folder)
        source = replace(_source_in(folder, name=hub.repo, kind="hub"), given=text, hub=hub, hub_names=hub.file_names())
        return _with_variant(source, variant, needed=needs_variant)
    if "/" in text or isinstance(model, Path):
        raise InvalidInputError(
            f"{path} does not exist; expected a diffusers pipeline folder, a Hub id or an embedded model"
        )
    raise unknown_name("model", text, EMBEDDED_NAMES)


def check_full_precision(source: ModelSource) -> None:
    """Refuse a model that is already quantized."""
    for component, config in source.transformer_configs.items():
        if (quantization := config.get("quantization_config")) is not None:
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
            origin = full_precision_origin(source.folder, config, source.index)
            raise already_quantized(source.name, component, method, origin=origin)


def _source_in(folder: Path, *, name: str, kind: Literal["embedded", "folder", "hub"]) -> ModelSource:
    index_path = find_index(folder)
    if not index_path.is_file():
        if any((folder / adapter).is_file() for adapter in _ADAPTER_FILES):
            raise InvalidInputError(
                f"{folder} is an adapter, not a model; load the model, then the adapter by load_lora_weights() of the "
                "pipeline"
            )
        raise InvalidInputError(
            f"{folder} is not a diffusers pipeline: it has no {index_path.name}; pass the pipeline's folder"
        )
    index = read_index(folder, remedy=_REMEDY)
    check_index(index_path, index)
    known = _component_classes(index)
    classes = {component: known[component][1] for component in TRANSFORMERS if component in known}
    if TRANSFORMERS[0] not in classes:
        raise InvalidInputError(
            f"{index_path}: {index.get('_class_name', 'this pipeline')} has no transformer; "
            "expected a text-to-video pipeline with a diffusion transformer"
        )
    configs = {component: _component_config(folder, component, class_name) for component, class_name in classes.items()}
    return ModelSource(name=name, kind=kind, given=name, folder=folder, index=index, transformer_configs=configs)


def _with_variant(source: ModelSource, variant: str | None, *, needed: bool) -> ModelSource:
    """The source with the variant that was asked for, after a check that weights are there as they will be loaded."""
    names = {component: source.file_names(component) for component in source.component_classes}
    if variant is not None and not any(has_variant(files, variant) for files in names.values()):
        if needed:
            there = sorted({name for files in names.values() for name in variants_in(files)})
            known = f"there are weights of variant {', '.join(there)}" if there else "it has no variants; remove it"
            raise InvalidInputError(f"{source.given}: no weights of variant {variant!r}; {known}")
        variant = None
    if variant is not None and source.hub is None:
        for component, name in ((component, name) for component, files in names.items() for name in sorted(files)):
            if "." not in name and (source.folder / component).is_dir():  # diffusers fails on it
                raise InvalidInputError(
                    f"{source.folder / component / name}: diffusers finds no variant beside a file without a suffix; "
                    "move it out of the folder"
                )
    chosen = replace(source, variant=variant)
    for component in names:
        chosen.weight_files(component)
    return chosen


def _component_classes(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of each component that a pipeline has."""
    return {
        name: (str(entry[0]), str(entry[1]))
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and all(entry) and name == Path(name).name
    }


def _component_config(folder: Path, component: str, class_name: str) -> dict[str, Any]:
    path = folder / component / "config.json"
    if not path.is_file():
        raise InvalidInputError(f"{path} is missing; {_REMEDY}")
    return {"_class_name": class_name, **read_json(path, remedy=_REMEDY)}
