"""Context parallelism of diffusers on quantized transformers: two processes give what one gives."""

import os

import pytest
import torch
import torch.multiprocessing
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig

import s2q
from s2q.common.errors import UsageError
from s2q.generation.generate import generate
from tiny import tiny_pipeline

PROCESSES = 2
FAMILY = "wan"
SIZE = {"num_frames": 5, "height": 16, "width": 16}
"""A video of an even number of tokens: each process takes as many."""


def latents(pipe):
    """Return the latents of a video, and how many tokens a block saw."""
    tokens = []
    queries = pipe.transformer.blocks[0].attn1.to_q
    with queries.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1])):
        (video,) = generate(pipe, prompts=["a cat"], num_inference_steps=2, **SIZE)
    return video.latents, tokens[0]


def generate_a_part(rank, checkpoint, rendezvous, result):
    """One of the processes; diffusers counts accelerators, and here processes are on the CPU."""
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    torch.accelerator.device_count = lambda: 1
    pipe = s2q.load(checkpoint, dtype="float32")
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=PROCESSES))
    torch.save(latents(pipe), f"{result}-{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_tokens_of_a_video(tmp_path):
    pipe = tiny_pipeline(FAMILY)
    s2q.quantize(pipe, recipe="rtn-w4a8", out=tmp_path / "checkpoint", overrides=["attention.num_bits=8"])
    expected, tokens = latents(s2q.load(tmp_path / "checkpoint", dtype="float32"))
    arguments = (tmp_path / "checkpoint", tmp_path / "rendezvous", tmp_path / "latents")
    torch.multiprocessing.spawn(generate_a_part, args=arguments, nprocs=PROCESSES)
    for rank in range(PROCESSES):
        result, part = torch.load(f"{tmp_path / 'latents'}-{rank}")
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        assert part == tokens // PROCESSES


def test_linears_that_depend_on_positions_refuse_a_part_of_the_tokens(tmp_path):
    pipe = tiny_pipeline(FAMILY)
    s2q.quantize(pipe, recipe="rtn-w4a8", out=tmp_path / "checkpoint", overrides=["activations.delta.cube=[2,2,2]"])
    loaded = s2q.load(tmp_path / "checkpoint", dtype="float32")
    before, _ = latents(loaded)
    loaded.transformer._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))
    with pytest.raises(UsageError, match=r"which context parallelism divides .*activations\.delta=null"):
        latents(loaded)
    loaded.transformer._parallel_config = None
    assert torch.equal(latents(loaded)[0], before)
