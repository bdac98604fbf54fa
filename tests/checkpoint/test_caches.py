"""diffusers' caches on quantized transformers: they skip as much, and give what they give of dequantized weights."""

import functools

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

import s2q
from quick import quick, quick_if
from s2q.generation.generate import generate
from tiny import tiny_pipeline, video_size

STEPS = 4
ALWAYS = (-1, 1001)
"""Timesteps between which attention may be skipped: all."""

FIRST_BLOCK, BROADCAST = "first block", "pyramid attention broadcast"
CACHES = {
    FIRST_BLOCK: lambda pipe: FirstBlockCacheConfig(threshold=0.5),
    BROADCAST: lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=ALWAYS,
        cross_attention_timestep_skip_range=ALWAYS,
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "faster": lambda pipe: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=ALWAYS,
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=ALWAYS,
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "taylorseer": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
    "magnitudes": lambda pipe: MagCacheConfig(
        num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS), retention_ratio=0.25, threshold=0.5, max_skip_steps=1
    ),
}
FAMILIES = ("cogvideox", "wan", "hunyuanvideo", "ltx", "mochi")
SUPPORTED = [
    *((family, cache) for family in FAMILIES for cache in (FIRST_BLOCK, BROADCAST)),
    ("cogvideox", "faster"),
    ("mochi", "faster"),
    ("hunyuanvideo", "taylorseer"),
    ("cogvideox", "magnitudes"),
    ("wan", "magnitudes"),
]
"""Where the cache runs in full precision and skips something; FasterCache of diffusers 0.42 fails for the others."""


def is_quick(family, cache):
    """Each cache in one family, each family with one cache."""
    return cache == FIRST_BLOCK or family == "cogvideox" or cache == "taylorseer"


def run(pipe, cache):
    """Return the latents of a video, and how often queries were computed."""
    calls = []
    if cache is not None:
        pipe.transformer.enable_cache(CACHES[cache](pipe))
    for name, module in pipe.transformer.named_modules():
        if name.endswith("to_q"):
            module.register_forward_hook(lambda *_: calls.append(None))
    (video,) = generate(pipe, prompts=["a cat"], num_inference_steps=STEPS, **video_size(pipe))
    return video.latents, len(calls)


def relative(latents, reference):
    return float((latents - reference).norm() / reference.norm())


@pytest.fixture(scope="module")
def weight_only(tmp_path_factory):
    """Checkpoints with unquantized inputs, by family; each is made once."""
    made = {}

    def checkpoint(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("caches") / "checkpoint"
            s2q.quantize(tiny_pipeline(family), recipe="rtn-w4a16", out=made[family])
        return made[family]

    return checkpoint


@pytest.fixture(scope="module")
def calls_without(weight_only):
    """How often a family computes queries without a cache."""
    return functools.cache(lambda family: run(s2q.load(weight_only(family), dtype="float32"), None)[1])


@pytest.mark.parametrize(("family", "cache"), quick_if(is_quick, SUPPORTED))
def test_a_cache_does_what_it_does_in_full_precision(weight_only, calls_without, family, cache):
    packed, dense = (s2q.load(weight_only(family), dtype="float32") for _ in range(2))
    dense.transformer.dequantize()
    latents, calls = run(packed, cache)
    expected, expected_calls = run(dense, cache)
    assert calls == expected_calls
    assert relative(latents, expected) < 1e-5
    assert calls < calls_without(family)


QUANTIZED = ["activations.delta.cube=[2,2,2]", "attention.num_bits=8"]
"""Recipes that follow the grid of the video's tokens and replace attention."""


@pytest.mark.parametrize("cache", quick([FIRST_BLOCK, BROADCAST, "faster"], FIRST_BLOCK))
def test_caches_run_with_quantized_attention_and_differences(tmp_path, cache):
    pipe = tiny_pipeline("cogvideox")
    s2q.quantize(pipe, recipe="rtn-w4a8", out=tmp_path / "checkpoint", overrides=QUANTIZED)
    errors = {}
    for name in (None, cache):
        expected, expected_calls = run(tiny_pipeline("cogvideox"), name)
        latents, calls = run(s2q.load(tmp_path / "checkpoint", dtype="float32"), name)
        assert calls == expected_calls
        errors[name] = relative(latents, expected)
    assert 0 < errors[cache] < 2 * errors[None]


def test_a_cache_that_is_switched_off_leaves_nothing_behind(weight_only):
    pipe = s2q.load(weight_only("wan"), dtype="float32")
    before, calls = run(s2q.load(weight_only("wan"), dtype="float32"), None)
    _, cached = run(pipe, FIRST_BLOCK)
    assert cached < calls
    pipe.transformer.disable_cache()
    (after,) = generate(pipe, prompts=["a cat"], num_inference_steps=STEPS, **video_size(pipe))
    assert torch.equal(after.latents, before)
