"""The manifest: SHA-256 and size of every file of a checkpoint, written last.

safetensors has no checksum: flipped bits in the payload, and some in the header, load silently. The hashes find them.
"""

import contextlib
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from s2q.common.cards import CARD
from s2q.common.errors import InvalidInputError, short_repr
from s2q.common.files import atomic_write_json, read_json, sha256_file
from s2q.common.log import log_once
from s2q.common.records import CONVERSION_RECORD, EXPORT_RECORD, MANIFEST_VERSION, RECORDS
from s2q.pipelines import INDEXES

logger = logging.getLogger(__name__)

MANIFEST = RECORDS / "manifest.json"
_SHA256 = re.compile("[0-9a-f]{64}")
_INTACT: ContextVar[bool] = ContextVar("intact", default=False)


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files that are in the folder now."""
    files = {name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for name, path in _files(folder).items()}
    (folder / MANIFEST).parent.mkdir(exist_ok=True)
    atomic_write_json(folder / MANIFEST, {"schema_version": MANIFEST_VERSION, "files": files})


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return `{"bytes": ..., "sha256": ...}` of each file in the manifest, by POSIX path relative to the folder."""
    path = folder / MANIFEST
    remedy = "download the checkpoint again"
    content = read_json(path, remedy=remedy)
    try:
        version, files = content["schema_version"], content["files"]
        entries = {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in files.items()}
        for entry in entries.values():
            if type(entry["bytes"]) is not int or entry["bytes"] < 0 or not _SHA256.fullmatch(entry["sha256"]):
                raise TypeError("no size or no hash")
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"{path}: damaged, not a manifest; {remedy}") from error
    if type(version) is not int or version != MANIFEST_VERSION:
        raise InvalidInputError(
            f"{path}: schema_version={short_repr(version)}; expected {MANIFEST_VERSION}; upgrade s2q"
        )
    return entries


def owned_files(folder: Path) -> set[str] | None:
    """Return `listed_files` of a checkpoint of `s2q quantize`; None for other folders, also exports and conversions."""
    others = (EXPORT_RECORD, CONVERSION_RECORD)
    return None if any((folder / record).is_file() for record in others) else listed_files(folder)


def listed_files(folder: Path) -> set[str] | None:
    """Return the relative POSIX paths of the files that s2q wrote, without a model card; None without a manifest."""
    if not (folder / MANIFEST).is_file():
        return None
    listed = read_manifest(folder)
    card = folder / CARD
    edited = CARD in listed and card.is_file() and sha256_file(card) != listed[CARD]["sha256"]
    return {*listed, MANIFEST.as_posix()} - ({CARD} if edited else set())


def verify_manifest(folder: Path) -> list[str]:
    """Compare every file with the manifest; return one line a problem, beginning with the file's relative path.

    Files at the top and hidden ones may come on top of what the manifest lists; inside the components' folders nothing
    may. Nothing is read that is not a regular file, or that a link has outside of the folder (the Hub's cache has all
    files of a model as links to its own).
    """
    if not _is_there(folder / MANIFEST):
        raise _no_manifest(folder)
    listed = read_manifest(folder)
    present = _files(folder)
    strange = strange_files(folder)
    problems = [f"{name}: {what}" for name, what in strange.items()]
    for name, entry in listed.items():
        if name not in strange and (problem := _problem(present.get(name), entry)):
            problems.append(f"{name}: {problem}")
    extra = [name for name in present if name not in listed and ("/" in name or name in INDEXES)]
    problems += [f"{name}: not in the manifest; added later" for name in extra if name not in strange]
    return sorted(problems)


def _problem(path: Path | None, entry: Mapping[str, Any]) -> str | None:
    """Compare a file with its entry in the manifest; return the difference."""
    if path is None or not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"got {size} bytes, expected {entry['bytes']} of the manifest; truncated or altered"
    if sha256_file(path) != entry["sha256"]:
        return "its SHA-256 differs from the manifest; altered"
    return None


def check_component(files: Collection[str | Path]) -> None:
    """Refuse weight files of a component that differ from the manifest of their checkpoint, or its configuration.

    For loaders that read one component after another. Without a manifest, and inside `intact`, nothing is checked.
    """
    paths = [Path(file) for file in files]
    component = paths[0].parent
    folder = component.parent
    if _INTACT.get() or not _is_there(folder / MANIFEST):
        return
    listed = read_manifest(folder)
    paths += [path for path in component.glob("*.json") if path not in paths]
    for path in paths:
        name = f"{component.name}/{path.name}"
        entry = listed.get(name)
        problem = "not in the manifest; added later" if entry is None else _problem(path, entry)
        if problem:
            raise InvalidInputError(
                f"{folder}: {name}: {problem}; download or quantize the model again, or remove {MANIFEST} if you "
                "changed it yourself"
            )


@contextlib.contextmanager
def intact() -> Iterator[None]:
    """Within it, `check_component` checks nothing: the whole checkpoint was checked, or is not to be."""
    token = _INTACT.set(True)
    try:
        yield
    finally:
        _INTACT.reset(token)


def check_intact(folder: Path, *, verify: bool | None = None, remedy: str | None = None) -> None:
    """Refuse a checkpoint whose files differ from its manifest; edits of the model card are allowed.

    diffusers writes no manifest when it saves a checkpoint again, with another scheduler for example: `verify=None`
    warns of that, True refuses it; False checks nothing. Errors end with `remedy`, by default that of loading.
    """
    if verify is False:
        return
    if not _is_there(folder / MANIFEST):
        if verify:
            raise _no_manifest(folder, remedy=remedy)
        message = f"{folder}: has no {MANIFEST}, as diffusers saves it, so its files are not verified"
        log_once(logger, logging.WARNING, message)  # evaluations load a checkpoint several times
        return
    problems = [problem for problem in verify_manifest(folder) if not problem.startswith(f"{CARD}:")]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        remedy = remedy or (
            "download or quantize the model again, or pass --no-verify (verify=False) if you changed it yourself"
        )
        raise InvalidInputError(f"{folder}: {'; '.join(problems[:3])}{more}; {remedy}")


def _no_manifest(folder: Path, *, remedy: str | None = None) -> InvalidInputError:
    remedy = remedy or "verify the original checkpoint, or omit --verify (verify=True)"
    return InvalidInputError(
        f"{folder}: has no {MANIFEST}, so it cannot be verified; diffusers does not save one: {remedy}"
    )


def _is_there(path: Path) -> bool:
    return os.path.lexists(path)  # a link to nowhere is a damaged manifest, not a missing one


def _files(folder: Path) -> dict[str, Path]:
    """Every file below the folder but the manifest and hidden files and folders, by relative POSIX path."""
    return {name: path for name, path in _entries(folder).items() if path.is_file() and name != MANIFEST.as_posix()}


def strange_files(folder: Path) -> dict[str, str]:
    """Return the entries of a folder that are pipes, devices, or links that lead out of it, each with what it is."""
    root = folder.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    strange = {}
    for name, path in _entries(folder).items():
        if path.is_symlink() and not any(path.resolve().is_relative_to(inside) for inside in roots):
            strange[name] = "a link that leads out of the folder"
        elif not path.is_file() and not path.is_dir():
            strange[name] = "neither a file nor a folder"
    return strange


def _entries(folder: Path) -> dict[str, Path]:
    """Everything below the folder except what is hidden, by relative POSIX path; links are not followed."""
    entries = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    return {
        name.as_posix(): path for name, path in entries.items() if not any(part.startswith(".") for part in name.parts)
    }
