"""Other tools as entries of a comparison: each quantizes the block linears of a transformer by its own public code.

Nothing of theirs is part of s2q: a tool that is installed is asked, in memory, on the device of the model. What
diffusers quantizes at loading is loaded so; for the others, the weights of the linears are replaced. A tool that
calibrates runs a full-precision pipeline on prompts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from s2q.common.components import TRANSFORMERS, transformers_of
from s2q.common.devices import free_memory
from s2q.common.errors import InvalidInputError, ResourceError, unknown_name
from s2q.common.versions import is_installed, package_versions
from s2q.core.storage import BF16_BYTES
from s2q.generation.defaults import with_first_frames
from s2q.generation.load import load_pipeline
from s2q.generation.prompts import Prompt
from s2q.generation.settings import GenerationSettings, resolve_settings, text_tokens
from s2q.models import ModelSource, family_of
from s2q.models.family import block_linears
from s2q.planning.workload import recommended_for
from s2q.shapes.embedded import EMBEDDED_NAMES, embedded_prompts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ALL_PEERS = "all"
_ROTATIONS = (256, 64, 16)
"""Group sizes of comfy-kitchen's rotation, the one that it prefers first."""

_AUTOROUND_GROUPS = (128, 64, 32)
"""Group sizes of AutoRound, its default first; a linear whose width none divides, it leaves alone."""

_AUTOROUND_PROMPTS = 32
"""Prompts that AutoRound calibrates on, a quarter of its default; of each it records 8 denoising steps."""

_AUTOROUND_STEPS = 200
"""Training steps of each block, its default."""


@dataclass(frozen=True, kw_only=True)
class PeerCalibration:
    """Pipeline, prompts and settings of a tool that calibrates.

    Attributes:
        pipe: A full-precision pipeline of its own, which the tool may change.
        prompts: The calibration prompts.
        settings: The generation settings that the model's makers recommend.
    """

    pipe: Any
    prompts: Sequence[Prompt]
    settings: GenerationSettings


Calibrate = Callable[[int], PeerCalibration]
"""Of the most prompts that a tool takes: what it calibrates on."""
Quantize = Callable[[Callable[..., nn.Module], Sequence[str], Sequence[str], Calibrate], nn.Module]
"""Of what loads a transformer onto its device, with options of `from_pretrained`, the names of its block linears and of
its other linears, and what opens a calibration: the quantized transformer."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another tool at one setting.

    Attributes:
        name: Its name on the command line, "torchao-w4a8".
        package: The distribution that has to be installed, as pip names it.
        width: Bits of weights and activations, "w4a8".
        does: What it does to a linear, in a few words.
        quantize: Quantizes a transformer.
        calibrates: Whether it needs calibration prompts.
    """

    name: str
    package: str
    width: str
    does: str
    quantize: Quantize
    calibrates: bool = False

    @property
    def version(self) -> str:
        """The installed version."""
        return str(package_versions((self.package,))[self.package])

    @property
    def label(self) -> str:
        """Name with version, as results are labelled."""
        return f"{self.name}-{self.version}"


def find_peers(names: Sequence[str]) -> list[Peer]:
    """Return peers by name, or every installed one for `all`.

    Raises:
        InvalidInputError: An unknown name.
        ResourceError: A peer, or for `all` every peer, is not installed.
    """
    named = [name for name in dict.fromkeys(names) if name != ALL_PEERS]
    for name in named:
        if name not in PEERS:
            raise unknown_name("peer", name, PEERS)
        if not is_installed(PEERS[name].package):
            package = PEERS[name].package
            raise ResourceError(f"--peers: {name} needs a package that is not installed; pip install {package}")
    if ALL_PEERS not in names:
        return [PEERS[name] for name in named]
    installed = [peer for peer in PEERS.values() if is_installed(peer.package)]
    if not installed:
        packages = " ".join(dict.fromkeys(peer.package for peer in PEERS.values()))
        raise ResourceError(f"--peers all: no peer is installed; pip install one or more of {packages}")
    return installed


def load_with_peer(
    peer: Peer,
    source: ModelSource,
    *,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    prompts: Sequence[str] | None = None,
) -> DiffusionPipeline:
    """Load a full-precision model, the linears of its transformers' blocks quantized by a peer.

    Args:
        prompts: Calibration prompts of a peer that calibrates; None takes those of an embedded model.
    """
    pipe = load_pipeline(source, dtype=dtype, device=device, offload="none")
    computes = {component: part.dtype for component, part in transformers_of(pipe).items()}
    with source.weights_folder(computes[TRANSFORMERS[0]], pipe=pipe) as folder:
        for component in computes:
            setattr(pipe, component, None)  # its memory is for the peer's
        free_memory()
        for component, compute in computes.items():
            quantized = _quantized(peer, source, component, folder, dtype=compute, device=device, prompts=prompts)
            setattr(pipe, component, quantized)
    return pipe


def cost_of_peer(
    peer: Peer, source: ModelSource, *, device: str = "cpu", prompts: Sequence[str] | None = None
) -> dict[str, Any]:
    """Let a peer quantize the transformers in the dtype in which they are stored.

    Args:
        prompts: As of `load_with_peer`.

    Returns:
        `seconds`, reading the weights and calibration included, and `storage`: the bytes in bf16 and of what the peer
        keeps, `ratio`.
    """
    full = stored = 0
    seconds = 0.0
    with source.weights_folder(source.stored_dtype()) as folder:
        for component, plain in source.meta_transformers().items():
            before = {name: tensor.shape for name, tensor in plain.state_dict().items()}
            start = time.perf_counter()
            dtype = source.stored_dtype()
            quantized = _quantized(peer, source, component, folder, dtype=dtype, device=device, prompts=prompts)
            seconds += time.perf_counter() - start
            full += sum(shape.numel() for shape in before.values()) * BF16_BYTES
            stored += _stored_bytes(quantized, before)
    storage = {"full_precision_bytes": full, "quantized_bytes": stored, "ratio": full / stored}
    return {"seconds": seconds, "storage": storage}


def _quantized(
    peer: Peer,
    source: ModelSource,
    component: str,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: str,
    prompts: Sequence[str] | None,
) -> nn.Module:
    plain = source.meta_transformer(component)
    names = [linear.name for linear in block_linears(plain, family_of(type(plain).__name__))]
    linears = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear)]
    others = sorted(set(linears) - set(names))

    def load(**options: Any) -> nn.Module:
        transformer: nn.Module = type(plain).from_pretrained(  # type: ignore[attr-defined]
            folder, subfolder=component, variant=source.variant, torch_dtype=dtype, **options
        )
        return transformer.to(device)

    def calibrate(most: int) -> PeerCalibration:
        pipe = load_pipeline(source, device=device, offload="none")
        settings = resolve_settings(pipe, defaults=recommended_for(source))
        texts = _calibration_prompts(peer, source, prompts, most)
        return PeerCalibration(pipe=pipe, prompts=texts, settings=settings)

    return peer.quantize(load, names, others, calibrate).eval()


def _calibration_prompts(peer: Peer, source: ModelSource, prompts: Sequence[str] | None, most: int) -> list[Prompt]:
    """Return the first prompts of those given, or of those of an embedded model."""
    if prompts is None:
        if source.name not in EMBEDDED_NAMES:
            remedy = "pass --calibration-prompts FILE, or name the peers without it"
            raise InvalidInputError(f"{peer.name} needs calibration prompts; {remedy}")
        prompts = embedded_prompts(source.name, split="calibration", count=most)
    return with_first_frames(source, prompts[:most])


def _stored_bytes(quantized: nn.Module, before: Mapping[str, torch.Size]) -> int:
    """The bytes of what a peer stores; unchanged tensors count in bf16."""
    total = 0
    for name, tensor in quantized.state_dict().items():
        if type(tensor) is torch.Tensor and tensor.is_floating_point() and tensor.shape == before.get(name):
            total += tensor.numel() * BF16_BYTES
        elif isinstance(tensor, torch.Tensor):
            total += _bytes_of(tensor)
    return total


def _bytes_of(tensor: Any) -> int:
    """The bytes of a tensor, of a tensor subclass those of the tensors inside."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes_of(getattr(tensor, name)) for name in names)
    return int(tensor.numel() * tensor.element_size())


def _by_diffusers(
    config: Callable[[list[str]], Any],
    load: Callable[..., nn.Module],
    _names: Sequence[str],
    others: Sequence[str],
    _calibrate: Calibrate,
) -> nn.Module:
    """Load with a `quantization_config`, made of the names of all linears that it has to skip."""
    return load(quantization_config=config(list(others)))


def _sdnq(kept: list[str], **options: Any) -> Any:
    from diffusers import SDNQConfig

    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # compiling takes minutes and changes no result
    beginnings = [f".{name}." for name in kept]  # of the names of weights, which it marks by a point
    return SDNQConfig(modules_to_not_convert=beginnings, add_skip_keys=False, minimum_allowed_numel=0, **options)


def _torchao(kept: list[str], *, bits: int) -> Any:
    from diffusers import TorchAoConfig
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
    )

    kind = (
        Int8DynamicActivationInt8WeightConfig()
        if bits == 8
        else Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4)
    )
    return TorchAoConfig(kind, modules_to_not_convert=kept)


def _by_linear(
    replace: Callable[[nn.Linear], nn.Module],
    load: Callable[..., nn.Module],
    names: Sequence[str],
    _others: Sequence[str],
    _calibrate: Calibrate,
) -> nn.Module:
    """Replace one linear after another."""
    transformer = load()
    for name in names:
        transformer.set_submodule(name, replace(transformer.get_submodule(name)))  # type: ignore[arg-type]
    return transformer


def _bitsandbytes(linear: nn.Linear, *, bits: int) -> nn.Module:
    import bitsandbytes as bnb

    shape, bias, device = (linear.in_features, linear.out_features), linear.bias is not None, linear.weight.device
    if bits == 4:
        made = bnb.nn.Linear4bit(*shape, bias=bias, compute_dtype=linear.weight.dtype, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=made)
    else:
        made = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, threshold=6.0)
        made.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = linear.bias
    quantized: nn.Module = made.to(device)
    return quantized


def _gguf(linear: nn.Linear, *, kind: str) -> nn.Module:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    number = gguf.GGMLQuantizationType[kind]
    data = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().float().cpu().numpy(), number))
    dtype = linear.weight.dtype
    made = GGUFLinear(linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=dtype)
    made.weight, made.bias = GGUFParameter(data, quant_type=number), linear.bias
    return made


def _comfy(linear: nn.Linear, *, layout: str, **options: Any) -> nn.Module:
    from comfy_kitchen.tensor import QuantizedTensor

    group = next((size for size in _ROTATIONS if linear.in_features % size == 0), None)
    if group is None:
        raise InvalidInputError(
            f"comfy-kitchen: no rotation divides a width of {linear.in_features}; remove it from --peers"
        )
    weight = QuantizedTensor.from_float(linear.weight.data, layout, convrot_groupsize=group, **options)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _quanto(
    load: Callable[..., nn.Module],
    names: Sequence[str],
    _others: Sequence[str],
    _calibrate: Calibrate,
    *,
    bits: int,
) -> nn.Module:
    from optimum.quanto import freeze, qint4, qint8, quantize

    transformer = load()
    quantize(transformer, weights=qint4 if bits == 4 else qint8, include=list(names))
    freeze(transformer)
    return transformer


def _autoround(
    load: Callable[..., nn.Module], names: Sequence[str], others: Sequence[str], calibrate: Calibrate
) -> nn.Module:
    """Tune roundings and clips block by block on recorded calls of the transformer, and put in the packed linears."""
    from auto_round import AutoRound
    from auto_round.algorithms.block_runner import register_diffusion_output
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
    from auto_round.export.export_to_autoround.export import pack_layer

    given = calibrate(_AUTOROUND_PROMPTS)
    pipe, settings = given.pipe, given.settings
    if len(transformers_of(pipe)) > 1:
        raise InvalidInputError("auto-round tunes one transformer and this model has two; remove it from --peers")
    family = family_of(pipe.transformer)
    for blocks in family.block_lists:
        block = pipe.transformer.get_submodule(blocks)[0]
        register_diffusion_output(type(block).__name__, list(family.streams_of(blocks)))
    widths = {name: pipe.transformer.get_submodule(name).in_features for name in names}
    groups = {name: size for size in reversed(_AUTOROUND_GROUPS) for name in names if widths[name] % size == 0}
    call = {**family.call, "height": settings.height, "width": settings.width, "output_type": "latent"}
    call |= {family.frames_argument: settings.num_frames, "max_sequence_length": text_tokens(pipe, settings)}
    pipe.register_to_config(_name_or_path=None)  # which it would read as a folder
    tuned = AutoRound(
        pipe,
        scheme="W4A16",
        alg_configs=SignRoundConfig(iters=_AUTOROUND_STEPS),
        dataset=[_autoround_batch(index, prompt) for index, prompt in enumerate(given.prompts)],
        nsamples=len(given.prompts),
        device_map=str(pipe.device),
        guidance_scale=settings.guidance_scale,
        pipeline_call_kwargs=call,
        layer_config={name: {"bits": 16, "data_type": "fp"} for name in others}
        | {name: {"group_size": size} for name, size in groups.items()},
        low_cpu_mem_usage=False,  # keeps all blocks in memory
        enable_torch_compile=False,  # needs no C++ compiler
    )
    quantized, _ = tuned.quantize()
    for name in names:
        pack_layer(name, quantized, "auto_round")
    modules = {name: quantized.get_submodule(name) for name in names}
    packed = {name: module for name, module in modules.items() if not isinstance(module, nn.Linear)}
    del given, pipe, tuned, quantized, modules
    free_memory()
    transformer = load()
    for name, linear in packed.items():
        transformer.set_submodule(name, linear.to(transformer.device))  # it is tuned and packed on the CPU
    return transformer


def _autoround_batch(index: int, prompt: Prompt) -> tuple[Any, ...]:
    """A prompt as its data sets give one: number, text and, if there is one, the image."""
    image = () if prompt.image is None else ([prompt.image.pixels],)
    return [index], [str(prompt)], *image


def _diffusers(config: Callable[..., Any], **options: Any) -> Quantize:
    return partial(_by_diffusers, partial(config, **options))


def _linears(replace: Callable[..., nn.Module], **options: Any) -> Quantize:
    return partial(_by_linear, partial(replace, **options))


_SVD = {"use_svd": True, "use_hadamard": True, "use_quantized_matmul": True}
_SDNQ, _TORCHAO, _BITSANDBYTES, _QUANTO = "sdnq", "torchao", "bitsandbytes", "optimum-quanto"
_GGUF, _COMFY, _AUTOROUND = "gguf", "comfy-kitchen", "auto-round"
_CALIBRATING = (_AUTOROUND,)
_ROW, _ASYMMETRIC, _INT4 = "TensorWiseINT8Layout", "AsymW4A8Int8Layout", "TensorCoreConvRotW4A4Layout"
_TABLE: tuple[tuple[str, str, str, Quantize], ...] = (
    ("sdnq-w8a8", _SDNQ, "int8, int8 products", _diffusers(_sdnq, weights_dtype="int8", use_quantized_matmul=True)),
    ("sdnq-w4a16", _SDNQ, "uint4 in groups", _diffusers(_sdnq, weights_dtype="uint4")),
    ("sdnq-w4a8", _SDNQ, "uint4, SVD branch, Hadamard", _diffusers(_sdnq, weights_dtype="uint4", **_SVD)),
    ("torchao-w8a8", _TORCHAO, "int8 per channel, int8 per token", _diffusers(_torchao, bits=8)),
    ("torchao-w4a8", _TORCHAO, "int4 in groups of 32, int8 per token", _diffusers(_torchao, bits=4)),
    ("bitsandbytes-w8a8", _BITSANDBYTES, "LLM.int8, threshold 6", _linears(_bitsandbytes, bits=8)),
    ("bitsandbytes-w4a16", _BITSANDBYTES, "NF4 in groups of 64", _linears(_bitsandbytes, bits=4)),
    ("quanto-w8a16", _QUANTO, "qint8 per channel", partial(_quanto, bits=8)),
    ("quanto-w4a16", _QUANTO, "qint4 in groups", partial(_quanto, bits=4)),
    ("gguf-w8a16", _GGUF, "Q8_0", _linears(_gguf, kind="Q8_0")),
    ("gguf-w4a16", _GGUF, "Q4_0", _linears(_gguf, kind="Q4_0")),
    ("autoround-w4a16", _AUTOROUND, "int4 in groups of up to 128, SignSGD", _autoround),
    ("comfy-w8a8", _COMFY, "int8 per channel, ConvRot", _linears(_comfy, layout=_ROW, per_channel=True, convrot=True)),
    ("comfy-w4a8", _COMFY, "16 levels in groups of 16, ConvRot", _linears(_comfy, layout=_ASYMMETRIC)),
    ("comfy-w4a4", _COMFY, "int4 per channel, ConvRot", _linears(_comfy, layout=_INT4)),
)
PEERS: Mapping[str, Peer] = {
    name: Peer(
        name=name,
        package=package,
        width=name.rpartition("-")[2],
        does=does,
        quantize=quantize,
        calibrates=package in _CALIBRATING,
    )
    for name, package, does, quantize in _TABLE
}
"""The peers by name, at the settings that each recommends."""
