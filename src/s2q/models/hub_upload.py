"""A repository of the Hub to write to: what it has, and one commit that replaces it.

`HF_ENDPOINT`, `HF_TOKEN` and the token of `hf auth login` are those of huggingface_hub. Large files are stored by their
hash before the commit: a repeated call sends only what is missing, and a reader never sees half of a model.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from s2q.common.errors import InvalidInputError, S2QError, first_line
from s2q.models.hub import MAIN, HubId


@dataclass(frozen=True)
class RemoteModel:
    """A repository that exists.

    Attributes:
        commit: Of the branch to write, or of the one that it will start from.
        has_branch: Whether the branch exists.
        files: Names of the files in that commit.
    """

    commit: str
    private: bool
    has_branch: bool
    files: frozenset[str]


def check_access() -> None:
    """Refuse to start where the Hub cannot be written: offline, or without a token."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise InvalidInputError("push: HF_HUB_OFFLINE is set; unset it to write to the Hub")
    if not get_token():
        raise InvalidInputError("push: got no token of the Hub; run hf auth login, or set HF_TOKEN")


def remote_model(hub: HubId) -> RemoteModel | None:
    """Return what a repository has; None if there is none that the token may read."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    with _hub_errors(hub):
        try:
            info, has_branch = api.model_info(hub.repo, revision=hub.branch), True
        except RepositoryNotFoundError:
            return None
        except RevisionNotFoundError:
            info, has_branch = api.model_info(hub.repo), False
        files = frozenset(file.rfilename for file in info.siblings or ())
        return RemoteModel(commit=info.sha or "", private=bool(info.private), has_branch=has_branch, files=files)


@contextlib.contextmanager
def downloaded(hub: HubId, commit: str, names: Collection[str]) -> Iterator[Path]:
    """Yield a temporary folder with some files of a commit."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        with _hub_errors(hub):
            for name in names:
                HfApi().hf_hub_download(hub.repo, name, revision=commit, local_dir=folder)
        yield Path(folder)


def write_model(
    hub: HubId,
    files: Mapping[str, Path | bytes],
    *,
    remote: RemoteModel | None,
    deleted: Collection[str],
    private: bool,
    message: str,
) -> str:
    """Create the repository and the branch where they are missing, and commit all files at once; return the commit.

    Args:
        files: Files or contents by path in the repository.
        remote: What `remote_model` returned; a commit in between is refused.
        deleted: Files of the repository to remove.
        private: Visibility of a new repository.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    additions = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    deletions = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in sorted(deleted)]
    with _hub_errors(hub):
        if remote is None:
            api.create_repo(hub.repo, private=private)
        if hub.branch != MAIN and (remote is None or not remote.has_branch):
            api.create_branch(hub.repo, branch=hub.branch, exist_ok=True)
        written = api.create_commit(
            hub.repo,
            operations=[*deletions, *additions],
            commit_message=message,
            revision=hub.branch,
            parent_commit=remote.commit if remote is not None else None,
        )
    return written.oid


@contextlib.contextmanager
def _hub_errors(hub: HubId) -> Iterator[None]:
    """Raise errors of the Hub and of the network in one line that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        yield
    except HFValidationError as error:
        raise InvalidInputError(f"{hub.repo}: is no id of the Hub ({first_line(error)})") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        remedies = {
            401: "the Hub refuses the token; run hf auth login, or set HF_TOKEN to a valid one",
            403: f"the token may not write to {hub.repo.partition('/')[0]}; take one with write access",
            409: "it exists, and the token may not read it; take another id or token",
            412: "it was changed meanwhile; run the command again",
        }
        if status in remedies:
            raise InvalidInputError(f"{hub}: {remedies[status]}") from error
        raise _interrupted(hub, error) from error
    except ValueError as error:  # of the card, which the Hub validates before anything is sent
        raise InvalidInputError(f"{hub}: {first_line(error)}") from error
    except (HTTPError, OSError, RuntimeError) as error:  # HTTPError: of the HTTP client, without an answer of the Hub
        raise _interrupted(hub, error) from error


def _interrupted(hub: HubId, error: Exception) -> S2QError:
    cause = first_line(error.__cause__ or error)
    return S2QError(
        f"{hub}: the Hub cannot be reached or failed ({cause}); run the command again, it uploads only what is missing"
    )
