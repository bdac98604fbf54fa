"""Values of packed codes: every backend against the definition, number by number."""

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.core.codebook import TABLES, nibble_levels
from s2q.core.packing import pack_codes
from s2q.core.schemes import PerChannel, PerGroup, QuantScheme
from s2q.ops.level_values import BACKENDS, cpu, level_values

ALL = torch.tensor(TABLES, dtype=torch.int8).flatten()
FIRST = ALL[:16]


def drawn(rows, columns, groups=None):
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=generator)
    scale = None
    if groups is not None:
        scale = torch.randint(-128, 128, (rows, groups), dtype=torch.int8, generator=generator)
        scale[0, 0], scale[-1, -1] = -128, 0
    return codes, scale


def defined(codes, scale):
    values = []
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            place = int(codes[row, column]) + 8
            level = TABLES[0][place]
            if scale is not None:
                byte = int(scale[row, column * scale.shape[1] // codes.shape[1]])
                level = (TABLES[byte % 4][place] * (byte // 4) + 16) // 32
            values.append(level)
    return torch.tensor(values, dtype=torch.int8).reshape(codes.shape)


@pytest.mark.parametrize(
    ("rows", "columns", "groups"),
    [(3, 32, None), (5, 21, None), (3, 32, 2), (7, 96, 6), (4, 30, 2), (2, 33, 3), (1, 2080, 130)],
)
def test_every_backend_returns_the_definition(backend, rows, columns, groups, monkeypatch):
    monkeypatch.setattr(cpu, "PIECE", 2 * columns)
    codes, scale = drawn(rows, columns, groups)
    packed = pack_codes(codes, num_bits=4)
    levels = FIRST if scale is None else ALL
    found = level_values(levels, packed, scale, in_features=columns, backend=backend)
    assert torch.equal(found, defined(codes, scale))


def test_the_example_of_the_docstring(backend):
    levels = torch.tensor([0, 10, -20, *[0] * 61], dtype=torch.int8)
    packed = torch.tensor([[0x21]], dtype=torch.uint8)
    assert level_values(levels[:16], packed, in_features=2, backend=backend).tolist() == [[10, -20]]
    scale = torch.tensor([[64]], dtype=torch.int8)
    assert level_values(levels, packed, scale, in_features=2, backend=backend).tolist() == [[5, -10]]


@pytest.mark.parametrize("level", [127, -127])
def test_the_largest_products_fit_in_eight_bits(backend, level):
    levels = torch.full((64,), level, dtype=torch.int8)
    packed = pack_codes(torch.zeros(1, 2, dtype=torch.int8), num_bits=4)
    for scale, expected in ((31 * 4 + 3, {127: 123, -127: -123}), (-32 * 4, {127: -127, -127: 127})):
        scales = torch.tensor([[scale]], dtype=torch.int8)
        found = level_values(levels, packed, scales, in_features=2, backend=backend)
        assert found.tolist() == [[expected[level]] * 2]


def test_strided_rows_and_no_rows_are_taken(backend):
    codes, _ = drawn(6, 64)
    packed = pack_codes(codes, num_bits=4)
    found = level_values(FIRST, packed[::2], in_features=64, backend=backend)
    assert torch.equal(found, defined(codes[::2], None))
    assert level_values(FIRST, packed[:0], in_features=64, backend=backend).shape == (0, 64)


def test_parts_of_wider_rows_are_taken(backend):
    codes, scale = drawn(6, 64, 4)
    wider = torch.cat([pack_codes(codes, num_bits=4)] * 2, dim=1)
    scales = torch.cat([scale] * 2, dim=1)
    for packed, part in ((wider[:, :32], scales[:, :4]), (wider[::2, 32:], scales[::2, 4:])):
        found = level_values(ALL, packed, part, in_features=64, backend=backend)
        assert torch.equal(found, defined(codes[:: 6 // len(packed)], scale[:: 6 // len(packed)]))


def test_codes_of_another_width_are_refused(backend):
    with pytest.raises(InvalidInputError, match=r"codes.*expected"):
        level_values(FIRST, pack_codes(drawn(2, 30)[0], num_bits=4), in_features=32, backend=backend)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nibbles_of_fewer_bits_find_their_levels(bits):
    scheme = QuantScheme(num_bits=bits, granularity=PerChannel(), levels="lloyd_max_int8")
    levels = nibble_levels(scheme, 64)
    codes = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1), dtype=torch.int8).unsqueeze(0)
    values = BACKENDS["cpu"](levels, pack_codes(codes, num_bits=bits), in_features=codes.shape[1])
    assert values[0, -1] == 127
    assert values[0, 0] == -127
    assert torch.equal(values, -values.flip(1))
    assert bool((values.diff() > 0).all())


def test_groups_have_the_four_tables_one_after_the_other():
    scheme = QuantScheme(num_bits=4, granularity=PerGroup(group_size=16), levels="table")
    assert torch.equal(nibble_levels(scheme, 64), ALL)
