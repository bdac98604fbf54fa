"""A checkpointed step: the same gradient, less kept, also where cubes of tokens are quantized together."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn

from s2q.blocks.distil import checkpoint_parts
from s2q.core.memo import memoization
from s2q.core.schemes import Delta
from s2q.core.tokens import TokenGrid, token_grid
from s2q.nn import Estimator, LearnableClip, StudentInput, StudentLinear
from s2q.transforms import Compose, KroneckerTransform, SmoothScale
from schemes import activations, scheme

SCHEME = scheme(4, 6)
ACTIVATION = SCHEME.activation
DELTA = replace(SCHEME, activation=activations(4, delta=Delta(cube=(2, 2, 2), mean_bits=8)))
GRID = TokenGrid(frames=5, height=2, width=3, text_tokens=4, text="after")


def student_input(features, quantized=SCHEME):
    transform = Compose(SmoothScale(torch.ones(features)), KroneckerTransform.build(features))
    return StudentInput(quantized.activation, transform=transform, clip=LearnableClip((1,)))


class Attention(nn.Module):
    """Three linears that share an input, mixed over tokens."""

    def __init__(self, width, quantized=SCHEME):
        super().__init__()
        source = student_input(width, quantized)
        self.norm_q = OwnRMSNorm(width)
        for name in ("to_q", "to_k", "to_v"):
            linear = nn.Linear(width, width)
            self.add_module(name, StudentLinear(linear, learns_clip=True, scheme=quantized, source=source))

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

    def __init__(self, width=16, quantized=SCHEME):
        super().__init__()
        torch.manual_seed(0)
        self.attn = Attention(width, quantized)
        self.ff = OwnFeedForward(width, mult=2)
        for place, name in ((self.ff.net[0], "proj"), (self.ff.net, "2")):
            linear = place.get_submodule(name)
            source = student_input(linear.in_features, quantized)
            student = StudentLinear(linear, learns_clip=True, scheme=quantized, source=source)
            place.__setattr__(name, student) if name == "proj" else place.__setitem__(int(name), student)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.ff(x)


class SingleStream(nn.Module):
    """Attention and feed-forward of one input, joined by one linear, as in Flux and HunyuanVideo."""

    def __init__(self, width=16, quantized=SCHEME):
        super().__init__()
        torch.manual_seed(0)
        self.attn = Attention(width, quantized)
        self.proj_mlp, self.act_mlp = self.student(width, 4 * width, quantized), nn.GELU()
        self.proj_out = self.student(5 * width, width, quantized)

    @staticmethod
    def student(features, outputs, quantized):
        source = student_input(features, quantized)
        return StudentLinear(nn.Linear(features, outputs), learns_clip=True, scheme=quantized, source=source)

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


def lengths_of(source):
    """Record how many tokens an input has each time that it is transformed."""
    lengths = []
    source.transform.register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[1]))
    return lengths


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", [Block, SingleStream])
def test_pieces_have_whole_cubes_where_differences_from_their_means_are_quantized(kind, place):
    block = learnable(kind(quantized=DELTA))
    parts = [block.attn.to_q, *([block.ff.net[0].proj, block.ff.net[2]] if kind is Block else [block.proj_mlp])]
    x = torch.randn(1, 34, 16)
    with token_grid(replace(GRID, text=place)):
        plain, kept = gradients(block, x)
        lengths = [lengths_of(part.source) for part in parts]
        with checkpoint_parts(block, piece=16):
            pieces, kept_then = gradients(block, x)
    video = [12, 12, 6]
    expected = [4, *video] if place == "before" else [*video, 4]
    assert [sizes[:4] for sizes in lengths] == [expected] * len(parts)
    assert kept_then < 0.5 * kept
    for one, other in zip(plain, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_in_one_piece_a_step_with_cubes_has_the_same_bits():
    block, x = learnable(Block(quantized=DELTA)), torch.randn(1, 30, 16)
    with token_grid(GRID):
        plain, kept = gradients(block, x)
        with checkpoint_parts(block):
            again, kept_then = gradients(block, x)
    assert kept_then < 0.5 * kept
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_a_piece_of_text_is_not_taken_for_the_video():
    source, x = student_input(16, DELTA), torch.randn(1, 2 * GRID.tokens, 16)
    with token_grid(GRID):
        whole = source(x).quantized
        source.piece = GRID.tokens
        lengths = lengths_of(source)
        pieces = source(x).quantized
    assert lengths == [GRID.tokens] * 2
    torch.testing.assert_close(pieces, whole)


def test_an_estimator_sees_all_frames_at_once():
    """Its scales belong to the frames of the whole video; the inputs of its linear are in pieces."""
    linear, source = nn.Linear(16, 16), student_input(16, DELTA)
    estimator = Estimator(16, 16, frames=GRID.frames, seed=0)
    with torch.no_grad():
        estimator.frames.copy_(torch.linspace(0.5, 2, GRID.frames))
        estimator.beta.fill_(1.0)
    part = StudentLinear(linear, learns_clip=True, scheme=DELTA, source=source, estimator=estimator)
    block = learnable(nn.Sequential(part))
    x = torch.randn(1, 30, 16)
    with token_grid(GRID):
        plain, _ = gradients(block, x)
        lengths = lengths_of(source)
        with checkpoint_parts(block, piece=16):
            pieces, _ = gradients(block, x)
    assert set(lengths) == {12, 6}
    for one, other in zip(plain, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [Block, SingleStream])
def test_the_student_is_as_it_was_after_an_error(kind):
    block = learnable(kind())
    with pytest.raises(RuntimeError, match="stop"), checkpoint_parts(block):
        raise RuntimeError("stop")
    modules = list(block.modules())
    assert not any("forward" in vars(module) or getattr(module, "recomputes", False) for module in modules)
    assert all(module.piece is None for module in modules if isinstance(module, StudentInput))
