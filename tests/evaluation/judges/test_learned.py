"""Learned metrics in an evaluation: they are there with weights, and only with them."""

import json

import pytest

from s2q.common.errors import InvalidInputError
from s2q.evaluation.evaluate import evaluate
from s2q.evaluation.judges.clip_score import ClipJudge
from s2q.evaluation.judges.evalcrafter import evalcrafter_needs, evalcrafter_scores
from s2q.evaluation.video_metrics import METRICS, selected_metrics
from s2q.generation.generate import generate
from tiny import tiny_pipeline
from tiny_judges import save_tiny_clip, save_tiny_lpips

FAST = {"num_inference_steps": 1, "guidance_scale": 2.0, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("cogvideox")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def lpips(tmp_path_factory):
    return save_tiny_lpips(tmp_path_factory.mktemp("lpips") / "lpips.pth")


def test_with_weights_they_are_measured(pipe, clip, lpips):
    options = dict(metrics=("ssim", "lpips", "clip", "clipsim"), **FAST, clip=clip)
    with pytest.raises(InvalidInputError, match="metric lpips: needs --lpips-weights"):
        evaluate(pipe, reference=pipe, prompts=["a", "b"], **options)
    options = dict(**FAST, clip=clip, lpips_weights=lpips)
    result = evaluate(pipe, reference=pipe, prompts=["a", "b"], **options)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    metrics = result["metrics"]
    learned = {"lpips", "clip_score", "clipsim", "clip_temp"}
    assert learned < set(metrics)
    assert metrics["lpips"]["mean"] == 0.0
    assert result["noise_floor"]["metrics"]["lpips"] > 0
    for name in learned - {"lpips"}:
        assert metrics[name]["mean"] == metrics[f"reference_{name}"]["mean"]
        assert metrics[name]["version"] == metrics[f"reference_{name}"]["version"] == 1
    video = generate(pipe, prompts=["a"], seeds=[0], **FAST, batch_size=1)[0]
    alone = ClipJudge(clip).measure("a", video.frames)
    assert result["videos"][0]["metrics"]["clipsim"] == pytest.approx(alone["clipsim"], abs=1e-4)
    assert result["evalcrafter"]["clipsim"]["reference"] == metrics["reference_clipsim"]["mean"]
    assert set(result["evalcrafter"]["absent"]) == {"vqa_a", "vqa_t", "flow_score"}


def test_without_weights_there_are_none(pipe):
    result = evaluate(pipe, reference=pipe, prompts=["a"], seeds=[0], **FAST)
    assert "evalcrafter" not in result
    assert not {"lpips", "clip_score"} & set(result["metrics"])


@pytest.mark.parametrize("option", ["clip", "lpips_weights"])
def test_missing_weights_are_said_before_anything_is_generated(pipe, tmp_path, monkeypatch, option):
    monkeypatch.setattr(pipe.transformer, "forward", None)
    with pytest.raises(InvalidInputError, match="nothing-here"):
        evaluate(pipe, reference=pipe, prompts=["a"], **{option: tmp_path / "nothing-here"})


def test_they_are_chosen_by_name():
    learned = {"lpips": True, "clip": True}
    assert selected_metrics((), **learned) == (*METRICS, "lpips", "clip_score", "clipsim", "clip_temp")
    assert selected_metrics(("lpips", "ssim"), **learned) == ("ssim", "lpips")
    assert selected_metrics(("clip",), **learned) == ("clip_score", "clip_temp")
    with pytest.raises(InvalidInputError, match="clipsim: needs --clip"):
        selected_metrics(("clipsim",), lpips=True)


def test_evalcrafters_figures_are_there_or_say_what_they_need():
    metrics = {"clipsim": {"mean": 0.2}, "reference_clipsim": {"mean": 0.3}, "clip_temp": {"mean": None}}
    scores = evalcrafter_scores(metrics, flow={"model": 1.0, "reference": 2.0})
    assert scores["clipsim"] == {"model": 0.2, "reference": 0.3}
    assert scores["flow_score"] == {"model": 1.0, "reference": 2.0}
    assert set(scores) | set(scores["absent"]) == {*evalcrafter_needs(), "absent"}
    assert "DOVER" in scores["absent"]["vqa_a"]
    assert evalcrafter_scores({}) is None
