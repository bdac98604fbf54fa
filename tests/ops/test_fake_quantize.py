"""Trainable quantization of rows: compiled passes and kernels have the values of the specification.

They have its gradients up to the order of their sums, which are those towards clip ratios and largest magnitudes.
"""

from functools import partial

import pytest
import torch

from s2q.core import qparams
from s2q.ops.dispatch import KernelUnavailableError
from s2q.ops.fake_quantize import fake_quantize_rows

bitwise = pytest.mark.usefixtures("passes")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


kernels = partial(fake_quantize_rows, backend="triton")


def learned(quantizer, x, clip, upstream, num_bits, of_weight=False):
    """The values and the gradients towards x and the clip ratio."""
    inputs = [x.clone().requires_grad_()] + ([] if clip is None else [clip.clone().requires_grad_()])
    ratio = None if clip is None else inputs[1]
    values = quantizer(inputs[0], num_bits=num_bits, clip_ratio=ratio, of_weight=of_weight)
    return [values.detach(), *torch.autograd.grad(values, inputs, upstream)]


def assert_same(found, specified):
    """Values are equal; so are gradients, up to the order of sums."""
    assert torch.equal(found[0], specified[0])
    for gradient, expected in zip(found[1:], specified[1:], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


CLIPS = {
    "none": lambda shape: None,
    "shared": lambda shape: torch.tensor([0.7]),
    "per row": lambda shape: torch.rand(*shape[:-1], 1, generator=torch.Generator().manual_seed(1)),
    "per channel of groups": lambda shape: torch.linspace(0.4, 1, shape[0]).view(-1, *[1] * (len(shape) - 1)),
}


@bitwise
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("shape", [(9, 33), (1, 40, 1, 192), (6, 5, 16), (3, 1), (4, 1100)])
@pytest.mark.parametrize(("num_bits", "of_weight"), [(2, False), (6, False), (4, True)])
def test_compiled_passes_have_the_values_and_gradients_of_the_specification(shape, clip, num_bits, of_weight):
    x, upstream = draw(*shape) * draw(*shape, seed=2).exp(), draw(*shape, seed=3)
    rows = x.view(-1, shape[-1])
    rows[0], rows[1] = 0, rows[1].sign()  # a row of zeros, and one of largest magnitudes alone
    ratio = CLIPS[clip](shape)
    results = [
        learned(quantizer, x, ratio, upstream, num_bits, of_weight)
        for quantizer in (fake_quantize_rows, qparams.fake_quantize_rows)
    ]
    assert_same(*results)
    below = x.abs() < x.abs().amax(dim=-1, keepdim=True)  # whose gradient is no sum
    assert torch.equal(results[0][1][below], results[1][1][below])


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("shape", [(9, 33), (2, 40, 1, 192), (6, 5, 16), (3, 1), (2, 5000)])
@pytest.mark.parametrize(("num_bits", "of_weight"), [(2, False), (6, False), (4, True)])
def test_kernels_have_the_values_and_gradients_of_the_specification(shape, clip, num_bits, of_weight):
    pytest.importorskip("triton")
    x, upstream = draw(*shape) * draw(*shape, seed=2).exp(), draw(*shape, seed=3)
    rows = x.view(-1, shape[-1])
    rows[0], rows[1] = 0, rows[1].sign()
    ratio = CLIPS[clip](shape)
    quantizers = kernels, qparams.fake_quantize_rows
    assert_same(*(learned(quantizer, x, ratio, upstream, num_bits, of_weight) for quantizer in quantizers))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_take_half_precision(dtype):
    pytest.importorskip("triton")
    x, upstream = draw(5, 48).to(dtype), draw(5, 48, seed=3).to(dtype)
    values, gradient, of_clip = learned(kernels, x, torch.tensor([0.7]), upstream, 6)
    wanted, expected, of_expected = learned(qparams.fake_quantize_rows, x, torch.tensor([0.7]), upstream, 6)
    assert (values.dtype, gradient.dtype, of_clip.dtype) == (dtype, dtype, torch.float32)
    torch.testing.assert_close(values, wanted)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(of_clip, of_expected, rtol=1e-3, atol=1e-3)


def test_a_kernel_that_is_lost_between_the_passes_leaves_the_gradient_to_pytorch(monkeypatch):
    pytest.importorskip("triton")
    from s2q.ops.fake_quantize import triton as module

    x, upstream, ratio = draw(4, 24), draw(4, 24, seed=3), torch.tensor([0.7])
    launched = module.launch

    def refuse(kernel, *arguments, **settings):
        if kernel is module.gradient_kernel:
            raise KernelUnavailableError("too much shared memory")
        launched(kernel, *arguments, **settings)

    monkeypatch.setattr(module, "launch", refuse)
    found, expected = (learned(q, x, ratio, upstream, 4) for q in (kernels, qparams.fake_quantize_rows))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_gradients_of_a_row_that_is_not_finite_are_nan(value):
    pytest.importorskip("triton")
    x, upstream = draw(3, 8), draw(3, 8, seed=3)
    x[1, 2] = value
    for found in (learned(q, x, None, upstream, 4) for q in (kernels, qparams.fake_quantize_rows)):
        assert not bool(found[0][1].isfinite().any())
        assert bool(found[1][1].isnan().all())
        assert bool(found[1][::2].isfinite().all())


def test_kernels_take_no_rows():
    pytest.importorskip("triton")
    values, gradient = learned(kernels, torch.empty(0, 8), None, torch.empty(0, 8), 4)
    assert values.shape == gradient.shape == (0, 8)


@bitwise
def test_rows_that_are_not_contiguous_have_the_same_values_and_gradients():
    x, upstream = draw(300, 64).t(), draw(64, 300, seed=3)
    results = [
        learned(quantizer, x, torch.tensor([0.7]), upstream, 6)
        for quantizer in (fake_quantize_rows, qparams.fake_quantize_rows)
    ]
    assert_same(*results)


def test_torch_compile_traces_it_without_a_break():
    quantized = torch.compile(lambda x: fake_quantize_rows(x, num_bits=4), backend="eager", fullgraph=True)
    assert torch.equal(quantized(draw(4, 16)), fake_quantize_rows(draw(4, 16), num_bits=4))


@bitwise
def test_the_number_of_threads_changes_no_bit():
    x, upstream, before = draw(70, 600), draw(70, 600, seed=3), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(learned(fake_quantize_rows, x, CLIPS["per row"](x.shape), upstream, 6))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@bitwise
def test_strided_rows_and_gradients():
    x, upstream = draw(8, 60)[:, ::2], draw(30, 8, seed=3).t()
    assert_same(*(learned(q, x, None, upstream, 4) for q in (fake_quantize_rows, qparams.fake_quantize_rows)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_to_the_specification(dtype):
    x = draw(4, 12).to(dtype)
    found = fake_quantize_rows(x, num_bits=4)
    assert found.dtype == dtype
    assert torch.equal(found, qparams.fake_quantize_rows(x, num_bits=4))


def test_a_row_with_a_nan_is_nan(backend):
    x = draw(3, 8)
    x[1, 2] = torch.nan
    found = fake_quantize_rows(x, num_bits=4, backend=backend)
    assert bool(found[1].isnan().all())
    assert bool(found[::2].isfinite().all())
