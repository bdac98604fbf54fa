import json
import stat

import pytest
import torch

from s2q.checkpoint import CheckpointRecords, S2QConfig, save_checkpoint
from s2q.checkpoint.model_card import render_model_card
from s2q.common.cards import front_matter
from s2q.common.errors import InvalidInputError
from s2q.core.schemes import LinearScheme, PerChannel, PerToken, QuantScheme
from s2q.recipes.load import load_recipe
from tiny import tiny_pipeline

STORAGE = {"full_precision_bytes": 4000, "quantized_bytes": 1000, "ratio": 4.0}


@pytest.fixture(scope="module")
def config():
    weight = QuantScheme(num_bits=4, granularity=PerChannel())
    activation = QuantScheme(num_bits=6, granularity=PerToken(), dynamic=True)
    schemes = {
        "a": LinearScheme(weight=weight, activation=activation),
        "b": LinearScheme(weight=weight, activation=None),
        "c": LinearScheme(weight=weight, activation=None),
    }
    return S2QConfig.from_schemes(schemes, recipe="rtn-w4a6", compute_dtype="bfloat16")


def card(config, *, source="someone/model", report=None, base_folder=None, pipeline_class="CogVideoXPipeline"):
    return render_model_card(
        config,
        pipeline_class=pipeline_class,
        source=source,
        recipe=load_recipe("rtn-w4a6").resolved(),
        report={"storage": STORAGE, **(report or {})},
        base_folder=base_folder,
    )


def test_configuration_survives_json(config):
    content = json.loads(json.dumps(config.to_dict()))
    assert S2QConfig.from_dict(content).to_dict() == config.to_dict()
    assert S2QConfig.from_dict(content).layer_schemes() == config.layer_schemes()
    assert content["quant_method"] == "s2q"
    assert content["layers"] == {"a": "w4a6", "b": "w4a16", "c": "w4a16"}
    assert repr(config)


def test_folder_layout_and_modes(checkpoint):
    names = {path.name for path in (checkpoint / "s2q").iterdir()}
    assert names == {"recipe.json", "report.json", "events.jsonl", "manifest.json"}
    for path in checkpoint.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o755 if path.is_dir() else 0o644), path


def test_nothing_is_left_beside_the_checkpoint(checkpoint):
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_the_saved_recipe_is_the_resolved_one(checkpoint):
    assert load_recipe(checkpoint / "s2q/recipe.json") == load_recipe("rtn-w4a6")


def test_the_card_of_an_image_to_video_pipeline_says_so(config):
    text = card(config, pipeline_class="WanImageToVideoPipeline")
    assert front_matter(text)["pipeline_tag"] == "image-to-video"
    assert "--prompts FILE.jsonl" in text
    assert "text-to-video" not in text


def test_the_front_matter_keeps_the_license_of_the_base_model(config, tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: theirs\nlicense_link: LICENSE\ntags: [x]\n---\n"
    )
    assert front_matter(card(config, base_folder=tmp_path)) == {
        "base_model": "someone/model",
        "base_model_relation": "quantized",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "license": "other",
        "license_name": "theirs",
        "license_link": "LICENSE",
        "tags": ["s2q", "quantized", "rtn-w4a6"],
    }


def test_a_card_without_known_origin_names_no_base_model_and_no_licence(config):
    fields = front_matter(card(config, source="CogVideoXPipeline"))
    assert not {"base_model", "base_model_relation", "license"} & fields.keys()


@pytest.mark.parametrize("readme", ["", "no front matter", "---\n: [\n---\n", "---\n- 1\n---\n"])
def test_unreadable_cards_of_the_original_are_no_obstacle(config, tmp_path, readme):
    (tmp_path / "README.md").write_text(readme)
    assert "license" not in front_matter(card(config, base_folder=tmp_path))


def test_names_cannot_break_the_front_matter(config):
    assert front_matter(card(config, source='evil"\nlicense: mit'))["base_model"] == 'evil"\nlicense: mit'


def test_measured_table_only_with_numbers(config):
    assert "Measured" not in card(config)
    metrics = {"psnr": {"mean": 34.25, "low": None, "high": 35.0, "definition": "mean of frames, dB"}}
    text = card(config, report={"metrics": metrics})
    assert "| psnr | 34.25 | – | 35 | mean of frames, dB |" in text
    assert "| Quantized linears | 3 |" in text
    assert "w4a6 (1), w4a16 (2)" in text


def test_the_licence_file_comes_along_and_the_path_does_not(tmp_path, checkpoint):
    from s2q.run.quantize import quantize

    model = tmp_path / "model"
    tiny_pipeline("cogvideox").save_pretrained(model)
    (model / "LICENSE").write_text("theirs")
    quantize(model, recipe="rtn-w4a16", out=tmp_path / "out")
    assert (tmp_path / "out/LICENSE").read_text() == "theirs"
    for path in (tmp_path / "out").rglob("*"):  # where the original lay on this machine stays here
        if path.suffix in (".json", ".jsonl", ".md"):
            assert str(tmp_path) not in path.read_text(), path


def test_a_pipeline_that_is_not_quantized_is_refused(tmp_path):
    records = CheckpointRecords(source="x", recipe={}, report={})
    with pytest.raises(InvalidInputError, match="is not quantized by s2q"):
        save_checkpoint(tiny_pipeline("cogvideox"), tmp_path / "out", records=records)
    assert not list(tmp_path.iterdir())


def test_text_encoder_tensors_are_stored_as_they_were(checkpoint, teacher):
    from safetensors.torch import load_file

    stored = load_file(checkpoint / "text_encoder/model.safetensors")
    state = teacher.text_encoder.state_dict()
    assert all(
        torch.equal(tensor, state[name]) and tensor.dtype == state[name].dtype for name, tensor in stored.items()
    )


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("色调艳丽, 'blurred' & <low>", "`negative_prompt=\"色调艳丽, 'blurred' & <low>\"`"),
        ("a `b` ``c", '```negative_prompt="a `b` ``c"```'),
        ("two\nlines", '`negative_prompt="two\\nlines"`'),
    ],
)
def test_the_card_has_negative_prompts_as_they_were_written(config, text, code):
    text = card(config, report={"generation": {"negative_prompt": text}})
    assert f"It was calibrated with {code}. `s2q generate`" in text
