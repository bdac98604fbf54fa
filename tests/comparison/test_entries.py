import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loras import save_lora
from s2q.common.errors import InvalidInputError
from s2q.comparison.entries import content_of, find_entries
from s2q.models import resolve_model
from s2q.models.lora import with_loras
from s2q.recipes.load import recipe_names
from s2q.recipes.methods import matching_recipes
from s2q.run.quantize import quantize
from tiny import tiny_pipeline


@pytest.fixture(scope="module")
def checkpoints(tiny_model, tmp_path_factory):
    """Two checkpoints of one name in two folders."""
    folder = tmp_path_factory.mktemp("made")
    paths = [folder / name / "checkpoint" for name in ("first", "second")]
    for path, recipe in zip(paths, ("rtn-w4a6", "rtn-w4a16"), strict=True):
        quantize(tiny_model, recipe=recipe, out=path)
    return [str(path) for path in paths]


def labels(*given, **options):
    return [entry.label for entry in find_entries(given, **options)]


def test_names_patterns_and_all():
    assert labels("s2q-w4a4", "rtn-w4a6") == ["s2q-w4a4", "rtn-w4a6"]
    assert labels("all") == recipe_names()
    assert labels("rtn-*") == [name for name in recipe_names() if name.startswith("rtn-")]
    assert labels("*-w4a6", "rtn-*").count("rtn-w4a6") == 1, "patterns may overlap"
    assert labels("rtn-*", "rtn-w4a6")[-1] == "rtn-w4a6"
    assert [entry.width for entry in find_entries(["rtn-w4a16", "rtn-w4a6"])] == ["w4a16", "w4a6"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["rtn-w4a7"], "unknown recipe 'rtn-w4a7': rtn has the widths w4a16"),
        (["s2g-w4*"], r"no recipe matches 's2g-w4\*': nearest names are s2q-w"),
        (["rtn-w4a6", "rtn-w4a4", "rtn-w4a6"], "rtn-w4a6 appears twice"),
        (["runs/nothing/here"], "no such checkpoint folder"),
        (["missing.yaml"], "no such recipe file"),
    ],
)
def test_unknown_and_repeated_entries_are_refused(given, message):
    with pytest.raises(InvalidInputError, match=message):
        find_entries(given)


def test_all_is_no_path_and_a_path_is_no_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("all").write_text("")
    Path("runs[1]").mkdir()
    Path("runs[1]/mine.yaml").write_text("extends: rtn-w4a6\nname: mine\n")
    assert labels("all") == recipe_names()
    assert labels("runs[1]/mine.yaml") == ["mine"]
    assert matching_recipes("runs[1]/mine.yaml") is None


def test_a_recipe_file_is_called_by_its_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: rtn-w4a6\nname: my recipe/2\nskip: ['transformer_blocks.0.*']\n")
    (entry,) = find_entries([str(path)])
    assert (entry.label, entry.width) == ("my-recipe-2", "w4a6")
    assert entry.identity()["recipe"]["skip"] == ["transformer_blocks.0.*"]
    path.write_text("extends: rtn-w4a6\nname: rtn-w4a6\nskip: ['transformer_blocks.0.*']\n")
    with pytest.raises(InvalidInputError, match="would both be labelled rtn-w4a6"):
        find_entries(["rtn-w4a6", str(path)])


def test_changes_go_to_the_recipes_that_have_the_group():
    changes = ("distillation.epochs=2", "calibration.samples=4", "weights.num_bits=3")
    rounding, trained = find_entries(["rtn-w4a6", "s2q-w4a6"], overrides=changes)
    assert rounding.overrides == ("weights.num_bits=3",)
    assert rounding.width == trained.width == "w3a6"
    assert trained.overrides == changes
    assert (trained.recipe.distillation.epochs, trained.recipe.calibration.samples) == (2, 4)
    with pytest.raises(InvalidInputError, match=r"'distillation.epochs=2' changes none of the recipes"):
        find_entries(["rtn-w4a6"], overrides=("distillation.epochs=2",))


def test_a_change_makes_no_recipe_another_method():
    changes = ("refinement.epochs=2", "activations.num_bits=8", "weights.num_bits=3")
    weights, rounding, refined = find_entries(["rtn-w4a16", "rtn-w4a6", "s2q-plus-w4a6"], overrides=changes)
    assert weights.overrides == changes[2:]
    assert rounding.overrides == changes[1:]
    assert not rounding.recipe.calibrates
    assert refined.overrides == changes
    assert "changed: activations.num_bits=8, weights.num_bits=3" in rounding.description


def test_variants_are_recipes_too():
    assert labels("quarot-w4a4+std", "quarot-w4a4") == ["quarot-w4a4+std", "quarot-w4a4"]
    with pytest.raises(InvalidInputError, match="unknown recipe 'quarot-w4a9'|unknown recipe"):
        find_entries(["quarot-w4a9+std"])


def test_a_checkpoint_called_like_a_recipe_stands_beside_it(tiny_model, tmp_path):
    quantize(tiny_model, recipe="rtn-w4a4", out=tmp_path / "mine" / "rtn-w4a4")
    for given in (["rtn-*", str(tmp_path / "mine/rtn-w4a4")], [str(tmp_path / "mine/rtn-w4a4"), "rtn-*"]):
        assert {"rtn-w4a4", "mine-rtn-w4a4"} < set(labels(*given))


def test_a_model_is_told_by_what_it_holds(tiny_model, tmp_path):
    for name in ("first", "second", "trained", "shifted"):
        shutil.copytree(tiny_model, tmp_path / name)
    (weights,) = (tmp_path / "trained" / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    scheduler = tmp_path / "shifted" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("}", "} "))
    found = {path.name: content_of(resolve_model(str(path))) for path in tmp_path.iterdir()}
    assert found["first"] == found["second"]
    assert found["trained"] != found["first"] != found["shifted"]


def test_adapters_are_told_apart_by_what_they_hold_and_not_by_their_names(tmp_path):
    pipe = tiny_pipeline("wan")
    pipe.save_pretrained(tmp_path / "model")
    first, second = (save_lora(pipe, tmp_path / str(seed), seed=seed) for seed in range(2))
    copy = shutil.copy(first, tmp_path / "copy.safetensors")

    def content(*loras):
        return content_of(with_loras(resolve_model(tmp_path / "model"), [str(lora) for lora in loras]))

    assert content(first) == content(copy)
    assert content(first, second) == content(second, first)
    assert content(first) not in (content(), content(second), content(f"{first}:2"), content(first, copy))
    assert json.loads(json.dumps(content(first))) == content(first), "compared with what a file holds"


def test_checkpoints_are_told_apart_by_their_folders(checkpoints):
    first, second = find_entries(checkpoints)
    assert (first.label, second.label) == ("first-checkpoint", "second-checkpoint")
    assert (first.width, second.width) == ("w4a6", "w4a16")
    assert first.identity() != second.identity()
    assert labels(checkpoints[0], "rtn-w4a6") == ["checkpoint", "rtn-w4a6"]
    with pytest.raises(InvalidInputError, match="appears twice"):
        find_entries([checkpoints[0], checkpoints[0]])
    damaged = Path(checkpoints[1], "model_index.json")
    before = damaged.read_text()
    damaged.write_text(before + "\n")
    with pytest.raises(InvalidInputError, match=r"model_index\.json: got \d+ bytes"):
        find_entries(checkpoints)
    damaged.write_text(before)
