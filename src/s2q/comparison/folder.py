"""The folder of a comparison: paths, finished parts, and whether a run may resume in it.

compare_run.json                    what every result depends on
checkpoints/LABEL/                  quantized models
evaluations/LABEL/shard-000.json    what was measured, prompts by prompts; eval.json puts them together
evaluations/LABEL/peer.json         seconds and bytes of another tool, which quantizes in memory
frames/LABEL/000.npz                frames of the videos that the page shows
compare.json, compare.md, index.html, sheet.png, videos/
"""

import hashlib
import io
import itertools
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from s2q.checkpoint.manifest import MANIFEST, owned_files
from s2q.common.differences import differences
from s2q.common.errors import InvalidInputError, first_line, short_repr
from s2q.common.files import PARTIAL, atomic_write_bytes, atomic_write_json, canonical_json, sha256_file
from s2q.common.outputs import Owned, check_owned, check_writable, files_below, owned_matching
from s2q.common.records import COMPARISON_VERSION
from s2q.common.temporaries import remove_abandoned
from s2q.comparison.setup import RunPlan
from s2q.evaluation.scores import EvaluationResult
from s2q.generation.prompts import prompt_record

logger = logging.getLogger(__name__)

RUN = "compare_run.json"
RESULT = "compare.json"
COST = "peer.json"
TABLE = "compare.md"
PAGE = "index.html"
SHEET = "sheet.png"


def _checkpoint_files(folder: Path) -> set[str]:
    """The files of the checkpoints in a folder, and what runs have left beside them."""
    names = {name for name in files_below(folder) if name.startswith(".")}
    for path in folder.iterdir():
        names |= {f"{path.name}/{name}" for name in owned_files(path) or ()}
    return names


_OWNED: Mapping[str, Owned] = {
    "checkpoints": _checkpoint_files,
    "evaluations": owned_matching("*/*.json"),
    "frames": owned_matching("*/*.npz"),
    "videos": owned_matching("*/*.mp4"),
}
"""The folders of a comparison, and what it wrote into each."""


class CompareFolder:
    """The folder of a comparison."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, plan: RunPlan, *, resume: bool, overwrite: bool) -> None:
        """Check that this comparison may be written here, before any work and again under the lock. Changes nothing."""
        if not self._is_used():
            check_writable(self.path / RUN)
            return
        if not (self.path / RUN).is_file():
            raise InvalidInputError(
                f"{self.path} exists and was not written by this command (no {RUN} in it); choose another folder"
            )
        change = self._change(plan)
        if overwrite:
            if not resume or change is not None:
                self._check_not_inside(plan)
                for name, owned in _OWNED.items():
                    check_owned(self.path / name, owned)
        elif not resume:
            raise InvalidInputError(
                f"{self.path} contains a comparison; pass --overwrite to replace it, or choose another folder"
            )
        elif change is not None:
            raise InvalidInputError(
                f"{self.path} contains a different comparison: {change}; repeat its command to resume it, pass "
                "--overwrite to replace it, or choose another folder"
            )

    def open(self, plan: RunPlan, *, resume: bool) -> RunPlan:
        """Write down what will be compared; a comparison that differs is removed.

        Returns:
            The plan, with the entries of earlier runs that this one leaves out.
        """
        if self._is_used():
            if not resume or self._change(plan) is not None:
                self._clear()
            else:
                earlier = self._content()
                paths = {label: path for label, path in earlier["paths"].items() if label not in plan.entries}
                plan = replace(plan, entries={**earlier["entries"], **plan.entries}, paths={**paths, **plan.paths})
        self.path.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.path.rglob(f".*{PARTIAL}"))
        atomic_write_json(self.path / RUN, plan.to_dict())
        return plan

    def model_of(self, plan: RunPlan, label: str) -> str:
        """Return the checkpoint of an entry: the one that was given, or the one that its recipe made here."""
        return plan.paths.get(label, str(self.checkpoint(label)))

    def checkpoint(self, label: str) -> Path:
        """Return where the checkpoint of a recipe is."""
        return self.path / "checkpoints" / label

    def evaluation(self, label: str) -> Path:
        """Return where the evaluation of an entry is put together."""
        return self.path / "evaluations" / label / "eval.json"

    def shard_fingerprint(self, plan: RunPlan, label: str, index: int) -> str:
        """Return a hash of everything that a shard of an entry depends on."""
        entry = plan.entries[label]
        made = sha256_file(self.checkpoint(label) / MANIFEST) if "recipe" in entry else None
        depends = {
            **plan.common(),
            "prompts": list(map(prompt_record, plan.shards()[index])),
            "entry": entry,
            "made": made,
        }
        return hashlib.sha256(canonical_json(depends).encode()).hexdigest()

    def save_shard(self, plan: RunPlan, label: str, index: int, measured: EvaluationResult) -> None:
        """Store what was measured on a shard; it is there entirely, or not at all."""
        path = self._shard(label, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        fingerprint = self.shard_fingerprint(plan, label, index)
        atomic_write_json(
            path, {"schema_version": COMPARISON_VERSION, "fingerprint": fingerprint, "measured": measured.to_dict()}
        )

    def load_shard(self, plan: RunPlan, label: str, index: int) -> EvaluationResult | None:
        """Return what was measured on a shard; None if it is not there, or was made from something else."""
        try:
            content = json.loads(self._shard(label, index).read_text(encoding="utf-8"))
            if content["fingerprint"] != self.shard_fingerprint(plan, label, index):
                return None
            return EvaluationResult.from_dict(content["measured"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save_cost(self, label: str, identity: Mapping[str, Any], cost: Mapping[str, Any]) -> None:
        """Store the seconds and bytes of a peer."""
        path = self.evaluation(label).with_name(COST)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, {**identity, **cost})

    def load_cost(self, label: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the seconds and bytes of a peer; None if they are not there, or are another version's."""
        try:
            content: dict[str, Any] = json.loads(self.evaluation(label).with_name(COST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if {name: content.get(name) for name in identity} == identity else None

    def save_frames(self, label: str, index: int, frames: np.ndarray) -> None:
        """Store the frames `[F, H, W, 3]`, uint8, of a prompt's video that the page shows."""
        path = self._frames(label, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, frames=frames)
        atomic_write_bytes(path, buffer.getvalue())

    def load_frames(self, label: str, index: int) -> np.ndarray | None:
        """Return frames that `save_frames` stored; None if they are not there, or cannot be decoded."""
        path = self._frames(label, index)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as content:
                frames: np.ndarray = content["frames"]
        except Exception as error:  # zip, zlib and the parser of numpy's header have errors of their own
            logger.warning("%s: cannot be decoded as the frames of a video (%s)", path, first_line(error))
            return None
        return frames if frames.ndim == 4 and frames.shape[-1] == 3 and frames.dtype == np.uint8 else None

    def has_damaged_frames(self, label: str, index: int) -> bool:
        """Tell whether frames are there and cannot be decoded: their video is generated again."""
        return self._frames(label, index).is_file() and self.load_frames(label, index) is None

    def _change(self, plan: RunPlan) -> str | None:
        """The first difference between a comparison and that of the folder.

        Entries may be added and removed. A checkpoint may have changed: it is evaluated again. A recipe may not: what
        it made may have taken hours.
        """
        try:
            earlier = self._content()
            if (version := earlier["schema_version"]) != COMPARISON_VERSION:
                return f"{RUN} has schema_version={short_repr(version)}; this s2q reads {COMPARISON_VERSION}"
            entries = earlier["entries"]
        except (OSError, ValueError, KeyError):
            return f"{RUN} cannot be read"
        common, identities = (json.loads(canonical_json(dict(part))) for part in (plan.common(), plan.entries))
        changes = [differences({name: earlier.get(name) for name in common}, common)]
        for label, identity in identities.items():
            if "recipe" in entries.get(label, {}):
                changes.append(differences({f"entry {label}": entries[label]}, {f"entry {label}": identity}))
        return next(itertools.chain(*changes), None)

    def _check_not_inside(self, plan: RunPlan) -> None:
        """Refuse to replace a comparison that contains the model or a checkpoint of the one that replaces it."""
        for given in (plan.model, *plan.paths.values()):
            path = Path(given).expanduser().resolve()
            if any(path.is_relative_to((self.path / name).resolve()) for name in _OWNED):
                raise InvalidInputError(
                    f"{given} is part of the comparison in {self.path}, which --overwrite would remove; choose another "
                    "folder, or move it out first"
                )

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.path / RUN).read_text(encoding="utf-8"))
        return content

    def _is_used(self) -> bool:
        """Whether something is there; what a killed process had begun to write is nothing."""
        if not self.path.is_dir():
            return self.path.exists()
        return any(not path.match(f".*{PARTIAL}") for path in self.path.iterdir())

    def _clear(self) -> None:
        (self.path / RESULT).unlink(missing_ok=True)
        for name in _OWNED:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (TABLE, PAGE, SHEET, RUN):
            (self.path / name).unlink(missing_ok=True)

    def _shard(self, label: str, index: int) -> Path:
        return self.path / "evaluations" / label / f"shard-{index:03d}.json"

    def _frames(self, label: str, index: int) -> Path:
        return self.path / "frames" / label / f"{index:03d}.npz"
