"""Content of the report page: stages beside their plan, and the videos that an evaluation keeps."""

from types import SimpleNamespace

from report.test_run_records import checkpoint, report
from s2q.cli import pages
from s2q.cli.pages import SHOWN_PROMPTS, EvaluationPage, all_of, page_content
from s2q.report.run_records import RunRecords, read_records

EVALUATION = {"model": "runs/w4a6", "metrics": {}}


def planned(seconds):
    return [SimpleNamespace(name="blocks", peak_memory_bytes=2_000_000, seconds=seconds)]


def test_stages_have_planned_memory_and_time_beside_the_measured_ones(tmp_path):
    stages = [{"name": name, "seconds": 61.0, "peak_memory_bytes": 3_000_000} for name in ("load", "blocks")]
    records = read_records(checkpoint(tmp_path, report=report(stages=stages)))
    load, blocks = page_content(records, EVALUATION, [], planned=planned(59.0)).stages
    assert blocks == {
        "Stage": "blocks",
        "Planned peak memory": "2 MB",
        "Measured peak memory": "3 MB",
        "Planned time, one worker": "59 s",
        "Measured time": "1:01 min",
    }
    assert (load["Planned peak memory"], load["Planned time, one worker"]) == ("–", "–")
    assert list(blocks) == list(load)


def test_without_a_plan_there_is_no_column_for_it(tmp_path):
    records = read_records(checkpoint(tmp_path))
    assert list(page_content(records, EVALUATION, []).stages[0]) == ["Stage", "Measured peak memory", "Measured time"]
    (row,) = page_content(records, EVALUATION, [], planned=planned(None)).stages
    assert "Planned time, one worker" not in row


def test_the_title_is_source_and_scheme_or_the_name_of_the_model(tmp_path):
    assert page_content(read_records(checkpoint(tmp_path)), EVALUATION, []).title == "tiny, W4A6"
    assert page_content(RunRecords(), EVALUATION, []).title == "w4a6"


def test_an_evaluation_keeps_the_first_seed_of_the_first_prompts_of_both_models(tmp_path):
    page = EvaluationPage(path=tmp_path / "page.html", records=RunRecords())
    videos = [SimpleNamespace(prompt=f"{prompt}", seed=seed) for prompt in range(SHOWN_PROMPTS + 2) for seed in (3, 4)]
    for label in ("full", "quantized"):
        for video in videos:
            page.keep(label, SimpleNamespace(**vars(video), label=label))
    for kept, label in ((page.theirs, "full"), (page.ours, "quantized")):
        assert list(kept) == [str(prompt) for prompt in range(SHOWN_PROMPTS)]
        assert {(video.seed, video.label) for video in kept.values()} == {(3, label)}


def test_the_sample_of_the_maps_is_generated_by_the_embedded_model_of_the_run(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pages, "sample_frames", lambda model, records: asked.append(model))
    monkeypatch.setattr("s2q.report.page.render_page", lambda content: "a page")
    for source in ("shapes-wan-outliers", "acme/model"):
        records = RunRecords(report=report(source=source))
        EvaluationPage(path=tmp_path / "page.html", records=records).write(EVALUATION)
    EvaluationPage(path=tmp_path / "page.html", records=RunRecords()).write(EVALUATION)
    assert asked == ["shapes-wan-outliers"]


def test_all_listeners_are_told():
    told = []
    listener = all_of(None, lambda label, video: told.append((1, label, video)), lambda label, video: told.append(2))
    listener("a", "b")
    assert told == [(1, "a", "b"), 2]
    assert all_of(None, None) is None
