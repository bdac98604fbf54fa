"""Models that the page of `s2q ui` offers, and pairs that it compares."""

import json
import shutil

import pytest

import s2q
from s2q.common.errors import InvalidInputError
from s2q.ui.offers import DATA_FREE, check_pair, offered, partners


@pytest.fixture
def embedded_checkpoint(embedded_tiny, tmp_path):
    """A checkpoint whose record names an embedded model."""
    s2q.quantize(embedded_tiny, recipe="rtn-w4a8", out=tmp_path / "embedded-w4a8")
    return tmp_path / "embedded-w4a8"


def labels(offers):
    return [offer.label for offer in offers]


def test_without_arguments_the_embedded_models_are_offered_with_recipes_that_need_no_samples():
    offers = offered()
    assert labels(offers)[:5] == [
        "shapes-cogvideox",
        "shapes-cogvideox-outliers",
        "shapes-wan",
        "shapes-wan-outliers",
        "shapes-wan-i2v",
    ]
    assert len(offers) == 5 * (1 + len(DATA_FREE))
    assert [offer.label for offer in offers if offer.needs_image and not offer.quantized] == ["shapes-wan-i2v"]
    others = labels(partners(offers[2], offers))
    assert "shapes-wan, table-w4a8" in others
    assert not any("cogvideox" in name or "i2v" in name for name in others)


def test_checkpoints_are_offered_with_the_given_model_or_the_embedded_one_that_they_were_made_from(
    checkpoint, tiny_model, embedded_checkpoint
):
    full, quantized = offered(models=[tiny_model], checkpoints=[checkpoint])
    assert labels([full, quantized]) == [str(tiny_model), str(checkpoint)]
    assert (full.quantized, quantized.quantized) == (False, True)
    assert partners(full, [full, quantized]) == [quantized]
    found = labels(offered(checkpoints=[embedded_checkpoint]))
    assert found[:3] == ["shapes-cogvideox", str(embedded_checkpoint), "shapes-cogvideox, table-w4a8"]


def test_a_checkpoint_given_twice_is_offered_once(checkpoint, tiny_model):
    assert len(offered(models=[tiny_model], checkpoints=[checkpoint, f"{checkpoint}/"])) == 2


def test_what_cannot_be_offered_is_refused_with_its_remedy(checkpoint, tiny_model, tmp_path):
    with pytest.raises(InvalidInputError, match="is not an s2q checkpoint; pass a full-precision model with -m"):
        offered(checkpoints=[tiny_model])
    with pytest.raises(InvalidInputError, match="tiny: has nothing to be compared with; pass a full-precision model"):
        offered(models=[tiny_model])
    with pytest.raises(
        InvalidInputError, match="the model that it was made from, tiny, with -m MODEL, or a checkpoint"
    ):
        offered(checkpoints=[checkpoint])
    with pytest.raises(InvalidInputError, match=r"tiny-w4a6: .*that of the reference shapes-wan"):
        offered(models=["shapes-wan"], checkpoints=[checkpoint])
    with pytest.raises(InvalidInputError, match="does not exist"):
        offered(checkpoints=[tmp_path / "absent"])


@pytest.fixture
def with_pipeline(tiny_model, tmp_path):
    """The configurations of a model, with another class of pipeline."""

    def write(class_name, transformer_class):
        folder = tmp_path / class_name
        shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        for name, class_of in (("model_index.json", class_name), ("transformer/config.json", transformer_class)):
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(content | {"_class_name": class_of}))
        return folder

    return write


def test_models_that_need_more_than_a_prompt_and_an_image_are_refused(with_pipeline):
    animate = with_pipeline("WanAnimatePipeline", "WanAnimateTransformer3DModel")
    with pytest.raises(
        InvalidInputError, match=r"needs pose_video and face_video, .*; use s2q eval with a \.jsonl file"
    ):
        offered(models=[animate])
    control = with_pipeline("CogVideoXVideoToVideoPipeline", "CogVideoXTransformer3DModel")
    with pytest.raises(InvalidInputError, match="not with CogVideoXVideoToVideoPipeline; load the model in Python"):
        offered(models=[control])


def test_two_models_of_other_architectures_are_no_pair():
    offers = {offer.label: offer for offer in offered()}
    check_pair(offers["shapes-wan"], offers["shapes-wan-outliers, rtn-w4a4"])
    with pytest.raises(InvalidInputError, match="compare it with the model that it was made from"):
        check_pair(offers["shapes-wan"], offers["shapes-cogvideox"])
