"""The paper's tables again: every figure has its row, a run makes what is missing, and nothing twice."""

import json
import shlex
from types import SimpleNamespace

import pytest
import typer
from published import published_models, published_name
from reproduce import run as running
from reproduce import specs
from reproduce.beside import _costs, contents, page_of
from reproduce.command import main
from reproduce.plan import Request, video_name
from reproduce.specs import TABLES, row_overrides

from s2q.cli import run as s2q
from s2q.cli.app import app
from s2q.evaluation.paper import FULL_PRECISION, METHOD, paper_tables
from s2q.recipes.load import load_recipe, recipe_names
from tiny import tiny_pipeline

FAST = ["--steps", "2", "--num-frames", "9", "--height", "16", "--width", "16", "--device", "cpu"]
SMALL = ["distillation.epochs=1", "calibration.steps=2", "calibration.n_prompts=1", "calibration.samples=2"]
SMALL_FLAGS = [part for change in SMALL for part in ("--set", change)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Flags of a tiny model and its prompts."""
    folder = tmp_path_factory.mktemp("reproduce")
    tiny_pipeline("cogvideox").save_pretrained(folder / "tiny")
    (folder / "judged.txt").write_text("red\na square\nup/down\n")
    (folder / "calibration.txt").write_text("blue\n")
    prompts = ["--prompts", folder / "judged.txt", "--calibration-prompts", folder / "calibration.txt"]
    return [str(part) for part in ("-m", folder / "tiny", *prompts)]


@pytest.fixture
def in_this_process(monkeypatch):
    """Commands run here, which is faster; they are returned."""
    ran = []

    def command(arguments):
        ran.append(arguments)
        assert s2q(list(arguments)) == 0

    monkeypatch.setattr(running, "_command", command)
    return ran


@pytest.fixture
def no_baselines(monkeypatch):
    """The package has no recipes of other methods."""
    own = [name for name in recipe_names() if name.startswith(("rtn-", "s2q-"))]
    monkeypatch.setattr(specs, "recipe_names", lambda: own)


def parsed(line):
    """What the command line understands of a line."""
    program, name, *rest = shlex.split(line)
    assert program == "s2q"
    return typer.main.get_command(app).commands[name].make_context(name, rest).params


def test_every_figure_of_the_paper_has_its_row():
    assert set(paper_tables()) == set(TABLES)
    for table in TABLES.values():
        methods = {row.method for row in table.rows if row.in_paper}
        for model, figures in table.paper["values"].items():
            assert model in published_models()
            assert set(figures) <= methods
            assert all(len(values) == len(table.paper["metrics"]) for values in figures.values())


def test_no_row_waits_for_a_recipe():
    rows = [(name, row) for name, table in TABLES.items() for row in table.rows if row.variant]
    lacking = {(name, row.method) for name, row in rows if not row.runs}
    assert lacking == set()


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_every_row_with_a_recipe_is_valid(table):
    variants = [row.variant for row in table.rows if row.variant]
    assert len({variant.name for variant in variants}) == len(variants)
    runnable = [row.variant for row in table.rows if row.runs]
    changes = ["distillation.epochs=1"]
    recipes = [load_recipe(variant.recipe, overrides=row_overrides(variant, changes)) for variant in runnable]
    assert recipes
    assert len({json.dumps(recipe.resolved()) for recipe in recipes}) == len(recipes)


def test_changes_concern_the_rows_that_have_such_a_part():
    rows = {row.variant.name: row.variant for row in TABLES["vbench-w4a6"].rows if row.runs}
    changes = ["outer.num_bits=8", *SMALL]
    assert row_overrides(rows["rtn-w4a6"], changes) == ("outer.num_bits=8",)
    assert row_overrides(rows["s2q-w4a6"], changes) == tuple(changes)


def test_a_dry_run_shows_the_commands_and_the_rows_without_a_recipe(no_baselines, capsys, tmp_path):
    arguments = ["vbench-w4a6", "-m", "shapes-cogvideox", "-o", str(tmp_path / "o"), "--dry-run", *FAST, *SMALL_FLAGS]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [parsed(line) for line in lines if not line.startswith("#")]
    assert [one["recipe"] for one in commands if "recipe" in one] == ["rtn-w4a6", "s2q-w4a6", "s2q-plus-w4a6"]
    judged = [one for one in commands if "reference" in one]
    assert {one["model"] for one in judged} == {str(one["out"]) for one in commands if "recipe" in one}
    assert all(one["num_prompts"] == 64 and one["num_inference_steps"] == 2 and one["seeds"] == 1 for one in judged)
    assert "# QuaRot: no recipe yet" in lines
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_a_run_makes_what_is_missing_and_nothing_twice(inputs, tmp_path, in_this_process, monkeypatch, capsys):
    out = tmp_path / "o"
    rows = ["--only", "rtn-w4a6", "--only", "s2q-w4a6"]
    arguments = ["vbench-w4a6", *inputs, "-o", str(out), "--piece", "2", *FAST, *SMALL_FLAGS, *rows]
    assert main(arguments) == 0
    page = capsys.readouterr().out
    assert page == (out / "tables" / "vbench-w4a6.md").read_text()
    measured = {row["method"]: row for row in json.loads((out / "tables" / "vbench-w4a6.json").read_text())["rows"]}
    assert measured[METHOD]["ours"]["prompts"] == 3
    assert measured[METHOD]["ours"]["velocity_relative_error"]["mean"] > 0
    assert measured[METHOD]["ours"]["storage_gb"] > 0
    assert measured["s2q-plus, beyond the paper"]["status"] == "not run"
    assert [command[4] for command in in_this_process] == ["rtn-w4a6", "s2q-w4a6"]
    folders = sorted((out / "videos").iterdir())
    assert [folder.name.split("-")[0] for folder in folders] == ["full", "rtn", "s2q"]
    for folder in folders:
        videos = {path.name for path in folder.glob("*.mp4")}
        assert {"red-0.mp4", "a square-0.mp4"} < videos
        assert json.loads((folder / "prompts.json").read_text()) == {
            video_name(prompt, 0): prompt for prompt in ("red", "a square", "up/down")
        }
        assert len(videos) == 3

    in_this_process.clear()
    monkeypatch.setattr(running, "run_reference", lambda *args, **options: pytest.fail("judged again"))
    assert main(arguments) == 0
    assert capsys.readouterr().out == page
    assert not in_this_process

    assert main([*arguments, "--dry-run"]) == 0
    assert not capsys.readouterr().out.strip()
    assert main([*arguments, "--guidance-scale", "2", "--dry-run"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["eval", "eval"]


def test_costs_are_of_the_runs_that_are_there(tmp_path):
    """Another table may have made one of the three runs of a row and judged it."""
    runs = [SimpleNamespace(checkpoint=tmp_path / str(seed)) for seed in range(3)]
    assert _costs(runs) == {}
    (tmp_path / "1" / "s2q").mkdir(parents=True)
    report = {"storage": {"quantized_bytes": 3 * 2**30}, "blocks": [{"resumed": False}]}
    report |= {"seconds": 1800.0, "peak_memory_bytes": 2**31}
    (tmp_path / "1" / "s2q" / "report.json").write_text(json.dumps(report))
    assert _costs(runs) == {"storage_gb": 3, "calibration_hours": 0.5, "peak_memory_gb": 2}


def test_a_failing_command_ends_the_run_with_its_code(capfd):
    with pytest.raises(SystemExit) as failure:
        running._command(["plan", "--nothing"])
    assert failure.value.code == 2
    assert "--nothing" in capfd.readouterr().err


def test_the_papers_figures_stand_beside_ours(no_baselines, tmp_path):
    request = Request(model="THUDM/CogVideoX-5b", out=tmp_path, prompts=["a"], calibration_prompts=["b"])
    content = contents(TABLES["vbench-w4a6"], request)
    assert content["published_model"] == "cogvideox-5b"
    rows = {row["method"]: row for row in content["rows"]}
    assert rows[METHOD]["paper"]["scene consistency"] == 46.66
    assert rows[FULL_PRECISION]["paper"]["dynamic degree"] == 72.22
    assert (rows["ViDiT-Q"]["status"], rows[METHOD]["status"]) == ("no recipe yet", "not run")
    page = page_of(content)
    assert "| S²Q-VDiT | `s2q-w4a6` | 60.75 | 56.9 |" in page
    assert "Only the order of the methods can be compared" in page
    assert "no recipe of theirs yet: Q-DiT, PTQ4DiT, SmoothQuant, QuaRot, ViDiT-Q." in page


def test_speed_is_of_the_models_dimensions(capsys, tmp_path):
    assert published_name("somewhere/else") is None
    arguments = ["efficiency", "-m", "zai-org/CogVideoX-5b", "-o", str(tmp_path), "--device", "cpu"]
    assert main([*arguments, "--dry-run"]) == 0
    (command,) = [parsed(line) for line in capsys.readouterr().out.splitlines()]
    assert command["model"] == "synthetic:cogvideox-5b"
    assert command["recipes"] == ["s2q-w4a6", "s2q-plus-w4a6"]
    result = {"model": "synthetic:cogvideox-5b", "tokens": 17550, "ratio_to_bf16": 1.25, "bf16_milliseconds": 5.0}
    result |= {"recipe": "s2q-w4a6", "milliseconds": 4.0, "peak_memory_bytes": 2**30, "bf16_peak_memory_bytes": 2**31}
    (tmp_path / "bench.json").write_text(json.dumps({"results": [result]}))
    page = page_of(contents(TABLES["efficiency"], Request(model=arguments[2], out=tmp_path, prompts=[])))
    assert "| full precision |  | 10.375 | 2.000 | 5 | 1.00 | 10.375 | 15.801 | 259.2 |" in page
    assert "| 2.619 | 1.000 | 4 | 1.25 | 2.633 | 10.145 | 203.2 |" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vbench-w4a6", "-m", "zai-org/CogVideoX-2b"], "--calibration-prompts"),
        (["selection", "-m", "shapes-cogvideox", "--set", "calibration.selection=ds"], "differ in"),
        (["parts", "-m", "shapes-cogvideox", "--set", "loss.lambda_min=0"], "differ in"),
        (["samples", "-m", "shapes-cogvideox", "--only", "s2q-w4a6"], "unknown row"),
    ],
)
def test_what_cannot_work_is_refused_at_once(arguments, message, tmp_path, capsys):
    assert main([*arguments, "-o", str(tmp_path / "o"), "--device", "cpu"]) == 3
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
