"""Channel scale, then Kronecker product, the specification.

    y = (x ⊙ v) · (A ⊗ B)        with I = n1 · n2, A [n1, n1], B [n2, n2]

The I×I matrix is never built: with X = x reshaped to [n1, n2] (row-major), y = Aᵀ · X · B, which costs I · (n1 + n2)
products a token instead of I².

Example: v = [1, 1, 1, 2], A = [[0, 1], [1, 0]], B = [[1, 0], [0, 3]]; x = [1, 2, 3, 4] becomes [1, 2, 3, 8], then
Aᵀ · [[1, 2], [3, 8]] · B = [[3, 24], [1, 6]], so y = [3, 24, 1, 6].

Shapes: `I` features, `n1`, `n2` orders of the two factors; every leading dimension counts rows (tokens, or the output
channels of a weight).
"""

from typing import Any

import torch
from torch import Tensor

from s2q.common.torch_state import without_autocast
from s2q.ops.fused import passes
from s2q.ops.passes import ORDERS, Passes, vector

_ROWS = 4096


@without_autocast
def scaled_kronecker(
    x: Tensor, *, scale: Tensor | None = None, left: Tensor | None = None, right: Tensor | None = None
) -> Tensor:
    """Multiply rows [..., I] by diag(scale [I]) · (left [n1, n1] ⊗ right [n2, n2]); differentiable in everything.

    None is the identity of the order that makes n1 · n2 = I: without `left`, each n2 channels in turn are a block of
    their own. The result has the dtype that x and the factors promote to: fp32 for a bf16 x and fp32 factors.
    """
    for factor in (scale, left, right):
        if factor is not None:
            x = x.to(torch.promote_types(x.dtype, factor.dtype))
    if scale is None and left is None and right is None:
        return x
    n1, n2 = factor_orders(x.shape[-1], left, right)
    assert n1 * n2 == x.shape[-1], (n1, n2, x.shape)
    scale, left, right = (None if factor is None else factor.to(x.dtype) for factor in (scale, left, right))
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, scale, left, right)):
        result: Tensor = _ScaledKronecker.apply(x, scale, left, right)  # type: ignore[no-untyped-call]
        return result
    return _product(x, scale, left, right)[1]


def _product(x: Tensor, scale: Tensor | None, left: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x ⊙ v) (1 ⊗ B) as [..., n1, n2], or [..., I] without a rotation; and the whole product, [..., I]."""
    compiled = _compiled(x, left, right)
    if compiled is None or left is None or right is None:
        half = _times_right(x, scale, left, right)
        return half, (half if left is None else _times_left(left.t(), half)).reshape(x.shape)
    rows, orders = _rows(x), (left.shape[0], right.shape[0])
    half, out, factors = torch.empty_like(rows), torch.empty_like(rows), (left.contiguous(), right.contiguous())
    compiled.kronecker(rows, vector(scale, rows.shape[1], missing=1.0), *factors, half=half, out=out)
    return half.view(*x.shape[:-1], *orders), out.view(x.shape)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _compiled(x: Tensor, left: Tensor | None, right: Tensor | None) -> Passes | None:
    """The compiled passes where they take the product, else None."""
    if left is None or right is None or left.shape[0] not in ORDERS or right.shape[0] not in ORDERS:
        return None
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return None
    compiled = passes()
    return compiled if compiled is not None and compiled.multiplies else None


def _times_right(x: Tensor, scale: Tensor | None, left: Tensor | None, right: Tensor | None) -> Tensor:
    """(x ⊙ v) B as [..., n1, n2], or [..., I] without a rotation."""
    x = x if scale is None else x * scale
    if left is None and right is None:
        return x
    grid = x.reshape(*x.shape[:-1], *factor_orders(x.shape[-1], left, right))
    return grid if right is None else grid @ right


def _times_left(factor: Tensor, grids: Tensor) -> Tensor:
    """Multiply every matrix of [..., n1, n2] by one of [n1, n1] from the left.

    A CPU makes one product of it, between two transposed copies of the grids.
    """
    return factor @ grids if grids.device.type == "cpu" else _times_left_in_batch(factor, grids)


def _times_left_in_batch(factor: Tensor, grids: Tensor) -> Tensor:
    """Do so without copies, by a batched product in which all share the factor."""
    batch = grids.reshape(-1, *grids.shape[-2:])
    return torch.bmm(factor.expand(len(batch), -1, -1), batch).view(grids.shape)


class _ScaledKronecker(torch.autograd.Function):
    """`scaled_kronecker` with a backward pass that keeps x and (x ⊙ v) B alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, left: Tensor | None, right: Tensor | None) -> Tensor:
        half, out = _product(x, scale, left, right)
        ctx.save_for_backward(x, scale, left, right, None if left is None else half)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, left, right, half = ctx.saved_tensors
        grad, gradients = grad_outputs[0], dict.fromkeys(("x", "scale", "left", "right"))
        wanted = dict(zip(gradients, ctx.needs_input_grad, strict=True))
        grid = factor_orders(x.shape[-1], left, right)
        compiled = _compiled(x, left, right)
        if compiled is not None:
            scales, factors = vector(scale, x.shape[-1], missing=1.0), (left.contiguous(), right.contiguous())
            grad_x = x.new_empty(x.shape) if wanted["x"] else None
            sums = compiled.kronecker_gradient(_rows(x), scales, *factors, half, _rows(grad), grad_x=grad_x)
            gradients = dict(zip(gradients, (grad_x, *sums), strict=True))
            return tuple(gradient if wanted[name] else None for name, gradient in gradients.items())
        if left is not None:
            grad = grad.reshape(-1, *grid)
            if wanted["left"]:
                gradients["left"] = _summed_products(half.reshape(-1, *grid), grad)
            grad = _times_left(left, grad)
        if right is not None:
            grad = grad.reshape(-1, grid[1])
            if wanted["right"]:
                scaled = x if scale is None else x * scale
                gradients["right"] = scaled.reshape(-1, grid[1]).t() @ grad
            if wanted["x"] or wanted["scale"]:
                grad = grad @ right.t()
        grad = grad.reshape(x.shape)
        if wanted["scale"]:
            gradients["scale"] = (grad * x).reshape(-1, x.shape[-1]).sum(dim=0)
        if wanted["x"]:
            gradients["x"] = grad if scale is None else grad * scale
        return tuple(gradients.values())


def _summed_products(half: Tensor, grad: Tensor) -> Tensor:
    """Σ_m half_m grad_mᵀ of [M, n1, n2] twice, [n1, n1]; products are made for `_ROWS` of the M at a time."""
    pieces = zip(torch.split(half, _ROWS), torch.split(grad, _ROWS), strict=True)
    total = half.new_zeros(half.shape[1], half.shape[1])
    for left, right in pieces:
        total += (left @ right.transpose(1, 2)).sum(dim=0)
    return total


def factor_orders(features: int, left: Tensor | None, right: Tensor | None) -> tuple[int, int]:
    """Return n1 and n2 of factors (None: the identity); their product is I where they fit."""
    if left is None:
        n2 = features if right is None else right.shape[0]
        return features // n2, n2
    n1 = left.shape[0]
    return n1, features // n1 if right is None else right.shape[0]
