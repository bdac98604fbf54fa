"""The backend of the packed linears and the int8 attention of a model."""

import logging

from torch import nn

from s2q.common.errors import InvalidInputError, unknown_name
from s2q.nn.attention import attention_modes
from s2q.nn.dequantized import FASTEST, runs_dequantized
from s2q.nn.fp4 import has_fp4
from s2q.nn.packed import PackedLinear
from s2q.ops.dispatch import FP4
from s2q.ops.rescaled_int_matmul import BACKENDS

logger = logging.getLogger(__name__)


def set_backend(model: nn.Module, backend: str) -> None:
    """Choose how the packed linears and the int8 attention of a model are computed.

    Args:
        model: Anything with packed linears, a transformer for example; may have none.
        backend: "auto", "reference", "cpu", "triton", "fastest" (`nn.dequantized`: other results than those that were
            judged, closer to full precision, and memory for what is dequantized; attention without a kernel runs in
            full precision) or "fp4" (`nn.fp4`: for linears whose weights and inputs are NVFP4; the others run as with
            "auto").

    Raises:
        InvalidInputError: If there is no such backend, or no linear for "fp4". Whether it can run is found at the first
            call.
    """
    check_backend(backend)
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    if backend == FP4 and linears and not any(has_fp4(linear) for linear in linears):
        raise InvalidInputError(
            "backend 'fp4': no linear of the model has levels=nvfp4 of weights and activations; use backend='auto'"
        )
    for linear in linears:
        linear.backend = backend
        linear.kept.release()
    for mode in attention_modes(model):
        mode.backend = backend
    dequantized = sum(runs_dequantized(linear) for linear in linears)
    if dequantized:
        logger.info("backend 'fastest': %d of %d quantized linears run dequantized", dequantized, len(linears))


def check_backend(backend: str) -> None:
    """Raise InvalidInputError if `set_backend` knows no such backend."""
    names = ("auto", *BACKENDS, FASTEST, FP4)
    if backend not in names:
        raise unknown_name("backend", backend, names)
