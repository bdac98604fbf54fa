"""What belongs to a prompt counts in the fingerprints of a run and of a comparison."""

import pytest

import s2q
from s2q.common.errors import InvalidInputError
from s2q.comparison.compare import compare

pytestmark = pytest.mark.usefixtures("no_encoding", "forked_workers")

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 16, "width": 16, "num_frames": 9}
CALIBRATION = ["n_prompts=2", "samples=2", "steps=2", "guidance_scale=2", "num_frames=9", "height=16", "width=16"]
OVERRIDES = [*(f"calibration.{text}" for text in CALIBRATION), "distillation.epochs=1"]


def test_a_resumed_run_records_a_prompt_again_only_if_what_belongs_to_it_changed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("s2q.run.stages.assemble", lambda *_args, **_options: 1 / 0)  # keeps the run folder
    prompts, recorded = ["red", {"prompt": "blue", "negative_prompt": "ugly"}], []
    original = s2q.calibration.candidates.record_trajectory

    def record(pipe, texts, **options):
        recorded.append((texts[0], texts[0].negative_prompt))
        return original(pipe, texts, **options)

    monkeypatch.setattr("s2q.calibration.candidates.record_trajectory", record)
    for given in (prompts, prompts, ["red", {"prompt": "blue", "negative_prompt": "dull"}]):
        with pytest.raises(ZeroDivisionError):
            s2q.quantize(
                tiny_model, recipe="s2q-w4a6", out=tmp_path / "out", prompts=given, overrides=OVERRIDES, workers=1
            )
    assert recorded == [("red", None), ("blue", "ugly"), ("blue", "dull")]


def test_a_comparison_of_other_negative_prompts_is_another_comparison(tiny_model, tmp_path):
    def run(negative):
        prompts = ["red", {"prompt": "blue", "negative_prompt": negative}]
        return compare(["rtn-w8a8"], model=tiny_model, out=tmp_path / "out", prompts=prompts, seeds=[0], **SETTINGS)

    result = run("ugly")
    assert result["prompts"] == ["red", "blue"]
    assert run("ugly") == result
    with pytest.raises(InvalidInputError, match=r"contains a different comparison: prompts.*ugly"):
        run("dull")
