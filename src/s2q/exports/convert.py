"""`s2q convert`: a quantized model of another program as an s2q checkpoint, refused where its codes do not fit."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2q import checkpoint
from s2q.checkpoint import S2QConfig, S2QQuantizer
from s2q.checkpoint.save import REPORT, clean_config
from s2q.common.arguments import dtype_name, flag, model_argument, optional, path_argument, word
from s2q.common.components import full_name
from s2q.common.errors import InvalidInputError, S2QError, memory_errors
from s2q.common.files import atomic_write_json
from s2q.common.fp32_modules import is_within, kept_in_fp32
from s2q.common.outputs import check_apart, check_output, staged_directory
from s2q.common.progress import Progress, silent
from s2q.common.records import REPORT_VERSION
from s2q.common.torch_state import in_fresh_torch_state
from s2q.common.versions import package_versions
from s2q.common.weight_files import copy_component
from s2q.core.storage import BF16_BYTES, LinearStorage, parse_bytes
from s2q.exports.folder import check_components, copy_components, read_tensors, write_card, write_transformer
from s2q.exports.reading import Conversion, StoredTransformer, find_conversion, full_precision
from s2q.exports.repack import Repacked, packed_file, repacked
from s2q.exports.target import decoded
from s2q.models import block_linears, family_of

_EXACT = 1e-5
"""Difference of a weight, relative to its largest magnitude: fp32 sums in another order."""
_ROUNDED = 2.0**-7
"""Of a product of two factors of a branch, each rounded to bf16."""


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """A conversion, as returned by `s2q.convert` and stored as s2q/report.json in the checkpoint.

    Attributes:
        source: Name of the full-precision model, as far as it is known: prompts and settings are those of it.
        converted: Name of what was converted.
        tool: The program that quantized it.
        tool_version: Its version, or None where its files do not tell.
        writer: What else they tell of who wrote them, or None.
        calibrated: Whether s2q calibrated anything, which a conversion does not.
        recipe: What the checkpoint has for a recipe: tool and width.
        output: Name of the checkpoint's folder.
        dtype: Compute dtype of the model.
        format_versions: Of the checkpoint's transformers.
        linears: Number of quantized linears by scheme.
        storage: The transformers' bytes in bf16 and in the checkpoint, and their `ratio`.
        layers: Every quantized linear: name, shape, scheme, bytes.
        largest_difference: Of a weight from that which the tool's readers compute, relative to its largest magnitude.
        rounding: Where that comes from.
        n_prompts: Of calibration; none.
        selection: Of calibration samples; none.
        blocks: Reports of quantized blocks; none.
    """

    schema_version: int
    source: str
    converted: str
    tool: str
    tool_version: str | None
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
    calibrated: bool = False
    n_prompts: int = 0
    selection: Mapping[str, Any] | None = None
    blocks: Sequence[Mapping[str, Any]] = ()

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
        variant: Variant of the weights of a folder.
        max_shard_size: Size at which weight files are split, "5GB".
        overwrite: Whether to replace an existing checkpoint.
        progress: Called with the stage, what is done and the total.

    Returns:
        Schemes, bytes, and the largest difference that was found.

    Raises:
        InvalidInputError: If the model is no such folder or file, a linear does not fit, or `out` exists.
        S2QError: If a weight differs from that which the tool computes; nothing is left then.
    """
    start = time.perf_counter()
    out, overwrite = path_argument("out", out), flag("overwrite", overwrite)
    shard_size = parse_bytes(max_shard_size, option="max_shard_size")
    base = None if base is None else model_argument("base", base)
    conversion = find_conversion(model_argument("model", model), base=base, variant=optional(word, "variant", variant))
    check_apart(out, conversion.path, given=conversion.given)
    check_output(out, overwrite=overwrite, owned=checkpoint.owned_files)
    job = _Job(conversion, progress or silent)
    with staged_directory(out, overwrite=overwrite, owned=checkpoint.owned_files) as staged:
        return job.write(staged, name=out.name, max_shard_size=shard_size, start=start)


@dataclass(frozen=True, kw_only=True)
class _Transformer:
    """A converted transformer: the tensors of its file, and what its configuration says of them."""

    tensors: dict[str, Tensor]
    config: S2QConfig
    layers: Sequence[LinearStorage]
    full_bytes: int


class _Job:
    """One conversion: its transformers are converted in memory, then all is written."""

    def __init__(self, conversion: Conversion, progress: Progress) -> None:
        self.conversion, self.progress = conversion, progress
        self.folder = conversion.others.complete_folder()
        self.difference, self.is_rounded = 0.0, False
        check_components(conversion.others, self.folder, without=conversion.transformers.transformer_configs)
        self.transformers = {component: self.transformer(component) for component in conversion.components}

    def transformer(self, component: str) -> _Transformer:
        """Convert a transformer."""
        conversion = self.conversion
        plain = conversion.transformers.meta_transformer(component)
        stored = conversion.read(component, plain)
        dtype = _compute_dtype(stored, plain)
        parts = self.repacked(component, stored, plain, dtype)
        wide = not all(part.is_narrow for part in parts)
        config = S2QConfig.from_schemes(
            {part.form.name: part.scheme for part in parts},
            recipe=f"{conversion.format.name}-{_width(parts)}",
            compute_dtype=dtype_name(dtype),
            paths={part.form.name: part.form.path for part in parts if not part.form.path.empty},
            wide=wide,
        )
        tensors, layers = dict(stored.plain), []
        for part in parts:
            name, packed = part.form.name, self.packed(component, part, stored, wide=wide)
            tensors |= packed
            layers.append(
                LinearStorage(
                    name=full_name(component, name),
                    shape=(part.form.out_features, part.form.in_features),
                    scheme=part.scheme.name,
                    bytes=sum(tensor.nbytes for tensor in packed.values()),
                )
            )
        full_bytes = sum(tensor.numel() for tensor in plain.state_dict().values()) * BF16_BYTES
        self.check_complete(component, tensors, plain, config)
        return _Transformer(tensors=tensors, config=config, layers=layers, full_bytes=full_bytes)

    def repacked(
        self, component: str, stored: StoredTransformer, plain: nn.Module, dtype: torch.dtype
    ) -> list[Repacked]:
        """Read the values of the quantized linears."""
        read = self.conversion.format
        roles = {linear.name: linear.role for linear in block_linears(plain, family_of(plain))}
        parts: list[Repacked] = []
        for index, (name, (tensors, options)) in enumerate(stored.linears.items()):
            self.progress("read", index, len(stored.linears))
            try:
                linear = plain.get_submodule(name)
                if not isinstance(linear, nn.Linear):
                    raise InvalidInputError(f"codes of {type(linear).__name__}")
                form = read.form(name, linear, tensors, options, dtype)
                scheme = form.scheme
                if read.least_rows > 1 and roles.get(name) != "linear":
                    scheme = replace(scheme, activation=None)
                parts.append(repacked(read.weight(tensors, form), form, tensors.get("bias"), scheme=scheme))
            except InvalidInputError as error:
                raise self.refusal(component, name, str(error)) from error
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise self.refusal(component, name, f"damaged tensors or options ({error})") from error
        self.progress("read", len(stored.linears), len(stored.linears))
        return parts

    def packed(self, component: str, part: Repacked, stored: StoredTransformer, *, wide: bool) -> dict[str, Tensor]:
        """Return what the file has of a linear, after comparing its weight with that of the tool's readers."""
        form, read = part.form, self.conversion.format
        try:
            layer = part.layer(wide=wide)
        except InvalidInputError as error:
            raise self.refusal(component, form.name, str(error)) from error
        tensors, _ = stored.linears[form.name]
        expected = decoded(read.weight(tensors, form), form)
        largest, allowed = float(expected.abs().max()) or 1.0, _EXACT
        difference = float((layer.effective_weight(torch.float32) - expected).abs().max()) / largest
        if layer.low_rank_weight is not None and layer.low_rank_basis is not None:
            self.is_rounded = True
            up, basis = (factor.float().abs() for factor in (layer.low_rank_weight, layer.low_rank_basis))
            allowed += _ROUNDED * float((up @ basis.t()).max()) / largest
        if not difference <= allowed:
            raise S2QError(
                f"{full_name(component, form.name)}: differs by {difference:.1e} of its largest magnitude from what "
                f"{read.name} computes; nothing was converted"
            )
        self.difference = max(self.difference, difference)
        return packed_file(form.name, layer, wide=wide)

    def refusal(self, component: str, name: str, what: str) -> InvalidInputError:
        """Build (not raise) the error for a linear that does not fit."""
        read, origin = self.conversion.format, full_precision(self.conversion.origin)
        return InvalidInputError(
            f"{full_name(component, name)}: is stored with {what}; expected symmetric integer codes in rows or groups; "
            f"quantize {origin} with s2q quantize, or {read.remedy}"
        )

    def check_complete(
        self, component: str, tensors: Mapping[str, Tensor], plain: nn.Module, config: S2QConfig
    ) -> None:
        """Refuse tensors that are not those of the transformer with its packed linears; `plain` is changed."""
        S2QQuantizer(config, pre_quantized=True).pack(plain)
        expected = plain.state_dict()
        if strange := sorted(expected.keys() ^ tensors.keys()):
            where = "missing" if strange[0] in expected else f"no tensor of {type(plain).__name__}"
            raise InvalidInputError(
                f"{self.conversion.given}: {full_name(component, strange[0])} is {where}; check --base, or download "
                "the model again"
            )
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                raise InvalidInputError(
                    f"{self.conversion.given}: {full_name(component, name)}: got {list(tensor.shape)}, expected "
                    f"{list(expected[name].shape)}; check --base, or download the model again"
                )

    def write(self, staged: Path, *, name: str, max_shard_size: int, start: float) -> ConversionReport:
        """Write the checkpoint, which will have a name, and compare what is read back."""
        ours, others = self.conversion.transformers, self.conversion.others
        copy_components(others, self.folder, staged, without=ours.transformer_configs)
        for component in ours.transformer_configs.keys() - self.transformers.keys():
            library, _ = ours.component_classes[component]
            copy_component(self.conversion.path / component, staged / component, library=library, variant=ours.variant)
        for index, (component, made) in enumerate(self.transformers.items()):
            self.progress("write", index, len(self.transformers))
            config = ours.plain_config(component) | {"quantization_config": made.config.to_dict()}
            write_transformer(staged / component, made.tensors, config, max_shard_size=max_shard_size)
            read = read_tensors(staged / component)
            for key, tensor in made.tensors.items():
                if key not in read or read[key].dtype != tensor.dtype or not _equal(read[key], tensor):
                    raise S2QError(f"{key}: was read back with other values; nothing was converted, check the disk")
        for path in (staged / "model_index.json", *staged.glob("*/config.json")):
            clean_config(path)
        report = self.report(name, start)
        write_card(self.card_folder(), staged, self.card(report))
        (staged / REPORT).parent.mkdir()
        atomic_write_json(staged / REPORT, report.to_dict())
        checkpoint.write_manifest(staged)
        self.progress("write", len(self.transformers), len(self.transformers))
        return report

    def source_name(self) -> str:
        """Return the name of the full-precision model, or of the pipeline that has the other components."""
        others, origin = self.conversion.others, self.conversion.origin
        if origin is None or others is not self.conversion.transformers:
            return others.name
        return Path(origin).name if Path(origin).is_dir() else origin

    def card_folder(self) -> Path:
        """Return the folder whose card has the front matter."""
        path = self.conversion.path
        return path if path.is_dir() else self.folder

    def card(self, report: ConversionReport) -> str:
        """Return the text of a model card."""
        tool = report.tool if report.tool_version is None else f"{report.tool} {report.tool_version}"
        return (
            f"# {self.conversion.name}, converted from {tool}\n\n"
            f"Quantized by {tool}, not by s2q: `s2q convert` kept its codes and scales. Nothing was calibrated.\n\n"
            "Load it with `import s2q` and `DiffusionPipeline.from_pretrained`.\n"
        )

    def report(self, output: str, start: float) -> ConversionReport:
        """Return the report of the conversion to a folder of a name."""
        conversion, made = self.conversion, list(self.transformers.values())
        layers = [layer for transformer in made for layer in transformer.layers]
        full = sum(transformer.full_bytes for transformer in made)
        stored = sum(tensor.nbytes for transformer in made for tensor in transformer.tensors.values())
        config = made[0].config
        return ConversionReport(
            schema_version=REPORT_VERSION,
            source=self.source_name(),
            converted=conversion.name,
            tool=conversion.format.name,
            tool_version=conversion.version,
            writer=conversion.writer,
            recipe=config.recipe,
            output=output,
            dtype=config.compute_dtype,
            format_versions=[transformer.config.format_version for transformer in made],
            linears=dict(Counter(layer.scheme for layer in layers)),
            storage={"full_precision_bytes": full, "quantized_bytes": stored, "ratio": full / stored},
            layers=layers,
            simulated=any(
                scheme.simulated for transformer in made for scheme in transformer.config.layer_schemes().values()
            ),
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


def _width(parts: Sequence[Repacked]) -> str:
    """The scheme of most quantized weights, without groups: "w4a8"."""
    sizes: Counter[str] = Counter()
    for part in parts:
        sizes[re.sub(r"g\d+", "", part.scheme.name)] += part.form.in_features * part.form.out_features
    return sizes.most_common(1)[0][0]


def _equal(read: Tensor, written: Tensor) -> bool:
    return torch.equal(read.view(torch.uint8), written.contiguous().view(torch.uint8))
