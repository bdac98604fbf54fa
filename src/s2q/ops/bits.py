"""Whether the compiled functions of `ops.passes` have the bits of PyTorch's operations here."""

import torch
from torch import Tensor

from s2q.common.torch_state import in_fresh_torch_state
from s2q.core.codebook import nearest_level, scaled_levels, table_and_scale
from s2q.core.input_path import InputTensors
from s2q.core.memo import saved_as_usual
from s2q.core.packing import pack_codes, unpack_codes
from s2q.core.qparams import fake_quantize_rows, quantize_per_token
from s2q.ops.passes import DTYPES, HIGHEST_RANK, PANEL, RANKS, SEGMENT, SMALLEST_BRANCH, Passes, vector


@in_fresh_torch_state
@torch.no_grad()
def equals_torch(passes: Passes) -> bool:
    """Compare every function with PyTorch's operations, bit for bit, on numbers with ties, zeros and many sizes."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()

    rows, columns = 5, 131
    x, vectors, clip = draw(rows, columns), draw(2, columns), draw(rows, 1).sigmoid()
    x[0], x[1, ::2] = 0, x[1, ::2].round()
    half = x.bfloat16()
    checks = [
        torch.equal(
            passes.scale(half, *vectors, out=half.clone()), ((half.float() - vectors[0]) * vectors[1]).bfloat16()
        )
    ]
    table = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    found = passes.look_up(half.contiguous(), table.flip(0), out=torch.empty_like(half))
    checks.append(torch.equal(found.view(torch.int16), half.view(torch.int16).bitwise_not()))
    for y in (x, half):
        codes, scale = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, 1)
        passes.quantize(y, clip.flatten(), num_bits=4, codes=codes, scale=scale)
        expected = quantize_per_token(y, num_bits=4, clip_ratio=clip)
        checks += [torch.equal(codes, expected[0]), torch.equal(scale, expected[1])]
    sums = torch.randint(-(1 << 22), 1 << 22, (rows, columns), dtype=torch.int32, generator=generator)
    for dtype in DTYPES:
        for bias in (vectors[1] * 1e6, None):
            out, total = torch.empty(rows, columns, dtype=dtype), sums.float() * vectors[0]
            passes.rescale(sums, vectors[0], clip, vector(bias, columns, missing=-0.0), out=out)
            expected_out = total * clip if bias is None else torch.addcmul(bias, total, clip)
            checks.append(torch.equal(out, expected_out.to(dtype)))
    w = torch.randint(-8, 8, (rows, 2 * columns), dtype=torch.int8, generator=generator)
    unpacked = torch.empty_like(w)
    packed = pack_codes(w, num_bits=4)
    passes.unpack(packed, out=unpacked)
    return (
        all(checks)
        and torch.equal(unpacked, w)
        and _levels_equal_torch(passes, packed, x)
        and all(_gradients_equal_torch(passes, x, clip, of_weight=of_weight) for of_weight in (False, True))
    )


def _levels_equal_torch(passes: Passes, packed: Tensor, x: Tensor) -> bool:
    """The same for the passes of levels."""
    levels = torch.arange(-128, 128, 4).remainder(113).sub(50).to(torch.int8)  # four tables
    group_scale = torch.tensor([[127], [-128], [0], [66], [-3]], dtype=torch.int8)
    codes = unpack_codes(packed, num_bits=4, in_features=2 * packed.shape[1])
    values, (table, scale) = torch.empty_like(codes), table_and_scale(group_scale)
    passes.values(packed, levels, group_scale, out=values)
    looked_up = levels[codes.int() + 8 + 16 * table.int()]
    checks = [torch.equal(values, scaled_levels(looked_up, scale).to(torch.int8))]
    levels = torch.arange(-127, 128, 17, dtype=torch.int8)
    wide, scales = levels.float(), x.abs().amax(dim=1, keepdim=True) / 100
    for y in (x, x.bfloat16()):
        found = torch.empty(y.shape, dtype=torch.int8)
        passes.nearest(y, scales, wide, (wide[1:] + wide[:-1]) / 2, out=found)
        expected = wide[nearest_level(y.float() / torch.where(scales == 0, 1.0, scales), wide)]
        checks.append(torch.equal(found, expected.to(torch.int8)))
    return all(checks)


@torch.enable_grad()
def _gradients_equal_torch(passes: Passes, x: Tensor, clip: Tensor, *, of_weight: bool) -> bool:
    """The same for fake quantization; gradients of scales are sums of another order, compared up to rounding."""
    inputs, num_bits = (x.clone().requires_grad_(), clip.clone().requires_grad_()), 4
    grad = x.roll(1, dims=0).contiguous()
    with saved_as_usual():  # the first call may be in a function that is called again in the backward pass
        values = fake_quantize_rows(inputs[0], num_bits=num_bits, clip_ratio=inputs[1], of_weight=of_weight)
        expected = torch.autograd.grad(values, inputs, grad)
    out, grad_x = torch.empty_like(x), torch.empty_like(x)
    amax, scale, grad_clip = torch.empty(3, len(x))
    ratio, of_rows = clip.flatten(), {"grad_x": grad_x, "grad_clip": grad_clip}
    passes.fake_quantize(x, ratio, num_bits=num_bits, of_weight=of_weight, out=out, amax=amax, scale=scale)
    passes.fake_quantize_gradient(x, grad, amax, scale, ratio, num_bits=num_bits, of_weight=of_weight, **of_rows)
    found, smaller = (grad_x, grad_clip.unsqueeze(1)), x.abs() < amax.unsqueeze(1)
    return (
        torch.equal(out, values)
        and torch.equal(grad_x[smaller], expected[0][smaller])
        and all(_is_close(one, other) for one, other in zip(found, expected, strict=True))
    )


@in_fresh_torch_state
@torch.no_grad()
def products_equal_torch(passes: Passes) -> bool:
    """Compare the Kronecker products with PyTorch's, bit for bit, on orders with and without a rest.

    Gradients that are sums over rows have another order and are compared up to rounding.
    """
    generator = torch.Generator().manual_seed(0)
    for n1, n2 in ((12, 12), (12, 16), (24, 32), (33, 49)):
        x, grad = torch.randn(2, 5, n1 * n2, generator=generator)
        scale, left, right = (torch.randn(size, generator=generator) for size in ((n1 * n2,), (n1, n1), (n2, n2)))
        half, out, grad_x = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        passes.kronecker(x, scale, left, right, half=half, out=out)
        sums = passes.kronecker_gradient(x, scale, left, right, half, grad, grad_x=grad_x)
        scaled, grads = (x * scale).view(-1, n1, n2), grad.view(-1, n1, n2)
        first, rotated = scaled @ right, left @ grads
        back = (rotated.reshape(-1, n2) @ right.t()).view(x.shape)
        exact = (half, first), (out, left.t() @ first), (grad_x, back * scale)
        if not all(torch.equal(one.view_as(other), other) for one, other in exact):
            return False
        expected = (back * x).sum(dim=0), (first @ grads.mT).sum(dim=0), (scaled.mT @ rotated).sum(dim=0)
        if not all(_is_close(one, other) for one, other in zip(sums, expected, strict=True)):
            return False
    return True


@in_fresh_torch_state
@torch.no_grad()
def branches_equal_torch(passes: Passes, *, pairs: bool = False) -> bool:
    """Compare rescaling with a branch, in fp32 or in pairs of bf16, with PyTorch's operations, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns, rank in ((300, 192, 32), (67, 131, RANKS[-1]), (SMALLEST_BRANCH, PANEL, 7)):
        sums = torch.randint(-(1 << 20), 1 << 20, (rows, columns), dtype=torch.int32, generator=generator)
        (w_scale, bias), x_scale = torch.rand(2, columns, generator=generator), torch.rand(rows, 1, generator=generator)
        low, weight = (torch.randn(size, generator=generator) * 1e5 for size in ((rows, rank), (columns, rank)))
        branch = low, weight.t().contiguous()
        if pairs:
            low, weight = low.bfloat16().float(), weight.bfloat16().float()
            of_low, of_weight = passes.reversed_pairs(low, segment=1), passes.reversed_pairs(weight, segment=SEGMENT)
            if of_low is None or of_weight is None:
                return False
            branch = of_low, of_weight
        expected = torch.addcmul(bias, sums.float() * w_scale, x_scale).addmm_(low, weight.t())
        for dtype in DTYPES:
            out = torch.empty(rows, columns, dtype=dtype)
            passes.rescale(sums, w_scale, x_scale, bias, branch=branch, out=out)
            if not torch.equal(out, expected.to(dtype)):
                return False
    return True


Size = tuple[int, int, int, int]
"""n1, n2, rank and tokens of an activation path."""

_LARGE_ORDERS: tuple[Size, ...] = (2, 256, 0, 9), (256, 2, 0, 9), (24, 40, 0, 17)
NARROW_PATHS = (*_LARGE_ORDERS, (12, 16, 6, 17), (12, 16, HIGHEST_RANK, 9))
WIDE_PATHS: tuple[Size, ...] = (24, 32, 32, 130), (32, 32, 6, 40), (40, 48, 32, 130), (48, 64, 64, 40)


@in_fresh_torch_state
@torch.no_grad()
def paths_equal_torch(passes: Passes, sizes: tuple[Size, ...]) -> bool:
    """Compare activation paths in bf16 with PyTorch's operations, bit for bit, with and without a branch and means."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for n1, n2, rank, tokens in sizes:
        size, num_bits = n1 * n2, 6
        x, shift, scale, clip = draw(tokens, size).bfloat16(), draw(size), draw(size), draw(tokens).sigmoid()
        factors = [draw(order, order).bfloat16() / order**0.5 for order in (n1, n2)]
        basis = draw(size, rank).bfloat16() / size**0.5 if rank else None
        path = InputTensors(shift=shift, scale=scale, left=factors[0], right=factors[1], low_rank_basis=basis)
        means = (draw(3, size), torch.arange(tokens, dtype=torch.int32) % 3) if rank else None
        codes, scales = torch.empty(tokens, size, dtype=torch.int8), torch.empty(tokens, 1)
        coefficients = torch.empty(tokens, rank) if rank else None
        passes.activation_path(
            x, path, clip, num_bits=num_bits, means=means, codes=codes, scale=scales, coefficients=coefficients
        )
        y = ((x.float() - shift) * scale).bfloat16()
        if basis is not None and coefficients is not None:
            found = y @ basis
            y = torch.addmm(y, found, basis.t(), alpha=-1)
            if not torch.equal(coefficients, found.float()):
                return False
        y = (factors[0].t() @ (y.view(-1, n1, n2) @ factors[1])).view(x.shape)
        expected = quantize_per_token(
            y if means is None else y.float() - means[0][means[1]], num_bits=num_bits, clip_ratio=clip.unsqueeze(1)
        )
        if not all(torch.equal(one, other) for one, other in zip((codes, scales), expected, strict=True)):
            return False
    return True


def _is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether sums of the same terms differ by their order alone."""
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())
