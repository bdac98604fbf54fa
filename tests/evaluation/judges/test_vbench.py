"""The protocol of the VBench bridge, with a stand-in for the package in a subprocess of this interpreter."""

import json
import sys

import pytest

from fake_vbench import write_fake
from s2q.common.errors import InvalidInputError, S2QError
from s2q.evaluation.judges.vbench import (
    VBenchOptions,
    flow_scores,
    judge_videos,
    plan_vbench,
    vbench_section,
)

TWO = ("subject_consistency", "overall_consistency")


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return write_fake(tmp_path_factory.mktemp("fake"))


@pytest.fixture(autouse=True)
def with_fake(fake, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(fake))
    monkeypatch.delenv("FAKE_VBENCH", raising=False)


def options(tmp_path, **changes):
    return VBenchOptions(**{"python": sys.executable, "folder": tmp_path / "work", "dimensions": TWO} | changes)


def write_files(plan, side):
    """Files of sizes that tell them apart; the sizes by name."""
    folder = plan.options.folder / side
    folder.mkdir(parents=True)
    sizes = {}
    for prompt in plan.prompts:
        for index in range(plan.videos_a_prompt):
            name = plan.file_name(prompt, index)
            sizes[name] = 10 * (len(sizes) + 1) + (side == "model")
            (folder / name).write_bytes(b"x" * sizes[name])
    return sizes


def test_the_interpreter_may_be_named_from_where_one_is(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    plan = plan_vbench(options(tmp_path, python="bin/python"), ["up/down"], videos_a_prompt=1)
    write_files(plan, "model")
    assert judge_videos(plan, "model").scores.keys() == set(TWO)


def test_other_prompts_are_listed_and_judged_in_every_dimension(tmp_path):
    plan = plan_vbench(options(tmp_path, cache=tmp_path), ["up/down", "beach"], videos_a_prompt=2)
    assert not plan.standard
    assert plan.judged == dict.fromkeys(TWO, ("up/down", "beach"))
    sizes = {side: write_files(plan, side) for side in ("model", "reference")}
    scores = {side: judge_videos(plan, side) for side in ("model", "reference")}
    section = vbench_section(plan, scores["model"], scores["reference"])
    for name in TWO:
        for side in sizes:
            expected = 100 * sum(1 / size for size in sizes[side].values()) / 4
            assert section["dimensions"][name][side] == pytest.approx(expected)
        assert section["dimensions"][name]["n_videos"] == 4
    assert section["mode"] == "custom_input"
    assert "nobody else's" in section["notes"][0]
    assert [(one["prompt"], one["index"]) for one in section["videos"]] == [
        ("up/down", 0),
        ("up/down", 1),
        ("beach", 0),
        ("beach", 1),
    ]
    last = section["videos"][-1]
    assert last["model"] == dict.fromkeys(TWO, 1 / sizes["model"][last["file"]])
    assert json.loads(json.dumps(section, allow_nan=False)) == section
    call = json.loads((tmp_path / "work/model-vbench/call.json").read_text())
    assert call == {"mode": "custom_input", "local": True, "cache": str(tmp_path), "device": "cpu"}
    assert flow_scores(scores["model"], scores["reference"]) is None


def test_its_own_prompts_are_judged_where_they_belong(tmp_path):
    plan = plan_vbench(options(tmp_path), ["beach", "a dog, running"], videos_a_prompt=1)
    assert plan.standard
    assert plan.judged == {"subject_consistency": ("beach",), "overall_consistency": ("a dog, running",)}
    assert plan.file_name("a dog, running", 3) == "a dog, running-3.mp4"
    sizes = write_files(plan, "model")
    found = judge_videos(plan, "model")
    assert found.scores["overall_consistency"] == pytest.approx(1 / sizes["a dog, running-0.mp4"])
    section = vbench_section(plan, found, found)
    assert section["dimensions"]["subject_consistency"]["n_prompts_of_vbench"] == 2
    assert section["notes"] == [
        "fewer prompts than VBench has, not comparable with published scores: subject_consistency 1 of 2",
        "1 of the 5 videos a prompt that VBench's own tables rest on (the paper: 1)",
    ]


def test_the_default_is_what_the_prompts_allow_of_the_papers_dimensions(tmp_path, monkeypatch):
    from s2q.evaluation.judges import vbench

    monkeypatch.setattr(vbench, "paper_dimensions", lambda: (*TWO, "scene"))
    plan = plan_vbench(options(tmp_path, dimensions=()), ["up/down"], videos_a_prompt=1)
    assert set(plan.judged) == set(TWO)
    assert "its own prompts only" in plan.absent["scene"]
    plan = plan_vbench(options(tmp_path, dimensions=()), ["alley"], videos_a_prompt=1)
    assert set(plan.judged) == {"subject_consistency", "scene"}
    assert "none of the prompts" in plan.absent["overall_consistency"]


@pytest.mark.parametrize(
    ("changes", "prompts", "message"),
    [
        ({"python": "no-such-python"}, ["a"], "no such program"),
        ({"cache": "no-such-folder"}, ["a"], "no such folder"),
        ({"dimensions": ("subject_consistancy",)}, ["a"], "nearest names are subject_consistency"),
        ({"dimensions": ("scene",)}, ["a"], "scene: VBench judges it on its own prompts only"),
        ({"dimensions": ("scene", *TWO)}, ["alley"], "overall_consistency: none of the prompts"),
        (
            {"dimensions": ("dynamic_degree",)},
            ["a"],
            "dynamic_degree: .*ModuleNotFoundError.*a_module_that_is_not_there",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_generated(tmp_path, changes, prompts, message):
    if "cache" in changes:
        changes = {"cache": tmp_path / changes["cache"]}
    with pytest.raises(InvalidInputError, match=message):
        plan_vbench(options(tmp_path, **changes), prompts, videos_a_prompt=1)
    assert not (tmp_path / "work").exists()


def test_more_videos_than_vbench_looks_at_are_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="at most 5 videos"):
        plan_vbench(options(tmp_path, dimensions=("scene",)), ["alley"], videos_a_prompt=6)


def test_an_interpreter_without_vbench_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_VBENCH", "import")
    with pytest.raises(InvalidInputError, match="cannot import vbench: ModuleNotFoundError.*docs/judging.md"):
        plan_vbench(options(tmp_path), ["a"], videos_a_prompt=1)


def test_missing_weights_are_named_when_nothing_may_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_VBENCH", "weights")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InvalidInputError, match=r"weights are missing.*example\.org/subject_consistency\.pth"):
        plan_vbench(options(tmp_path), ["a"], videos_a_prompt=1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("fail", r"exit code 1.*model-vbench/log\.txt ends with: .*the weights are of another model"),
        ("nan", "subject_consistency of the model's videos: the score is nan"),
        ("nan video", r"0000-0\.mp4 is nan"),
        ("missing dimension", "overall_consistency of the model's videos: not in its results"),
        ("missing video", r"1 of 2 videos were not scored, '0001-0\.mp4' first"),
    ],
)
def test_incomplete_results_are_refused(tmp_path, monkeypatch, fault, message):
    plan = plan_vbench(options(tmp_path), ["a", "b"], videos_a_prompt=1)
    write_files(plan, "model")
    monkeypatch.setenv("FAKE_VBENCH", fault)
    with pytest.raises(S2QError, match=message):
        judge_videos(plan, "model")
