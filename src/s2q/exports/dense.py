"""Full precision again: every packed linear as the ordinary one that computes the same, up to its input's rounding.

Transforms and branches are multiplied into the weight; activations are not quantized. A pipeline folder that diffusers,
and every program which reads its models, loads without s2q.
"""

import torch
from torch import Tensor

from s2q.core.input_path import PARTS
from s2q.exports.target import LinearForm, Target, Tensors
from s2q.nn import PackedLinear


def _obstacle(form: LinearForm) -> str | None:
    return None


def _encode(layer: PackedLinear, form: LinearForm) -> dict[str, Tensor]:
    weight, bias = layer.effective_parameters(form.dtype)
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def _decode(tensors: Tensors, form: LinearForm) -> Tensor:
    return tensors["weight"].float()


DENSE = Target(
    name="diffusers",
    does="full-precision weights, a plain diffusers folder",
    loading="DiffusionPipeline.from_pretrained(OUT)",
    recipes=("any recipe except q-vdit-*",),
    parts=frozenset(PARTS) - {"estimator_frames"} - {name for name, part in PARTS.items() if part.apply is not None},
    obstacle=_obstacle,
    encode=_encode,
    decode=_decode,
    kind=lambda form: "full precision",
    tolerance=lambda form: torch.finfo(form.dtype).eps / 2,
    rounding="weights are rounded to the compute dtype",
    stores_codes=False,
)
