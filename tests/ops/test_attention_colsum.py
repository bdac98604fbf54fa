import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from s2q.common.errors import InvalidInputError
from s2q.ops.attention_colsum import attention_colsum, reference


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def explicit(query, key, mask=None, scale=None):
    """The whole map in fp64."""
    logits = query.double() @ key.double().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
    attention = logits.softmax(-1).nan_to_num(0.0)  # rows without any key are NaN there
    return attention.sum(dim=(1, 2))


def from_backward(query, key, mask=None):
    """dV = Aᵀ · dO: what torch's own attention says."""
    value = torch.zeros_like(key).requires_grad_()
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    (gradient,) = torch.autograd.grad(output, value, torch.ones_like(output))
    return gradient[..., 0].sum(dim=1)


def padding(batch, keys):
    lengths = torch.arange(batch) * 2 + 3
    return (torch.arange(keys) < lengths[:, None])[:, None, None, :]


MASKS = {
    "none": lambda: None,
    "keys [B,1,1,N]": lambda: padding(2, 11),
    "pairs [B,1,N,N]": lambda: padding(2, 11) & padding(2, 11).transpose(-1, -2),  # padded queries see nothing
    "heads [1,H,N,N]": lambda: draw(1, 3, 11, 11) > -0.5,
    "matrix [N,N]": lambda: torch.ones(11, 11, dtype=torch.bool).tril(),
    "additive [B,1,1,N]": lambda: draw(2, 1, 1, 11) * 3,
    "additive [N,N]": lambda: draw(11, 11) * 3,
    "additive infinite": lambda: torch.zeros(2, 1, 11, 11).masked_fill(~padding(2, 11), -torch.inf),
    "nothing is seen": lambda: torch.zeros(2, 1, 1, 11, dtype=torch.bool),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 11, 100])
def test_equals_the_explicit_map(name, chunk_size):
    query, key, mask = draw(2, 3, 11, 8), draw(2, 3, 11, 8, seed=1) * 2, MASKS[name]()
    sums = attention_colsum(query, key, mask=mask, chunk_size=chunk_size)
    assert (sums.shape, sums.dtype) == ((2, 11), torch.float32)
    torch.testing.assert_close(sums.double(), explicit(query, key, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["none", "keys [B,1,1,N]", "additive [N,N]"])
def test_equals_what_attention_itself_does(name):
    query, key, mask = draw(2, 3, 11, 8), draw(2, 3, 11, 8, seed=1), MASKS[name]()
    torch.testing.assert_close(attention_colsum(query, key, mask=mask), from_backward(query, key, mask))


def test_every_seeing_query_gives_one():
    query, key = draw(2, 3, 11, 8), draw(2, 3, 11, 8, seed=1)
    torch.testing.assert_close(attention_colsum(query, key).sum(dim=1), torch.full((2,), 33.0))
    pairs = MASKS["pairs [B,1,N,N]"]()
    seeing = pairs.any(dim=-1).sum(dim=(1, 2)).float() * 3
    torch.testing.assert_close(attention_colsum(query, key, mask=pairs).sum(dim=1), seeing)


def test_masked_keys_receive_nothing():
    sums = attention_colsum(draw(2, 3, 11, 8), draw(2, 3, 11, 8, seed=1), mask=padding(2, 11))
    assert not sums[0, 3:].any()
    assert not sums[1, 5:].any()


def test_the_example_of_the_docstring():
    query, key = torch.zeros(1, 1, 2, 1), torch.tensor([5.0, 7.0]).reshape(1, 1, 2, 1)
    assert attention_colsum(query, key).tolist() == [[1.0, 1.0]]


def test_more_queries_than_keys_and_another_scale():
    query, key = draw(2, 3, 11, 8), draw(2, 3, 5, 8, seed=1)
    torch.testing.assert_close(attention_colsum(query, key, scale=0.7).double(), explicit(query, key, scale=0.7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    query, key = draw(1, 2, 40, 8).to(dtype), draw(1, 2, 40, 8, seed=1).to(dtype)
    torch.testing.assert_close(attention_colsum(query, key), attention_colsum(query.float(), key.float()))
    assert attention_colsum(query, key).dtype == torch.float32


def test_non_contiguous_huge_logits_and_fp64():
    query, key = draw(2, 11, 3, 8).transpose(1, 2) * 100, draw(2, 11, 3, 8, seed=1).transpose(1, 2) * 100
    torch.testing.assert_close(attention_colsum(query, key, chunk_size=4).double(), explicit(query, key))
    assert attention_colsum(query.double(), key.double()).dtype == torch.float64


def test_nan_is_not_swallowed():
    query = draw(1, 1, 4, 8)
    query[0, 0, 2, 1] = torch.nan
    assert attention_colsum(query, draw(1, 1, 4, 8)).isnan().all()


@pytest.mark.parametrize(
    ("query", "key", "mask", "chunk_size", "message"),
    [
        ((1, 2, 4, 8), (1, 3, 4, 8), None, None, "expected"),
        ((1, 2, 4, 8), (1, 2, 4, 6), None, None, "expected"),
        ((2, 4, 8), (2, 4, 8), None, None, "expected"),
        ((1, 2, 4, 8), (1, 2, 4, 8), (3, 4), None, "mask of shape"),
        ((1, 2, 4, 8), (1, 2, 4, 8), (1, 1, 1, 4, 4), None, "mask of shape"),
        ((1, 2, 4, 8), (1, 2, 4, 8), None, 0, "chunk_size=0"),
    ],
)
def test_column_sums_refuse_bad_input(query, key, mask, chunk_size, message):
    mask = None if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises(InvalidInputError, match=message):
        attention_colsum(torch.ones(query), torch.ones(key), mask=mask, chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("free", "chunk"),
    [
        (0, 32 << 20),
        (1 << 20, 32 << 20),
        (1 << 30, 1 << 28),
        (3 << 30, 3 << 28),
        (4 << 30, 1 << 30),
        (80 << 30, 1 << 30),
    ],
)
def test_chunks_on_a_gpu_take_a_quarter_of_what_is_free_up_to_a_gib(free, chunk):
    assert reference.chunk_bytes(free) == chunk


def test_chunks_on_a_gpu_count_what_the_allocator_has_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 << 30)
    assert reference._chunk_bytes_on(torch.device("cuda")) == 1 << 29
    assert reference._chunk_bytes_on(torch.device("cpu")) == 32 << 20


_MEASURE = """
import json, pathlib, torch
from s2q.ops.attention_colsum import attention_colsum
torch.set_num_threads(1)

def peak():
    # not ru_maxrss: that starts with the peak of the process that started this one
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

attention_colsum(torch.ones(1, 2, 64, 64), torch.ones(1, 2, 64, 64))  # what loading and set-up take is not counted
query, key = (torch.randn(1, 2, {tokens}, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
before = peak()
sums = attention_colsum(query, key, chunk_size={chunk_size})
print(json.dumps({{"bytes": peak() - before, "total": float(sums.sum())}}))
"""


def peak_above_inputs(tokens, *, chunk_size=None):
    script = _MEASURE.format(tokens=tokens, chunk_size=chunk_size)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    measured = json.loads(run.stdout)
    assert measured["total"] == pytest.approx(2 * tokens, rel=1e-4)
    return measured["bytes"]


@pytest.mark.slow
def test_a_full_length_video_stays_far_below_the_map():
    """N = 17,776 tokens of CogVideoX, 2 heads of 64: the map alone would be 2.5 GB."""
    assert peak_above_inputs(17_776) < 250e6


@pytest.mark.slow
def test_the_measurement_sees_a_map():
    tokens = 6000
    assert peak_above_inputs(tokens, chunk_size=tokens) > 2 * tokens * tokens * 4 > 250e6
