"""The manifest: SHA-256 and size of every file of a checkpoint, written last.

safetensors has no checksum: flipped bits in the payload, and some in the header, load silently. The hashes find them.
"""

import json
import logging
from pathlib import Path
from typing import Any

from s2q.common.errors import InvalidInputError
from s2q.common.files import atomic_write_json, sha256_file
from s2q.common.log import log_once
from s2q.common.records import MANIFEST_VERSION

logger = logging.getLogger(__name__)

MANIFEST = Path("s2q/manifest.json")
CARD = "README.md"


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files that are in the folder now."""
    files = {name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for name, path in _files(folder).items()}
    (folder / MANIFEST).parent.mkdir(exist_ok=True)
    atomic_write_json(folder / MANIFEST, {"schema_version": MANIFEST_VERSION, "files": files})


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return `{"bytes": ..., "sha256": ...}` of each file in the manifest, by POSIX path relative to the folder."""
    path = folder / MANIFEST
    remedy = "download the checkpoint again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, files = content["schema_version"], content["files"]
        entries = {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in files.items()}
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"{path}: damaged, not a manifest; {remedy}") from error
    if version != MANIFEST_VERSION:
        raise InvalidInputError(f"{path}: schema_version={version!r}; expected {MANIFEST_VERSION}; upgrade s2q")
    return entries


def owned_files(folder: Path) -> set[str] | None:
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
    may.
    """
    if not (folder / MANIFEST).exists():
        raise _no_manifest(folder)
    listed = read_manifest(folder)
    present = _files(folder)
    problems = []
    for name, entry in listed.items():
        path = present.get(name)
        if path is None:
            problems.append(f"{name}: missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name}: got {path.stat().st_size} bytes, expected {entry['bytes']}; truncated or altered")
        elif sha256_file(path) != entry["sha256"]:
            problems.append(f"{name}: its SHA-256 differs from the manifest; altered")
    extra = [name for name in present if name not in listed and "/" in name]
    problems += [f"{name}: not in the manifest; added later" for name in extra]
    return sorted(problems)


def check_intact(folder: Path, *, verify: bool | None = None) -> None:
    """Refuse a checkpoint whose files differ from its manifest; edits of the model card are allowed.

    diffusers writes no manifest when it saves a checkpoint again, with another scheduler for example: `verify=None`
    warns of that, True refuses it; False checks nothing.
    """
    if verify is False:
        return
    if not (folder / MANIFEST).exists():
        if verify:
            raise _no_manifest(folder)
        message = f"{folder}: has no {MANIFEST}, as diffusers saves it, so its files are not verified"
        log_once(logger, logging.WARNING, message)  # evaluations load a checkpoint several times
        return
    problems = [problem for problem in verify_manifest(folder) if not problem.startswith(f"{CARD}:")]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise InvalidInputError(
            f"{folder}: {'; '.join(problems[:3])}{more}; download or quantize the model again, or pass --no-verify "
            "(verify=False) if you changed it yourself"
        )


def _no_manifest(folder: Path) -> InvalidInputError:
    return InvalidInputError(
        f"{folder}: has no {MANIFEST}, so it cannot be verified; diffusers does not save one: verify the original "
        "checkpoint, or omit --verify (verify=True)"
    )


def _files(folder: Path) -> dict[str, Path]:
    """Every file below the folder but the manifest and hidden files and folders, by relative POSIX path."""
    files = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and relative != MANIFEST and not any(part.startswith(".") for part in relative.parts):
            files[relative.as_posix()] = path
    return files
