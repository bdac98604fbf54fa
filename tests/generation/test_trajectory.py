import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.generation.settings import resolve_settings
from s2q.generation.trajectory import record_trajectory
from tiny import tiny_pipeline


@pytest.fixture(scope="module", params=[False, True], ids=["positions", "rotary"])
def pipe(request):
    return tiny_pipeline("cogvideox rotary" if request.param else "cogvideox")


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_replaying_a_call_gives_its_recorded_output(pipe, guidance):
    settings = resolve_settings(pipe, requested={"num_inference_steps": 3, "guidance_scale": guidance})
    trajectory = record_trajectory(pipe, ["red", "blue"], seeds=[0, 1], settings=settings)
    assert len(trajectory.calls) == 3
    timesteps = [call.timestep for call in trajectory.calls]
    assert timesteps == sorted(timesteps, reverse=True)
    for call in trajectory.calls:
        assert trajectory.branches(call) == (2 if guidance > 1 else 1)
        torch.testing.assert_close(pipe.transformer(**call.inputs, return_dict=False)[0], call.output)
    assert trajectory.num_bytes == sum(c.inputs["hidden_states"].nbytes + c.output.nbytes for c in trajectory.calls)


def test_rows_of_a_video_hold_its_own_latents_in_both_branches(pipe):
    settings = resolve_settings(pipe, requested={"num_inference_steps": 2, "guidance_scale": 4.0})
    both = record_trajectory(pipe, ["red", "blue"], seeds=[0, 1], settings=settings)
    alone = record_trajectory(pipe, ["blue"], seeds=[1], settings=settings)
    for call, single in zip(both.calls, alone.calls, strict=True):
        rows = both.rows_of(call, 1)
        assert rows == [1, 3]
        for name in ("hidden_states", "encoder_hidden_states"):
            torch.testing.assert_close(call.inputs[name][rows], single.inputs[name], rtol=1e-4, atol=1e-4)


def test_recording_changes_nothing_and_leaves_no_hook(pipe):
    settings = resolve_settings(pipe, requested={"num_inference_steps": 2, "guidance_scale": 1.0})
    first = record_trajectory(pipe, ["red"], seeds=[0], settings=settings, decode=True)
    second = record_trajectory(pipe, ["red"], seeds=[0], settings=settings)
    assert torch.equal(first.latents, second.latents)
    assert first.frames.shape == (1, 9, 16, 16, 3)
    assert second.frames is None
    assert not pipe.transformer._forward_hooks


def test_text_embeddings_are_stored_once(pipe):
    settings = resolve_settings(pipe, requested={"num_inference_steps": 2, "guidance_scale": 2.0})
    first, second = record_trajectory(pipe, ["red"], seeds=[0], settings=settings).calls
    assert first.inputs["encoder_hidden_states"] is second.inputs["encoder_hidden_states"]


def test_bad_prompts_are_refused_before_the_model_runs(pipe):
    settings = resolve_settings(pipe, requested={"num_inference_steps": 2})
    with pytest.raises(InvalidInputError, match="empty"):
        record_trajectory(pipe, [" "], seeds=[0], settings=settings)


def test_the_first_steps_are_those_of_the_whole_generation(pipe):
    settings = resolve_settings(pipe, requested={"num_inference_steps": 4})
    whole, done = record_trajectory(pipe, ["red"], seeds=[0], settings=settings), []
    part = record_trajectory(pipe, ["red"], seeds=[0], settings=settings, steps=2, step_done=lambda: done.append(0))
    assert (len(part.calls), len(done)) == (2, 2)
    for call, same in zip(part.calls, whole.calls, strict=False):
        assert torch.equal(call.inputs["hidden_states"], same.inputs["hidden_states"])
    rows = whole.rows_of(whole.calls[2], 0)
    channels = part.latents.shape[2]
    after = whole.calls[2].inputs["hidden_states"][rows[-1:], :, :channels]
    assert torch.equal(part.latents, after.float())
    assert len(record_trajectory(pipe, ["red"], seeds=[0], settings=settings).calls) == 4
