import copy
import json
import tempfile
from types import SimpleNamespace

import pytest
import torch

from s2q.common.errors import InvalidInputError, UsageError
from s2q.evaluation import recordings
from s2q.evaluation.evaluate import evaluate
from s2q.evaluation.measure import judge_model, run_reference
from s2q.evaluation.settings import EvaluationSettings
from s2q.evaluation.summary import summarise
from s2q.evaluation.video_metrics import METRICS, selected_metrics
from s2q.run.quantize import quantize
from tiny import tiny_pipeline

FAST = {"num_inference_steps": 2, "guidance_scale": 2.0}
CAPTION = "a red circle moving left on a grey background"


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline("cogvideox")
    torch.manual_seed(0)
    config = dict(pipe.transformer.config) | {"max_text_seq_length": 64}
    pipe.register_modules(transformer=type(pipe.transformer).from_config(config).eval())
    return pipe


@pytest.fixture(scope="module")
def damaged(pipe):
    student = copy.deepcopy(pipe)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.transformer.transformer_blocks.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return student


def test_a_model_against_itself_has_no_error(pipe):
    result = evaluate(pipe, reference=pipe, prompts=["a", CAPTION], **FAST)
    text = json.dumps(result, allow_nan=False)
    assert json.loads(text) == result
    means = {name: entry["mean"] for name, entry in result["metrics"].items()}
    assert means["latent_relative_l2"] == 0.0
    assert means["latent_cosine"] == pytest.approx(1.0)
    assert means["psnr_frame_mean_db"] == means["psnr_pooled_db"] == 100.0
    assert means["ssim"] == pytest.approx(1.0)
    assert means["flicker_rms"] == 0.0
    assert means["velocity_relative_error"] == pytest.approx(0.0, abs=1e-9)
    assert means["adherence_all_change"] == 0.0


def test_several_models_share_a_reference_that_generates_once(pipe, damaged):
    """Each gets what it would get alone, and is only taken when the one before it has been judged."""
    stages, taken = [], []

    def models():
        for model in (damaged, pipe):
            taken.append(len(stages))
            yield model

    def progress(stage, done, total):
        stages.append(stage)

    settings = EvaluationSettings(requested=FAST)
    run = run_reference(pipe, prompts=["a"], seeds=(0, 1), settings=settings, progress=progress)
    results = [summarise(judge_model(model, run, progress=progress)) for model in models()]
    assert results == [evaluate(model, reference=pipe, prompts=["a"], **FAST) for model in (damaged, pipe)]
    assert 0 < taken[0] < taken[1]
    assert "full precision" not in stages[taken[0] :]


def test_the_file_has_everything_that_was_promised(pipe, damaged):
    prompts = [{"prompt": "a", "negative_prompt": "b", "seed": 7}, CAPTION]
    result = evaluate(damaged, reference=pipe, prompts=prompts, seeds=[0, 4], **FAST)
    assert result["schema_version"] == 1
    assert (result["n_prompts"], result["n_seeds"], result["inputs"]) == (2, 2, prompts)
    alone = {"black_frames", "first_frame_psnr_db", *(name for name in METRICS if name.startswith("adherence"))}
    assert set(result["metrics"]) == {*METRICS, *(f"reference_{name}" for name in alone), "adherence_all_change"}
    for entry in result["metrics"].values():
        assert set(entry) == {"mean", "low", "high", "definition", "version"}
        assert entry["low"] is entry["high"] is None, "two prompts are too few for an interval"
        assert entry["definition"]
        assert entry["version"] == 1
    assert [(video["prompt"], video["seed"]) for video in result["videos"]] == [
        ("a", 0),
        ("a", 4),
        (CAPTION, 0),
        (CAPTION, 4),
    ]
    for video in result["videos"]:
        assert set(video["metrics"]) == set(result["metrics"])
        assert video["metrics"]["latent_relative_l2"] > 0
        assert (video["metrics"]["adherence_all"] is None) == (video["prompt"] == "a")
    steps = result["velocity"]["steps"]
    assert [step["timestep"] for step in steps] == [500.0, 0.0]
    mean = sum(step["mean"] for step in steps) / 2
    assert result["metrics"]["velocity_relative_error"]["mean"] == pytest.approx(mean)
    assert result["noise_floor"]["n_pairs"] == 2
    assert result["noise_floor"]["metrics"]["latent_relative_l2"] > 0.1
    assert result["noise_floor"]["metrics"]["flicker_rms"] > 0
    assert result["settings"]["seeds"] == [0, 4]
    assert result["versions"]["torch"]


def test_means_are_those_of_the_videos(pipe, damaged):
    result = evaluate(damaged, reference=pipe, prompts=["a", "b", "c"], seeds=[1], **FAST)
    for name in ("ssim", "latent_cosine", "velocity_relative_error"):
        values = [video["metrics"][name] for video in result["videos"]]
        assert result["metrics"][name]["mean"] == pytest.approx(sum(values) / 3)
    assert result["noise_floor"] is None, "one seed has no other seed to be compared with"
    assert result["metrics"]["adherence_shape"]["mean"] is None


def test_batches_change_nothing_but_rounding(pipe, damaged):
    def run(batch_size):
        options = dict(FAST, batch_size=batch_size, metrics=("latent", "velocity"))
        return evaluate(damaged, reference=pipe, prompts=["a", "b", "c"], seeds=[1], **options)["metrics"]

    one, many = run(1), run(2)
    for name, entry in one.items():
        assert many[name]["mean"] == pytest.approx(entry["mean"], rel=1e-3), name


def test_intervals_from_ten_prompts_on(pipe, damaged):
    options = dict(**FAST | {"num_inference_steps": 1}, metrics=("ssim", "velocity"))
    result = evaluate(damaged, reference=pipe, prompts=[f"scene {i}" for i in range(10)], seeds=[0], **options)
    for entry in result["metrics"].values():
        assert entry["low"] < entry["mean"] < entry["high"]
    assert result["velocity"]["steps"][0]["low"] is not None


def test_trajectories_beyond_the_memory_for_them_go_to_the_disk(pipe, damaged, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wanted = {**FAST, "batch_size": 1, "metrics": ("velocity",)}
    kept, spilled = (
        evaluate(damaged, reference=pipe, prompts=["a", "b", "c"], seeds=[0], **wanted, **memory)
        for memory in ({}, {"trajectory_bytes": 1})
    )
    assert spilled == kept
    assert spilled["velocity"]["n_videos"] == 3
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_videos_that_there_is_no_room_for_have_no_velocity_error(pipe, damaged, monkeypatch, caplog):
    monkeypatch.setattr(recordings.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    options = dict(FAST, batch_size=1, trajectory_bytes=1, metrics=("velocity",))
    result = evaluate(damaged, reference=pipe, prompts=["a", "b"], seeds=[0], **options)
    assert "measured on the first 1 batch(es) of videos only" in caplog.text
    first, second = (video["metrics"]["velocity_relative_error"] for video in result["videos"])
    assert first > 0
    assert second is None
    assert result["velocity"]["n_videos"] == 1
    assert result["metrics"]["velocity_relative_error"]["mean"] == first


def test_progress_reports_each_stage_from_its_first_step_on(pipe):
    calls = []
    evaluate(
        pipe,
        reference=pipe,
        prompts=["a"],
        seeds=[0],
        **FAST,
        progress=lambda *c: calls.append(c),
    )
    stages = ("full precision", "quantized", "velocity")  # velocity is not announced while videos are generated
    assert calls == [(stage, done, 2) for stage in stages for done in range(3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["a", "a"]}, "appears twice"),
        ({"prompts": ["a"], "seeds": []}, "seeds"),
        ({"prompts": ["a"], "metrics": ("psrn",)}, "nearest names are psnr"),
        ({"prompts": None}, "no prompts given"),
    ],
)
def test_evaluate_refuses_bad_input(pipe, options, message):
    with pytest.raises(InvalidInputError, match=message):
        evaluate(pipe, reference=pipe, **options)


def test_a_damaged_student_is_refused_before_the_reference_runs(pipe, tmp_path, monkeypatch):
    quantize(tiny_pipeline("cogvideox"), recipe="rtn-w4a6", out=tmp_path / "student")
    (tmp_path / "student/model_index.json").open("a").write("\n")
    monkeypatch.setattr(pipe.transformer, "forward", None)
    with pytest.raises(InvalidInputError, match=r"model_index\.json: got \d+ bytes"):
        evaluate(tmp_path / "student", reference=pipe, prompts=["a"])


def test_metrics_are_chosen_by_name_or_group():
    assert selected_metrics(()) == METRICS
    assert selected_metrics(("velocity", "psnr")) == ("psnr_frame_mean_db", "psnr_pooled_db", "velocity_relative_error")
    assert selected_metrics(("adherence_shape",)) == ("adherence_shape",)


def test_videos_can_be_kept(pipe, damaged):
    kept = []
    options = dict(metrics=("psnr",), **FAST, video_done=lambda label, video: kept.append((label, video)))
    evaluate(damaged, reference=pipe, prompts=["a", CAPTION], seeds=(3,), **options)
    assert [(video.prompt, video.seed) for _, video in kept] == [("a", 3), (CAPTION, 3)] * 2
    assert {label for label, _ in kept} == {"CogVideoXPipeline"}
    assert not torch.equal(kept[0][1].latents, kept[2][1].latents)


@pytest.mark.usefixtures("forked_workers")
def test_processes_measure_what_one_measures(pipe, damaged, tmp_path):
    for name, model in (("student", damaged), ("teacher", pipe)):
        model.save_pretrained(tmp_path / name)
    models = {"model": str(tmp_path / "student"), "reference": str(tmp_path / "teacher")}
    found, kept, stages = [], [], []
    for workers in (1, 2):
        videos = {}

        def keep(label, video, videos=videos):
            videos[label, video.prompt, video.seed] = video.frames

        options = dict(FAST, batch_size=1, workers=workers, video_done=keep)
        progress = (lambda *step: stages.append(step)) if workers == 2 else None
        found.append(evaluate(**models, prompts=["a", "b", CAPTION], seeds=[0, 4], **options, progress=progress))
        kept.append(videos)
    assert found[0] == found[1]
    assert kept[0].keys() == kept[1].keys()
    assert {label for label, *_ in kept[1]} == set(models.values())
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])
    ends = {stage: (done, total) for stage, done, total in stages}
    assert ends == dict.fromkeys(("full precision", "quantized", "velocity"), (12, 12))


@pytest.mark.parametrize("option", [{"dtype": "float32"}, {"variant": "fp16"}, {"verify": True}])
def test_options_of_loading_are_refused_with_two_loaded_pipelines(pipe, option):
    with pytest.raises(UsageError, match=f"evaluate: {next(iter(option))} is for models by name or folder"):
        evaluate(pipe, reference=pipe, prompts=["a"], **FAST, **option)


def test_processes_need_models_by_name(pipe):
    options = dict(FAST, workers=2)
    with pytest.raises(UsageError, match="workers=2 and a loaded pipeline; pass the name or folder"):
        evaluate(pipe, reference=pipe, prompts=["a"], **options)
