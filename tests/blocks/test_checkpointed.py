"""A checkpointed step: the same gradient, less kept."""

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn

from s2q.blocks.distil import checkpoint_parts
from s2q.core.memo import memoization
from s2q.nn import LearnableClip, StudentInput, StudentLinear
from s2q.transforms import Compose, KroneckerTransform, SmoothScale
from schemes import scheme

SCHEME = scheme(4, 6)
ACTIVATION = SCHEME.activation


def student_input(features):
    transform = Compose(SmoothScale(torch.ones(features)), KroneckerTransform.build(features))
    return StudentInput(ACTIVATION, transform=transform, clip=LearnableClip((1,)))


class Attention(nn.Module):
    """Three linears that share an input, mixed over tokens."""

    def __init__(self, width):
        super().__init__()
        source = student_input(width)
        self.norm_q = OwnRMSNorm(width)
        for name in ("to_q", "to_k", "to_v"):
            linear = nn.Linear(width, width)
            self.add_module(name, StudentLinear(linear, learns_clip=True, scheme=SCHEME, source=source))

    def forward(self, x):
        query, key, value = (layer(x) for layer in (self.to_q, self.to_k, self.to_v))
        heads = (tensor[:, None] for tensor in (self.norm_q(query), key, value))
        return nn.functional.scaled_dot_product_attention(*heads)[:, 0]


class OwnRMSNorm(nn.RMSNorm):
    """A model's own, which tells how many tokens it sees at a time."""

    def __init__(self, width):
        super().__init__(width)
        self.lengths = []

    def forward(self, x):
        self.lengths.append(x.shape[1])
        return super().forward(x)


class OwnFeedForward(FeedForward):
    """A model's own, derived from that of diffusers."""


class Block(nn.Module):
    """Attention and feed-forward with residuals."""

    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.attn = Attention(width)
        self.ff = OwnFeedForward(width, mult=2)
        for place, name in ((self.ff.net[0], "proj"), (self.ff.net, "2")):
            linear = place.get_submodule(name)
            student = StudentLinear(linear, learns_clip=True, scheme=SCHEME, source=student_input(linear.in_features))
            place.__setattr__(name, student) if name == "proj" else place.__setitem__(int(name), student)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.ff(x)


class SingleStream(nn.Module):
    """Attention and feed-forward of one input, joined by one linear, as in Flux and HunyuanVideo."""

    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.attn = Attention(width)
        self.proj_mlp, self.act_mlp = self.student(width, 4 * width), nn.GELU()
        self.proj_out = self.student(5 * width, width)

    @staticmethod
    def student(features, outputs):
        source = student_input(features)
        return StudentLinear(nn.Linear(features, outputs), learns_clip=True, scheme=SCHEME, source=source)

    def forward(self, x):
        inner = self.act_mlp(self.proj_mlp(x))
        return x + self.proj_out(torch.cat([self.attn(x), inner], dim=2))


def learnable(block):
    """The block; its transforms and clips require gradients."""
    for name, parameter in block.named_parameters():
        parameter.requires_grad_("weight" not in name and "bias" not in name)
    return block


def gradients(block, x):
    """Of every learnable parameter, and how many values the graph keeps."""
    block.zero_grad(set_to_none=True)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with memoization():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = block(x).square().mean()
        loss.backward()
    return [one.grad.clone() for one in block.parameters() if one.grad is not None], sum(kept)


@pytest.fixture
def block():
    return learnable(Block())


def test_the_gradient_is_the_same_and_less_is_kept(block):
    x = torch.randn(1, 50, 16)
    plain, kept = gradients(block, x)
    with checkpoint_parts(block):
        again, kept_then = gradients(block, x)
    assert len(plain) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert kept_then < 0.5 * kept
    after, kept_after = gradients(block, x)
    assert kept_after == kept
    assert all(torch.equal(a, b) for a, b in zip(plain, after, strict=True))


def test_a_feed_forward_goes_through_a_long_sequence_in_pieces(block):
    x, lengths = torch.randn(1, 50, 16), []
    plain, _ = gradients(block, x)
    block.ff.net[0].register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[1]))
    with checkpoint_parts(block, piece=16):
        pieces, _ = gradients(block, x)
    assert lengths[:4] == [16, 16, 16, 2]
    assert len(lengths) == 8  # forward, and again in the backward pass
    for one, other in zip(plain, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_input_of_an_attention_is_transformed_in_pieces(block):
    x, lengths = torch.randn(1, 50, 16), []
    plain, _ = gradients(block, x)
    source = block.attn.to_q.source
    source.transform.register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[1]))
    block.attn.norm_q.lengths.clear()
    with checkpoint_parts(block, piece=16):
        pieces, _ = gradients(block, x)
    assert lengths[:4] == [16, 16, 16, 2]
    assert set(block.attn.norm_q.lengths) == {16, 2}
    for one, other in zip(plain, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_forward_of_its_own_is_put_back(block):
    def own(x):
        return x

    block.ff.forward = own
    with checkpoint_parts(block):
        assert block.ff.forward is not own
    assert block.ff.forward is own


def test_pieces_of_an_input_keep_the_coefficients_of_a_branch():
    source = StudentInput(ACTIVATION, low_rank_basis=torch.linalg.qr(torch.randn(16, 2))[0])
    x = torch.randn(1, 50, 16)
    whole = source(x)
    source.piece = 16
    pieces = source(x)
    torch.testing.assert_close(pieces.quantized, whole.quantized)
    torch.testing.assert_close(pieces.coefficients, whole.coefficients)


def test_what_the_activation_of_a_single_stream_needs_is_not_kept(monkeypatch):
    block = learnable(SingleStream())
    x = torch.randn(1, 50, 16)
    plain, _ = gradients(block, x)
    with checkpoint_parts(block, piece=16):
        again, kept = gradients(block, x)
    monkeypatch.setattr("s2q.blocks.distil._ACTIVATIONS", {})
    with checkpoint_parts(block, piece=16):
        _, kept_with_it = gradients(block, x)
    assert kept_with_it - kept >= 50 * 64  # the output of proj_mlp
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(block(x), learnable(SingleStream())(x))


@pytest.mark.parametrize("kind", [Block, SingleStream])
def test_the_student_is_as_it_was_after_an_error(kind):
    block = learnable(kind())
    with pytest.raises(RuntimeError, match="stop"), checkpoint_parts(block):
        raise RuntimeError("stop")
    modules = list(block.modules())
    assert not any("forward" in vars(module) or getattr(module, "recomputes", False) for module in modules)
    assert all(module.piece is None for module in modules if isinstance(module, StudentInput))
