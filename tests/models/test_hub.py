"""Models on the Hub, from a cache laid out as huggingface_hub does it; nothing is downloaded."""

import importlib
import json
import shutil

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub.errors import RevisionNotFoundError
from safetensors.torch import load_file

import s2q
from s2q.cli import run
from s2q.common.errors import InvalidInputError
from s2q.models import resolve_model
from s2q.models.hub import HubId, parse_hub_id
from tiny import tiny_pipeline

OLD, NEW = "a" * 40, "b" * 40
SETTINGS = ["--num-frames", "9", "--height", "16", "--width", "16", "--steps", "1"]


def publish(cache, repo, folder, commit, *refs):
    """Add a commit to the cache: a snapshot of links into blobs, and the branches and tags that lead to it."""
    home = cache / f"models--{repo.replace('/', '--')}"
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            blob = home / "blobs" / f"{commit}-{path.relative_to(folder).as_posix().replace('/', '-')}"
            link = home / "snapshots" / commit / path.relative_to(folder)
            for parent in (blob.parent, link.parent):
                parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            link.symlink_to(blob)
    for ref in refs:
        (home / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (home / "refs" / ref).write_text(commit)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """acme/full has two commits of other weights, the newer one with a variant; acme/packed was made from both."""
    root, cache = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("cache")
    for seed, (commit, refs) in enumerate({OLD: ["v1", "refs/pr/3"], NEW: ["main", "release/2.0"]}.items()):
        tiny_pipeline("cogvideox", seed).save_pretrained(root / commit)
        s2q.quantize(root / commit, recipe="rtn-w4a6", out=root / f"{commit}-packed")
        publish(cache, "acme/packed", root / f"{commit}-packed", commit, *refs)
    tiny_pipeline("cogvideox", 2, dtype=torch.float16).save_pretrained(
        root / NEW, variant="fp16", max_shard_size="15KB"
    )
    publish(cache, "acme/full", root / OLD, OLD, "v1", "refs/pr/3")
    publish(cache, "acme/full", root / NEW, NEW, "main", "release/2.0")
    return cache


@pytest.fixture(autouse=True)
def use_cache(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("acme/wan", HubId("acme/wan")),
        ("acme/wan@main", HubId("acme/wan", "main")),
        ("acme/Wan2.1-T2V_1.3B@refs/pr/3", HubId("acme/Wan2.1-T2V_1.3B", "refs/pr/3")),
        (f"acme/wan@{OLD}", HubId("acme/wan", OLD)),
        ("acme/wan@", None),
        ("acme/wan@v1@v2", None),
        ("acme/wan@-x", None),
        ("wan@main", None),
        ("a/b/c@main", None),
        ("./acme/wan@main", None),
    ],
)
def test_a_hub_id_has_an_organisation_and_perhaps_a_revision(text, expected):
    assert parse_hub_id(text) == expected
    assert expected is None or str(expected) == text


@pytest.mark.parametrize(
    ("model", "commit"),
    [
        ("acme/full", NEW),
        ("acme/full@main", NEW),
        ("acme/full@release/2.0", NEW),
        ("acme/full@v1", OLD),
        ("acme/full@refs/pr/3", OLD),
        (f"acme/full@{OLD}", OLD),
    ],
)
def test_a_revision_is_resolved_to_its_commit_and_its_weights(model, commit, cache):
    source = resolve_model(model)
    assert (source.name, source.given, source.revision, source.pinned) == (
        "acme/full",
        model,
        commit,
        f"acme/full@{commit}",
    )
    snapshot = cache / "models--acme--full" / "snapshots" / commit
    assert source.folder == snapshot
    stored = load_file(snapshot / "transformer/diffusion_pytorch_model.safetensors")
    loaded = source.load_pipeline().transformer.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


def test_a_variant_of_a_revision(cache):
    source = resolve_model("acme/full@main", variant="fp16")
    assert source.weights_dtype() is torch.float16
    assert source.load_pipeline().transformer.dtype is torch.float16
    assert resolve_model("acme/full@main").weights_dtype() is torch.float32
    with pytest.raises(InvalidInputError, match=r"acme/full@v1: no weights of variant 'fp16'; it has no variants"):
        resolve_model("acme/full@v1", variant="fp16")


def test_the_commit_and_the_variant_are_recorded(tmp_path):
    report = s2q.quantize("acme/full@release/2.0", recipe="rtn-w4a6", out=tmp_path / "q", variant="fp16")
    assert (report.source, report.source_revision, report.source_variant) == ("acme/full", NEW, "fp16")
    stored = json.loads((tmp_path / "q/s2q/report.json").read_text())
    assert (stored["source"], stored["source_revision"], stored["source_variant"]) == ("acme/full", NEW, "fp16")
    card = (tmp_path / "q/README.md").read_text()
    assert yaml.safe_load(card[4:].partition("\n---")[0])["base_model"] == "acme/full"
    assert f"[acme/full](https://huggingface.co/acme/full/tree/{NEW})" in card


def arguments(verb, model, packed, folder):
    """The command line of a verb on a model, or on a checkpoint where it takes one."""
    return {
        "plan": ["plan", "-m", model, "-r", "rtn-w4a6"],
        "quantize": ["quantize", "-m", model, "-r", "rtn-w4a6", "-o", folder / "q"],
        "generate": ["generate", "-m", packed, "--prompt", "a", "-o", folder / "v", *SETTINGS],
        "eval": ["eval", "-m", packed, "--reference", model, "--prompts", folder / "prompts.txt", "--seeds", "1"]
        + ["--metrics", "psnr", "-o", folder / "e.json", *SETTINGS],
        "compare": ["compare", packed, "rtn-w4a4", "-m", model, "--prompts", folder / "prompts.txt", "--dry-run"]
        + ["-o", folder / "c", *SETTINGS],
        "bench": ["bench", "-m", model, "--ops", "gemm", "--tokens", "4", "--seconds", "0", "--repeats", "1"]
        + ["-o", folder / "b.json"],
        "inspect": ["inspect", packed, "--verify"],
    }[verb]


VERBS = ("plan", "quantize", "generate", "eval", "compare", "bench", "inspect")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_a_revision(verb, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a\n")
    command = [str(word) for word in arguments(verb, "acme/full@v1", "acme/packed@v1", tmp_path)]
    assert run(command) == 0, capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_names_an_unknown_revision_in_one_line(verb, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a\n")
    command = [str(word) for word in arguments(verb, "acme/full@v9", "acme/packed@v9", tmp_path)]
    assert run(command) == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "revision 'v9' is not in the cache, and HF_HUB_OFFLINE is set" in line
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_revision_that_the_hub_does_not_have(monkeypatch):
    class NotThereError(RevisionNotFoundError):
        def __init__(self):
            Exception.__init__(self, "404")

    def refuse(repo_id, **_):
        raise NotThereError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InvalidInputError, match="acme/full: has no revision 'v9'; expected a branch, a tag"):
        resolve_model("acme/full@v9")


def test_later_downloads_take_the_commit_that_was_resolved(cache, monkeypatch):
    asked = []
    whole = huggingface_hub.snapshot_download

    def snapshot(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns is None))
        return whole(repo_id, revision=revision, allow_patterns=allow_patterns)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    s2q.inspect("acme/packed@v1", verify=True)
    assert asked == [("acme/packed", "v1", False), ("acme/packed", OLD, True)]


def test_variants_of_a_repository_are_known_before_its_weights_are_downloaded(tmp_path, cache, monkeypatch):
    folder = tmp_path / "configurations"
    shutil.copytree(cache / "models--acme--full" / "snapshots" / OLD, folder)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for path in folder.rglob("*.safetensors"):
        path.unlink()

    def listed(change):
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo, revision: map(change, names))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: str(folder))
    listed(lambda name: name)
    assert s2q.plan("acme/other").layers
    listed(lambda name: name.replace(".safetensors", ".fp16.safetensors"))
    with pytest.raises(InvalidInputError, match="has only weights of variant fp16; pass --variant fp16"):
        s2q.plan("acme/other")
    assert s2q.plan("acme/other", variant="fp16").layers
    listed(lambda name: name.replace(".safetensors", ".bin"))
    with pytest.raises(InvalidInputError, match="has only pickled weights"):
        s2q.plan("acme/other")


def test_local_folders_with_an_at_sign_are_folders(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model@v1", "acme/full@v1"):
        shutil.copytree(cache / "models--acme--full" / "snapshots" / NEW, tmp_path / name)
        source = resolve_model(name)
        assert (source.kind, source.name, source.revision) == ("folder", name.rpartition("/")[2], None)
        assert s2q.plan(name).model == source.name


def test_a_checkpoint_on_the_hub_is_judged_as_a_folder_is(cache):
    by_id = s2q.inspect("acme/packed@v1")
    by_folder = s2q.inspect(cache / "models--acme--packed" / "snapshots" / OLD)
    assert by_id == by_folder
    assert by_id.layers


def test_a_comparison_keeps_the_commits_that_it_began_with(tmp_path, monkeypatch):
    comparing, setups = importlib.import_module("s2q.comparison.compare"), []
    set_up = comparing.set_up
    monkeypatch.setattr(comparing, "set_up", lambda settings: setups.append(set_up(settings)) or setups[-1])
    sizes = {"num_inference_steps": 1, "num_frames": 9, "height": 16, "width": 16}
    s2q.compare(["acme/packed@v1"], model="acme/full@v1", out=tmp_path, prompts=["a"], dry_run=True, **sizes)
    (setup,) = setups
    assert setup.plan.model == f"acme/full@{OLD}"
    assert list(setup.plan.paths.values()) == [f"acme/packed@{OLD}"]
