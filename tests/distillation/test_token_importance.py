import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2q.common.errors import InvalidInputError
from s2q.distillation.token_importance import capture_column_sums, linear_attention_colsum, token_weights
from tiny import tiny_transformer, transformer_inputs


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attends(nn.Module):
    """Calls attention with whatever it is given."""

    def forward(self, *args, **kwargs):
        return F.scaled_dot_product_attention(*args, **kwargs)


def column_sums(query, key, mask=None):
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0).sum(dim=(1, 2))


@pytest.mark.parametrize("rotary", [False, True])
def test_joint_attention_of_a_real_block(rotary):
    """Against the attention map that is computed by hand from the block's own projections."""
    transformer = tiny_transformer("cogvideox rotary" if rotary else "cogvideox")
    inputs = transformer_inputs(batch=2)
    if rotary:
        angles = draw(3, 16)
        inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
    seen = {}
    attention = transformer.transformer_blocks[1].attn1
    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.__setitem__(name, output))
        for name, module in (("query", attention.norm_q), ("key", attention.norm_k))
    ]
    with torch.no_grad(), capture_column_sums(attention) as captured:
        heard = transformer(**inputs, return_dict=False)[0]
    for handle in handles:
        handle.remove()
    sums = captured.joined()
    assert len(captured.calls) == 1
    assert sums.shape == (2, 16 + 3)  # 16 text tokens, then 3 frames of one patch
    torch.testing.assert_close(sums.sum(dim=1), torch.full((2,), 4.0 * 19))
    torch.testing.assert_close(sums, column_sums(seen["query"], seen["key"]))  # rotated in place, where they are
    with torch.no_grad():
        assert torch.equal(transformer(**inputs, return_dict=False)[0], heard)


def test_only_the_given_module_is_heard_and_only_inside_the_context():
    one, other = Attends(), Attends()
    q, k, v = (draw(1, 2, 5, 4, seed=seed) for seed in range(3))
    with capture_column_sums(one) as captured:
        other(q, k, v)
        F.scaled_dot_product_attention(q, k, v)
        assert not captured.calls
        one(q, k, v)
    one(q, k, v)
    assert len(captured.calls) == 1
    torch.testing.assert_close(captured.joined(), column_sums(q, k))
    assert not one._forward_hooks
    assert not one._forward_pre_hooks


def test_every_way_of_calling_is_understood():
    module, mask = Attends(), torch.tensor([True, True, False, True, False])[None, None, None]
    q, k, v = (draw(1, 2, 5, 4, seed=seed) for seed in range(3))
    with capture_column_sums(module) as captured:
        module(q, k, v, mask)
        module(query=q, key=k, value=v, attn_mask=mask, dropout_p=0.0, is_causal=False)
        module(q, k[:, :1], v[:, :1], mask, enable_gqa=True)
        module(q, k, v, scale=2.0)
    expected = column_sums(q, k, mask)
    torch.testing.assert_close(captured.calls[0], expected)
    torch.testing.assert_close(captured.calls[1], expected)
    torch.testing.assert_close(captured.calls[2], column_sums(q, k[:, :1].expand(-1, 2, -1, -1), mask))
    torch.testing.assert_close(captured.calls[3], column_sums(q * 2 * 4**0.5, k))


def test_cross_attention_is_passed_over():
    module = Attends()
    q, k = draw(1, 2, 5, 4), draw(1, 2, 3, 4, seed=1)
    with capture_column_sums(module) as captured:
        module(q, k, k)
    with pytest.raises(InvalidInputError, match="no self-attention was captured"):
        captured.joined()


def test_samples_that_attend_one_by_one_are_joined():
    module = Attends()
    q, k, v = (draw(3, 2, 5, 4, seed=seed) for seed in range(3))
    with capture_column_sums(module) as captured:
        for sample in range(3):
            module(q[sample : sample + 1], k[sample : sample + 1], v[sample : sample + 1])
    torch.testing.assert_close(captured.joined(), column_sums(q, k))
    with capture_column_sums(module) as captured:
        module(q, k, v)
        module(q[:, :, :4], k[:, :, :4], v[:, :, :4])
    with pytest.raises(InvalidInputError, match=r"\[4, 5\] tokens"):
        captured.joined()


@pytest.mark.parametrize("option", [{"is_causal": True}, {"dropout_p": 0.1}])
def test_attention_that_is_none_of_a_video_model_is_refused(option):
    q = draw(1, 2, 5, 4)
    with pytest.raises(InvalidInputError, match="expected neither"), capture_column_sums(module := Attends()):
        module(q, q, q, **option)


def test_a_failure_inside_leaves_no_hooks_and_does_not_listen_on():
    module = Attends()
    q = draw(1, 2, 5, 4)
    with capture_column_sums(module) as captured:
        with pytest.raises(RuntimeError):
            module(q, q, q.double())
        captured.calls.clear()
        F.scaled_dot_product_attention(q, q, q)
    assert not captured.calls
    assert not module._forward_hooks


def test_weights_by_hand():
    sums = torch.tensor([[1.0, 3.0, 2.0], [10.0, 0.0, 5.0]])
    expected = torch.tensor([[0.5, 1.0, 0.75], [1.0, 0.5, 0.75]])
    torch.testing.assert_close(token_weights(sums), expected)
    torch.testing.assert_close(token_weights(sums, lambda_min=0.0, lambda_max=2.0), (expected - 0.5) * 4)


@pytest.mark.parametrize("lambda_min", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_range_order_and_ends(lambda_min):
    sums = draw(4, 500).abs() * 1e4
    weights = token_weights(sums, lambda_min=lambda_min)
    assert weights.dtype == torch.float32
    assert (weights.amin(dim=1) == torch.tensor(lambda_min)).all()
    assert (weights.amax(dim=1) == 1).all()
    assert (weights.gather(1, sums.argsort(dim=1)).diff(dim=1) >= 0).all()


def test_constant_sums_weight_every_token_alike():
    noise = 1 + draw(1, 50) * 1e-7
    sums = torch.cat([torch.full((1, 50), 3.0), torch.zeros(1, 50), noise, torch.arange(50.0)[None]])
    weights = token_weights(sums, lambda_max=0.9)
    assert (weights[:3] == torch.tensor(0.9)).all()
    assert len(weights[3].unique()) == 50
    assert token_weights(torch.tensor([[7.0]])).tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("sums", "options", "message"),
    [
        ([[1.0, float("nan")]], {}, "NaN"),
        ([[1.0, float("inf")]], {}, "infinite"),
        ([1.0, 2.0], {}, r"\[B, N\]"),
        ([[]], {}, r"\[B, N\]"),
        ([[1.0, 2.0]], {"lambda_min": -0.1}, "lambda_min=-0.1"),
        ([[1.0, 2.0]], {"lambda_min": 0.9, "lambda_max": 0.8}, "lambda_max=0.8"),
        ([[1.0, 2.0]], {"lambda_min": 0.0, "lambda_max": 0.0}, "lambda_max=0.0"),
        ([[1.0, 2.0]], {"lambda_min": float("nan")}, "lambda_min=nan"),
    ],
)
def test_importance_refuses_bad_input(sums, options, message):
    with pytest.raises(InvalidInputError, match=message):
        token_weights(torch.tensor(sums), **options)


class LinearAttention(torch.nn.Module):
    heads = 2

    def __init__(self, norms):
        super().__init__()
        self.to_q, self.to_k = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.norm_q, self.norm_k = (torch.nn.RMSNorm(8), torch.nn.RMSNorm(8)) if norms else (None, None)

    def forward(self, x):
        query, key = self.to_q(x), self.to_k(x)
        if self.norm_q is not None:
            query, key = self.norm_q(query), self.norm_k(key)
        self.seen = query, key
        return query


@pytest.mark.parametrize("norms", [False, True])
def test_sums_of_linear_attention_are_those_of_its_explicit_map(norms):
    torch.manual_seed(0)
    module, x = LinearAttention(norms), torch.randn(2, 11, 8)
    with torch.no_grad(), capture_column_sums(module, linear=True) as captured:
        output = module(x)
        assert torch.equal(output, module.seen[0])
    query, key = (part.unflatten(-1, (2, 4)).relu().transpose(1, 2) for part in module.seen)  # [B, H, N, D]
    products = query @ key.transpose(-1, -2)
    explicit = products / products.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(captured.joined(), explicit.nan_to_num().sum(dim=(1, 2)))
    assert not module._forward_hooks


def test_a_query_that_attends_to_nothing_gives_nothing():
    query, key = torch.tensor([1.0, 0.0, -1.0, -1.0]).reshape(1, 2, 1, 2), torch.tensor([3.0, 0.0, 1.0, 5.0])
    assert linear_attention_colsum(query, key.reshape(1, 2, 1, 2)).tolist() == [[0.75, 0.25]]
