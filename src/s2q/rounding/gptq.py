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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError, S2QError
from s2q.core.codebook import levels_of, nearest_level
from s2q.core.qparams import (
    ClipRatio,
    RoundedWeight,
    code_range,
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
        self,
        weights: Sequence[Tensor],
        scheme: QuantScheme,
        *,
        clip_ratios: Sequence[ClipRatio],
        hessian: Tensor | None = None,
    ) -> list[tuple[RoundedWeight, dict[str, Any]]]:
        """Round weights by `round_gptq`; see `Rounding.round`."""
        assert hessian is not None
        rounded = round_gptq(weights, scheme, hessian=hessian, clip_ratios=clip_ratios, options=self)
        return [(weight, asdict(report)) for weight, report in rounded]


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
    weights: Sequence[Tensor],
    scheme: QuantScheme,
    *,
    hessian: Tensor,
    clip_ratios: Sequence[ClipRatio] | None = None,
    options: GPTQ | None = None,
) -> list[tuple[RoundedWeight, GPTQReport]]:
    """Round weights that read one input to make the errors of the layers' outputs small, not those of the weights.

    Their rows are independent: they share the factorization and the pass over the columns.

    Args:
        weights: [O, I] each, any floating dtype; computed in fp32, the factorization in fp64.
        scheme: PerChannel or PerGroup.
        hessian: [I, I] of the layers' input, transformed and quantized; see `HessianAccumulator`.
        clip_ratios: Factors in (0, 1] on the scale of each, broadcast to it.
        options: None is the defaults.

    Raises:
        InvalidInputError: If shapes do not fit, or W is not finite.
        S2QError: If H is not finite or no factorization succeeds, and the options do not allow the fallback.
    """
    options = options or GPTQ()
    weights = [weight.float() for weight in weights]
    hessian = hessian.to(device=weights[0].device, dtype=torch.float32)
    for weight in weights:
        _check(weight, hessian)
    ratios = [None] * len(weights) if clip_ratios is None else clip_ratios
    scales = [weight_scale(weight, scheme, clip_ratio=ratio) for weight, ratio in zip(weights, ratios, strict=True)]
    if not bool(hessian.isfinite().all()):
        return [
            (_nearest(weight, scale, scheme), _not_finite(hessian, options, rows=len(weight)))
            for weight, scale in zip(weights, scales, strict=True)
        ]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor, dampening_frac, retries = _factorize(hessian[order][:, order], options)
    codes: list[Tensor | None] = [None] * len(weights)
    if factor is not None:
        rounded = _round_columns(torch.cat(weights), torch.cat(scales), factor, order, scheme=scheme, options=options)
        codes = list(torch.split(rounded, [len(weight) for weight in weights]))
    results, dead_columns = [], int((hessian.diagonal() == 0).sum())
    for weight, scale, rounded_codes in zip(weights, scales, codes, strict=True):
        kept, errors = _better_rows(weight, scale, rounded_codes, scheme, hessian)
        report = GPTQReport(
            **errors,
            dampening_frac=dampening_frac,
            retries=retries,
            dead_columns=dead_columns,
            fallback=None if factor is not None else f"no positive definite Hessian in {retries} tries",
        )
        results.append((kept, report))
    return results


def _nearest(weight: Tensor, scale: Tensor, scheme: QuantScheme) -> RoundedWeight:
    levels = levels_of(scheme, weight.shape[1], device=weight.device)
    codes = quantize_weight(weight, scale, num_bits=scheme.num_bits, levels=levels)
    return RoundedWeight(codes=codes, scale=scale)


def _better_rows(
    weight: Tensor, scale: Tensor, codes: Tensor | None, scheme: QuantScheme, hessian: Tensor
) -> tuple[RoundedWeight, dict[str, Any]]:
    """Return the better of GPTQ's codes, if there are any, and the nearest ones, row by row; and the errors."""
    levels, nearest = levels_of(scheme, weight.shape[1], device=weight.device), _nearest(weight, scale, scheme)

    def errors(codes: Tensor) -> Tensor:
        return hessian_error(dequantize_weight(codes, scale, levels=levels) - weight, hessian)

    rtn_rows = errors(nearest.codes)
    if codes is None:
        rows, worse, codes = rtn_rows, torch.ones_like(rtn_rows, dtype=torch.bool), nearest.codes
    else:
        rows = errors(codes)
        worse = rows > rtn_rows
        codes = torch.where(worse[:, None], nearest.codes, codes)
    report = {
        "rtn_error": float(rtn_rows.sum()),
        "error": float(torch.where(worse, rtn_rows, rows).sum()),
        "rtn_rows": int(worse.sum()),
    }
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


def _round_columns(
    weight: Tensor, scale: Tensor, factor: Tensor, order: Tensor, *, scheme: QuantScheme, options: GPTQ
) -> Tensor:
    """Carry out GPTQ on the columns of weight [O, I] in an order [I]; factor U [I, I]; scale [O] or [O, G].

    Columns are rows of memory meanwhile, and each takes five operations: on a GPU their number is what takes time. What
    `ahead` multiplies is (w - q), U_ij / U_ii instead of U_ij and e = (w - q) / U_ii.
    """
    rest, groups = weight.t()[order], scale.view(len(scale), -1).t()  # [I, O], and [G, O] or [1, O]
    scales = groups[order.div(len(order) // len(groups), rounding_mode="floor")]
    divisors = torch.where(scales == 0, 1, scales)
    codes = torch.empty(rest.shape, dtype=torch.int8, device=weight.device)
    levels = levels_of(scheme, len(order), device=weight.device)
    for start in range(0, len(order), options.block_size):
        stop = min(start + options.block_size, len(order))
        block, ahead = rest[start:stop], factor[start:stop] / factor.diagonal()[start:stop, None]
        units, errors = torch.empty_like(block), torch.empty_like(block)
        for column in range(stop - start):
            value = units[column]
            torch.div(block[column], divisors[start + column], out=value)
            if levels is None:
                value.round_().clamp_(*code_range(scheme.num_bits))
            else:
                value.copy_(levels[nearest_level(value, levels).long()])
            torch.addcmul(block[column], value, scales[start + column], value=-1, out=errors[column])
            block[column + 1 :].addr_(ahead[column, start + column + 1 : stop], errors[column], alpha=-1)
        codes[start:stop] = quantize(units, units.new_ones(()), num_bits=scheme.num_bits, levels=levels)
        rest[stop:].addmm_(ahead[:, stop:].t(), errors, alpha=-1)
    result = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    result[:, order] = codes.t()
    return result
