"""`s2q export`: a checkpoint as files that another program runs, refused where they cannot hold all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2q import checkpoint
from s2q.checkpoint import S2QConfig
from s2q.checkpoint.manifest import intact
from s2q.checkpoint.text_encoders import encoder_configs
from s2q.common.arguments import flag, model_argument, optional, path_argument, word
from s2q.common.components import full_name
from s2q.common.errors import InvalidInputError, S2QError, UsageError, memory_errors, unknown_name
from s2q.common.files import atomic_write_json
from s2q.common.outputs import check_apart, check_file_output, check_output, staged_directory, staged_file
from s2q.common.progress import Progress, silent
from s2q.common.records import EXPORT_RECORD, EXPORT_VERSION
from s2q.common.torch_state import in_fresh_torch_state
from s2q.core.storage import BF16_BYTES, parse_bytes
from s2q.exports.folder import (
    check_components,
    copy_components,
    exported_files,
    read_tensors,
    write_card,
    write_transformer,
)
from s2q.exports.layout import Layout, layout_of
from s2q.exports.target import (
    FileFormat,
    LinearForm,
    Target,
    check_rotation,
    check_storable,
    encoded,
    linear_forms,
    stored_unquantized,
)
from s2q.exports.targets import TARGETS
from s2q.exports.text_encoders import write_dequantized
from s2q.exports.verify import verify_written
from s2q.generation.load import require_checkpoint
from s2q.models import ModelSource, resolve_model
from s2q.models.originals import from_original
from s2q.nn import PackedLinear
from s2q.pipelines import modular_components


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """An export, as returned by `s2q.export`.

    Attributes:
        target: Its name.
        checkpoint: Name of what was exported.
        recipe: The recipe of the checkpoint.
        output: Name of the folder or file.
        component: The transformer in a file, "transformer" or "transformer_2"; None for a folder, which has all.
        loading: How it is loaded.
        linears: Number of quantized linears in each format of the target.
        storage: The transformers' bytes in bf16 and as exported, and their `ratio`.
        largest_difference: Of a weight as its readers dequantize it, or of a bias, from s2q's, relative to the largest
            magnitude of it.
        rounding: Where that comes from.
    """

    schema_version: int
    target: str
    checkpoint: str
    recipe: str
    output: str
    component: str | None
    loading: str
    linears: Mapping[str, int]
    storage: Mapping[str, int | float]
    largest_difference: float
    rounding: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


@memory_errors("exporting a checkpoint", remedy="free some, or export where there is more")
@in_fresh_torch_state
def export(
    model: str | Path,
    *,
    to: str,
    out: str | Path,
    component: str | None = None,
    variant: str | None = None,
    verify: bool | None = None,
    max_shard_size: int | str = "10GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a checkpoint in the format of another program, and compare what was written with the checkpoint.

    Nothing is left out: what the format cannot store of a linear is refused before anything is written.

    Args:
        model: The checkpoint's folder, or its Hub id, "organisation/name" or "organisation/name@revision".
        to: A name of `s2q.exports.targets.TARGETS`.
        out: Folder or file to write.
        component: For a file, the transformer of a model that has two, "transformer" or "transformer_2".
        variant: Variant of the weights, for a checkpoint that diffusers has saved again with one.
        verify: Whether to compare the checkpoint's files with its manifest first: None does where there is a manifest
            and warns where there is none, True refuses a checkpoint without, False does not.
        max_shard_size: Size at which the weight files of a folder are split, "5GB".
        overwrite: Whether to replace an existing output of the same kind.
        progress: Called with the stage, what is done and the total.

    Returns:
        Formats, bytes, and the largest difference that was found.

    Raises:
        InvalidInputError: If there is no such checkpoint, the target cannot store a part of it, or `out` exists.
        UsageError: If `component` is missing for a file of one of two transformers, or given for a folder.
        S2QError: If what was written differs from the checkpoint; nothing is left then.
    """
    target, out = _target(to), path_argument("out", out)
    verify, overwrite = optional(flag, "verify", verify), flag("overwrite", overwrite)
    shard_size = parse_bytes(max_shard_size, option="max_shard_size")
    source = resolve_model(model_argument("model", model), variant=optional(word, "variant", variant))
    require_checkpoint(source)
    if target.file is not None and out.suffix != target.file.suffix:
        raise UsageError(f"out: got {out}; {target.name} writes a file, whose name ends in {target.file.suffix}")
    job = _Job(source, target, optional(word, "component", component), progress or silent)
    check_apart(out, job.folder, given=f"the checkpoint {source.given}")
    if target.file is None:
        check_output(out, overwrite=overwrite, owned=exported_files)
    else:
        layout, marks = job.original_names()
        check_file_output(out, overwrite=overwrite, owned=target.file.wrote)
    checkpoint.check_intact(job.folder, verify=verify)
    if target.file is None:
        with staged_directory(out, overwrite=overwrite, owned=exported_files) as folder:
            job.write_folder(folder, name=out.name, max_shard_size=shard_size)
    else:
        with staged_file(out, overwrite=overwrite, owned=target.file.wrote) as path:
            job.write_file(path, target.file, layout, marks)
    return job.report(out.name)


def _target(name: str) -> Target:
    if not isinstance(name, str) or name not in TARGETS:
        raise unknown_name("target", name, TARGETS)
    return TARGETS[name]


class _Job:
    """One export: the forms of its linears are checked at once, its transformers loaded and written in turn."""

    def __init__(self, source: ModelSource, target: Target, component: str | None, progress: Progress) -> None:
        self.source, self.target, self.progress = source, target, progress
        self.folder = source.complete_folder()
        self.configs = self._chosen(component, checkpoint.read_configs(self.folder))
        self.forms: dict[str, list[LinearForm]] = {}
        self.full_bytes = self.written_bytes = 0
        self.difference = 0.0
        # a file has no text encoder
        self.encoders = {} if target.file is not None else encoder_configs(self.folder)
        self.rewritten = {*self.configs, *self.encoders}
        if target.file is None:
            check_components(source, self.folder, without=self.rewritten)
        if self.encoders and target.stores_codes:
            raise InvalidInputError(
                f"{next(iter(self.encoders))}: {target.name} cannot store quantized text encoders; quantize the model "
                "with text_encoder=null, or export to diffusers"
            )
        for component, config in self.configs.items():
            plain = source.meta_transformer(component)
            if modules := config.attention_modules():
                raise InvalidInputError(
                    f"{full_name(component, modules[0])}: {target.name} cannot store its int8 attention; quantize the "
                    "model with attention=null"
                )
            self.forms[component] = linear_forms(plain, config, component=component)
            check_storable(target, self.forms[component], recipe=config.recipe)
            self.full_bytes += sum(tensor.numel() for tensor in plain.state_dict().values()) * BF16_BYTES

    def _chosen(self, component: str | None, configs: Mapping[str, S2QConfig]) -> Mapping[str, S2QConfig]:
        """Return the quantized transformers to write: all into a folder, one into a file."""
        if self.target.file is None:
            if component is not None:
                raise UsageError(
                    f"component (--component): got {component}; {self.target.name} writes a folder with all "
                    "transformers, omit it"
                )
            return configs
        both = list(self.source.transformer_configs)
        if component is None and len(both) > 1:
            raise UsageError(
                f"{self.source.given}: has two transformers, and {self.target.name} writes a file of one; pass "
                f"--component {' or '.join(both)} (component=)"
            )
        component = component or both[0]
        if component not in configs:
            raise InvalidInputError(
                f"component (--component): got {component}, which {self.source.given} has not quantized; expected "
                f"{' or '.join(configs)}"
            )
        return {component: configs[component]}

    def write_folder(self, staged: Path, *, name: str, max_shard_size: int) -> None:
        """Write a pipeline folder, which will have a name, and compare it."""
        copy_components(self.source, self.folder, staged, without=self.rewritten)
        for index, component in enumerate(self.forms):
            self.progress("export", index, len(self.forms))
            self.write_component(component, staged / component, max_shard_size=max_shard_size)
        for component, config in self.encoders.items():
            write_dequantized(self.source, self.folder, staged, component, config, max_shard_size=max_shard_size)
        write_card(self.folder, staged, self.card())
        (staged / EXPORT_RECORD).parent.mkdir(exist_ok=True)
        atomic_write_json(staged / EXPORT_RECORD, self.report(name).to_dict())
        checkpoint.write_manifest(staged)
        self.progress("export", len(self.forms), len(self.forms))

    def write_component(self, component: str, staged: Path, *, max_shard_size: int) -> None:
        """Write and compare one transformer, and drop it."""
        model, forms, config = self.load(component), self.forms[component], self.source.plain_config(component)
        tensors = self.tensors(component, model)
        quantization = self.target.config(model, forms)
        if quantization is not None:
            config["quantization_config"] = quantization
        write_transformer(staged, tensors, config, max_shard_size=max_shard_size)
        self.compare(component, read_tensors(staged), tensors, model)

    def original_names(self) -> tuple[Layout, dict[str, str]]:
        """Return the layout of a file's transformer and the marks of its linears; refuse what a file cannot hold."""
        ((component, forms),) = self.forms.items()
        plain = self.source.meta_transformer(component)
        layout = layout_of(plain, self.target.name)
        return layout, _marks(plain, forms, layout, self.target)

    def write_file(self, path: Path, file: FileFormat, layout: Layout, marks: Mapping[str, str]) -> None:
        """Write the transformer into one file and compare it, converted back by diffusers."""
        ((component, forms),) = self.forms.items()
        self.progress("export", 0, 1)
        model = self.load(component)
        linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        quantized = {form.name for form in forms}
        tensors = {
            name: tensor
            if name.rpartition(".")[0] in quantized and not name.endswith(".bias")
            else file.plain(tensor, is_weight=name in linears)
            for name, tensor in self.tensors(component, model).items()
        }
        file.write(path, layout.to_original(tensors), marks, layout.architecture)
        read, read_marks = file.read(path)
        if read_marks != marks:
            raise S2QError(
                f"{path.name}: the formats of its linears were read back with other values; nothing was exported"
            )
        read = from_original(type(model).__name__, read, suffixes=file.suffixes)
        self.compare(component, read, tensors, model)
        self.progress("export", 1, 1)

    def load(self, component: str) -> nn.Module:
        """Load a transformer of the checkpoint, in its compute dtype, on the CPU."""
        with intact():
            model: nn.Module = self.source.transformer_type(component).from_pretrained(
                self.folder,
                subfolder=component,
                dtype=getattr(torch, self.configs[component].compute_dtype),
                variant=self.source.variant,
                use_safetensors=True,
            )
        return model.eval()

    def tensors(self, component: str, model: nn.Module) -> dict[str, Tensor]:
        """Return everything that is stored of a transformer, by full name."""
        forms, recipe = self.forms[component], self.configs[component].recipe
        names = {form.name for form in forms}
        stored = model.state_dict().items()
        tensors = {name: tensor for name, tensor in stored if name.rpartition(".")[0] not in names}
        for form in forms:
            layer = model.get_submodule(form.name)
            assert isinstance(layer, PackedLinear), form.name
            check_rotation(layer, form, self.target, recipe=recipe)
            tensors |= {f"{form.name}.{name}": tensor for name, tensor in encoded(self.target, layer, form).items()}
        return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}

    def compare(
        self, component: str, read: Mapping[str, Tensor], written: Mapping[str, Tensor], model: nn.Module
    ) -> None:
        """Compare what was read back with what was written, and both with the model."""
        difference = verify_written(read, written, model, self.forms[component], self.target, component=component)
        self.difference = max(self.difference, difference)
        self.written_bytes += sum(tensor.nbytes for tensor in read.values())

    @property
    def loading(self) -> str:
        """The call that loads the export, for people; a modular pipeline loads its components in a second call."""
        if not modular_components(self.source.index):
            return self.target.loading
        modular = "ModularPipeline.from_pretrained(OUT) and its load_components()"
        return self.target.loading.replace("DiffusionPipeline.from_pretrained(OUT)", modular)

    def card(self) -> str:
        """Return the text of a model card."""
        config, *_ = self.configs.values()
        return (
            f"# {self.source.name}, for {self.target.name}\n\n"
            f"Quantized with s2q, recipe `{config.recipe}`, and exported by `s2q export --to {self.target.name}`:\n"
            f"{self.target.does}.\n\n"
            f"Load it with `{self.loading}`.\n"
        )

    def report(self, output: str) -> ExportReport:
        """Return the report of the export to a folder or file of a name."""
        forms = [form for forms in self.forms.values() for form in forms]
        config, *_ = self.configs.values()
        return ExportReport(
            schema_version=EXPORT_VERSION,
            target=self.target.name,
            checkpoint=self.source.name,
            recipe=config.recipe,
            output=output,
            component=None if self.target.file is None else next(iter(self.configs)),
            loading=self.loading,
            linears=dict(Counter(self.target.kind(form) for form in forms)),
            storage={
                "full_precision_bytes": self.full_bytes,
                "quantized_bytes": self.written_bytes,
                "ratio": self.full_bytes / self.written_bytes,
            },
            largest_difference=self.difference,
            rounding=self.target.rounding,
        )


def _marks(model: nn.Module, forms: Sequence[LinearForm], layout: Layout, target: Target) -> dict[str, str]:
    """Return the marks of quantized linears by their original names; refuse a fused one whose parts differ."""
    assert target.file is not None
    described = {form.name: target.file.mark(form) for form in forms}
    for form in forms:
        misread = target.file.misread(form, layout.linear_name(form.name), layout.architecture)
        if misread is not None:
            raise stored_unquantized(target, form, misread, skip=[form.full_name])
    marks: dict[str, str] = {}
    for name in (name for name, module in model.named_modules() if isinstance(module, nn.Linear)):
        original, mark = layout.linear_name(name), described.get(name, "")
        if marks.setdefault(original, mark) != mark:
            raise InvalidInputError(
                f"{name}: {target.name} stores it as a part of {original}, whose other parts have another format; "
                "quantize them alike, or export to sdnq or diffusers"
            )
    return {name: mark for name, mark in marks.items() if mark}
