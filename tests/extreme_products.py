"""Products at the extremes of their codes, against int64; run as a program, it checks them on a CPU that is capped."""

import itertools
import sys

import torch

from s2q.common.processor import instruction_set
from s2q.core.packing import pack_codes
from s2q.ops.int_matmul import cpu, int_matmul
from s2q.ops.rescaled_int_matmul import rescaled_int_matmul

WIDTHS = ((8, 4), (6, 4), (4, 4), (8, 7), (7, 8), (8, 3), (5, 8), (2, 4), (8, 8), (6, 6))
SHAPES = ((1, 1, 1), (1, 64, 32), (1, 15360, 3), (2, 2049, 5), (7, 193, 37), (3, 15360, 9), (65, 130, 17))
FILLS = ("low low", "low high", "high low", "high high", "ends", "any")


def failures():
    """Cases of a CPU whose products are wrong, each with its largest difference."""
    generator = torch.Generator().manual_seed(0)
    wrong = []
    for (x_bits, w_bits), (rows, inner, columns), fill in itertools.product(WIDTHS, SHAPES, FILLS):
        first, second = (fill.split() * 2)[:2]
        x, w = _codes(first, rows, inner, x_bits, generator), _codes(second, columns, inner, w_bits, generator)
        expected = x.long() @ w.long().t()
        found = int_matmul(x, w, x_bits=x_bits, w_bits=w_bits).long()
        scale, token_scale = (torch.rand(size, generator=generator) + 0.1 for size in (columns, rows))
        arguments = {"x_bits": x_bits, "w_bits": w_bits, "out_dtype": torch.float32, "backend": "cpu"}
        packed = pack_codes(w, num_bits=w_bits)
        own = packed if w_bits <= 4 else packed.view(torch.int8)
        scaled = rescaled_int_matmul(x, token_scale.unsqueeze(1), own, scale, **arguments)
        rounded = expected.float() * scale * token_scale.unsqueeze(1)
        if not torch.equal(found, expected) or not torch.equal(scaled, rounded):
            wrong.append((x_bits, w_bits, rows, inner, columns, fill, int((found - expected).abs().max())))
    return wrong


def _codes(fill, rows, columns, bits, generator):
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if fill in ("low", "high"):
        return torch.full((rows, columns), low if fill == "low" else high, dtype=torch.int8)
    drawn = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8, generator=generator)
    return drawn if fill == "any" else torch.where(drawn < 0, low, high).to(torch.int8)


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = failures()
    sys.stdout.write(f"{instruction_set()} {cpu.multiplies_pairs(x_bits=8, w_bits=4)} {found[:3]}\n")
    sys.exit(bool(found))
