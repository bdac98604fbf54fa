"""ConvRot's rotation: regular, exact, its own inverse; where comfy-kitchen is installed, equal to its eager code."""

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.core.packing import pack_codes
from s2q.core.qparams import quantize_per_token
from s2q.core.schemes import LinearScheme, PerChannel, PerToken, QuantScheme
from s2q.nn import PackedLinear
from s2q.ops.kronecker import scaled_kronecker
from s2q.rounding import round_rtn
from s2q.transforms.convrot import convrot, convrot_order, regular_hadamard

WIDTHS = {192: 64, 384: 64, 768: 256, 1920: 64, 5120: 256, 12: 4, 13824: 256}
EMBEDDED = [(192, 64), (768, 256)]  # widths of the linears of the embedded models, with the orders of their blocks


@pytest.mark.parametrize("order", [4, 16, 64, 256])
def test_a_regular_matrix_is_its_own_inverse_with_equal_sums_of_rows(order):
    matrix = regular_hadamard(order)
    assert torch.equal(matrix, matrix.t())
    assert torch.equal(matrix @ matrix, torch.eye(order, dtype=torch.float64))
    assert matrix.sum(dim=0).unique().tolist() == [1.0]
    assert torch.equal(matrix.to(torch.bfloat16).double(), matrix)


def test_matrices_are_products_of_the_published_one():
    published = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
    assert torch.equal(regular_hadamard(4), published)
    assert torch.equal(regular_hadamard(16), torch.kron(published, published))


@pytest.mark.parametrize(("width", "order"), WIDTHS.items())
def test_the_order_is_the_largest_power_of_4_that_divides_the_width(width, order):
    assert convrot_order(width) == order
    assert {name: tensor.shape[0] for name, tensor in convrot(width).state_tensors().items()} == {"right": order}


def test_blocks_are_limited_and_impossible_widths_refused():
    assert convrot_order(768, block_size=64) == 64
    for width in (6, 7, 30):
        with pytest.raises(InvalidInputError, match=f"in_features={width}; expected a multiple of 4"):
            convrot(width)


@pytest.fixture
def eager():
    return pytest.importorskip("comfy_kitchen.backends.eager.convrot_w4a4")


@pytest.fixture
def recorded(width):
    """A weight and inputs as a layer sees them: rows of different sizes, one of them zero, outlier channels."""
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(96, width, generator=generator) * 0.05
    x = torch.randn(70, width, generator=generator) * torch.rand(70, 1, generator=generator) * 4
    x[:, 3] *= 30
    x[7] = 0
    return weight, x


@pytest.mark.parametrize(("width", "order"), EMBEDDED)
def test_rotation_and_codes_equal_comfy_kitchens_bit_for_bit(eager, recorded, width, order):
    weight, x = recorded
    matrix, theirs = regular_hadamard(order).float(), eager._build_hadamard(order)
    assert torch.equal(matrix, theirs)
    rotated = scaled_kronecker(x, right=matrix)
    assert torch.equal(rotated, eager._rotate_activation(x, theirs, order))
    codes, scale = eager._quantize_signed_int4_rowwise_unpacked(rotated)
    ours, our_scale = quantize_per_token(rotated, num_bits=4)
    zero = rotated.abs().amax(dim=1) == 0
    assert torch.equal(ours, codes)
    assert torch.equal(our_scale[~zero, 0], scale[~zero])  # of zeros: 1 here, the smallest there


@pytest.mark.parametrize(("width", "order"), EMBEDDED)
def test_the_weight_and_the_linear_equal_comfy_kitchens(eager, recorded, width, order):
    weight, x = recorded
    scheme = LinearScheme(
        weight=QuantScheme(num_bits=4, granularity=PerChannel()),
        activation=QuantScheme(num_bits=4, granularity=PerToken(), dynamic=True),
    )
    packed, scale = eager.quantize_convrot_w4a4_weight(weight, convrot_groupsize=order)
    folded = scaled_kronecker(weight, right=regular_hadamard(order).float().t())
    rounded = round_rtn(folded, scheme.weight)
    assert torch.equal(rounded.scale, scale.bfloat16().float())  # as a checkpoint stores it
    difference = rounded.codes - eager.prepare_int4_weight_for_int8_linear(packed)
    assert int(difference.abs().max()) <= 1  # of values that the scale's rounding moves over a boundary
    assert float(difference.abs().float().mean()) < 0.02
    exact = round_rtn(convrot(width).fold_inverse(weight), scheme.weight)  # folded in fp64, as recipes do
    assert float((exact.codes != rounded.codes).float().mean()) < 1e-4
    layer = PackedLinear.from_rounded(
        rounded, bias=None, scheme=scheme, inputs={"transform_right": regular_hadamard(order).float()}
    )
    layer.backend = "reference"
    packed = (pack_codes(rounded.codes, num_bits=4) ^ 0x88).view(torch.int8)
    theirs = eager.convrot_w4a4_linear(x, packed, rounded.scale, convrot_groupsize=order)
    # The same integer sums; the two scales are multiplied in the other order.
    torch.testing.assert_close(layer(x), theirs, rtol=3e-7, atol=0)
