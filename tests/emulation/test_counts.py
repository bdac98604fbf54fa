"""What a GPU is asked for: kernels and waits of the host, pinned.

A number that grew by accident is a slowdown that no clock on this machine shows. Where a change is meant to change one,
write the new number here, and say in the commit why it may grow.
"""

import gc

import pytest
import torch

from emulation import runs

pytestmark = [pytest.mark.gpu, pytest.mark.emulated]

PINNED_WITH = "2.13"
CHANGED = "a change of s2q changed {what}; if that is meant, pin the numbers that are counted now"

DISTILLATION = {"waits of a step": 0, "waits of an epoch": 2, "kernels of a step and its evaluation": 652}
BLOCK = {"waits": 0, "triton": 16, "kernels": 70}


@pytest.fixture
def stats():
    from emulation.emulator.stats import STATS

    if not torch.__version__.startswith(PINNED_WITH):
        pytest.skip(f"the numbers are those of torch {PINNED_WITH}, whose operators other versions split differently")
    return STATS


def count_run(stats, *, epochs, samples):
    """Kernels and waits of a whole run."""
    stats.reset()
    changes = (f"distillation.epochs={epochs}", "calibration.n_prompts=2", f"calibration.samples={samples}")
    runs.quantize("cogvideox", "s2q-w4a6", "cuda:1", overrides=changes)
    return stats.kernels, sum(stats.synchronisations.values())


@pytest.mark.kernels
def test_a_distillation_step_never_waits_and_has_so_many_kernels(stats):
    kernels, waits = {}, {}
    for samples in (1, 2):
        one, two = (count_run(stats, epochs=epochs, samples=samples) for epochs in (1, 2))
        kernels[samples], waits[samples] = two[0] - one[0], two[1] - one[1]
    counted = {
        "waits of a step": waits[2] - waits[1],
        "waits of an epoch": waits[1],
        "kernels of a step and its evaluation": kernels[2] - kernels[1],
    }
    assert counted == DISTILLATION, CHANGED.format(what="distillation")


@pytest.mark.kernels
def test_a_quantized_block_never_waits_and_has_so_many_launches(stats):
    pipe = runs.load(runs.on_cpu("cogvideox", "s2q-plus-w4a6").folder, "cuda:1")
    counted = {}

    def before(_block, _args):
        stats.reset()

    def after(_block, _args, _output):
        counted.update(
            waits=sum(stats.synchronisations.values()),
            triton=sum(count for name, count in stats.operators.items() if name.startswith("triton.")),
            kernels=stats.kernels,
        )

    block = pipe.transformer.transformer_blocks[0]
    block.register_forward_pre_hook(before)
    block.register_forward_hook(after)
    runs.latents(pipe, num_inference_steps=1)
    assert counted == BLOCK, CHANGED.format(what="the launches of a block")


def test_the_peak_is_that_of_the_run(device):
    large = torch.zeros(64 * 2**20, device=device)
    del large
    gc.collect()
    report = runs.quantize("cogvideox", "rtn-w4a6", device).report
    assert 0 < report.peak_memory_bytes < 16 * 2**20
    assert all(0 < block.peak_memory_bytes <= report.peak_memory_bytes for block in report.blocks)
