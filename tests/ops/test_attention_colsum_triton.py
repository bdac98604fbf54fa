import math
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from quick import quick, quick_if
from s2q.common.errors import InvalidInputError
from s2q.ops.attention_colsum import BACKENDS


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def explicit(query, key, mask=None, scale=None):
    """The whole map in fp64."""
    logits = query.double() @ key.double().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
    return logits.softmax(-1).nan_to_num(0.0).sum(dim=(1, 2))


def padding(batch, keys):
    lengths = torch.arange(batch) * 20 + 30
    return (torch.arange(keys) < lengths[:, None])[:, None, None, :]


MASKS = {
    "none": lambda: None,
    "keys [B,1,1,M]": lambda: padding(2, 70),
    "queries [B,1,N,1]": lambda: padding(2, 37).transpose(-1, -2),
    "heads [1,H,N,M]": lambda: draw(1, 3, 37, 70) > -0.5,
    "matrix [N,M]": lambda: torch.ones(37, 70, dtype=torch.bool).tril(),
    "transposed [N,M]": lambda: (draw(70, 37) > 0).t(),
    "additive [B,1,1,M]": lambda: draw(2, 1, 1, 70) * 3,
    "additive bf16 [N,M]": lambda: (draw(37, 70) * 3).bfloat16(),
    "additive infinite": lambda: torch.zeros(2, 1, 37, 70).masked_fill(~padding(2, 70), -torch.inf),
    "some see nothing": lambda: (draw(2, 3, 37, 1) > 0).expand(2, 3, 37, 70),
    "nothing is seen": lambda: torch.zeros(2, 1, 1, 70, dtype=torch.bool),
}


def is_quick(name, dtype):
    """Each mask with one dtype."""
    return (dtype == torch.bfloat16) == name.startswith("additive")


@pytest.mark.parametrize(("name", "dtype"), quick_if(is_quick, product(MASKS, [torch.float32, torch.bfloat16])))
def test_equals_the_explicit_map_and_the_reference(name, dtype):
    query, key, mask = draw(2, 3, 37, 24).to(dtype), (draw(2, 3, 70, 24, seed=1) * 2).to(dtype), MASKS[name]()
    sums = BACKENDS["triton"](query, key, mask=mask)
    assert (sums.shape, sums.dtype) == ((2, 70), torch.float32)
    torch.testing.assert_close(sums.double(), explicit(query, key, mask), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums, BACKENDS["reference"](query, key, mask=mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(1, 1, 1), (1, 200, 64), (150, 3, 16), (129, 130, 48)])
def test_sizes_that_fill_no_tile(queries, keys, head_dim):
    query, key = draw(1, 2, queries, head_dim), draw(1, 2, keys, head_dim, seed=1)
    found = BACKENDS["triton"](query.half(), key.half(), scale=0.3)
    torch.testing.assert_close(found.double(), explicit(query.half(), key.half(), scale=0.3), rtol=1e-5, atol=1e-6)


def test_strides_of_packed_projections():
    packed = draw(2, 40, 3, 2, 16)  # [B, N, (q, k, v), H, D]
    query, key = packed[:, :, 0].transpose(1, 2), packed[:, :, 1].transpose(1, 2)
    torch.testing.assert_close(BACKENDS["triton"](query, key), BACKENDS["reference"](query, key), rtol=1e-5, atol=1e-6)
    query = draw(2, 2, 16, 40).transpose(-1, -2)
    torch.testing.assert_close(BACKENDS["triton"](query, key), BACKENDS["reference"](query, key), rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow():
    query, key = draw(1, 1, 20, 8) * 1e4, draw(1, 1, 30, 8, seed=1) * 1e4
    sums = BACKENDS["triton"](query, key)  # one unit in the last place of a logit is a factor of 2^8 here
    assert ((sums >= 0) & (sums <= 20)).all()
    query, key = query * 3e-3, key * 3e-3  # logits up to 2,000
    torch.testing.assert_close(BACKENDS["triton"](query, key).double(), explicit(query, key), rtol=1e-3, atol=1e-5)


def test_a_nan_reaches_all_keys_of_its_sample_unless_it_is_hidden():
    query, key = draw(2, 1, 20, 8), draw(2, 1, 40, 8, seed=1)
    key[1, 0, 35] = math.nan
    sums = BACKENDS["triton"](query, key)
    assert sums[0].isfinite().all()
    assert sums[1].isnan().all()
    mask = (torch.arange(40) < 33).expand(2, 1, 1, 40)
    torch.testing.assert_close(BACKENDS["triton"](query, key, mask=mask), BACKENDS["reference"](query, key, mask=mask))
    query[0, 0, 3] = math.nan
    assert BACKENDS["triton"](query, key)[0].isnan().all()


@pytest.mark.parametrize("dtype", quick([torch.float32, torch.float16, torch.bfloat16], torch.bfloat16))
@pytest.mark.parametrize("head_dim", quick([65, 128, 130, 256], 65, 256))
@pytest.mark.parametrize("masked", [False, True])
def test_wide_heads_equal_the_explicit_map(dtype, head_dim, masked):
    query, key = draw(1, 2, 70, head_dim).to(dtype), (draw(1, 2, 90, head_dim, seed=1) * 3).to(dtype)
    mask = draw(70, 90, seed=2) if masked else None
    sums = BACKENDS["triton"](query, key, mask=mask)  # the interpreter computes products of tf32 in fp32
    torch.testing.assert_close(sums.double(), explicit(query, key, mask), rtol=2e-5, atol=1e-6)


def test_no_queries_give_sums_of_zero():
    assert torch.equal(BACKENDS["triton"](draw(2, 1, 0, 8), draw(2, 1, 5, 8)), torch.zeros(2, 5))


def test_what_does_not_fit_is_refused():
    with pytest.raises(InvalidInputError, match="expected"):
        BACKENDS["triton"](draw(1, 2, 3, 8), draw(1, 1, 3, 8))
    with pytest.raises(InvalidInputError, match="float64"):
        BACKENDS["triton"](draw(1, 1, 3, 8).double(), draw(1, 1, 3, 8).double())
