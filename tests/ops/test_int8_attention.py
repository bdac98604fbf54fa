"""Attention with int8 queries and keys: the reference against its formula, and the kernel against the reference."""

import math

import pytest
import torch
import torch.nn.functional as F

from s2q.common.errors import InvalidInputError
from s2q.ops.int8_attention import BACKENDS, KEY_BLOCK, QUERY_BLOCK, int8_attention, reference

SIZES = [(1, 2, 150, 150, 24), (2, 1, 37, 70, 64), (1, 1, 1, 1, 5), (1, 1, 129, 65, 96)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(samples, heads, queries, keys, head_dim, dtype=torch.float32):
    """Queries, keys that share a large mean, and values."""
    query = draw(samples, heads, queries, head_dim)
    key = draw(samples, heads, keys, head_dim, seed=1) + 4 * draw(1, heads, 1, head_dim, seed=2)
    return query.to(dtype), key.to(dtype), draw(samples, heads, keys, head_dim, seed=3).to(dtype)


def rounded(x, size):
    """Blocks of tokens rounded to 127 steps of their largest magnitude, in fp64."""
    x, parts = x.double(), []
    for block in x.split(size, dim=2):
        step = (block.abs().amax(dim=(2, 3), keepdim=True).float() / 127).double()
        step[step == 0] = 1
        parts.append((block.float() / step.float()).round().double() * step)
    return torch.cat(parts, dim=2)


def explicit(query, key, value, mask=None, scale=None):
    """The formula with the whole map, in fp64."""
    key = key.float() - key.float().mean(dim=2, keepdim=True)
    scores = rounded(query, QUERY_BLOCK) @ rounded(key, KEY_BLOCK).transpose(-1, -2)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(dim=-1).nan_to_num(0.0) @ value.double()


def masks(samples, heads, queries, keys):
    seen = torch.arange(keys) < max(1, keys - 9)
    return {
        "none": None,
        "keys": seen[None, None, None],
        "pairs": draw(queries, keys) > -0.5,
        "additive": 2 * draw(samples, 1, 1, keys),
        "nothing is seen": torch.zeros(1, 1, queries, 1, dtype=torch.bool),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_formula_under_every_mask(size, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    query, key, value = heads(*size)
    for name, mask in masks(*size[:4]).items():
        out = int8_attention(query, key, value, mask, backend=backend)
        assert (out.shape, out.dtype) == (query.shape, query.dtype)
        torch.testing.assert_close(out.double(), explicit(query, key, value, mask), rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_halves_differ_by_their_rounding(dtype, tolerance):
    query, key, value = heads(1, 2, 70, 140, 32, dtype=dtype)
    wanted = explicit(query, key, value, scale=0.3)
    for backend in BACKENDS:
        out = int8_attention(query, key, value, scale=0.3, backend=backend)
        assert out.dtype == dtype
        assert float((out.double() - wanted).norm() / wanted.norm()) < tolerance


def test_error_against_full_precision_does_not_grow_with_the_mean_of_the_keys():
    query, key, value = heads(1, 2, 150, 150, 64)
    wanted = F.scaled_dot_product_attention(query, key, value)
    shifted = key + 100 * draw(1, 2, 1, 64, seed=9)
    errors = [float((int8_attention(query, each, value) - wanted).norm() / wanted.norm()) for each in (key, shifted)]
    assert errors[0] < 0.02
    assert errors[1] < 1.1 * errors[0]


def test_a_block_of_tokens_does_not_change_the_scales_of_the_others():
    query, key, value = heads(1, 1, 2 * QUERY_BLOCK, 2 * QUERY_BLOCK, 16)
    loud = query.clone()
    loud[:, :, :QUERY_BLOCK] *= 100
    plain, changed = (int8_attention(each, key, value) for each in (query, loud))
    assert torch.equal(plain[:, :, QUERY_BLOCK:], changed[:, :, QUERY_BLOCK:])
    assert not torch.equal(plain[:, :, :QUERY_BLOCK], changed[:, :, :QUERY_BLOCK])


def test_chunks_of_queries_change_nothing(monkeypatch):
    query, key, value = heads(2, 2, 150, 150, 16)
    whole = int8_attention(query, key, value, draw(150, 150))
    monkeypatch.setattr(reference, "_CHUNK_VALUES", 40 * 4 * KEY_BLOCK)
    torch.testing.assert_close(int8_attention(query, key, value, draw(150, 150)), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_is_that_of_the_queries_whatever_that_of_keys_and_values(backend):
    packed = draw(2, 40, 3, 2, 16)  # [B, N, (q, k, v), H, D]
    query, key, value = (packed[:, :, part].transpose(1, 2) for part in range(3))
    out = int8_attention(query, key, value, backend=backend)
    assert out.stride() == torch.empty_like(query).stride()
    torch.testing.assert_close(out.double(), explicit(query, key, value), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_are_averaged_and_a_nan_stays_in_its_head(backend):
    query, key, value = heads(1, 2, 20, 20, 16)
    out = int8_attention(torch.zeros_like(query), key, value, backend=backend)
    torch.testing.assert_close(out, value.mean(dim=2, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-6)
    key[0, 0, 3, 2] = math.nan
    out = int8_attention(query, key, value, backend=backend)
    assert out[0, 0].isnan().all()
    assert out[0, 1].isfinite().all()


def test_torch_compile_sees_a_single_node():
    query, key, value = heads(1, 2, 20, 20, 16)
    compiled = torch.compile(lambda *qkv: int8_attention(*qkv) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(query, key, value), int8_attention(query, key, value) + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": draw(1, 2, 9, 8)}, r"queries \[1, 2, 8, 16\] and keys \[1, 2, 9, 8\]; expected"),
        ({"value": draw(1, 2, 7, 16)}, r"keys \[1, 2, 8, 16\] and values \[1, 2, 7, 16\]; expected the same shape"),
        ({"mask": torch.ones(3, 8)}, r"mask of shape \[3, 8\]; expected it to broadcast to \[1, 2, 8, 8\]"),
        (dict.fromkeys(("query", "key", "value"), draw(1, 1, 4, 129)), "heads of 129 features; expected at most 128"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = dict(zip(("query", "key", "value"), heads(1, 2, 8, 8, 16), strict=True)) | {"mask": None} | change
    with pytest.raises(InvalidInputError, match=f"int8_attention: got .*{message}"):
        int8_attention(**arguments)
