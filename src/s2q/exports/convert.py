"""`s2q convert`: a quantized model of another program as an s2q checkpoint, refused where its codes do not fit."""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2q import checkpoint
from s2q.checkpoint import S2QConfig
from s2q.checkpoint.model_card import task_of
from s2q.checkpoint.save import clean_config
from s2q.common.arguments import dtype_name, flag, model_argument, optional, path_argument, word
from s2q.common.components import full_name
from s2q.common.errors import InvalidInputError, S2QError, memory_errors
from s2q.common.files import atomic_write_json, existing_folder
from s2q.common.fp32_modules import is_within, kept_in_fp32
from s2q.common.headers import read_headers
from s2q.common.meta import check_tensors
from s2q.common.outputs import check_apart, check_output, staged_directory
from s2q.common.progress import Progress, silent
from s2q.common.records import CONVERSION_RECORD, CONVERSION_VERSION
from s2q.common.torch_state import in_fresh_torch_state
from s2q.common.versions import package_versions
from s2q.common.weight_files import copy_component, weight_files
from s2q.core.schemes import LinearScheme
from s2q.core.storage import BF16_BYTES, LinearStorage, parse_bytes
from s2q.exports.folder import (
    check_components,
    converted_files,
    copy_components,
    read_tensors,
    write_card,
    write_transformer,
)
from s2q.exports.reading import Conversion, StoredTransformer, check_stored, find_conversion, full_precision
from s2q.exports.repack import packed_file, repacked
from s2q.exports.target import LinearForm, decoded
from s2q.exports.verify import check_read
from s2q.models import block_linears, family_of
from s2q.models.hub import parse_hub_id
from s2q.pipelines import find_index

_ORIGIN = ("base_model", "base_model_relation")
"""Front matter of a model card."""
_EXACT = 1e-5
"""Difference of a weight, relative to its largest magnitude: fp32 sums in another order."""
_ROUNDED = 2.0**-7
"""Of a product of two factors of a branch, each rounded to bf16."""


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """A conversion, as returned by `s2q.convert` and stored as s2q/convert.json in the checkpoint.

    Attributes:
        source: Name of the full-precision model, which gives default prompts and settings, or of the converted one if
            that is not known.
        converted: Name of the converted model.
        tool: Program whose format it has.
        tool_version: Version of the tool, or None where the files have none.
        compared_version: Version of the tool that s2q's reader was compared with.
        writer: Writer named in the files, or None.
        recipe: Recipe name: tool and width.
        output: Name of the checkpoint's folder.
        dtype: Compute dtype of the model.
        format_versions: Of the checkpoint's transformers.
        linears: Number of quantized linears by scheme.
        storage: The transformers' bytes in bf16 and in the checkpoint, and their `ratio`.
        layers: Every quantized linear: name, shape, scheme, bytes.
        largest_difference: Of a weight from s2q's decoding of the source's tensors, relative to its largest magnitude.
        rounding: Reason of the difference.
    """

    schema_version: int
    source: str
    converted: str
    tool: str
    tool_version: str | None
    compared_version: str
    writer: str | None
    recipe: str
    output: str
    dtype: str
    format_versions: Sequence[int]
    linears: Mapping[str, int]
    storage: Mapping[str, int | float]
    layers: Sequence[LinearStorage]
    simulated: bool
    largest_difference: float
    rounding: str
    seconds: float
    versions: Mapping[str, str] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


@memory_errors("converting a checkpoint", remedy="free some, or convert where there is more")
@in_fresh_torch_state
def convert(
    model: str | Path,
    *,
    out: str | Path,
    base: str | Path | None = None,
    variant: str | None = None,
    verify: bool | None = None,
    max_shard_size: int | str = "10GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Make an s2q checkpoint of a model that another program has quantized, with the codes and scales that it has.

    Nothing is quantized again: what packed linears cannot hold is refused before anything is written.

    Args:
        model: SDNQ's pipeline folder or its Hub id, "organisation/name" or "organisation/name@revision", or ComfyUI's
            safetensors of one transformer.
        out: Folder of the checkpoint.
        base: The diffusers pipeline with the other components, and for a file with the configuration: embedded name,
            folder or Hub id.
        variant: Variant of the weights of a folder, and of the base where that has it.
        verify: Whether to compare the files of the model and of the base with their manifests first, which exports and
            checkpoints of s2q have: None does where there is one, True refuses a model without, False does not.
        max_shard_size: Size at which weight files are split, "5GB".
        overwrite: Whether to replace an existing checkpoint.
        progress: Called with the stage, what is done and the total.

    Returns:
        Schemes, bytes, and the largest difference that was found.

    Raises:
        InvalidInputError: If the model is no such folder or file, a linear does not fit, or `out` exists.
        S2QError: If a repacked weight differs from the decoded one, or files are read back with other values; nothing
            is left then.
    """
    start = time.perf_counter()
    out, overwrite = path_argument("out", out), flag("overwrite", overwrite)
    verify = optional(flag, "verify", verify)
    shard_size = parse_bytes(max_shard_size, option="max_shard_size")
    base = None if base is None else model_argument("base", base)
    conversion = find_conversion(model_argument("model", model), base=base, variant=optional(word, "variant", variant))
    check_apart(out, conversion.path, given=conversion.given)
    check_apart(out, conversion.others.complete_folder(), given=conversion.others.given)
    check_output(out, overwrite=overwrite, owned=converted_files)
    _check_intact(conversion, verify=verify)
    job = _Job(conversion, progress or silent)
    with staged_directory(out, overwrite=overwrite, owned=converted_files) as staged:
        return job.write(staged, name=out.name, max_shard_size=shard_size, start=start)


def _check_intact(conversion: Conversion, *, verify: bool | None) -> None:
    """Compare the files of the model and of the base with their manifests; other programs write none."""
    for folder, needed in {conversion.others.complete_folder(): False, conversion.path: bool(verify)}.items():
        if needed or (folder / checkpoint.MANIFEST).is_file():
            checkpoint.check_intact(folder, verify=verify)


class _Job:
    """One conversion: all linears are checked at once, the transformers converted and written in turn."""

    def __init__(self, conversion: Conversion, progress: Progress) -> None:
        self.conversion, self.progress = conversion, progress
        self.folder = conversion.others.complete_folder()
        self.difference, self.is_rounded = 0.0, False
        self.full_bytes = self.stored_bytes = 0
        self.layers: list[LinearStorage] = []
        ours = conversion.transformers
        check_components(conversion.others, self.folder, without=ours.transformer_configs)
        self.forms: dict[str, dict[str, LinearForm]] = {}
        checked = {component: self.checked(component) for component in conversion.components}
        self.configs = {component: config for component, config in checked.items() if config is not None}
        if not self.configs:
            raise InvalidInputError(
                f"{conversion.given}: {' and '.join(checked)} without a quantized linear, which needs no conversion; "
                f"quantize {full_precision(conversion.origin)} with s2q quantize"
            )
        self.copied = [component for component in ours.transformer_configs if component not in self.configs]
        if self.copied:
            without = ours.component_classes.keys() - set(self.copied)
            check_components(ours, conversion.path, without=without)
        for component in self.copied:
            self.count_copied(component)

    def count_copied(self, component: str) -> None:
        """Check the headers of a transformer that is not quantized, and count its bytes."""
        ours, folder = self.conversion.transformers, self.conversion.path / component
        headers = read_headers(weight_files(folder, variant=ours.variant))
        expected = ours.meta_transformer(component).state_dict()
        check_tensors(headers, expected, folder=folder, remedy="download or save the model again")
        self.full_bytes += sum(tensor.numel() for tensor in expected.values()) * BF16_BYTES
        self.stored_bytes += sum(info.num_bytes for info in headers.values())

    def checked(self, component: str) -> S2QConfig | None:
        """Check all that is stored of a transformer.

        Returns:
            The configuration that it will have, or None if none of its linears is quantized.
        """
        conversion = self.conversion
        plain = conversion.transformers.meta_transformer(component)
        stored = conversion.read(component, plain)
        check_stored(stored, plain, component=component, conversion=conversion)
        if not stored.linears:
            return None
        dtype = _compute_dtype(stored, plain)
        self.full_bytes += sum(tensor.numel() for tensor in plain.state_dict().values()) * BF16_BYTES
        roles = {linear.name: linear.role for linear in block_linears(plain, family_of(plain))}
        forms: dict[str, LinearForm] = {}
        schemes: dict[str, LinearScheme] = {}
        wide = False
        for index, (name, (tensors, options)) in enumerate(stored.linears.items()):
            self.progress("check", index, len(stored.linears))
            with self.refusals(component, name):
                linear = plain.get_submodule(name)
                if not isinstance(linear, nn.Linear):
                    raise InvalidInputError(f"codes of {type(linear).__name__}")
                form = conversion.format.form(name, linear, tensors, options, dtype)
                weight_only = conversion.format.few_rows_unquantized and roles.get(name) != "linear"
                scheme = replace(form.scheme, activation=None) if weight_only else form.scheme
                part = repacked(conversion.format.weight(tensors, form), form, tensors.get("bias"), scheme=scheme)
                part.check()
            wide = wide or not part.is_narrow
            forms[name], schemes[name] = form, scheme
        self.progress("check", len(stored.linears), len(stored.linears))
        self.forms[component] = forms
        return S2QConfig.from_schemes(
            schemes,
            recipe=f"{conversion.format.name}-{_width(forms.values(), schemes)}",
            compute_dtype=dtype_name(dtype),
            paths={name: form.path for name, form in forms.items() if not form.path.empty},
            wide=wide,
        )

    def packed(
        self, component: str, stored: StoredTransformer, form: LinearForm, scheme: LinearScheme, *, wide: bool
    ) -> dict[str, Tensor]:
        """Return what the file has of a linear, after comparing its weight with the decoded one of the source."""
        tensors, _ = stored.linears[form.name]
        weight = self.conversion.format.weight(tensors, form)
        layer = repacked(weight, form, tensors.get("bias"), scheme=scheme).layer(wide=wide)
        expected = decoded(weight, form)
        largest, allowed = float(expected.abs().max()) or 1.0, _EXACT
        difference = float((layer.effective_weight(torch.float32) - expected).abs().max()) / largest
        if layer.low_rank_weight is not None and layer.low_rank_basis is not None:
            self.is_rounded = True
            up, basis = (factor.float().abs() for factor in (layer.low_rank_weight, layer.low_rank_basis))
            allowed += _ROUNDED * float((up @ basis.t()).max()) / largest
        if not difference <= allowed:
            raise S2QError(
                f"{full_name(component, form.name)}: repacked, its weight differs by {difference:.1e} of its largest "
                f"magnitude from s2q's decoding of the {self.conversion.format.name} tensors, expected at most "
                f"{allowed:.1e}; nothing was converted"
            )
        self.difference = max(self.difference, difference)
        return packed_file(form.name, layer, wide=wide)

    @contextlib.contextmanager
    def refusals(self, component: str, name: str) -> Iterator[None]:
        """Name the linear and the remedy in the error for one that does not fit."""
        read, origin = self.conversion.format, full_precision(self.conversion.origin)
        try:
            yield
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, InvalidInputError) as error:
            what = str(error) if isinstance(error, InvalidInputError) else f"damaged tensors or options ({error})"
            raise InvalidInputError(
                f"{full_name(component, name)}: is stored with {what}; expected symmetric integer codes in rows or "
                f"groups; quantize {origin} with s2q quantize, or {read.remedy}"
            ) from error

    def write(self, staged: Path, *, name: str, max_shard_size: int, start: float) -> ConversionReport:
        """Write the checkpoint, which will have a name, and compare what is read back."""
        ours, others = self.conversion.transformers, self.conversion.others
        copy_components(others, self.folder, staged, without=ours.transformer_configs)
        for component in self.copied:
            library, _ = ours.component_classes[component]
            copy_component(self.conversion.path / component, staged / component, library=library, variant=ours.variant)
            atomic_write_json(staged / component / "config.json", ours.plain_config(component))
        for component in self.configs:
            self.write_component(component, staged / component, max_shard_size=max_shard_size)
        for path in (find_index(staged), *staged.glob("*/config.json")):
            clean_config(path)
        report = self.report(name, start)
        self.write_card(staged, report)
        (staged / CONVERSION_RECORD).parent.mkdir()
        atomic_write_json(staged / CONVERSION_RECORD, report.to_dict())
        checkpoint.write_manifest(staged)
        return report

    def write_component(self, component: str, folder: Path, *, max_shard_size: int) -> None:
        """Convert one transformer, write it, compare what is read back, and drop it."""
        ours, config = self.conversion.transformers, self.configs[component]
        stored = self.conversion.read(component, ours.meta_transformer(component))
        schemes, written = config.layer_schemes(), dict(stored.plain)
        for index, (name, form) in enumerate(self.forms[component].items()):
            self.progress("convert", index, len(schemes))
            packed = self.packed(component, stored, form, schemes[name], wide=config.wide)
            written |= packed
            self.layers.append(
                LinearStorage(
                    name=full_name(component, name),
                    shape=(form.out_features, form.in_features),
                    scheme=schemes[name].name,
                    bytes=sum(tensor.nbytes for tensor in packed.values()),
                )
            )
        described = ours.plain_config(component) | {"quantization_config": config.to_dict()}
        write_transformer(folder, written, described, max_shard_size=max_shard_size)
        check_read(read_tensors(folder), written, component=component, done="converted")
        self.stored_bytes += sum(tensor.nbytes for tensor in written.values())
        self.progress("convert", len(schemes), len(schemes))

    def source_name(self) -> str:
        """Return the name of the full-precision model, or of the pipeline that has the other components."""
        others, origin = self.conversion.others, self.conversion.origin
        if origin is None or others is not self.conversion.transformers:
            return others.name
        folder = existing_folder(origin)
        return origin if folder is None else folder.name

    def write_card(self, staged: Path, report: ConversionReport) -> None:
        """Write the model card, with front matter of the card of the source, or of the base of a file.

        The base is what a file was made from, and the base's own `base_model` is not.
        """
        path = self.conversion.path
        folder, ignored = (path, ()) if path.is_dir() else (self.folder, _ORIGIN)
        write_card(folder, staged, self.card(report), fields=self.card_fields(), ignored=ignored)

    def card_fields(self) -> dict[str, Any]:
        """Return the front matter that a card has where that of the source does not say otherwise."""
        origin = self.conversion.origin
        hub = None if origin is None or existing_folder(origin) is not None else parse_hub_id(origin)
        base = {} if hub is None else dict(zip(_ORIGIN, (hub.repo, "quantized"), strict=True))
        return {
            **base,
            "library_name": "diffusers",
            "pipeline_tag": task_of(self.conversion.others.index["_class_name"]),
            "tags": ["s2q", "quantized", self.conversion.format.name],
        }

    def card(self, report: ConversionReport) -> str:
        """Return the text of a model card."""
        tool = report.tool if report.tool_version is None else f"{report.tool} {report.tool_version}"
        writer = report.writer or tool
        return (
            f"# {self.conversion.name}, converted from {tool}\n\n"
            f"Quantized by {writer}; `s2q convert` kept its codes and scales and calibrated nothing.\n\n"
            "Load it with `import s2q` and `DiffusionPipeline.from_pretrained`.\n"
        )

    def report(self, output: str, start: float) -> ConversionReport:
        """Return the report of the conversion to a folder of a name."""
        conversion, configs = self.conversion, list(self.configs.values())
        return ConversionReport(
            schema_version=CONVERSION_VERSION,
            source=self.source_name(),
            converted=conversion.name,
            tool=conversion.format.name,
            tool_version=conversion.version,
            compared_version=conversion.format.version,
            writer=conversion.writer,
            recipe=configs[0].recipe,
            output=output,
            dtype=configs[0].compute_dtype,
            format_versions=[config.format_version for config in configs],
            linears=dict(Counter(layer.scheme for layer in self.layers)),
            storage={
                "full_precision_bytes": self.full_bytes,
                "quantized_bytes": self.stored_bytes,
                "ratio": self.full_bytes / self.stored_bytes,
            },
            layers=self.layers,
            simulated=any(scheme.simulated for config in configs for scheme in config.layer_schemes().values()),
            largest_difference=self.difference,
            rounding="branches are rounded to bf16" if self.is_rounded else "fp32 sums in another order",
            seconds=time.perf_counter() - start,
            versions=package_versions(),
        )


def _compute_dtype(stored: StoredTransformer, plain: nn.Module) -> torch.dtype:
    """The floating dtype of most values that are not quantized, biases included, fp32 parts of the class apart."""
    kept, counts = kept_in_fp32(plain), Counter[torch.dtype]()
    biases = {f"{name}.bias": tensors["bias"] for name, (tensors, _) in stored.linears.items() if "bias" in tensors}
    for name, tensor in (dict(stored.plain) | biases).items():
        if tensor.is_floating_point() and not is_within(name, kept):
            counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0] if counts else torch.bfloat16


def _width(forms: Iterable[LinearForm], schemes: Mapping[str, LinearScheme]) -> str:
    """The scheme of most quantized weights, without groups: "w4a8"."""
    sizes: Counter[str] = Counter()
    for form in forms:
        sizes[re.sub(r"g\d+", "", schemes[form.name].name)] += form.in_features * form.out_features
    return sizes.most_common(1)[0][0]
