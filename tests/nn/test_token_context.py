"""Layers of a transformer that know where the video tokens of a call lie."""

import copy

import pytest
import torch
from torch import nn

from s2q.core.errors import InvalidInputError
from s2q.core.qparams import RoundedWeight, fake_quantize_input
from s2q.core.schemes import Delta, LinearScheme, PerChannel, PerToken, QuantScheme
from s2q.core.tokens import TokenGrid, TokenLayout
from s2q.models import family_of, token_layout
from s2q.nn import PackedLinear, follow_tokens, set_token_grid, unfollow_tokens
from tiny import (
    TINY_CALL,
    tiny_cogvideox_pipeline,
    tiny_hunyuanvideo_pipeline,
    tiny_ltx_pipeline,
    tiny_wan_pipeline,
)

ACTIVATION = QuantScheme(num_bits=4, granularity=PerToken(), dynamic=True, delta=Delta(cube=(2, 2, 2)))
SCHEME = LinearScheme(weight=QuantScheme(num_bits=4, granularity=PerChannel()), activation=ACTIVATION)
LAYOUT = TokenLayout(latents="channels first", patch=(1, 1, 1), text="before")


def identity(width=8):
    codes = torch.eye(width, dtype=torch.int8)
    return PackedLinear.from_rounded(RoundedWeight(codes=codes, scale=torch.ones(width)), bias=None, scheme=SCHEME)


class Transformer(nn.Module):
    """Reads latents [B, C, f, h, w] behind a text [B, T, C]."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([identity(), identity()])

    def forward(self, hidden_states, encoder_hidden_states, scale=1.0):
        x = torch.cat([encoder_hidden_states, hidden_states.flatten(2).mT], dim=1) * scale
        for block in self.blocks:
            x = block(x)
        return x


def call(frames=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 8, frames, 2, 5, generator=generator), torch.randn(1, 4, 8, generator=generator)


def expected(latents, text, grid):
    x = torch.cat([text, latents.flatten(2).mT], dim=1)
    return fake_quantize_input(fake_quantize_input(x, ACTIVATION, grid=grid), ACTIVATION, grid=grid)


def grid(frames=3):
    return TokenGrid(frames=frames, height=2, width=5, text_tokens=4, text="before")


def test_layers_follow_every_call_however_it_is_made():
    transformer = Transformer()
    follow_tokens(transformer, LAYOUT)
    follow_tokens(transformer, LAYOUT)
    assert len(transformer._forward_pre_hooks) == 1
    for frames in (3, 2):
        latents, text = call(frames)
        wanted = expected(latents, text, grid(frames))
        assert not torch.equal(wanted, expected(latents, text, None))
        assert torch.equal(transformer(latents, text), wanted)
        assert torch.equal(transformer(encoder_hidden_states=text, hidden_states=latents), wanted)
    with pytest.raises(InvalidInputError, match="do not say where frames"):
        transformer(latents.flatten(2), text)
    unfollow_tokens(transformer)
    assert not transformer._forward_pre_hooks
    assert not transformer._forward_pre_hooks_with_kwargs


def test_copies_follow_their_own_calls():
    transformer = Transformer()
    follow_tokens(transformer, LAYOUT)
    other = copy.deepcopy(transformer)
    first, second = call(3), call(2)
    other(*second)
    assert transformer.blocks[0].tokens.grid is None
    assert torch.equal(transformer(*first), expected(*first, grid(3)))
    assert other.blocks[1].tokens.grid == grid(2)
    assert torch.equal(other(*second), expected(*second, grid(2)))


def test_a_compiled_transformer_follows_too():
    transformer = Transformer()
    follow_tokens(transformer, LAYOUT)
    compiled = torch.compile(transformer, backend="eager")
    for frames in (3, 2, 3):
        latents, text = call(frames)
        torch.testing.assert_close(compiled(latents, text), expected(latents, text, grid(frames)), rtol=0, atol=1e-6)


def test_outside_of_a_transformer_somebody_says():
    block = nn.Sequential(identity(), nn.ReLU())
    latents, text = call()
    x = torch.cat([text, latents.flatten(2).mT], dim=1)
    assert torch.equal(block[0](x), fake_quantize_input(x, ACTIVATION))
    set_token_grid(block, grid())
    assert torch.equal(block[0](x), fake_quantize_input(x, ACTIVATION, grid=grid()))
    set_token_grid(block, None)
    assert torch.equal(block[0](x), fake_quantize_input(x, ACTIVATION))


LARGER = {"num_inference_steps": 1, "num_frames": 9, "height": 64, "width": 32}
"""9 frames are 3 latent ones; 64 x 32 pixels are 8 x 4 latent ones, or 4 x 2 tokens where patches are 2 wide."""


@pytest.mark.parametrize(
    ("build", "call", "sizes", "text", "linears"),
    [
        (
            tiny_cogvideox_pipeline,
            TINY_CALL,
            (3, 1, 1),
            "before",
            {"transformer_blocks.0.attn1.to_q": "joint", "transformer_blocks.1.ff.net.2": "joint"},
        ),
        (
            tiny_wan_pipeline,
            LARGER,
            (3, 4, 2),
            "apart",
            {"blocks.0.attn1.to_q": "video", "blocks.0.attn2.to_q": "video", "blocks.1.ffn.net.2": "video"},
        ),
        (
            tiny_hunyuanvideo_pipeline,
            LARGER,
            (3, 4, 2),
            "after",
            {"transformer_blocks.0.attn.to_q": "video", "single_transformer_blocks.0.proj_mlp": "joint"},
        ),
        (tiny_ltx_pipeline, LARGER, (3, 8, 4), "apart", {"transformer_blocks.0.attn1.to_q": "video"}),
    ],
)
def test_the_grid_of_a_pipeline_and_what_its_linears_see(build, call, sizes, text, linears):
    pipe = build()
    layout = token_layout(pipe.transformer, family_of(pipe.transformer))
    heard = []

    def hear_call(_module, _args, kwargs):
        heard.append(layout.grid(kwargs))

    def hear_linear(name):
        return lambda _module, args: heard.append((name, args[0].shape[1]))

    pipe.transformer.register_forward_pre_hook(hear_call, with_kwargs=True)
    for name in linears:
        pipe.transformer.get_submodule(name).register_forward_pre_hook(hear_linear(name))
    pipe(prompt="a", output_type="latent", **call)
    found, lengths = heard[0], dict(one for one in heard if isinstance(one, tuple))
    assert (found.frames, found.height, found.width, found.text) == (*sizes, text)
    assert (found.text_tokens > 0) == (text != "apart")
    for name, sees in linears.items():
        assert lengths[name] == found.tokens + (found.text_tokens if sees == "joint" else 0)
        assert found.offset(lengths[name]) == (found.text_tokens if text == "before" else 0)
