"""`s2q push` to a local stand-in for the Hub, and what is loaded from there."""

import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import constants

import s2q
from hub_server import READ_ONLY, TOKEN, Repo, hub_server
from s2q.cli import run
from s2q.common.cards import front_matter
from s2q.common.errors import InvalidInputError, S2QError
from tiny import tiny_pipeline

REPO = "acme/tiny-w4a8"


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("pushed") / "tiny-w4a8"
    s2q.quantize(tiny_model, recipe="rtn-w4a8", out=out)
    return out


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_server() as (address, contents):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield contents


def online(address, home):
    """The environment of a process for which the stand-in is the Hub."""
    return {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }


@pytest.fixture
def measured(checkpoint, tmp_path):
    """An evaluation and videos of the checkpoint."""
    metric = {"mean": 34.25, "low": None, "high": 35.0, "definition": "mean of frames, dB"}
    record = {
        "schema_version": 1,
        "model": f"runs/{checkpoint.name}",
        "metrics": {"psnr": metric, "reference_x": metric, "x": metric | {"mean": None}},
    }
    evaluation, videos = tmp_path / "eval.json", tmp_path / "videos"
    evaluation.write_text(json.dumps(record))
    videos.mkdir()
    (videos / "000-a.mp4").write_bytes(b"a video")
    (videos / "sheet.png").write_bytes(b"no video")
    listed = [{"file": "000-a.mp4", "prompt": 'a "red" circle', "seed": 0}]
    (videos / "generation.json").write_text(
        json.dumps({"schema_version": 1, "model": str(checkpoint), "videos": listed})
    )
    return {"evaluation": evaluation, "videos": videos}


def stored(hub, repo=REPO, revision="main"):
    """Contents by path."""
    files = hub.repos[repo].files(revision)
    return {name: hub.objects[file] if isinstance(file, str) else file for name, file in files.items()}


def copied(hub, folder):
    """A downloaded copy of the repository."""
    for name, content in stored(hub).items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return folder


def test_a_copy_of_a_pushed_repository_is_pushed_with_another_evaluation_and_videos(
    hub, checkpoint, measured, tmp_path
):
    s2q.push(checkpoint, repo=REPO, **measured)
    record = json.loads(stored(hub)["s2q/eval.json"])
    record["metrics"]["psnr"]["mean"] = 12.5
    measured["evaluation"].write_text(json.dumps(record))
    generation = json.loads((measured["videos"] / "generation.json").read_text())
    generation["videos"] = [{"file": "001-b.mp4", "prompt": "a blue square", "seed": 0}]
    (measured["videos"] / "generation.json").write_text(json.dumps(generation))
    (measured["videos"] / "001-b.mp4").write_bytes(b"another")
    report = s2q.push(copied(hub, tmp_path / checkpoint.name), repo=REPO, overwrite=True, **measured)
    assert report.deleted == ("videos/000-a.mp4",)
    again = copied(hub, tmp_path / "again")
    assert s2q.inspect(again, verify=True).problems == ()
    assert json.loads((again / "s2q/eval.json").read_text())["metrics"]["psnr"]["mean"] == 12.5
    text = (again / "README.md").read_text()
    assert [text.count(part) for part in ("## Measured", "## Videos", "<Gallery />", "widget:")] == [1, 1, 1, 1]
    assert "| psnr | 12.5 |" in text
    assert front_matter(text)["widget"] == [{"text": "a blue square", "output": {"url": "videos/001-b.mp4"}}]


def test_the_pushed_evaluation_has_no_local_path(hub, checkpoint, measured, tmp_path):
    for reference, expected in ((str(tmp_path), tmp_path.name), ("acme/wan@v2", "acme/wan@v2"), ("shapes-wan",) * 2):
        record = json.loads(measured["evaluation"].read_text())
        measured["evaluation"].write_text(json.dumps(record | {"reference": reference}))
        s2q.push(checkpoint, repo=REPO, overwrite=True, evaluation=measured["evaluation"])
        pushed = json.loads(stored(hub)["s2q/eval.json"])
        assert (pushed["model"], pushed["reference"]) == (REPO, expected)
        assert pushed["metrics"] == record["metrics"]


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("base_model: acme/base\n", "acme/base"),
        ("base_model:\n- acme/base\n- ./local\n- acme/other\n", ["acme/base", "acme/other"]),
        ("base_model:\n- ./local\n- /data/model\n", None),
        ("base_model: {}\n", None),
    ],
)
def test_base_models_on_the_hub_are_kept(hub, checkpoint, tmp_path, base, expected):
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy)
    fields = front_matter((copy / "README.md").read_text())
    others = {name: value for name, value in fields.items() if not name.startswith("base_model")}
    kept = "".join(f"{name}: {json.dumps(value)}\n" for name, value in others.items())
    (copy / "README.md").write_text(f"---\n{base}base_model_relation: quantized\n{kept}---\n\nMine.\n")
    s2q.push(copy, repo=REPO)
    text = stored(hub)["README.md"].decode()
    bases = {} if expected is None else {"base_model": expected, "base_model_relation": "quantized"}
    assert front_matter(text) == others | bases
    assert text.endswith("---\n\nMine.\n")
    huggingface_hub.ModelCard(text).validate()


def test_a_card_that_cannot_be_read_is_refused(hub, checkpoint, tmp_path):
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy)
    (copy / "README.md").write_text("---\ntags: [a\n---\nMine.\n")
    with pytest.raises(InvalidInputError, match=r"README\.md: its front matter is not a YAML mapping; correct it"):
        s2q.push(copy, repo=REPO)
    assert hub.repos == {}


@pytest.mark.parametrize("is_pushed", [True, False])
def test_a_card_that_was_written_on_the_hub_is_replaced_only_if_asked(hub, checkpoint, is_pushed):
    if is_pushed:
        s2q.push(checkpoint, repo=REPO)
    else:
        hub.repos[REPO] = Repo(private=True)
    repo = hub.repos[REPO]
    repo.commit("main", repo.files("main") | {"README.md": b"---\nlicense: mit\n---\nWritten on the Hub.\n"})
    before = stored(hub)
    with pytest.raises(InvalidInputError, match=r"its README\.md was written or edited there; pass --overwrite"):
        s2q.push(checkpoint, repo=REPO)
    assert stored(hub) == before
    assert s2q.push(checkpoint, repo=f"{REPO}@v2").branch == "v2"
    s2q.push(checkpoint, repo=REPO, overwrite=True)
    assert b"Written on the Hub" not in stored(hub)["README.md"]


def test_a_card_that_the_hub_made_for_a_new_repository_is_replaced(hub, checkpoint):
    hub.repos[REPO] = Repo(private=True)
    hub.repos[REPO].commit("main", {"README.md": b"---\nlicense: mit\n---\n"})
    s2q.push(checkpoint, repo=REPO)
    assert b"library_name: diffusers" in stored(hub)["README.md"]


def test_a_push_is_private_and_has_the_files_the_card_and_a_manifest_of_all(hub, checkpoint, measured, tmp_path):
    report = s2q.push(checkpoint, repo=REPO, message="First", **measured)
    files = stored(hub)
    assert hub.repos[REPO].private
    assert report.private
    assert report.commit == hub.repos[REPO].branches["main"]
    assert set(files) == set(report.files) | {".gitattributes"}
    assert {name: len(content) for name, content in files.items() if name != ".gitattributes"} == report.files
    own = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    assert set(own) | {"s2q/eval.json", "videos/000-a.mp4"} == set(report.files)
    changed = {name for name, path in own.items() if files[name] != path.read_bytes()}
    assert changed == {"README.md", "s2q/manifest.json"}
    assert s2q.inspect(copied(hub, tmp_path / "copy"), verify=True).problems == ()


def test_the_card_has_the_id_the_measured_table_and_the_videos(hub, checkpoint, measured):
    s2q.push(checkpoint, repo=REPO, **measured)
    text = stored(hub)["README.md"].decode()
    assert hub.cards == [text]
    assert "path/to/this/folder" not in text
    assert f's2q generate -m {REPO} --prompt "…"' in text
    assert "| psnr | 34.25 | – | 35 | mean of frames, dB |" in text
    assert "reference_x" not in text
    assert "| x |" not in text
    assert text.count("## Measured") == text.count("<Gallery />") == 1
    fields = front_matter(text)
    assert fields["widget"] == [{"text": 'a "red" circle', "output": {"url": "videos/000-a.mp4"}}]
    assert "base_model" not in fields  # the tiny model is a folder
    card = huggingface_hub.ModelCard(text)
    card.validate()
    assert card.data.to_dict()["library_name"] == "diffusers"


def test_measured_again_replaces_the_table(measured, checkpoint):
    from s2q.checkpoint.model_card import published_card

    metrics = json.loads(measured["evaluation"].read_text())["metrics"]
    text = (checkpoint / "README.md").read_text()
    metrics.pop("x")
    first = published_card(text, repo=REPO, bases=[], metrics=metrics, videos={})
    second = published_card(first, repo=REPO, bases=[], metrics={"ssim": metrics["psnr"]}, videos={})
    assert second == first.replace("| psnr |", "| ssim |").replace(
        "| reference_x | 34.25 | – | 35 | mean of frames, dB |\n", ""
    )
    assert published_card(first, repo=REPO, bases=[], metrics=None, videos={}) == first


def test_an_interrupted_push_sends_what_is_missing(hub, checkpoint):
    hub.fail = r"^POST .*/commit/"
    with pytest.raises(S2QError, match="run the command again") as raised:
        s2q.push(checkpoint, repo=REPO)
    assert raised.value.exit_code == 1
    assert set(stored(hub)) == {".gitattributes"}
    sent, hub.fail = len(hub.puts()), None
    assert sent > 0
    s2q.push(checkpoint, repo=REPO)
    assert len(hub.puts()) == sent
    commits = len(hub.repos[REPO].commits)
    again = s2q.push(checkpoint, repo=REPO)  # its answer may have been lost
    assert len(hub.repos[REPO].commits) == commits
    assert again.commit == hub.repos[REPO].branches["main"]


def test_another_checkpoint_is_replaced_only_if_asked(hub, checkpoint, measured):
    s2q.push(checkpoint, repo=REPO, **measured)
    before = stored(hub)
    with pytest.raises(InvalidInputError, match=r"has another checkpoint; pass --overwrite"):
        s2q.push(checkpoint, repo=REPO)
    assert stored(hub) == before
    report = s2q.push(checkpoint, repo=REPO, overwrite=True)
    assert report.deleted == ("s2q/eval.json", "videos/000-a.mp4")
    assert set(stored(hub)) == set(report.files) | {".gitattributes"}


def test_a_branch_is_another_revision(hub, checkpoint, measured):
    s2q.push(checkpoint, repo=REPO, **measured)
    main = stored(hub)
    report = s2q.push(checkpoint, repo=f"{REPO}@v2")
    assert (report.branch, report.commit) == ("v2", hub.repos[REPO].branches["v2"])
    assert "videos/000-a.mp4" not in stored(hub, revision="v2")
    assert stored(hub) == main


def test_a_dry_run_writes_nothing(hub, checkpoint):
    report = s2q.push(checkpoint, repo=REPO, dry_run=True)
    assert (report.commit, hub.repos) == (None, {})
    assert {method for method, _ in hub.requests} == {"GET"}


def test_a_dry_run_lists_the_files_to_write_and_to_delete(hub, checkpoint, measured, capsys):
    s2q.push(checkpoint, repo=REPO, **measured)
    before = stored(hub)
    assert run(["push", str(checkpoint), REPO, "--overwrite", "--dry-run"]) == 0
    lines = capsys.readouterr().err.splitlines()
    deleted = [line.removeprefix("would be deleted: ") for line in lines if line.startswith("would be deleted: ")]
    assert deleted == ["s2q/eval.json", "videos/000-a.mp4"]
    written = [line.split()[3] for line in lines if line.startswith("would be written: ")]
    assert set(written) == set(before) - {".gitattributes", *deleted}
    assert stored(hub) == before


@pytest.mark.parametrize("files", [{"model.bin": b"x"}, {"s2q/manifest.json": None, "notes.txt": b"x"}])
def test_a_repository_with_other_files_is_refused(hub, checkpoint, files):
    s2q.push(checkpoint, repo=REPO)
    repo = hub.repos[REPO]
    content = dict(repo.files("main")) if None in files.values() else {}
    repo.commit("main", content | {name: file for name, file in files.items() if file is not None})
    before = stored(hub)
    with pytest.raises(InvalidInputError, match=r"has files that s2q did not write \((model.bin|notes.txt)\)"):
        s2q.push(checkpoint, repo=REPO, overwrite=True)
    assert stored(hub) == before


def test_a_public_repository_must_be_meant(hub, checkpoint):
    hub.repos[REPO] = Repo(private=False)
    with pytest.raises(InvalidInputError, match="exists and is public; pass --public"):
        s2q.push(checkpoint, repo=REPO)
    assert not s2q.push(checkpoint, repo=REPO, private=False).private


def test_a_commit_in_between_is_noticed(hub, checkpoint, monkeypatch):
    from s2q.exports import push

    s2q.push(checkpoint, repo=REPO)
    write = push.write_model

    def late(*args, **kwargs):
        hub.repos[REPO].commit("main", {"README.md": b"edited on the Hub"})
        return write(*args, **kwargs)

    monkeypatch.setattr(push, "write_model", late)
    with pytest.raises(InvalidInputError, match="was changed meanwhile"):
        s2q.push(checkpoint, repo=REPO, overwrite=True, message="again")


@pytest.mark.parametrize(
    ("token", "words"),
    [("hf_wrong", "the Hub refuses the token"), (READ_ONLY, "may not write to acme"), ("", "got no token of the Hub")],
)
def test_tokens_that_do_not_do(hub, checkpoint, monkeypatch, tmp_path, token, words):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(InvalidInputError, match=words):
        s2q.push(checkpoint, repo=REPO)
    assert hub.repos == {}


def test_offline_is_refused_before_anything(checkpoint, capsys):
    assert run(["push", str(checkpoint), REPO]) == 3
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_no_hub_is_one_line(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(S2QError, match="cannot be reached"):
        s2q.push(checkpoint, repo=REPO)


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "acme/x@", 5, "acme/--x"])
def test_an_id_of_another_form_is_refused(hub, checkpoint, repo):
    with pytest.raises(InvalidInputError, match=r"expected an id of the Hub|is no id of the Hub"):
        s2q.push(checkpoint, repo=repo)


def test_what_is_no_intact_checkpoint_is_refused(hub, checkpoint, tiny_model, tmp_path):
    for source, words in (
        (tiny_model, "is not an s2q checkpoint"),
        ("shapes-wan", "is not an s2q checkpoint"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            s2q.push(source, repo=REPO)
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy)
    (copy / "model_index.json").write_text((copy / "model_index.json").read_text() + " ")
    with pytest.raises(
        InvalidInputError, match=r"model_index\.json: .*; push the folder as s2q quantize wrote it"
    ) as raised:
        s2q.push(copy, repo=REPO)
    assert "verify" not in str(raised.value)
    (copy / "s2q" / "manifest.json").unlink()
    with pytest.raises(InvalidInputError, match="has no s2q/manifest.json, .* push the folder as s2q") as raised:
        s2q.push(copy, repo=REPO)
    assert "--verify" not in str(raised.value)
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("evaluation", {"schema_version": 1, "model": "other", "metrics": {}}, "is of the model 'other'"),
        ("evaluation", {"schema_version": 7, "metrics": {}}, "is no evaluation"),
        (
            "evaluation",
            {"schema_version": 1, "model": "tiny-w4a8", "metrics": {"psnr": {"mean": "3"}}},
            "no evaluation",
        ),
        ("videos", {"model": "other", "videos": []}, "is of the model 'other'"),
        ("videos", {"model": "tiny-w4a8", "videos": [{"file": "gone.mp4", "prompt": "x"}]}, "has no mp4 files"),
    ],
)
def test_evaluations_and_videos_of_others_are_refused(hub, checkpoint, measured, name, content, words):
    file = measured["videos"] / "generation.json" if name == "videos" else measured["evaluation"]
    file.write_text(json.dumps(content))
    with pytest.raises(InvalidInputError, match=words):
        s2q.push(checkpoint, repo=REPO, **measured)
    assert hub.repos == {}


@pytest.mark.slow
def test_the_command_pushes_and_a_revision_is_loaded_from_the_hub(checkpoint, measured, tmp_path):
    code = (
        "import json, sys\n"
        "from s2q.cli import run\n"
        "codes = [run(command) for command in json.loads(sys.argv[1])]\n"
        "print(codes, file=sys.stderr)"
    )
    push = ["push", str(checkpoint), REPO, "--eval", str(measured["evaluation"]), "--videos", str(measured["videos"])]
    generate = ["--prompt", "a red circle", "--steps", "2", "-o", str(tmp_path / "out"), "--device", "cpu", "--json"]
    with hub_server() as (address, contents):
        commands = [
            [*push, "--json"],
            ["push", str(checkpoint), f"{REPO}@v2"],
            ["inspect", f"{REPO}@main", "--verify"],
            ["generate", "-m", f"{REPO}@v2", *generate],
        ]
        environment = online(address, tmp_path / "home")
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(commands)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.stderr.splitlines()[-1] == "[0, 0, 0, 0]", done.stderr
    assert "LFS files:" not in done.stderr  # no bars in a log
    assert json.loads(done.stdout[: done.stdout.index("\n}\n") + 3])["repo"] == REPO
    assert f"s2q generate -m {REPO}@v2 --prompt TEXT" in done.stderr
    assert list((tmp_path / "out").glob("*.mp4"))
    assert contents.repos[REPO].branches.keys() == {"main", "v2"}


@pytest.mark.slow
def test_a_modular_pipeline_is_loaded_from_where_it_was_pushed(tmp_path):
    tiny_pipeline("minimax-h3").save_pretrained(tmp_path / "model")
    s2q.quantize(tmp_path / "model", recipe="rtn-w4a8", out=tmp_path / "out")
    code = """
import sys
import s2q
from diffusers import ModularPipeline
s2q.push(sys.argv[1], repo="acme/h3-w4a8")
ours, theirs = s2q.load("acme/h3-w4a8"), ModularPipeline.from_pretrained("acme/h3-w4a8")
theirs.load_components(names=["transformer", "vae"])
linears = [pipe.transformer.transformer_blocks[0].attn.to_q for pipe in (ours, theirs)]
print([linear.scheme.name for linear in linears], theirs.vae is not None)
"""
    with hub_server() as (address, contents):
        environment = online(address, tmp_path / "home")
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "out")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        names = contents.repos["acme/h3-w4a8"].files("main")
    assert done.stdout.splitlines()[-1] == "['w4a8', 'w4a8'] True", done.stderr
    index = json.loads(names["modular_model_index.json"])
    assert index["vae"][2]["pretrained_model_name_or_path"] == "acme/h3-w4a8"
