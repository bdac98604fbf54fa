"""Two videos of a prompt with their figures are those of `s2q generate` and `s2q eval`."""

import pytest
import torch

import s2q
from s2q.common.progress import silent
from s2q.generation.prompts import prompt_list
from s2q.ui.offers import offered
from s2q.ui.pipelines import Pipelines
from s2q.ui.side_by_side import generate_side_by_side

PROMPT = "a red circle moving left on a grey background"


@pytest.fixture
def offers(checkpoint, tiny_model):
    return offered(models=[tiny_model], checkpoints=[checkpoint])


def run(offers, pipelines, *, velocity=True, progress=silent):
    (prompt,) = prompt_list("prompts", [PROMPT])
    requested = {"num_inference_steps": 2, "num_frames": 9, "height": 32, "width": 32}
    return generate_side_by_side(
        *offers,
        prompt=prompt,
        seed=5,
        requested=requested,
        velocity=velocity,
        pipelines=pipelines,
        progress=progress,
    )


def test_videos_and_metrics_equal_those_of_the_commands(offers, tmp_path):
    result = run(offers, Pipelines(tmp_path))
    settings = {"num_inference_steps": 2, "num_frames": 9, "height": 32, "width": 32}
    for offer, frames in zip(offers, (result.pair.reference, result.pair.student), strict=True):
        (video,) = s2q.generate(offer.source, prompts=[PROMPT], seeds=[5], **settings)
        assert torch.equal(video.frames, torch.from_numpy(frames))
    full, quantized = (offer.source for offer in offers)
    measured = s2q.evaluate(quantized, reference=full, prompts=[PROMPT], seeds=[5], **settings)
    for name in ("psnr_frame_mean_db", "velocity_relative_error"):
        assert result.pair.metrics[name] == pytest.approx(measured["metrics"][name]["mean"])
    assert result.settings["num_inference_steps"] == 2
    assert 0 < result.right.weight_bytes < result.left.weight_bytes
    assert min(result.left.seconds, result.right.seconds) > 0


def test_the_velocity_error_is_left_out_if_it_is_not_asked_for(offers, tmp_path):
    stages = set()
    result = run(offers, Pipelines(tmp_path), velocity=False, progress=lambda stage, done, total: stages.add(stage))
    assert "velocity_relative_error" not in result.pair.metrics
    assert {"full precision", "quantized"} < stages
    assert "velocity" not in stages


def test_two_pipelines_stay_loaded_until_others_are_chosen(offers, tmp_path):
    pipelines = Pipelines(tmp_path)
    first, second = pipelines.open(*offers, progress=silent)
    assert pipelines.open(*offers, progress=silent) == (first, second)
    again, same = pipelines.open(offers[1], offers[1], progress=silent)
    assert again is same is second
    assert pipelines.open(*offers, progress=silent)[0] is not first


def test_both_pipelines_have_the_dtype_of_the_left_model_whatever_was_loaded_before(offers, tmp_path, monkeypatch):
    of_label = dict(zip([offer.source.name for offer in offers], (torch.bfloat16, torch.float32), strict=True))
    monkeypatch.setattr("s2q.ui.pipelines.own_dtype", lambda source, device: of_label[source.name])
    pipelines = Pipelines(tmp_path)
    for pair, dtype in ((offers, torch.bfloat16), (offers[::-1], torch.float32), (offers, torch.bfloat16)):
        opened = pipelines.open(*pair, progress=silent)
        assert [pipe.transformer.dtype for pipe in opened] == [dtype, dtype]


def test_a_recipe_quantizes_an_embedded_model_once(embedded_tiny, tmp_path, monkeypatch):
    left, right, *_ = (offer for offer in offered(models=[embedded_tiny]))
    pipelines = Pipelines(tmp_path)
    folder = pipelines.source(right, progress=silent).folder
    assert (folder.parent, right.recipe) == (tmp_path, "table-w4a8")
    monkeypatch.setattr("s2q.ui.pipelines.quantize", None)
    assert pipelines.source(right, progress=silent).folder == folder
    assert pipelines.source(left, progress=silent) is left.source
