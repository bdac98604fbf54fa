import itertools

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.core.packing import pack_codes, packed_width, unpack_codes

WIDTHS = range(2, 9)


def random_codes(num_bits, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1), shape, dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("num_bits", WIDTHS)
@pytest.mark.parametrize("out_features", [1, 2, 5])
@pytest.mark.parametrize("in_features", [1, 2, 3, 7, 8, 33, 64])
def test_unpacking_undoes_packing(num_bits, out_features, in_features):
    codes = random_codes(num_bits, (out_features, in_features))
    packed = pack_codes(codes, num_bits=num_bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (out_features, packed_width(num_bits, in_features))
    assert packed.is_contiguous()
    unpacked = unpack_codes(packed, num_bits=num_bits, in_features=in_features)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_every_pair_of_codes_survives(num_bits):
    codes = range(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1))
    pairs = torch.tensor(list(itertools.product(codes, codes)), dtype=torch.int8)
    packed = pack_codes(pairs, num_bits=num_bits)
    assert torch.equal(unpack_codes(packed, num_bits=num_bits, in_features=2), pairs)
    assert len(set(packed.flatten().tolist())) == len(pairs)


@pytest.mark.parametrize("num_bits", [5, 6, 7, 8])
def test_every_wide_code_survives(num_bits):
    codes = torch.arange(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1)).to(torch.int8)[:, None]
    packed = pack_codes(codes, num_bits=num_bits)
    assert torch.equal(unpack_codes(packed, num_bits=num_bits, in_features=1), codes)


def test_golden_bytes():
    codes = torch.tensor([[-8, 7, 3], [0, 0, -1]], dtype=torch.int8)
    assert pack_codes(codes, num_bits=4).tolist() == [[0xF0, 0x8B], [0x88, 0x87]]
    assert pack_codes(codes, num_bits=5).tolist() == [[0xF8, 0x07, 0x03], [0x00, 0x00, 0xFF]]
    assert pack_codes(torch.tensor([[-2, 1]], dtype=torch.int8), num_bits=2).tolist() == [[0x96]]


@pytest.mark.parametrize("num_bits", [3, 4, 6])
def test_non_contiguous_codes_and_bytes(num_bits):
    codes = random_codes(num_bits, (6, 10))
    packed = pack_codes(codes.t(), num_bits=num_bits)
    assert torch.equal(unpack_codes(packed, num_bits=num_bits, in_features=6), codes.t())
    strided = packed.t().contiguous().t()
    assert torch.equal(unpack_codes(strided, num_bits=num_bits, in_features=6), codes.t())


def test_unpacking_does_not_touch_the_packed_bytes():
    packed = pack_codes(random_codes(4, (3, 8)), num_bits=4)
    before = packed.clone()
    unpack_codes(packed, num_bits=4, in_features=8)
    assert torch.equal(packed, before)


@pytest.mark.parametrize(("num_bits", "code"), [(2, 2), (3, -5), (4, 8), (7, 64), (4, -128)])
def test_codes_out_of_range_are_refused(num_bits, code):
    with pytest.raises(InvalidInputError, match=f"{num_bits} bits represent"):
        pack_codes(torch.tensor([[0, code]], dtype=torch.int8), num_bits=num_bits)


@pytest.mark.parametrize("codes", [torch.zeros(4, dtype=torch.int8), torch.zeros(2, 2), torch.zeros(2, 2).int()])
def test_only_int8_matrices_are_packed(codes):
    with pytest.raises(InvalidInputError, match="int8"):
        pack_codes(codes, num_bits=4)


@pytest.mark.parametrize("num_bits", [1, 9])
def test_only_known_widths(num_bits):
    with pytest.raises(InvalidInputError, match="num_bits"):
        packed_width(num_bits, 8)


@pytest.mark.parametrize(
    ("packed", "num_bits", "in_features"),
    [
        (torch.zeros(3, 5, dtype=torch.uint8), 4, 8),
        (torch.zeros(3, 8, dtype=torch.uint8), 4, 8),
        (torch.zeros(3, 4, dtype=torch.uint8), 8, 8),
        (torch.zeros(3, 4, dtype=torch.int8), 4, 8),
        (torch.zeros(4, dtype=torch.uint8), 4, 8),
    ],
)
def test_packed_data_of_another_width_is_refused(packed, num_bits, in_features):
    with pytest.raises(InvalidInputError, match="expected uint8"):
        unpack_codes(packed, num_bits=num_bits, in_features=in_features)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_shapes_on_the_meta_device(num_bits):
    packed = pack_codes(torch.empty(3, 7, dtype=torch.int8, device="meta"), num_bits=num_bits)
    assert packed.shape == (3, packed_width(num_bits, 7))
    assert unpack_codes(packed, num_bits=num_bits, in_features=7).shape == (3, 7)
