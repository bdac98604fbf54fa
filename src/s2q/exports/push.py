"""A checkpoint on the Hub, with its measured table and videos on the model card.

What is pushed is what the manifest lists, checked first, and a manifest of its own that lists the card, the evaluation
and the videos too: `s2q inspect REPO_ID --verify` checks them after a download.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s2q import checkpoint
from s2q.checkpoint.manifest import MANIFEST, read_manifest
from s2q.checkpoint.model_card import published_card
from s2q.common.arguments import flag, model_argument, optional, path_argument, plain_text
from s2q.common.cards import CARD, front_matter, split_card
from s2q.common.errors import InvalidInputError, first_line
from s2q.common.files import canonical_json, existing_folder, read_json, sha256_file
from s2q.common.progress import Progress, silent
from s2q.common.records import EVALUATION_VERSION, MANIFEST_VERSION, PUSH_VERSION, RECORDS
from s2q.generation.load import require_checkpoint
from s2q.models import resolve_model
from s2q.models.hub import MAIN, HubId, parse_hub_id
from s2q.models.hub_upload import RemoteModel, check_access, downloaded, remote_model, write_model
from s2q.pipelines import MODULAR_INDEX, pinned_index

EVALUATION = (RECORDS / "eval.json").as_posix()
VIDEOS = "videos"
_OF_THE_HUB = frozenset({".gitattributes", CARD})
_MESSAGE = "Push a checkpoint of s2q"
_REMEDY = "push the folder as s2q quantize wrote it; download or quantize the model again"


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """A push, as returned by `s2q.push`.

    Attributes:
        repo: Its id, "organisation/name".
        branch: The branch that was written.
        commit: The commit; None of a dry run.
        private: Whether only those with access see the repository.
        files: Bytes by path in the repository.
        deleted: Files of an earlier push that were removed.
    """

    schema_version: int
    repo: str
    branch: str
    commit: str | None
    private: bool
    files: Mapping[str, int]
    deleted: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def push(
    model: str | Path,
    *,
    repo: str,
    evaluation: str | Path | None = None,
    videos: str | Path | None = None,
    private: bool = True,
    message: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PushReport:
    """Write a checkpoint to the Hub, private unless asked otherwise; `-m REPO_ID@revision` then names it.

    All files are one commit. A push that was interrupted is repeated by the same call, which sends what is missing. A
    repository with files that s2q did not write is refused.

    Args:
        model: Folder of the checkpoint, which must equal its manifest.
        repo: "organisation/name", or "organisation/name@branch"; what does not exist is created.
        evaluation: The eval.json of the checkpoint, for the table of the card.
        videos: Folder of `s2q generate` of the checkpoint, for the gallery of the card.
        private: Visibility of a new repository; an existing public one is refused if it is True.
        message: Of the commit.
        overwrite: Whether to replace a checkpoint that the branch has, and a model card that was edited there.
        dry_run: Whether to check everything and write nothing.
        progress: Called with the stage, what is done and the total.

    Returns:
        Repository, commit and files.

    Raises:
        InvalidInputError: If the checkpoint differs from its manifest, evaluation or videos are of another model, there
            is no token, or the repository is public, has other files or an edited card.
        S2QError: If the Hub fails or cannot be reached.
    """
    private, overwrite, dry_run = flag("private", private), flag("overwrite", overwrite), flag("dry_run", dry_run)
    progress, text = progress or silent, optional(plain_text, "message", message) or _MESSAGE
    hub = _target(repo)
    check_access()
    folder = _checked_folder(model)
    progress("check", 0, 1)
    files = _files_of(folder, hub, evaluation=evaluation, videos=videos)
    progress("check", 1, 1)
    remote = remote_model(hub)
    earlier = frozenset[str]()
    if remote is not None:
        earlier = _check_remote(hub, remote, files, private=private, overwrite=overwrite)
    deleted = tuple(sorted(earlier - files.keys()))
    commit = None
    if not dry_run:
        progress("upload", 0, 1)
        commit = write_model(hub, files, remote=remote, deleted=deleted, private=private, message=text)
        progress("upload", 1, 1)
    return PushReport(
        schema_version=PUSH_VERSION,
        repo=hub.repo,
        branch=hub.branch,
        commit=commit,
        private=private if remote is None else remote.private,
        files={name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()},
        deleted=deleted,
    )


def _target(repo: str) -> HubId:
    hub = parse_hub_id(repo) if isinstance(repo, str) else None
    if hub is None:
        raise InvalidInputError(
            f"repo: got {repo!r}; expected an id of the Hub, organisation/name or organisation/name@branch"
        )
    return hub


def _checked_folder(model: str | Path) -> Path:
    """Return the folder of a checkpoint after comparing it with its manifest."""
    source = resolve_model(model_argument("model", model))
    require_checkpoint(source)
    if source.kind != "folder":
        raise InvalidInputError(f"{source.given}: got a {source.kind} model; expected a folder on this machine")
    folder = source.complete_folder()
    checkpoint.check_intact(folder, verify=True, remedy=_REMEDY)
    if not (folder / CARD).is_file():
        raise InvalidInputError(f"{folder}: has no {CARD}, the model card; put it back, or quantize again")
    return folder


def _files_of(
    folder: Path, hub: HubId, *, evaluation: str | Path | None, videos: str | Path | None
) -> dict[str, Path | bytes]:
    """Return files and contents by path in the repository, the manifest of all of them last."""
    listed = read_manifest(folder)
    copied: dict[str, Path | bytes] = {name: folder / name for name in listed if name != CARD}
    made: dict[str, Path | bytes] = {}
    metrics = None
    if evaluation is not None:
        path = path_argument("evaluation", evaluation)
        content = _evaluation_of(path, folder)
        metrics, made[EVALUATION] = _compared(content["metrics"]), _published(path, content, hub)
    captions = {} if videos is None else _captions_of(path_argument("videos", videos), folder)
    if captions:  # in place of those of an earlier push
        copied = {name: path for name, path in copied.items() if not name.startswith(f"{VIDEOS}/")}
    made |= {f"{VIDEOS}/{path.name}": path for path in captions}
    if MODULAR_INDEX in listed:
        made[MODULAR_INDEX] = pinned_index(
            (folder / MODULAR_INDEX).read_bytes(), hub.repo, revision=None if hub.branch == MAIN else hub.branch
        )
    text = _card_of(folder)
    made[CARD] = published_card(
        text,
        repo=hub.repo,
        bases=_hub_ids(front_matter(text).get("base_model")),
        metrics=metrics,
        videos={f"{VIDEOS}/{path.name}": caption for path, caption in captions.items()},
    ).encode()
    files = copied | made
    described = {name: _described(file) if name in made else listed[name] for name, file in files.items()}
    manifest = {"schema_version": MANIFEST_VERSION, "files": described}
    return files | {MANIFEST.as_posix(): canonical_json(manifest).encode()}


def _card_of(folder: Path) -> str:
    """Return the text of the model card of a folder; refuse front matter that cannot be read, which would be lost."""
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    front, _ = split_card(text)
    if front and front.strip() and not front_matter(text):
        raise InvalidInputError(f"{folder / CARD}: its front matter is not a YAML mapping; correct it")
    return text


def _hub_ids(base: Any) -> list[str]:
    """Return those of the `base_model` of a card, a text or a list, that are ids of the Hub."""
    names = base if isinstance(base, list) else [base]
    return [name for name in names if isinstance(name, str) and _is_hub_id(name)]


def _is_hub_id(name: str) -> bool:
    return parse_hub_id(name) is not None and existing_folder(name) is None


def _described(file: Path | bytes) -> dict[str, Any]:
    if isinstance(file, bytes):
        return {"bytes": len(file), "sha256": hashlib.sha256(file).hexdigest()}
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file)}


def _evaluation_of(path: Path, folder: Path) -> dict[str, Any]:
    """Return the content of an eval.json of this checkpoint."""
    remedy = f"make it with s2q eval -m {folder.name} --reference MODEL -o eval.json"
    content = read_json(path, remedy=remedy)
    metrics = content.get("metrics")
    is_evaluation = content.get("schema_version") == EVALUATION_VERSION and isinstance(metrics, dict)
    if not is_evaluation or not all(_is_metric(value) for value in metrics.values()):
        raise InvalidInputError(f"{path}: is no evaluation; {remedy}")
    _check_model(path, content, folder, remedy)
    return content


def _compared(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics for the card: measured ones, without those of the reference alone."""
    return {
        name: value
        for name, value in metrics.items()
        if not name.startswith("reference_") and value["mean"] is not None
    }


def _published(path: Path, content: Mapping[str, Any], hub: HubId) -> bytes:
    """Return an eval.json without paths of this machine."""
    content = {**content, "model": hub.repo}
    reference = content.get("reference")
    if isinstance(reference, str) and not _is_hub_id(reference):
        content["reference"] = Path(reference).name
    try:
        return canonical_json(content).encode()
    except ValueError as error:  # NaN, or half of a surrogate pair
        raise InvalidInputError(f"{path}: has a value that JSON cannot hold ({first_line(error)})") from error


def _is_metric(value: Any) -> bool:
    """Tell whether a value has what the table shows."""
    if not isinstance(value, dict) or not isinstance(value.get("definition"), str):
        return False
    return all(isinstance(value.get(name, ""), int | float | None) for name in ("mean", "low", "high"))


def _captions_of(videos: Path, folder: Path) -> dict[Path, str]:
    """Return the videos of a folder of `s2q generate` with their prompts."""
    remedy = f"make them with s2q generate -m {folder.name} --prompts FILE -o {videos.name}"
    record = videos / "generation.json"
    content = read_json(record, remedy=remedy)
    _check_model(record, content, folder, remedy)
    captions = {}
    for video in content.get("videos") or ():
        name, prompt = str(video.get("file")), str(video.get("prompt"))
        path = videos / Path(name).name
        if path.suffix == ".mp4" and path.is_file():
            captions[path] = prompt
    if not captions:
        raise InvalidInputError(f"{videos}: has no mp4 files of its {record.name}; {remedy}")
    return captions


def _check_model(path: Path, content: Mapping[str, Any], folder: Path, remedy: str) -> None:
    """Refuse a record of another model, by the name of its folder."""
    name = Path(str(content.get("model"))).name
    if name != folder.resolve().name:
        raise InvalidInputError(f"{path}: is of the model {name!r}, not of {folder.resolve().name!r}; {remedy}")


def _check_remote(
    hub: HubId, remote: RemoteModel, files: Mapping[str, Path | bytes], *, private: bool, overwrite: bool
) -> frozenset[str]:
    """Refuse a repository that is public, or has what an earlier push did not write; return the files of that push."""
    if private and not remote.private:
        raise InvalidInputError(f"{hub.repo}: exists and is public; pass --public (private=False), or another id")
    name, present = MANIFEST.as_posix(), remote.files - _OF_THE_HUB
    with downloaded(hub, remote.commit, remote.files & {name, CARD}) as folder:
        listed = read_manifest(folder) if name in present else {}
        is_same = name in present and (folder / name).read_bytes() == files[name]
        has_other_card = CARD in remote.files and _is_written(folder / CARD, listed, files[CARD])
    earlier = frozenset(listed) | ({name} & present)
    if others := sorted(present - earlier):
        raise InvalidInputError(f"{hub}: has files that s2q did not write ({others[0]}); take another id")
    if remote.has_branch and not overwrite:
        if present and not is_same:
            raise InvalidInputError(
                f"{hub}: has another checkpoint; pass --overwrite (overwrite=True) to replace it, or a new @branch"
            )
        if has_other_card:
            raise InvalidInputError(
                f"{hub}: its {CARD} was written or edited there; pass --overwrite (overwrite=True) to replace it, or "
                "a new @branch"
            )
    return earlier & remote.files


def _is_written(card: Path, listed: Mapping[str, Mapping[str, Any]], ours: Path | bytes) -> bool:
    """Tell whether somebody wrote or edited the card of a repository: not s2q, nor the Hub.

    The Hub itself makes a card of front matter only, with the licence chosen for a new repository.
    """
    content = card.read_bytes()
    if content == ours:
        return False
    if CARD in listed:
        return sha256_file(card) != listed[CARD]["sha256"]
    return bool(split_card(content.decode(errors="replace"))[1].strip())
