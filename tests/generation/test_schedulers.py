import pytest
import torch
from diffusers.schedulers import scheduling_flow_match_lcm as lcm

from s2q.common.errors import InvalidInputError
from s2q.generation.denoise import denoise
from s2q.generation.schedulers import DIFFUSION, FLOW, described, distilled_name, scheduler_of
from s2q.generation.settings import resolve_settings
from s2q.generation.trajectory import record_trajectory
from s2q.models import family_of
from tiny import tiny_pipeline, video_size
from tiny_families import TEXT_TO_VIDEO

STEPS = 4


def settings_of(pipe, **asked):
    return resolve_settings(pipe, requested={**video_size(pipe), "num_inference_steps": STEPS, **asked})


@pytest.mark.parametrize(
    ("family", "name"), [*(("wan", name) for name in FLOW), *(("cogvideox", name) for name in DIFFUSION)]
)
def test_each_listed_scheduler_calls_the_transformer_once_a_step_and_depends_on_the_seed_alone(family, name):
    pipe = tiny_pipeline(family)
    settings = settings_of(pipe, scheduler=name, guidance_scale=1)
    first, second = (record_trajectory(pipe, ["red"], seeds=[0], settings=settings) for _ in range(2))
    assert len(first.calls) == STEPS
    assert torch.equal(first.latents, second.latents)


@pytest.mark.parametrize("name", TEXT_TO_VIDEO)
def test_noise_of_a_video_does_not_depend_on_its_batch(name):
    pipe = tiny_pipeline(name, num_layers=1)
    if not family_of(pipe.transformer).takes_batches:
        pytest.skip("takes one prompt")
    drawing = "CogVideoXDPMScheduler" if family_of(pipe.transformer).name == "cogvideox" else "FlowMatchLCMScheduler"
    settings = settings_of(pipe, scheduler=drawing, guidance_scale=1, num_inference_steps=2)
    both = denoise(pipe, ["red", "blue"], seeds=[0, 1], settings=settings, decode=False)
    alone = denoise(pipe, ["blue"], seeds=[1], settings=settings, decode=False)
    torch.testing.assert_close(both.latents[1:], alone.latents, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both.latents[:1], alone.latents, atol=0.1)


def drawn_noises(pipe, settings, seeds, monkeypatch):
    """The noises that the scheduler of a pipeline and its copy for the sound draw, in the order of the draws."""
    noises, draw = [], lcm.randn_tensor

    def remember(*args, **kwargs):
        noises.append(draw(*args, **kwargs))
        return noises[-1]

    with monkeypatch.context() as patch:
        patch.setattr(lcm, "randn_tensor", remember)
        denoise(pipe, ["red"] * len(seeds), seeds=seeds, settings=settings, decode=False)
    return noises


def test_noise_of_the_sound_is_another_than_that_of_the_video_and_does_not_depend_on_its_batch(monkeypatch):
    pipe = tiny_pipeline("ltx-2", num_layers=1)
    settings = settings_of(pipe, scheduler="FlowMatchLCMScheduler", guidance_scale=1, num_inference_steps=3)
    noises = drawn_noises(pipe, settings, [0, 1], monkeypatch)
    alone = drawn_noises(pipe, settings, [1], monkeypatch)
    assert len(noises) == len(alone) == 6  # of video and sound, in each step
    for both, second in zip(noises, alone, strict=True):
        assert torch.equal(both[1:], second)
    videos = torch.cat([noise[0].flatten() for noise in noises[::2]])
    sounds = torch.cat([noise[0].flatten() for noise in noises[1::2]])
    assert not torch.isin(sounds, videos).any()
    assert len({noise[0].flatten()[0].item() for noise in noises}) == 6


def test_a_step_that_the_user_set_on_the_scheduler_runs_and_is_kept():
    pipe, calls = tiny_pipeline("wan", num_layers=1), []

    def step(*args, **kwargs):
        calls.append(kwargs)
        return type(pipe.scheduler).step(pipe.scheduler, *args, **kwargs)

    pipe.scheduler.step = step
    denoise(pipe, ["red"], seeds=[0], settings=settings_of(pipe, guidance_scale=1), decode=False)
    assert len(calls) == STEPS
    assert vars(pipe.scheduler)["step"] is step


def test_another_class_keeps_the_shift_of_the_model_and_takes_the_one_asked_for():
    pipe = tiny_pipeline("wan")  # UniPC, flow_shift 3
    kept = scheduler_of(pipe, settings_of(pipe, scheduler="FlowMatchEulerDiscreteScheduler"))
    asked = scheduler_of(pipe, settings_of(pipe, scheduler="FlowMatchEulerDiscreteScheduler", shift=8))
    own = scheduler_of(pipe, settings_of(pipe, shift=8))
    assert (kept.config.shift, asked.config.shift, own.config.flow_shift) == (3.0, 8.0, 8.0)
    assert type(own) is type(pipe.scheduler)
    assert pipe.scheduler.config.flow_shift == 3.0
    assert scheduler_of(pipe, settings_of(pipe)) is pipe.scheduler


def test_a_scheduler_of_flow_matching_is_replaced_by_one_that_samples_a_flow():
    pipe = tiny_pipeline("hunyuanvideo")  # FlowMatchEuler, shift 7
    chosen = scheduler_of(pipe, settings_of(pipe, scheduler="UniPCMultistepScheduler"))
    assert (chosen.config.use_flow_sigmas, chosen.config.prediction_type) == (True, "flow_prediction")
    assert described(chosen) == {"scheduler": "UniPCMultistepScheduler", "shift": 7.0}


def test_a_shift_replaces_the_one_by_the_size_of_the_video():
    pipe = tiny_pipeline("ltx")
    pipe.scheduler.register_to_config(use_dynamic_shifting=True)
    assert described(pipe.scheduler)["shift"] is None
    settings = settings_of(pipe, shift=5)
    assert described(scheduler_of(pipe, settings)) == {"scheduler": "FlowMatchEulerDiscreteScheduler", "shift": 5.0}
    timesteps = [call.timestep for call in record_trajectory(pipe, ["red"], seeds=[0], settings=settings).calls]
    assert timesteps == pytest.approx([5 * s / (1 + 4 * s) * 1000 for s in (1, 0.75, 0.5, 0.25)])


@pytest.mark.parametrize(
    ("family", "asked", "message"),
    [
        ("wan", {"scheduler": "UniPCMultistep"}, "unknown scheduler 'UniPCMultistep': nearest names are UniPCMultis"),
        ("wan", {"scheduler": "WanPipeline"}, "unknown scheduler"),
        ("wan", {"scheduler": "DDIMScheduler"}, "DDIMScheduler does not fit WanPipeline: it does not sample a flow"),
        ("wan", {"scheduler": "CogVideoXDDIMScheduler"}, "does not fit WanPipeline"),
        ("wan", {"scheduler": "FlowMatchHeunDiscreteScheduler"}, "a flow with a call a step; use FlowMatchEuler"),
        ("cogvideox", {"scheduler": "UniPCMultistepScheduler"}, "CogVideoX's betas; use CogVideoXDDIMScheduler or"),
        ("cogvideox", {"shift": 3}, "shift: got 3; a CogVideoXDDIMScheduler has no shift, remove it"),
        ("hunyuanvideo", {"scheduler": "DEISMultistepScheduler"}, "the pipeline sets sigmas, which it does not take"),
        ("mochi", {"scheduler": "UniPCMultistepScheduler"}, "sigmas are inverted; use FlowMatchEulerDiscreteScheduler"),
        ("wan", {"scheduler": 3}, "scheduler: got 3"),
    ],
)
def test_what_does_not_fit_the_pipeline_is_refused_with_those_that_do(family, asked, message):
    with pytest.raises(InvalidInputError, match=message):
        settings_of(tiny_pipeline(family), **asked)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "Wan2.2-Lightning",
            "acme/LTX-turbo",
            "wan_LCM",
            "Wan-DMD",
            "FusionX_14B",
            "causvid",
            "AccVid",
            "x-distilled",
            "FastVideo/FastWan2.1-T2V-1.3B-Diffusers",
            "FastHunyuan",
            "lightx2v/Wan2.1-T2V-14B",
            "Self-Forcing",
            "self_forcing_dmd",
            "rCM_Wan2.1",
            "Hyper-SD15-8steps",
            "hyper_wan",
            "distill-wan",
        ),
        *("FlowMatchLCMScheduler", "HeliosDMDScheduler", "TCDScheduler"),
    ],
)
def test_names_of_distilled_models_are_recognised(name):
    scheduler, names = (name, ()) if name.endswith("Scheduler") else ("UniPCMultistepScheduler", ("wan", name))
    assert distilled_name(scheduler, *names) == name


def test_names_of_other_models_are_not():
    names = ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "falcmodel", "admdata", "shapes-wan", "CogVideoX-5b")
    names += ("undistilled", "de-distilled", "Wan-dedistilled", "non_distilled", "hyper-realism", "breakfast", "arcm")
    assert distilled_name("FlowMatchEulerDiscreteScheduler", *names) is None
