import json
import shutil

import pytest

from s2q.benchmark.shapes import (
    attention_shapes,
    layer_shapes,
    resolve_subject,
    source_tokens,
    subject_rows,
)
from s2q.common.errors import InvalidInputError, UsageError
from s2q.models import resolve_model
from s2q.models.synthetic import synthetic_model, synthetic_names
from s2q.shapes.embedded import embedded_folder
from tiny import tiny_pipeline, video_to_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline("cogvideox").save_pretrained(path)
    return path


def shapes_of(name):
    return {one.shape for one in layer_shapes([synthetic_model(name)], rows=None)}


def test_the_layers_of_the_published_models():
    rows = 17_776
    assert shapes_of("cogvideox-2b") == {(rows, 1920, 1920), (rows, 1920, 7680), (rows, 7680, 1920)}
    assert shapes_of("cogvideox-5b") == {(rows, 3072, 3072), (rows, 3072, 12288), (rows, 12288, 3072)}
    rows = 32_760
    assert shapes_of("wan-1.3b") == {(rows, 1536, 1536), (rows, 1536, 8960), (rows, 8960, 1536)}
    assert shapes_of("wan-14b") == {(rows, 5120, 5120), (rows, 5120, 13824), (rows, 13824, 5120)}
    hunyuan = {(k, n): m for m, k, n in shapes_of("hunyuanvideo")}
    assert hunyuan == {
        (3072, 3072): 119_056,
        (3072, 12288): 119_056,
        (12288, 3072): 118_800,
        (15360, 3072): 119_056,
    }


def test_a_shape_of_several_models_is_measured_once():
    models = [synthetic_model(name) for name in synthetic_names()]
    shapes = layer_shapes(models, rows=256)
    assert len({entry.shape for entry in shapes}) == len(shapes) == 29
    (shared,) = [one for one in shapes if one.shape == (256, 3072, 12288)]
    assert {"cogvideox-5b ff.net.0.proj", "hunyuanvideo proj_mlp"} <= set(shared.layers)
    attentions = attention_shapes(models, rows=256)
    assert len(attentions) == 9
    assert (256, 28, 64) in {(shape.tokens, shape.heads, shape.head_dim) for shape in attentions}, "of Kandinsky 5"
    assert not any("sana-video-2b" in shape.models for shape in attentions), "whose attention is linear"


def test_shapes_of_a_pipeline_are_those_of_its_layers(folder):
    source = resolve_model(folder)
    assert source_tokens(source) == (3, 16)
    assert {one.shape for one in layer_shapes([source], rows=None)} == {(19, 64, 64), (19, 64, 256), (19, 256, 64)}
    (attention,) = attention_shapes([source], rows=None)
    assert (attention.tokens, attention.heads, attention.head_dim) == (19, 4, 16)
    assert subject_rows([source], tokens=None, device="cpu") is None


def test_a_cpu_gets_fewer_rows_of_a_large_model():
    models = [synthetic_model("cogvideox-2b")]
    assert subject_rows(models, tokens=None, device="cpu") == 2048
    assert subject_rows(models, tokens=None, device="cuda") is None
    assert subject_rows(models, tokens=7, device="cpu") == 7


def test_a_pipeline_whose_attention_does_not_see_the_text():
    source = resolve_model("shapes-wan")
    assert source_tokens(source) == (192, 16)
    shapes = layer_shapes([source], rows=None)
    assert {one.shape for one in shapes} == {(192, 192, 192), (192, 192, 768), (192, 768, 192)}
    assert not any(layer.endswith(("attn2.to_k", "attn2.to_v")) for one in shapes for layer in one.layers)
    assert attention_shapes([source], rows=None)[0].tokens == 192


def test_a_checkpoint_has_the_tokens_of_the_embedded_model_that_it_was_made_from(tmp_path):
    copy = shutil.copytree(
        embedded_folder("shapes-wan"), tmp_path / "copy", ignore=shutil.ignore_patterns("generation*")
    )
    (copy / "s2q").mkdir()
    (copy / "s2q/report.json").write_text(json.dumps({"source": "shapes-wan"}))
    assert source_tokens(resolve_model(copy)) == source_tokens(resolve_model("shapes-wan"))


def test_a_pipeline_that_does_not_tell(tmp_path):
    video_to_video().save_pretrained(tmp_path / "tiny")
    with pytest.raises(UsageError, match="tiny: .* pass --tokens"):
        source_tokens(resolve_model(tmp_path / "tiny"))


def test_subjects_are_found_by_name():
    assert resolve_subject("synthetic:wan-14b") == synthetic_model("wan-14b")
    with pytest.raises(InvalidInputError, match="unknown synthetic model"):
        resolve_subject("synthetic:wan")
    with pytest.raises(InvalidInputError, match="unknown model"):
        resolve_subject("wan-14b")
