"""What a repository of the Hub holds: its files at the tip of a branch, and what is in a container there."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from hlwq_formats import metadata as md
from hlwq_formats.errors import BadData, BadSet, HubFailed, UnsupportedFeature, UnsupportedVersion
from hlwq_formats.file_set import first_files, merge, part_name, place_of
from hlwq_formats.reader import Reader

from ..remote import HttpFile, Place
from .client import hub_errors, open_api

_PIECE = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; `sha256` is known of large files alone, `blob` is the SHA-1 that git gives it."""

    path: str
    size: int
    sha256: str | None
    blob: str


def list_files(repo: str, revision: str) -> dict[str, RemoteFile]:
    """All files of a repository at a revision."""
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(repo):
        entries = list(open_api().list_repo_tree(repo, revision=revision, recursive=True))
    return {
        entry.path: RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in entries
        if isinstance(entry, RepoFile)
    }


def list_tags(repo: str) -> set[str | None]:
    """The names of all tags."""
    with hub_errors(repo):
        return {ref.name for ref in open_api().list_repo_refs(repo).tags}


def read_range(repo: str, path: str, revision: str, start: int, length: int) -> bytes:
    """`length` bytes of a file from `start`, or fewer at its end; no more is ever read."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
    data = bytearray()
    with (
        hub_errors(repo),
        get_session().stream("GET", hf_hub_url(repo, path, revision=revision), headers=headers) as got,
    ):
        hf_raise_for_status(got)
        if got.status_code != 206 and start > 0:
            raise HubFailed("the Hub sends no ranges", file=f"{repo}/{path}")
        for piece in got.iter_bytes(_PIECE):
            data += piece
            if len(data) >= length:
                break
    return bytes(data[:length])


def sha256_of(repo: str, file: RemoteFile, revision: str) -> str:
    """The SHA-256 of a file's content: as the Hub states it of a large file, else of what it sends."""
    return file.sha256 or hashlib.sha256(read_range(repo, file.path, revision, 0, file.size + 1)).hexdigest()


def find_container(files: dict[str, RemoteFile], name: str) -> list[RemoteFile]:
    """The file, or all parts of the one set, of a container of this name; none when they are not all there."""
    first = first_files(files, name)
    place = place_of(first[0]) if len(first) == 1 else None
    names = first[:1] if place is None else [part_name(name, index, place[2]) for index in range(place[2])]
    return [files[one] for one in names] if names and files.keys() >= set(names) else []


def read_container(repo: str, files: list[RemoteFile], revision: str) -> md.Metadata | None:
    """The metadata of a container on the Hub that consists of these files; None when it is none that we can read."""
    found = [(file.path, _read_file(repo, file, revision)) for file in files]
    documents = [(name, metadata) for name, metadata in found if metadata is not None]
    if not files or len(documents) < len(files):
        return None
    try:
        return documents[0][1] if len(files) == 1 else merge(documents)
    except BadSet:
        return None


def _read_file(repo: str, file: RemoteFile, revision: str) -> md.Metadata | None:
    """The metadata of one file, from two ranges of it."""
    from huggingface_hub import get_token, hf_hub_url

    url = hf_hub_url(repo, file.path, revision=revision)
    try:
        with Reader(HttpFile(Place(url, get_token(), on_hub=True))) as reader:
            return reader.metadata
    except (BadData, UnsupportedFeature, UnsupportedVersion):
        return None
