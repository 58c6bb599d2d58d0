"""A model of the Hub as a folder of its cache: only what a conversion reads, at one commit."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hlwq_formats.errors import HubMoved, HubUnreadable, escape
from hlwq_formats.safetensors_dir import INDEX_SUFFIX, SUFFIX

from ..source import ASSETS, FORBIDDEN
from .client import hide_progress, hub_errors, open_api, parse_id


@dataclass(frozen=True)
class Remote:
    """A repository at the commit that a revision named: the files that a conversion could read, with their bytes."""

    repo: str
    revision: str
    commit: str
    files: dict[str, int]

    @property
    def small(self) -> list[str]:
        """All but the weights."""
        return [name for name in self.files if not name.endswith(SUFFIX)]


def local_model(text: str, progress: Callable[[str, int, int], None], *, bars: bool = False) -> str:
    """The folder that `text` means: itself where it exists, else the download of the Hub id that it is.

    Anything else is returned as it is, for the reader of folders to refuse. `bars` shows those of the client.
    """
    parsed = parse_id(text)
    if os.path.exists(text) or parsed is None:
        return text
    if not bars:
        hide_progress()
    progress(f"fetching {text}", 0, 0)
    try:
        return os.fspath(fetch(*parsed))
    except HubUnreadable as error:
        error.problem = f"no such folder here, and on the Hub: {error.problem}"
        raise


def fetch(repo: str, revision: str | None = None) -> Path:
    """Download what a conversion needs of a model and return its folder in the cache, which names its commit.

    The weights are the shards that the index lists, or every .safetensors file beside config.json without one.
    With HF_HUB_OFFLINE the cache must hold them.
    """
    api = open_api()
    from huggingface_hub import errors, is_offline_mode

    if not is_offline_mode():
        return download(resolve(repo, revision))
    with hub_errors(repo):
        try:
            return Path(api.snapshot_download(repo, revision=revision, local_files_only=True))
        except errors.IncompleteSnapshotError as error:  # of files that we never wanted, or the reader will miss them
            return Path(error.snapshot_path)


def resolve(repo: str, revision: str | None = None) -> Remote:
    """The commit that a branch, tag or hash names now, and its files; HubUnreadable when there is none."""
    api = open_api()
    with hub_errors(repo):
        info = api.model_info(repo, revision=revision or "main", files_metadata=True)
    names = {entry.rfilename: entry.size or 0 for entry in info.siblings or [] if is_wanted(entry.rfilename)}
    if info.sha is None or not names:
        raise HubUnreadable("no model: it holds no file that a conversion could read", file=repo)
    return Remote(repo, revision or "main", info.sha, names)


def download(remote: Remote) -> Path:
    """The folder of the cache that holds the files of `remote`, those fetched that are missing."""
    return _snapshot(remote, find_weights(remote))


def find_weights(remote: Remote) -> list[str]:
    """The shards that a conversion reads; fetches everything else."""
    folder = _snapshot(remote, remote.small)
    shards = [name for name in remote.files if name.endswith(SUFFIX)]
    listed = _listed_shards(folder)
    return [name for name in shards if listed is None or name in listed] or shards


def _snapshot(remote: Remote, names: list[str]) -> Path:
    # an empty list of patterns would mean all files
    patterns = [glob.escape(name) for name in names] or ["config.json"]
    with hub_errors(remote.repo):
        # by its name, not the commit, so that the cache knows it when HF_HUB_OFFLINE is set
        path = open_api().snapshot_download(remote.repo, revision=remote.revision, allow_patterns=patterns)
    folder = Path(path)
    if folder.name != remote.commit:
        raise HubMoved(f"{escape(remote.revision)} moved while it was read", file=remote.repo, hint="try again")
    return folder


def _listed_shards(folder: Path) -> set[Any] | None:
    """The shards that the index names, or None where there is no index that says so; it is checked when the
    folder is read."""
    indices = list(folder.glob("*" + INDEX_SUFFIX))
    try:
        return set(json.loads(indices[0].read_bytes())["weight_map"].values()) if len(indices) == 1 else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def is_asset(name: str) -> bool:
    """Whether a name is one of the files that may travel with a model."""
    return not any(part.startswith(".") for part in name.split("/")) and (
        not name.lower().endswith(FORBIDDEN)
        and any(name.count("/") == p.count("/") and fnmatch.fnmatchcase(name, p) for p in ASSETS)
    )


def is_wanted(name: str) -> bool:
    """Whether a conversion could read a file of this name."""
    return is_asset(name) or ("/" not in name and name.endswith((SUFFIX, INDEX_SUFFIX)))
