"""Help texts, their examples, and the commands that each command names as the next."""

import json
import shlex
from pathlib import Path

import pytest
import typer

from s2q.cli import next_steps
from s2q.cli.app import EXAMPLES, app

COMMANDS = typer.main.get_command(app).commands


def understood(words):
    """The arguments as the command line reads them; raises where it does not."""
    assert words[0] == "s2q"
    return COMMANDS[words[1]].make_context(words[1], list(words[2:])).params


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_that_the_command_line_understands(name):
    command = COMMANDS[name]
    text = command.get_help(typer.Context(command, info_name=f"s2q {name}"))
    for example in EXAMPLES[name]:
        assert f"\n    {example}" in text
        assert shlex.split(example)[1] == name
        assert understood(shlex.split(example))
    assert text.rstrip().endswith(EXAMPLES[name][-1])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json(name):
    assert "--json" in {flag for parameter in COMMANDS[name].params for flag in parameter.opts}


@pytest.fixture
def said(capsys):
    """Commands that were named as the next, each read by the command line."""

    def read():
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("next: s2q ")
        assert all(line.startswith("      s2q ") for line in lines[1:])
        return [(shlex.split(line[6:])[1], understood(shlex.split(line[6:]))) for line in lines]

    return read


def test_a_plan_is_followed_by_its_run(said):
    given = {"overrides": ["rounding.dampening_frac=0.1"], "variant": "fp16", "loras": ["a.safetensors"]}
    next_steps.say_next(next_steps.after_plan("a b", "s2q-w4a6", **given))
    ((name, shown),) = said()
    assert name == "quantize"
    assert (shown["model"], shown["recipe"], shown["prompts"]) == ("a b", "s2q-w4a6", Path("FILE"))
    assert {option: shown[option] for option in given} == given
    next_steps.say_next(next_steps.after_plan("synthetic:wan-14b", "rtn-w4a6", overrides=[], variant=None, loras=[]))
    assert [name for name, _ in said()] == ["bench"], "there are no weights to quantize"


@pytest.mark.parametrize(("model", "recipe"), [("shapes-wan", "s2q-w4a6"), ("acme/model", "rtn-w4a6")])
def test_no_prompts_are_asked_for_where_none_are_needed(said, model, recipe):
    next_steps.say_next(next_steps.after_plan(model, recipe, overrides=[], variant=None, loras=[]))
    ((_, given),) = said()
    assert given["prompts"] is None


@pytest.mark.parametrize(
    ("reference", "shown"),
    [
        ("acme/model@v2", "acme/model@v2"),
        ("shapes-wan", "shapes-wan"),
        ("base", "base"),
        ("a.safetensors@acme/model", "{here}/a.safetensors@acme/model"),
        ("a.safetensors@base", "{here}/a.safetensors@{here}/base"),
        ("transformer_2=a.safetensors@acme/model", "transformer_2={here}/a.safetensors@acme/model"),
        ("gone", "MODEL"),
        ("gone.safetensors@acme/model", "MODEL"),
        ("a.safetensors@gone", "MODEL"),
        (None, "MODEL"),
    ],
)
def test_the_reference_is_found_from_any_folder_or_left_to_the_user(tmp_path, monkeypatch, reference, shown):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "a.safetensors").touch()
    command = next_steps.evaluate_with("out", reference)
    assert command[command.index("--reference") + 1] == shown.format(here=tmp_path)
    assert understood(["s2q", *command])


def test_full_precision_videos_are_followed_by_quantizing_and_those_of_a_checkpoint_by_eval(said, checkpoint, tmp_path):
    next_steps.say_next(next_steps.after_generate("model", tmp_path, variant=None))
    assert [name for name, _ in said()] == ["quantize"]
    next_steps.say_next(next_steps.after_generate(str(checkpoint), checkpoint, variant=None))
    ((name, given),) = said()
    assert name == "eval"
    assert given["model"] == str(checkpoint)


@pytest.mark.parametrize(
    ("pipeline", "source", "given"),
    [
        ("WanPipeline", "acme/model", ["--prompt", "TEXT"]),
        ("WanImageToVideoPipeline", "acme/model", ["--prompts", "FILE.jsonl"]),
        ("WanImageToVideoPipeline", "shapes-wan-i2v", ["--prompt", "TEXT"]),
    ],
)
def test_a_checkpoint_whose_prompts_need_images_is_followed_by_a_file_of_prompts(tmp_path, pipeline, source, given):
    (tmp_path / "s2q").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    (tmp_path / "s2q/report.json").write_text(json.dumps({"schema_version": 1, "source": source}))
    command = next_steps.generate_with(tmp_path)
    assert command == ["generate", "-m", str(tmp_path), *given, "-o", "videos"]
    pushed = next_steps.generate_with("acme/pushed", folder=tmp_path)
    assert pushed == ["generate", "-m", "acme/pushed", *given, "-o", "videos"]
    assert understood(["s2q", *command])


def test_an_evaluation_is_followed_by_videos_side_by_side_and_a_push(said, checkpoint):
    next_steps.say_next(next_steps.after_evaluate(str(checkpoint), "shapes-wan", Path("eval.json")))
    (compare, compared), (push, pushed) = said()
    assert (compare, compared["entries"], compared["model"]) == ("compare", [str(checkpoint)], "shapes-wan")
    assert (push, pushed["evaluation"]) == ("push", Path("eval.json"))
    next_steps.say_next(next_steps.after_evaluate("acme/model", "shapes-wan", Path("eval.json")))
    assert [name for name, _ in said()] == ["compare"], "it is on the Hub already"


def test_the_videos_side_by_side_are_of_the_prompts_variant_and_adapters_of_the_evaluation(said):
    given = {"prompts": Path("judged.txt"), "variant": "fp16", "loras": ["a.safetensors"]}
    next_steps.say_next(next_steps.after_evaluate("out", "acme/model", Path("eval.json"), **given))
    ((_, compared),) = said()
    assert {name: compared[name] for name in given} == given


def test_a_dry_run_of_a_push_is_followed_by_the_push_with_all_of_its_options(said):
    given = {"evaluation": Path("eval.json"), "videos": Path("videos"), "message": "a b"}
    flags = {"public": True, "overwrite": True}
    next_steps.say_next(next_steps.after_dry_push("out", "acme/out", **given, **flags))
    ((name, pushed),) = said()
    assert (name, pushed["dry_run"]) == ("push", False)
    assert {option: pushed[option] for option in given | flags} == given | flags


def test_a_comparison_is_followed_by_the_checkpoint_of_the_least_error(said, tmp_path):
    for label in ("a", "b", "broken"):
        (tmp_path / "checkpoints" / label).mkdir(parents=True)
    entries = [
        {"label": label, "checkpoint": None, "error": error, "metrics": {"velocity_relative_error": {"mean": mean}}}
        for label, mean, error in (("a", 2.0, None), ("b", 1.0, None), ("broken", 0.5, "no"), ("peer", 0.1, None))
    ]
    next_steps.say_next(next_steps.after_compare({"entries": entries}, tmp_path))
    ((name, given),) = said()
    assert (name, given["model"]) == ("generate", str(tmp_path / "checkpoints" / "b"))
    assert next_steps.after_compare({"entries": []}, tmp_path) == []
