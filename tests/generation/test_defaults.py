import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.generation.defaults import embedded_source, generation_defaults, model_label, with_first_frames
from s2q.generation.prompts import Prompt, prompt_list
from s2q.shapes import embedded
from tiny import image_prompts

STRESS, IMAGE = "shapes-cogvideox-outliers", "shapes-wan-i2v"
CAPTION = "a red circle moving left on a grey background"


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "s2q").mkdir()
    (tmp_path / "s2q/report.json").write_text(json.dumps({"source": STRESS}))
    return tmp_path


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.setattr(embedded, "generation_defaults", lambda name: {"height": len(name)})


def loaded_from(place):
    return SimpleNamespace(name_or_path=str(place))


def test_by_name_by_report_and_loaded(checkpoint, settings):
    for model in (STRESS, checkpoint, str(checkpoint), loaded_from(STRESS), loaded_from(checkpoint)):
        assert embedded_source(model) == STRESS
        assert generation_defaults(model) == {"height": len(STRESS)}


def test_by_the_folder_of_the_package(tmp_path, monkeypatch, settings):
    monkeypatch.setattr(embedded, "embedded_folder", lambda name: tmp_path)
    for model in (tmp_path, loaded_from(tmp_path)):
        assert embedded_source(model) == "shapes-cogvideox"


def test_other_models_have_none(tmp_path, settings):
    (tmp_path / "s2q").mkdir()
    (tmp_path / "s2q/report.json").write_text(json.dumps({"source": "someone/model"}))
    for model in ("someone/model", tmp_path, loaded_from(tmp_path), object()):
        assert embedded_source(model) is None
        assert generation_defaults(model) == {}


def test_a_damaged_report_names_the_file(checkpoint):
    (checkpoint / "s2q/report.json").write_text("[")
    with pytest.raises(InvalidInputError, match=r"report\.json: cannot be read as JSON"):
        embedded_source(checkpoint)


def test_a_model_label_is_its_folder_source_or_class(tmp_path):
    assert model_label(tmp_path) == str(tmp_path)
    assert model_label(loaded_from("here")) == "here"
    assert model_label(object()) == "object"


def test_captions_of_an_image_model_get_the_first_frame_of_their_scene(tmp_path):
    (tmp_path / "s2q").mkdir()
    (tmp_path / "s2q/report.json").write_text(json.dumps({"source": IMAGE}))
    given = Prompt("a blue square", image=prompt_list("prompts", image_prompts("a"))[0].image)
    text = Prompt(CAPTION, negative_prompt="grey", seed=3)
    for model in (IMAGE, tmp_path):
        drawn, kept, unknown = with_first_frames(model, [text, given, "a cat"])
        assert (drawn, drawn.negative_prompt, drawn.seed) == (CAPTION, "grey", 3)
        assert torch.equal(torch.from_numpy(np.array(drawn.image.pixels)), embedded.first_frame(IMAGE, CAPTION))
        assert kept is given
        assert unknown.image is None
    assert [prompt.image for prompt in with_first_frames("shapes-wan", [text])] == [None]
