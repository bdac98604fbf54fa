"""Layers of a transformer that know where the video tokens of a call lie."""

import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from s2q.common.errors import InvalidInputError, UsageError
from s2q.core.qparams import RoundedWeight
from s2q.core.schemes import Delta, LinearScheme
from s2q.core.tokens import TokenGrid, TokenLayout, current_grid, token_grid
from s2q.models import family_of, token_layout
from s2q.nn import PackedLinear, follow_tokens, unfollow_tokens
from s2q.ops.fake_quantize import fake_quantize_input
from schemes import activations, weights
from tiny import TINY_CALL, tiny_pipeline

ACTIVATION = activations(4, delta=Delta(cube=(2, 2, 2)))
SCHEME = LinearScheme(weight=weights(4), activation=ACTIVATION)
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
    with pytest.raises(InvalidInputError, match="do not define frames"):
        transformer(latents.flatten(2), text)
    unfollow_tokens(transformer)
    assert not transformer._forward_pre_hooks
    assert not transformer._forward_pre_hooks_with_kwargs
    assert not transformer._forward_hooks
    assert not transformer._forward_hooks_always_called


def test_copies_follow_their_own_calls():
    transformer = Transformer()
    follow_tokens(transformer, LAYOUT)
    other = copy.deepcopy(transformer)
    first, second = call(3), call(2)
    other(*second)
    assert torch.equal(transformer(*first), expected(*first, grid(3)))
    assert torch.equal(other(*second), expected(*second, grid(2)))


@pytest.mark.slow
def test_a_compiled_transformer_follows_too():
    transformer = Transformer()
    follow_tokens(transformer, LAYOUT)
    compiled = torch.compile(transformer, backend="eager")
    for frames in (3, 2, 3):
        latents, text = call(frames)
        torch.testing.assert_close(compiled(latents, text), expected(latents, text, grid(frames)), rtol=0, atol=1e-6)


def test_outside_of_a_transformer_somebody_says():
    layer = identity()
    latents, text = call()
    x = torch.cat([text, latents.flatten(2).mT], dim=1)
    for known in (grid(), None):
        with token_grid(known):
            assert torch.equal(layer(x), fake_quantize_input(x, ACTIVATION, grid=known))
    with pytest.raises(UsageError, match="called outside its transformer"):
        layer(x)


LARGER = {"num_inference_steps": 1, "num_frames": 9, "height": 64, "width": 32}
"""9 frames are 3 latent ones; 64 x 32 pixels are 8 x 4 latent ones, or 4 x 2 tokens where patches are 2 wide."""


@pytest.mark.parametrize(
    ("name", "call", "sizes", "text", "linears"),
    [
        (
            "cogvideox",
            TINY_CALL,
            (3, 1, 1),
            "before",
            {"transformer_blocks.0.attn1.to_q": "joint", "transformer_blocks.1.ff.net.2": "joint"},
        ),
        (
            "wan",
            LARGER,
            (3, 4, 2),
            "apart",
            {"blocks.0.attn1.to_q": "video", "blocks.0.attn2.to_q": "video", "blocks.1.ffn.net.2": "video"},
        ),
        (
            "hunyuanvideo",
            LARGER,
            (3, 4, 2),
            "after",
            {"transformer_blocks.0.attn.to_q": "video", "single_transformer_blocks.0.proj_mlp": "joint"},
        ),
        ("ltx", LARGER, (3, 8, 4), "apart", {"transformer_blocks.0.attn1.to_q": "video"}),
    ],
)
def test_the_grid_of_a_pipeline_and_what_its_linears_see(name, call, sizes, text, linears):
    pipe = tiny_pipeline(name)
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
    heard_grid, lengths = heard[0], dict(entry for entry in heard if isinstance(entry, tuple))
    assert (heard_grid.frames, heard_grid.height, heard_grid.width, heard_grid.text) == (*sizes, text)
    assert (heard_grid.text_tokens > 0) == (text != "apart")
    for name, sees in linears.items():
        assert lengths[name] == heard_grid.tokens + (heard_grid.text_tokens if sees == "joint" else 0)
        assert heard_grid.offset(lengths[name]) == (heard_grid.text_tokens if text == "before" else 0)


class Deep(Transformer):
    """A transformer with a parameter before its layers, checkpointed as diffusers does it."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))
        self.gradient_checkpointing, self._gradient_checkpointing_func = False, None

    def forward(self, hidden_states, encoder_hidden_states):
        x = torch.cat([encoder_hidden_states, hidden_states.flatten(2).mT], dim=1) * self.gain
        for block in self.blocks:
            x = self._gradient_checkpointing_func(block, x) if self.gradient_checkpointing else block(x)
        return x


def following(kind=Transformer):
    transformer = kind()
    follow_tokens(transformer, LAYOUT)
    return transformer


def right(transformer, frames, seed=0):
    latents, text = call(frames, seed)
    return torch.equal(transformer(latents, text), expected(latents, text, grid(frames)))


def loss(transformer, frames):
    return transformer(*call(frames)).square().sum()


def gradient(transformer, sizes):
    transformer.zero_grad(set_to_none=True)
    sum(loss(transformer, frames) for frames in sizes).backward()
    return transformer.gain.grad.clone()


def meet(barrier):
    barrier.wait()


def in_threads(work, arguments):
    """Runs `work` of each argument in a thread of its own, all at once, and returns the results in order."""
    start = threading.Barrier(len(arguments))

    def run(argument):
        start.wait()
        return work(argument)

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(run, arguments))


@pytest.mark.parametrize("copies", [False, True], ids=["one transformer", "copies"])
def test_threads_with_other_sizes_do_not_disturb_each_other(copies):
    transformer = following()
    meeting = threading.Barrier(2, timeout=60)
    each = [copy.deepcopy(transformer) if copies else transformer for _ in range(2)]
    for module in dict.fromkeys(each):
        module.blocks[0].register_forward_hook(lambda *_: meet(meeting))  # both are between their layers
    assert in_threads(lambda job: right(job[0], job[1]), [(each[0], 2), (each[1], 3)]) == [True, True]


def test_batches_of_other_sizes_one_after_another():
    transformer = following()
    for frames, batch in ((3, 1), (2, 2), (3, 3)):
        latents, text = (torch.cat([part] * batch) for part in call(frames))
        assert torch.equal(transformer(latents, text), expected(latents, text, grid(frames)))


def test_a_call_within_a_call_gives_the_grid_back():
    transformer, inner = following(), following()
    transformer.blocks[0].register_forward_hook(lambda *_: None if right(inner, 2) else 1 / 0)
    assert right(transformer, 3)
    transformer.blocks[0].register_forward_pre_hook(
        lambda module, _: None if len(module._forward_pre_hooks) > 1 or right(inner, 2) else 1 / 0
    )
    assert right(transformer, 3)


def test_a_call_of_itself_gives_the_grid_back():
    transformer, depth = following(), []

    def call_again(*_):
        if not depth:
            depth.append(1)
            assert right(transformer, 2)

    transformer.blocks[0].register_forward_hook(call_again)
    assert right(transformer, 3)
    assert depth


@pytest.mark.parametrize("where", ["layer", "hook", "arguments"])
def test_a_call_that_fails_leaves_nothing_behind(where):
    outer, transformer = following(), following()
    latents, text = call(2)
    if where == "layer":
        text = text[..., :-1]
    elif where == "arguments":
        latents = latents.flatten(2)
    else:
        transformer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises((InvalidInputError, RuntimeError, ZeroDivisionError)):
        transformer(latents, text)
    with pytest.raises(UsageError):
        current_grid()

    def fail_within(*_):
        with pytest.raises((InvalidInputError, RuntimeError, ZeroDivisionError)):
            transformer(latents, text)

    outer.blocks[0].register_forward_hook(fail_within)
    assert right(outer, 3)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("sizes", [(3, 2), (2, 3, 2), (3, 3)])
def test_checkpointed_gradients_over_several_sizes_are_those_without(sizes, reentrant):
    plain, transformer = following(Deep), following(Deep)
    transformer.gradient_checkpointing = True
    transformer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)
    assert torch.equal(gradient(transformer, sizes), gradient(plain, sizes))
    other = copy.deepcopy(transformer)
    assert torch.equal(gradient(other, sizes[::-1]), gradient(plain, sizes[::-1]))


def test_a_block_is_recomputed_with_its_grid_after_another_call_and_in_another_thread():
    transformer, plain = following(Deep), following(Deep)
    wanted = {frames: gradient(plain, (frames,)) for frames in (2, 3)}
    transformer.gradient_checkpointing = True
    transformer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    losses = {frames: loss(transformer, frames) for frames in (2, 3)}
    right(transformer, 3)
    gradients = {}
    for frames in (3, 2):
        (gradients[frames],) = in_threads(
            lambda value: torch.autograd.grad(value, transformer.gain)[0], [losses[frames]]
        )
    for frames, value in gradients.items():
        assert torch.equal(value, wanted[frames])


def test_gradients_in_threads_are_those_of_one_after_another():
    plain = following(Deep)
    wanted = [gradient(plain, sizes) for sizes in ((2, 3), (3, 2, 2))]
    transformer = following(Deep)
    transformer.gradient_checkpointing = True
    transformer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    gradients = in_threads(
        lambda sizes: torch.autograd.grad(sum(loss(transformer, frames) for frames in sizes), transformer.gain)[0],
        [(2, 3), (3, 2, 2)],
    )
    for value, expected_value in zip(gradients, wanted, strict=True):
        assert torch.equal(value, expected_value)


def test_a_block_that_somebody_else_recomputes_is_refused_not_guessed():
    transformer = following(Deep)
    block = transformer.blocks[1].forward
    transformer.blocks[1].forward = functools.partial(checkpoint, lambda x: block(x).square(), use_reentrant=False)
    total = loss(transformer, 3)
    with pytest.raises(UsageError, match=r"enable_gradient_checkpointing\(\)"):
        total.backward()
    other = following()

    def backward_within(*_):
        with pytest.raises(UsageError, match=r"enable_gradient_checkpointing\(\)"):
            loss(transformer, 2).backward()

    other.blocks[0].register_forward_hook(backward_within)
    assert right(other, 3)


@pytest.mark.slow
@pytest.mark.parametrize("regional", [True, False], ids=["blocks", "whole"])
def test_compiled_calls_of_several_sizes_nested_and_in_threads(regional):
    transformer = following()
    compiled = transformer
    if regional:
        for block in transformer.blocks:
            block.compile(backend="eager", fullgraph=True)
    else:
        compiled = torch.compile(transformer, backend="eager", fullgraph=True)
    for frames in (3, 2, 3):
        latents, text = call(frames)
        torch.testing.assert_close(compiled(latents, text), expected(latents, text, grid(frames)), rtol=0, atol=1e-6)
    with pytest.raises(UsageError):
        current_grid()

    def close(frames):
        latents, text = call(frames)
        return torch.allclose(compiled(latents, text), expected(latents, text, grid(frames)), rtol=0, atol=1e-6)

    assert in_threads(close, [2, 3]) == [True, True]
