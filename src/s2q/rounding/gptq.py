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

Weights with tables (`rounding.table`) take their groups one after the other, in the order of falling mean diagonal,
and columns of a group in that of theirs. Table and scale of a group are searched when its turn comes, for the weights
that it then has, with 1 / U_ii² as the importance of a column. The error ½ · tr(ΔW H ΔWᵀ) of random weights in groups
of 16 with correlated inputs is 0.34 of that of uniform levels per channel, and 0.50 if tables are searched before.

Shapes: `I/O` in/out features, `G` groups, `K` columns of a block.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError, S2QError
from s2q.core.qparams import ClipRatio, RoundedWeight, rounded_values
from s2q.core.schemes import QuantScheme, num_groups
from s2q.rounding.base import Rounding
from s2q.rounding.columns import ScaledColumns, TableColumns
from s2q.rounding.hessian import hessian_error
from s2q.rounding.rtn import round_rtn

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
        rtn_error: ½ · tr(ΔW H ΔWᵀ) of rounding to nearest, with the same scales of rows; None where H is not finite.
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
    nearest = [round_rtn(weight, scheme, clip_ratio=ratio) for weight, ratio in zip(weights, ratios, strict=True)]
    if not bool(hessian.isfinite().all()):
        return [(rounded, _not_finite(hessian, options, rows=len(rounded.codes))) for rounded in nearest]
    order = _order(hessian.diagonal(), scheme)
    factor, dampening_frac, retries = _factorize(hessian[order][:, order], options)
    found: Sequence[RoundedWeight | None] = [None] * len(weights)
    if factor is not None:
        scale = torch.cat([rounded.scale for rounded in nearest])
        columns = (
            TableColumns(scale, scheme, order, importance=_importance(factor, hessian.diagonal()[order]))
            if scheme.has_table
            else ScaledColumns(scale, scheme, order)
        )
        _round_columns(torch.cat(weights), columns, factor, order, block_size=options.block_size)
        found = columns.rounded([len(weight) for weight in weights])
    results, dead_columns = [], int((hessian.diagonal() == 0).sum())
    for weight, by_rtn, by_gptq in zip(weights, nearest, found, strict=True):
        kept, errors = _better_rows(weight, by_rtn, by_gptq, scheme, hessian)
        report = GPTQReport(
            **errors,
            dampening_frac=dampening_frac,
            retries=retries,
            dead_columns=dead_columns,
            fallback=None if factor is not None else f"no positive definite Hessian in {retries} tries",
        )
        results.append((kept, report))
    return results


def _better_rows(
    weight: Tensor, nearest: RoundedWeight, found: RoundedWeight | None, scheme: QuantScheme, hessian: Tensor
) -> tuple[RoundedWeight, dict[str, Any]]:
    """Return the better of GPTQ's rows, if there are any, and those rounded to nearest; and the errors."""

    def errors(rounded: RoundedWeight) -> Tensor:
        return hessian_error(rounded_values(rounded, scheme) - weight, hessian)

    rtn_rows = errors(nearest)
    rows, worse, kept = rtn_rows, torch.ones_like(rtn_rows, dtype=torch.bool), nearest
    if found is not None:
        rows = errors(found)
        worse = rows > rtn_rows
        kept = RoundedWeight(
            codes=torch.where(worse[:, None], nearest.codes, found.codes),
            scale=nearest.scale,
            group_scale=None
            if nearest.group_scale is None or found.group_scale is None
            else torch.where(worse[:, None], nearest.group_scale, found.group_scale),
        )
    report = {
        "rtn_error": float(rtn_rows.sum()),
        "error": float(torch.where(worse, rtn_rows, rows).sum()),
        "rtn_rows": int(worse.sum()),
    }
    return kept, report


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


def _order(diagonal: Tensor, scheme: QuantScheme) -> Tensor:
    """The order of the columns, [I], by falling diagonal [I] of H; those of a group with a table stay together."""
    if not scheme.has_table:
        return torch.argsort(diagonal, descending=True, stable=True)
    groups = diagonal.view(num_groups(scheme, len(diagonal)), -1)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    by_mean = torch.argsort(groups.mean(dim=1), descending=True, stable=True)
    return (by_mean[:, None] * groups.shape[1] + inside[by_mean]).flatten()


def _importance(factor: Tensor, diagonal: Tensor) -> Tensor:
    """Importance of columns for tables, 1 / U_ii² over its largest, [I]; of dead ones, the least of all others."""
    alive, factors = diagonal > 0, factor.diagonal()
    importance = (torch.where(alive, factors, torch.inf).min() / factors).square()
    return torch.where(alive, importance, torch.where(alive, importance, 1.0).min())


def _round_columns(
    weight: Tensor,
    columns: ScaledColumns | TableColumns,
    factor: Tensor,
    order: Tensor,
    *,
    block_size: int,
) -> None:
    """Carry out GPTQ on the columns of weight [O, I] in an order [I], with the factor U [I, I].

    What `ahead` multiplies is (w - q), U_ij / U_ii instead of U_ij and e = (w - q) / U_ii.
    """
    rest = weight.t()[order]  # [I, O]: columns are rows of memory meanwhile
    step = math.ceil(block_size / columns.multiple) * columns.multiple
    for start in range(0, len(order), step):
        stop = min(start + step, len(order))
        block, ahead = rest[start:stop], factor[start:stop] / factor.diagonal()[start:stop, None]
        errors = torch.empty_like(block)
        for column in range(stop - start):
            columns.round(block, column, start, error=errors[column])
            block[column + 1 :].addr_(ahead[column, start + column + 1 : stop], errors[column], alpha=-1)
        rest[stop:].addmm_(ahead[:, stop:].t(), errors, alpha=-1)
