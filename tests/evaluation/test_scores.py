import json

import pytest

from s2q.common.files import canonical_json
from s2q.evaluation.scores import EvaluationResult, VideoScores, merge
from s2q.evaluation.summary import summarise
from s2q.generation.settings import GenerationSettings

SETTINGS = GenerationSettings(num_frames=9, height=16, width=16, num_inference_steps=2, guidance_scale=1.0)


def part(first, count, **changes):
    """Two seeds a prompt; the value is that of the prompt's number and the seed."""
    jobs = [(f"p{i}", seed) for i in range(first, first + count) for seed in (0, 1)]
    videos = tuple(
        VideoScores(
            prompt=p,
            seed=s,
            metrics={"ssim": 0.1 * int(p[1:]) + s / 3, "velocity_relative_error": None},
            velocity_steps=(0.1, 0.3),
        )
        for p, s in jobs
    )
    fields = {
        "model": "student",
        "reference": "teacher",
        "inputs": tuple({"prompt": f"p{i}", "seed": i} for i in range(first, first + count)),
        "videos": videos,
        "floor": tuple(VideoScores(prompt=p, seed=1, metrics={"ssim": 0.5 + int(p[1:])}) for p, s in jobs if s),
        "settings": SETTINGS,
        "dtype": "float32",
        "timesteps": (999.0, 499.0),
    }
    return EvaluationResult(**fields | changes)


def test_files_hold_it_exactly():
    one = part(0, 2)
    assert EvaluationResult.from_dict(json.loads(canonical_json(one.to_dict()))) == one
    with pytest.raises(ValueError, match="other"):
        EvaluationResult.from_dict(one.to_dict() | {"other": 1})


def test_parts_make_what_would_have_been_measured_at_once():
    whole = part(0, 5)
    assert merge([part(0, 2), part(2, 3)]) == whole
    assert merge([whole]) is not whole
    assert merge([part(0, 2, timesteps=()), part(2, 3)]).timesteps == (999.0, 499.0)
    assert summarise(merge([part(0, 2), part(2, 3)])) == summarise(whole)
    assert summarise(whole)["noise_floor"]["n_pairs"] == 5
    assert summarise(whole)["noise_floor"]["metrics"]["ssim"] == pytest.approx(2.5)


def test_parts_of_different_runs_are_not_joined():
    with pytest.raises(AssertionError):
        merge([part(0, 2), part(2, 2, dtype="bfloat16")])
