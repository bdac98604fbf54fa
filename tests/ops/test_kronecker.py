import itertools

import pytest
import torch

from s2q.common.processor import features
from s2q.ops import bits, fused, kronecker
from s2q.ops.kronecker import scaled_kronecker
from s2q.ops.passes import Passes


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_example_of_the_docstring():
    x, scale = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 1, 1, 2])
    left, right = torch.tensor([[0.0, 1], [1, 0]]), torch.tensor([[1.0, 0], [0, 3]])
    assert scaled_kronecker(x, scale=scale, left=left, right=right).tolist() == [3, 24, 1, 6]


@pytest.mark.parametrize(("n1", "n2"), [(1, 5), (5, 1), (2, 3), (4, 4), (3, 7)])
@pytest.mark.parametrize("rows", [(), (6,), (2, 3), (0,)])
def test_equals_the_full_matrix(n1, n2, rows):
    x, scale = draw(*rows, n1 * n2), draw(n1 * n2, seed=1)
    left, right = draw(n1, n1, seed=2), draw(n2, n2, seed=3)
    full = torch.diag(scale) @ torch.kron(left, right)
    torch.testing.assert_close(scaled_kronecker(x, scale=scale, left=left, right=right), x @ full)


def test_missing_parts_are_the_identity():
    x, scale, factor = draw(4, 6), draw(6, seed=1), draw(3, 3, seed=2)
    eye = torch.eye(2, dtype=torch.float64)
    assert torch.equal(scaled_kronecker(x), x)
    assert torch.equal(scaled_kronecker(x, scale=scale), x * scale)
    torch.testing.assert_close(scaled_kronecker(x, left=factor), x @ torch.kron(factor, eye))
    whole = draw(6, 6, seed=3)
    torch.testing.assert_close(scaled_kronecker(x, right=whole), x @ whole)
    torch.testing.assert_close(scaled_kronecker(x, right=factor), x @ torch.kron(eye, factor))


def test_non_contiguous_rows_and_half_precision():
    x, left, right = draw(6, 4), draw(2, 2, seed=1).float(), draw(3, 3, seed=2).float()
    full = torch.kron(left, right)
    torch.testing.assert_close(scaled_kronecker(x.float().t(), left=left, right=right), x.float().t() @ full)
    half = x.t().bfloat16()
    result = scaled_kronecker(half, left=left, right=right)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, half.float() @ full)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
def test_gradients_equal_finite_differences(wanted, monkeypatch):
    monkeypatch.setattr("s2q.ops.kronecker._ROWS", 2)  # of three
    parts = [draw(3, 6), draw(6, seed=1), draw(2, 2, seed=2), draw(3, 3, seed=3)]
    parts = [part.requires_grad_(learned) for part, learned in zip(parts, wanted, strict=True)]
    for given in (parts, [parts[0], None, parts[2], None], [parts[0], parts[1], None, draw(6, 6, seed=4)]):
        if any(part is not None and part.requires_grad for part in given):
            assert torch.autograd.gradcheck(
                lambda x, v, a, b: scaled_kronecker(x, scale=v, left=a, right=b), given, check_undefined_grad=False
            )


@pytest.fixture
def multiplies(passes):
    if "avx512" not in features() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the products take AVX-512, here and in PyTorch")
    if not torch.backends.mkl.is_available():
        pytest.skip("the products have the bits of MKL")
    assert passes.multiplies, "their bits differ from PyTorch's"


def products(parts, upstream):
    """The product and its gradients, and the product without a gradient."""
    parts = [None if part is None else part.float().clone().requires_grad_() for part in parts]
    x, scale, left, right = parts
    with torch.no_grad():
        plain = scaled_kronecker(x, scale=scale, left=left, right=right)
    product = scaled_kronecker(x, scale=scale, left=left, right=right)
    learned = [part for part in parts if part is not None]
    return [plain, product.detach(), *torch.autograd.grad(product, learned, upstream.float())]


@pytest.mark.parametrize(("n1", "n2"), [(12, 16), (24, 32), (13, 33), (64, 48)])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("rows", [7, 70])
def test_compiled_products_have_the_bits_of_the_operations_and_their_gradients(
    n1, n2, scaled, rows, multiplies, monkeypatch
):
    size = n1 * n2
    parts = [draw(3, rows, size), draw(size, seed=1) if scaled else None]
    parts += [draw(n1, n1, seed=2), draw(n2, n2, seed=3).t()]
    upstream = draw(3, rows, size, seed=4)
    compiled = products(parts, upstream)
    monkeypatch.setattr(kronecker, "passes", lambda: None)
    specified = products(parts, upstream)
    exact = 3  # without and with a gradient, and the gradient towards x; the others are sums over rows
    for found, expected in zip(compiled[:exact], specified[:exact], strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(compiled[exact:], specified[exact:], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("rows", [31, 1100])
def test_the_number_of_threads_changes_no_bit_of_compiled_products(rows, multiplies):
    parts, upstream, before = [draw(rows, 12 * 16), None, draw(12, 12), draw(16, 16)], draw(rows, 12 * 16), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            before.append(products(parts, upstream))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*before, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
def test_compiled_gradients_are_those_that_are_asked_for(wanted, multiplies):
    parts = [draw(5, 12 * 16), draw(12 * 16, seed=1), draw(12, 12, seed=2), draw(16, 16, seed=3)]
    upstream = draw(5, 12 * 16, seed=4).float()
    every = products(parts, upstream)[2:]
    x, scale, left, right = parts = [
        part.float().requires_grad_(asked) for part, asked in zip(parts, wanted, strict=True)
    ]
    product = scaled_kronecker(x, scale=scale, left=left, right=right)
    if any(wanted):
        product.backward(upstream)
    for part, asked, expected in zip(parts, wanted, every, strict=True):
        assert (part.grad is not None) == asked
        assert not asked or torch.equal(part.grad, expected)


def test_products_of_other_bits_are_left_to_pytorch(multiplies, monkeypatch):
    monkeypatch.setattr(Passes, "kronecker", lambda *arguments, half, out: (half.zero_(), out.zero_()))
    assert not bits.products_equal_torch(fused.passes())


@pytest.mark.parametrize("which", range(3))
def test_products_with_another_gradient_are_left_to_pytorch(which, multiplies, monkeypatch):
    compiled = Passes.kronecker_gradient

    def wrong(*arguments, **options):
        sums = list(compiled(*arguments, **options))
        sums[which] = sums[which] + 1e-4 * sums[which].abs().max()
        return tuple(sums)

    monkeypatch.setattr(Passes, "kronecker_gradient", wrong)
    assert not bits.products_equal_torch(fused.passes())


@pytest.mark.parametrize("rows", [(0,), (5,), (2, 3)])
def test_the_batched_product_of_gpus_is_that_of_cpus(rows):
    generator = torch.Generator().manual_seed(0)
    factor, grids = torch.randn(4, 4, generator=generator), torch.randn(*rows, 4, 6, generator=generator)
    for given in (factor, factor.t()):
        found = kronecker._times_left_in_batch(given, grids)
        torch.testing.assert_close(found, given @ grids)
        assert found.is_contiguous()
