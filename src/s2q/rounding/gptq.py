"""GPTQ: rounding column by column, each error made up for by the columns that are still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023. With
U the upper triangular factor of the inverse Hessian, H⁻¹ = Uᵀ U, for i = 1 … I:

    q_i = Δ · clamp(round(w_i / Δ)),    e_i = (w_i - q_i) / U_ii,    w_j ← w_j - e_i · U_ij  for j > i

in blocks of columns, so most of the work is matrix products. Columns are taken in the order of falling diagonal of H
(act-order). Scales are computed before and stay (static), so the layout of the codes is that of RTN.

Beyond the paper: the rows of a weight do not depend on each other, hence a row for which rounding to nearest has the
smaller Hessian-weighted error (a clamped one, mostly) takes that; GPTQ is then never worse than RTN. A dead column (its
input was zero in all of calibration, its diagonal is 0) is rounded to nearest and not set to zero: it costs nothing
there, and it still works where the input is not zero.

Shapes: `I/O` in/out features, `G` groups, `K` columns of a block.
"""

import logging
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError, S2QError
from s2q.core.codebook import levels_of
from s2q.core.qparams import (
    ClipRatio,
    RoundedWeight,
    dequantize,
    dequantize_weight,
    quantize,
    quantize_weight,
    weight_scale,
)
from s2q.core.schemes import QuantScheme
from s2q.rounding.base import Rounding
from s2q.rounding.hessian import hessian_error

logger = logging.getLogger(__name__)

_SMALLEST_RETRY = 1e-3  # dampening of the first retry where none was asked for
_MAX_RETRIES = 4  # each with ten times the dampening


@dataclass(frozen=True, kw_only=True)
class GPTQ(Rounding):
    """Options of GPTQ.

    Attributes:
        dampening_frac: What is added to the diagonal of H, as a fraction of its mean.
        block_size: Columns of a block.
        allow_fallback: Whether a weight is rounded to nearest if its H is not finite or no factorization succeeds.
    """

    needs_hessian: ClassVar[bool] = True

    method: Literal["gptq"] = "gptq"
    dampening_frac: float = field(default=0.01, metadata={"ge": 0})
    block_size: int = field(default=128, metadata={"ge": 1})
    allow_fallback: bool = True

    def round(
        self, weight: Tensor, scheme: QuantScheme, *, clip_ratio: ClipRatio = None, hessian: Tensor | None = None
    ) -> tuple[RoundedWeight, dict[str, Any]]:
        """Round a weight by `round_gptq`; see `Rounding.round`."""
        assert hessian is not None
        rounded, report = round_gptq(weight, scheme, hessian=hessian, clip_ratio=clip_ratio, options=self)
        return rounded, asdict(report)


@dataclass(frozen=True, kw_only=True)
class GPTQReport:
    """Result of GPTQ on one weight.

    Attributes:
        rtn_error: ½ · tr(ΔW H ΔWᵀ) of rounding to nearest with the same scales; None where H is not finite.
        error: The same of the result, at most `rtn_error`.
        dampening_frac: The one that the factorization succeeded with; None where it never did.
        retries: How many factorizations failed before.
        dead_columns: Columns whose input was zero in all of calibration.
        rtn_rows: Output channels that rounding to nearest served better.
        fallback: Why the whole weight was rounded to nearest; None if it was not.
    """

    rtn_error: float | None
    error: float | None
    dampening_frac: float | None
    retries: int
    dead_columns: int
    rtn_rows: int
    fallback: str | None


@torch.no_grad()
def round_gptq(
    weight: Tensor,
    scheme: QuantScheme,
    *,
    hessian: Tensor,
    clip_ratio: ClipRatio = None,
    options: GPTQ | None = None,
) -> tuple[RoundedWeight, GPTQReport]:
    """Round a weight so that the error of the layer's output is small, not that of the weight.

    Args:
        weight: [O, I], any floating dtype; computed in fp32, the factorization in fp64.
        scheme: PerChannel or PerGroup.
        hessian: [I, I] of the layer's input, transformed and quantized; see `HessianAccumulator`.
        clip_ratio: Factor in (0, 1] on the scale, broadcasts to it.
        options: None is the defaults.

    Raises:
        InvalidInputError: If shapes do not fit, or W is not finite.
        S2QError: If H is not finite or no factorization succeeds, and the options do not allow the fallback.
    """
    options = options or GPTQ()
    weight, hessian = weight.float(), hessian.to(device=weight.device, dtype=torch.float32)
    _check(weight, hessian)
    scale = weight_scale(weight, scheme, clip_ratio=clip_ratio)
    levels = levels_of(scheme, weight.shape[1], device=weight.device)
    nearest = quantize_weight(weight, scale, num_bits=scheme.num_bits, levels=levels)
    if not bool(hessian.isfinite().all()):
        return RoundedWeight(codes=nearest, scale=scale), _not_finite(hessian, options, rows=len(weight))
    rtn_rows = hessian_error(dequantize_weight(nearest, scale, levels=levels) - weight, hessian)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor, dampening_frac, retries = _factorize(hessian[order][:, order], options)
    codes, rows, worse = nearest, rtn_rows, torch.ones_like(rtn_rows, dtype=torch.bool)
    if factor is not None:
        groups, size = scale.view(len(scale), -1), options.block_size  # [O, G], or [O, 1] per channel
        columns = groups.repeat_interleave(weight.shape[1] // groups.shape[1], dim=1)[:, order]
        codes = torch.empty_like(nearest)
        codes[:, order] = _round_columns(weight[:, order], columns, factor, scheme=scheme, block_size=size)
        rows = hessian_error(dequantize_weight(codes, scale, levels=levels) - weight, hessian)
        worse = rows > rtn_rows
        codes[worse] = nearest[worse]
    report = GPTQReport(
        rtn_error=float(rtn_rows.sum()),
        error=float(torch.where(worse, rtn_rows, rows).sum()),
        dampening_frac=dampening_frac,
        retries=retries,
        dead_columns=int((hessian.diagonal() == 0).sum()),
        rtn_rows=int(worse.sum()),
        fallback=None if factor is not None else f"no positive definite Hessian in {retries} tries",
    )
    return RoundedWeight(codes=codes, scale=scale), report


def _not_finite(hessian: Tensor, options: GPTQ, *, rows: int) -> GPTQReport:
    """The report of rounding to nearest where the Hessian contains NaN or infinite values."""
    reason = "the Hessian contains NaN or infinite values"
    if not options.allow_fallback:
        raise S2QError(
            f"gptq: {reason}: its input does, or its squares overflow float32; check the model's activations, or use "
            "rounding.allow_fallback=true (round to nearest)"
        )
    return GPTQReport(
        rtn_error=None,
        error=None,
        dampening_frac=None,
        retries=0,
        dead_columns=int((hessian.diagonal() == 0).sum()),
        rtn_rows=rows,
        fallback=reason,
    )


def _check(weight: Tensor, hessian: Tensor) -> None:
    in_features = weight.shape[1]
    if hessian.shape != (in_features, in_features):
        raise InvalidInputError(
            f"gptq: got a Hessian of shape {list(hessian.shape)}; expected [{in_features}, {in_features}]"
        )
    if not bool(weight.isfinite().all()):
        raise InvalidInputError("gptq: the weight contains NaN or infinite values; check the model")


def _factorize(hessian: Tensor, options: GPTQ) -> tuple[Tensor | None, float | None, int]:
    """Find the upper triangular fp32 U with (H + dampening)⁻¹ = Uᵀ U; also the dampening used and the failed tries.

    With the order of rows and columns reversed, the lower Cholesky factor of H becomes an upper triangular R with
    H = R Rᵀ, and U = R⁻¹: one factorization and one triangular inverse, no inverse of H. At most four fp64 matrices
    exist at a time.
    """
    wide = hessian.double()
    dead = wide.diagonal() == 0
    wide.diagonal()[dead] = 1
    mean = float(wide.diagonal()[~dead].mean()) if bool((~dead).any()) else 1.0
    for retry in range(_MAX_RETRIES + 1):
        frac = options.dampening_frac
        if retry > 0:
            frac = max(10 * frac, _SMALLEST_RETRY) * 10 ** (retry - 1)
        reverse = wide.flip(0, 1)
        reverse.diagonal().add_(frac * mean)
        reverse, info = torch.linalg.cholesky_ex(reverse)
        if int(info) == 0:
            reverse = reverse.flip(0, 1)
            upper = torch.linalg.solve_triangular(
                reverse, torch.eye(len(wide), dtype=wide.dtype, device=wide.device), upper=True
            )
            if bool(upper.isfinite().all()):
                return upper.float(), frac, retry
        logger.debug("gptq: the Hessian with dampening_frac=%g is not positive definite", frac)
    tries = _MAX_RETRIES + 1
    if not options.allow_fallback:
        raise S2QError(
            f"gptq: the Hessian is not positive definite after {tries} tries with growing dampening; "
            "use more calibration samples, a larger dampening_frac, or rounding.allow_fallback=true (round to nearest)"
        )
    return None, None, tries


def _round_columns(weight: Tensor, scale: Tensor, factor: Tensor, *, scheme: QuantScheme, block_size: int) -> Tensor:
    """Carry out GPTQ on columns in their order; weight and scale [O, I], factor U [I, I]."""
    weight = weight.clone()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    in_features = weight.shape[1]
    levels = levels_of(scheme, in_features, device=weight.device)
    for start in range(0, in_features, block_size):
        stop = min(start + block_size, in_features)
        errors_OK = torch.zeros_like(weight[:, start:stop])
        for column in range(start, stop):
            value = weight[:, column]
            column_scale = scale[:, column]
            codes[:, column] = quantize(value, column_scale, num_bits=scheme.num_bits, levels=levels)
            error = (value - dequantize(codes[:, column], column_scale, levels=levels)) / factor[column, column]
            weight[:, column + 1 : stop].addr_(error, factor[column, column + 1 : stop], alpha=-1)
            errors_OK[:, column - start] = error
        weight[:, stop:].addmm_(errors_OK, factor[start:stop, stop:], alpha=-1)
    return codes
