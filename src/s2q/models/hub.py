"""Pipelines on the Hub: their ids with a revision ("acme/wan@v2"), what is downloaded of them, and what can go wrong.

`HF_HUB_OFFLINE`, `HF_HOME` and `HF_TOKEN` are those of huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2q.common.errors import InvalidInputError, first_line
from s2q.pipelines.index import modular_components

MAIN = "main"
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SETUP_PATTERNS = ("*.json", "*/*.json", "*.md", "LICENSE*")
_COMPONENT_PATTERNS = ("*.safetensors", "*.txt", "*.model", "*.jinja")  # beside what the set-up has


@dataclass(frozen=True)
class HubId:
    """A repository of the Hub, "organisation/name", at a branch, tag or commit; None is the main branch."""

    repo: str
    revision: str | None = None

    @property
    def branch(self) -> str:
        """The revision as the branch to write."""
        return self.revision or MAIN

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    def pipeline_folder(self, variant: str | None, *, index: Mapping[str, Any], without: Iterable[str] = ()) -> Path:
        """Return a cached snapshot with the files, and only those, that the pipeline loads.

        Args:
            variant: Of the weights.
            index: Of the pipeline (`s2q.pipelines`).
            without: Components that come from elsewhere.
        """
        from diffusers import DiffusionPipeline

        given = dict.fromkeys(without)
        if components := modular_components(index):
            return self.snapshot(complete=False, components=set(components) - set(given))
        try:
            return Path(
                DiffusionPipeline.download(
                    self.repo, revision=self.revision, variant=variant, use_safetensors=True, **given
                )
            )
        except (OSError, ValueError) as error:
            raise self._error(error) from error

    def file_names(self) -> frozenset[str] | None:
        """Return the names of all files of the repository; None where the Hub cannot be asked."""
        from huggingface_hub import HfApi

        try:
            return frozenset(HfApi().list_repo_files(self.repo, revision=self.revision))
        except Exception:  # offline, or whatever the HTTP client raises without a network
            return None

    def at(self, snapshot: Path) -> HubId:
        """Return the same repository at the commit of a snapshot, after which huggingface_hub names its folder."""
        return HubId(self.repo, snapshot.name) if _COMMIT.fullmatch(snapshot.name) else self

    def snapshot(self, *, complete: bool, components: Iterable[str] = ()) -> Path:
        """Return a cached snapshot, with all files or with at least those of the configuration and of components."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            of_components = [f"{name}/{pattern}" for name in sorted(components) for pattern in _COMPONENT_PATTERNS]
            patterns = None if complete else [*_SETUP_PATTERNS, *of_components]
            return Path(snapshot_download(self.repo, revision=self.revision, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> InvalidInputError:
        from huggingface_hub.constants import HF_HUB_OFFLINE
        from huggingface_hub.errors import RevisionNotFoundError

        cause = first_line(error)
        if any(isinstance(raised, RevisionNotFoundError) for raised in (error, error.__cause__)):
            return InvalidInputError(
                f"{self.repo}: has no revision {self.revision!r}; expected a branch, a tag or a commit, such as main"
            )
        if self.revision is not None and HF_HUB_OFFLINE:
            return InvalidInputError(
                f"{self.repo}: revision {self.revision!r} is not in the cache, and HF_HUB_OFFLINE is set; check the "
                "revision, or unset HF_HUB_OFFLINE to download it"
            )
        return InvalidInputError(
            f"{self}: no such folder, and not available on the Hub ({cause}); "
            "check the id, the network, HF_TOKEN and HF_HUB_OFFLINE, or pass a folder or an embedded model"
        )


def parse_hub_id(text: str) -> HubId | None:
    """Return the repository that "organisation/name" or "organisation/name@revision" names; None for other texts."""
    match = _HUB_ID.fullmatch(text)
    return None if match is None else HubId(match["repo"], match["revision"])
