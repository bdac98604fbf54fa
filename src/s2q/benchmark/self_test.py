"""Self-tests: every backend of every op, and of packed linears, against the reference on the CPU.

    error = ‖y - y_ref‖ / ‖y_ref‖

Codes count as what they represent, codes · Δ. A kernel may round a half-precision product to the other side, which
moves a code by one; a wrong kernel has an error near 1. Shapes are small, and tiles are not filled.

Shapes: `M` tokens, `I/O` in/out features, `R` rank, `H` heads, `D` head dim.
"""

import copy
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from s2q.common.errors import first_line
from s2q.common.torch_state import in_fresh_torch_state
from s2q.core.codebook import TABLES, level_unit, levels_of
from s2q.core.input_path import InputTensors
from s2q.core.packing import pack_codes
from s2q.core.schemes import (
    FP4_GROUPS,
    LLOYD_MAX_INT8,
    NVFP4,
    LinearScheme,
    PerChannel,
    PerGroup,
    PerToken,
    QuantScheme,
)
from s2q.nn.dequantized import FASTEST
from s2q.nn.packed import PackedLinear
from s2q.nn.runtime import set_backend
from s2q.ops import (
    activation_path,
    attention_colsum,
    fake_quantize,
    int8_attention,
    level_values,
    rescaled_int_matmul,
    token_levels,
    weight_only_matmul,
)
from s2q.ops.dispatch import FP4, backend_obstacle
from s2q.rounding import round_rtn

REFERENCE = "reference"
PASSED, FAILED, UNAVAILABLE = "passed", "failed", "unavailable"

_M, _I, _O, _R, _H, _D = 50, 96, 48, 4, 2, 24
_SEED = 0
_EXACT, _FP32, _CODES, _BF16 = 0.0, 1e-5, 1e-2, 5e-2

Compute = Callable[[str, str], Tensor]
"""Computes an op on drawn tensors, by device and backend."""


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """An op with drawn tensors.

    Attributes:
        backends: Names of its backends besides the reference.
        draw: Draws tensors on the CPU and returns what computes the op with them.
        tolerance: Largest error that passes.
    """

    backends: Collection[str]
    draw: Callable[[Generator], Compute]
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """The result of one backend of one op on a device.

    Attributes:
        tolerance: Largest error that passes.
        status: "passed", "failed", or "unavailable" if the device does not have the backend.
        error: Relative to the reference; None if it did not run.
        reason: For a status other than "passed".
    """

    device: str
    op: str
    backend: str
    tolerance: float
    status: str = UNAVAILABLE
    error: float | None = None
    reason: str | None = None
    seconds: float = 0.0


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _codes(generator: Generator, rows: int, columns: int, *, num_bits: int) -> Tensor:
    limit = 1 << (num_bits - 1)
    return torch.randint(-limit, limit, (rows, columns), dtype=torch.int8, generator=generator)


def _orthogonal(generator: Generator, rows: int, columns: int) -> Tensor:
    basis: Tensor = torch.linalg.qr(_normal(generator, rows, columns))[0]
    return basis


def _activation_path(generator: Generator) -> Compute:
    x = _normal(generator, _M, _I).bfloat16()
    parts: dict[str, Any] = {
        "shift": 0.3 * _normal(generator, _I),
        "scale": _normal(generator, _I).exp(),
        "left": _orthogonal(generator, 8, 8),
        "right": _orthogonal(generator, _I // 8, _I // 8),
        "low_rank_basis": _orthogonal(generator, _I, _R).bfloat16(),
        "clip_ratio": torch.tensor([0.9]),
    }

    def compute(device: str, backend: str) -> Tensor:
        path = InputTensors(**{name: tensor.to(device) for name, tensor in parts.items()})
        codes, scale, coefficients = activation_path.activation_path(x.to(device), path, num_bits=8, backend=backend)
        assert coefficients is not None
        return torch.cat([codes * scale, coefficients], dim=1)

    return compute


def _rescaled_int_matmul(generator: Generator) -> Compute:
    x, w = _codes(generator, _M, _I, num_bits=8), _codes(generator, _O, _I, num_bits=4)
    scales = _normal(generator, _M, 1).abs(), _normal(generator, _O).abs()
    bias, packed = _normal(generator, _O), pack_codes(w, num_bits=4)

    def compute(device: str, backend: str) -> Tensor:
        tensors = (tensor.to(device) for tensor in (x, scales[0], packed, scales[1], bias))
        return rescaled_int_matmul.rescaled_int_matmul(
            *tensors, x_bits=8, w_bits=4, out_dtype=torch.float32, backend=backend
        )

    return compute


def _weight_only_matmul(generator: Generator) -> Compute:
    x, packed = _normal(generator, 2, _I), pack_codes(_codes(generator, _O, _I, num_bits=4), num_bits=4)
    scale, bias = _normal(generator, _O).abs(), _normal(generator, _O)

    def compute(device: str, backend: str) -> Tensor:
        tensors = (tensor.to(device) for tensor in (x, packed, scale, bias))
        return weight_only_matmul.weight_only_matmul(*tensors, w_bits=4, backend=backend)

    return compute


def _level_values(generator: Generator) -> Compute:
    levels = torch.tensor(TABLES, dtype=torch.int8).flatten()
    packed = pack_codes(_codes(generator, _O, _I, num_bits=4), num_bits=4)
    group_scale = _codes(generator, _O, _I // 16, num_bits=8)

    def compute(device: str, backend: str) -> Tensor:
        tensors = (tensor.to(device) for tensor in (levels, packed, group_scale))
        return level_values.level_values(*tensors, in_features=_I, backend=backend)

    return compute


def _token_levels(generator: Generator) -> Compute:
    scheme = QuantScheme(num_bits=4, granularity=PerToken(), dynamic=True, levels=LLOYD_MAX_INT8)
    x, levels, unit = _normal(generator, _M, _I), levels_of(scheme, _I), level_unit(scheme, _I)
    assert levels is not None

    def compute(device: str, backend: str) -> Tensor:
        codes, scale = token_levels.token_levels(x.to(device), levels.to(device), unit=unit, backend=backend)
        return codes * scale

    return compute


def _fake_quantize(generator: Generator) -> Compute:
    x, upstream, ratio = _normal(generator, _M, _I), _normal(generator, _M, _I), torch.tensor([0.9])

    def compute(device: str, backend: str) -> Tensor:
        inputs = [tensor.detach().to(device).requires_grad_() for tensor in (x, ratio)]
        with torch.enable_grad():
            values = fake_quantize.fake_quantize_rows(inputs[0], num_bits=4, clip_ratio=inputs[1], backend=backend)
        gradients = torch.autograd.grad(values, inputs, upstream.to(device))
        return torch.cat([tensor.detach().flatten() for tensor in (values, *gradients)])

    return compute


def _attention(op: Callable[..., Tensor], *, reads: int) -> Callable[[Generator], Compute]:
    """Return what draws an op of attention that reads so many of queries, keys and values."""

    def draw(generator: Generator) -> Compute:
        qkv = [_normal(generator, 1, _H, _M, _D).bfloat16() for _ in range(reads)]
        return lambda device, backend: op(*(tensor.to(device) for tensor in qkv), backend=backend)

    return draw


def _linear(scheme: LinearScheme) -> Callable[[Generator], Compute]:
    """Return what draws a packed linear of a scheme, and its input."""

    def draw(generator: Generator) -> Compute:
        rounded = round_rtn(_normal(generator, _O, _I), scheme.weight)
        layer = PackedLinear.from_rounded(rounded, bias=_normal(generator, _O), scheme=scheme)
        x = _normal(generator, 1, _M, _I)

        def compute(device: str, backend: str) -> Tensor:
            moved = copy.deepcopy(layer).to(device)
            set_backend(moved, backend)
            output: Tensor = moved(x.to(device))
            return output

        return compute

    return draw


_W4A8 = LinearScheme(
    weight=QuantScheme(num_bits=4, granularity=PerChannel()),
    activation=QuantScheme(num_bits=8, granularity=PerToken(), dynamic=True),
)
_FP4 = LinearScheme(
    weight=QuantScheme(num_bits=4, granularity=PerGroup(group_size=FP4_GROUPS[NVFP4]), levels=NVFP4),
    activation=QuantScheme(num_bits=4, granularity=PerGroup(group_size=FP4_GROUPS[NVFP4]), levels=NVFP4, dynamic=True),
)

OPS: Mapping[str, OpCase] = {
    "activation_path": OpCase(backends=activation_path.BACKENDS, draw=_activation_path, tolerance=_BF16),
    "rescaled_int_matmul": OpCase(backends=rescaled_int_matmul.BACKENDS, draw=_rescaled_int_matmul, tolerance=_FP32),
    "weight_only_matmul": OpCase(backends=weight_only_matmul.BACKENDS, draw=_weight_only_matmul, tolerance=_FP32),
    "level_values": OpCase(backends=level_values.BACKENDS, draw=_level_values, tolerance=_EXACT),
    "fake_quantize": OpCase(backends=fake_quantize.BACKENDS, draw=_fake_quantize, tolerance=_FP32),
    "token_levels": OpCase(backends=token_levels.BACKENDS, draw=_token_levels, tolerance=_CODES),
    "attention_colsum": OpCase(
        backends=attention_colsum.BACKENDS, draw=_attention(attention_colsum.attention_colsum, reads=2), tolerance=_BF16
    ),
    "int8_attention": OpCase(
        backends=int8_attention.BACKENDS, draw=_attention(int8_attention.int8_attention, reads=3), tolerance=_BF16
    ),
    "linear w4a8": OpCase(backends=(*rescaled_int_matmul.BACKENDS, FASTEST), draw=_linear(_W4A8), tolerance=_CODES),
    "linear nvfp4": OpCase(backends=(FP4,), draw=_linear(_FP4), tolerance=_BF16),
}
"""The ops with a table of backends each, and packed linears."""


@in_fresh_torch_state
@torch.no_grad()
def self_tests(device: str) -> list[SelfTest]:
    """Run every backend that an op has on a device ("cpu", "cuda:0"), and compare it with the reference on the CPU."""
    results, probe = [], torch.empty(0, device=device)
    for op, case in OPS.items():
        compute: Compute | None = None
        for backend in case.backends:
            if backend == REFERENCE and device == "cpu":
                continue
            test = SelfTest(device=device, op=op, backend=backend, tolerance=case.tolerance)
            obstacle = backend_obstacle(backend, probe)
            if obstacle is not None:
                results.append(replace(test, status=UNAVAILABLE, reason=obstacle))
                continue
            if compute is None:
                compute = case.draw(Generator().manual_seed(_SEED))
                expected = compute("cpu", REFERENCE)
            results.append(_run(test, compute, expected))
    return results


def _run(test: SelfTest, compute: Compute, expected: Tensor) -> SelfTest:
    start = time.perf_counter()
    error, reason = None, None
    try:
        result = compute(test.device, test.backend).cpu()
    except Exception as failure:  # whatever a compiler, a driver or a library raises is the finding
        reason = f"{type(failure).__name__}: {first_line(failure)}"
    else:
        error, reason = _compared(result, expected, test.tolerance)
    seconds = time.perf_counter() - start
    return replace(test, status=PASSED if reason is None else FAILED, error=error, reason=reason, seconds=seconds)


def _compared(result: Tensor, expected: Tensor, tolerance: float) -> tuple[float | None, str | None]:
    """Return the error of a result, and why it fails; None if it passes."""
    if result.shape != expected.shape:
        return None, f"got shape {tuple(result.shape)}; expected {tuple(expected.shape)}"
    if not bool(result.isfinite().all()):
        return None, "got values that are not finite"
    error = float((result.double() - expected.double()).norm() / expected.double().norm())
    return error, None if error <= tolerance else f"error {error:.2g}; expected at most {tolerance:g}"
