"""Publish a bundle: one commit on top of the tip that was looked at, compared afterwards, then the tag."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hlwq_formats import metadata as md
from hlwq_formats.errors import CannotCreate, ForeignRepo, HlwqError, HubMismatch, HubRefused, Usage, escape
from hlwq_formats.file_set import whole_of

from .bundle import CARD, SUFFIX, Bundle, Item
from .card import LIBRARY, front_matter
from .client import LOG_IN, hub_errors, open_api
from .download import is_asset
from .remote import RemoteFile, list_files, read_container, read_range, sha256_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MAX_CARD = 1 << 20


@dataclass(frozen=True)
class Target:
    """A branch as it was before the push: the commit at its tip (where it is missing, that of main, which it will
    start from), its files, and the commit that the tag has."""

    is_new: bool
    commit: str
    files: dict[str, RemoteFile]
    tagged: str | None


@dataclass(frozen=True)
class Outcome:
    """What a push did: the commit that holds the files now, and whether this push made it."""

    repo: str
    commit: str
    changed: bool
    tag: str | None
    url: str


def publish(
    bundle: Bundle, *, branch: str = "main", tag: str | None = None, create_pr: bool = False, private: bool = False
) -> Outcome:
    """Push all files of a bundle in one commit; what is there already, by its content, is not pushed again.

    A repository that does not exist is created (`private` says how), and so is a `branch`. With `create_pr` the
    commit goes to a pull request. Raises an HlwqError for everything that goes wrong; until the commit is made, and
    it is made whole or not at all, the branch is as it was.
    """
    if create_pr and (tag is not None or branch != "main"):
        raise Usage("--create-pr proposes a change of main: it takes no --tag and no --branch")
    api, repo = open_api(), bundle.repo
    with hub_errors(repo, writing=True):
        target = _look(api, repo, branch, tag, private)
        _refuse_foreign(bundle, target, create_pr)
        if target.is_new:
            api.create_branch(repo, branch=branch, revision=target.commit)
        commit, changed, url = target.commit, False, f"{api.endpoint}/{repo}/tree/{target.commit}"
        if not _is_there(bundle, target):
            if target.tagged is not None:
                raise CannotCreate(f"the tag {escape(str(tag))} exists already", file=repo, hint="choose another --tag")
            commit, url = _commit(api, bundle, branch, target, create_pr)
            changed = True
            try:
                _compare(bundle, commit)
            except HubMismatch:
                raise
            except HlwqError as error:
                error.problem = f"commit {commit[:12]} was made but not compared: {error.problem}"
                raise
        if tag is not None and target.tagged is None:
            api.create_tag(repo, tag=tag, revision=commit)
        elif tag is not None and target.tagged != commit:
            raise CannotCreate(
                f"the tag {escape(tag)} exists already, at commit {str(target.tagged)[:12]}",
                file=repo,
                hint="choose another --tag",
            )
    return Outcome(repo, commit, changed, tag, url)


def _look(api: HfApi, repo: str, branch: str, tag: str | None, private: bool) -> Target:
    """The branch as it is; a repository is made where it is missing."""
    from huggingface_hub import errors, get_token

    if get_token() is None:
        raise HubRefused("no token: pushing needs one that may write", file=repo, hint=LOG_IN)
    try:
        api.model_info(repo)
    except errors.RepositoryNotFoundError as error:
        if error.response.status_code != 404:  # 401: the token is not accepted, which says nothing of the repository
            raise
        api.create_repo(repo, private=private, exist_ok=True)
    refs = api.list_repo_refs(repo)
    is_new = branch not in (ref.name for ref in refs.branches)
    commit = api.model_info(repo, revision="main" if is_new else branch).sha
    if commit is None:
        raise HubRefused("the Hub names no commit of the branch", file=repo)
    tagged = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
    return Target(is_new, commit, list_files(repo, commit), tagged)


def _refuse_foreign(bundle: Bundle, target: Target, create_pr: bool) -> None:
    """Refuse a branch that holds anything but what an earlier push of ours could have left."""
    ours = {CARD, md.REPORT, ".gitattributes"}
    foreign = sorted(n for n in target.files if not (n in ours or n.endswith(SUFFIX) or is_asset(n)))
    if not foreign and CARD in target.files:
        card = read_range(bundle.repo, CARD, target.commit, 0, _MAX_CARD)
        if front_matter(card).get("library_name") != LIBRARY:
            foreign = [CARD]
    elif not foreign and not target.files.keys() <= {".gitattributes"}:
        foreign = sorted(target.files.keys() - {".gitattributes"})
    if foreign and not create_pr:
        raise ForeignRepo(
            f"it holds what this tool did not write: {escape(', '.join(foreign[:3]), 120)}"
            + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""),
            file=bundle.repo,
            hint="choose another repository, or propose the change with --create-pr",
        )
    others = sorted(_other_containers(bundle, target) - _replaced(bundle, target))
    if others:
        raise ForeignRepo(
            f"it holds {escape(', '.join(others[:3]), 120)} too, which the new card would not describe",
            file=bundle.repo,
            hint="push all files together, delete those on the Hub, or choose another repository",
        )


def _other_containers(bundle: Bundle, target: Target) -> set[str]:
    return {name for name in target.files if name.endswith(SUFFIX)} - {f for c in bundle.containers for f in c.files}


def _replaced(bundle: Bundle, target: Target) -> set[str]:
    """What a container replaces under other names: the parts of another set of its name, or what was not split."""
    names = {container.name for container in bundle.containers}
    return {name for name in _other_containers(bundle, target) if whole_of(name) in names}


def _is_there(bundle: Bundle, target: Target) -> bool:
    """Whether the branch holds these weights already, by content, and the same files of the model beside them."""
    for item in bundle.beside:
        file = target.files.get(item.path)
        if file is None or not isinstance(item.content, bytes):
            return False
        blob = hashlib.sha1(b"blob %d\0" % len(item.content) + item.content, usedforsecurity=False).hexdigest()
        if item.sha256 != file.sha256 and blob != file.blob:
            return False
    for container in bundle.containers:
        if not target.files.keys() >= set(container.files):
            return False
        metadata = read_container(bundle.repo, [target.files[name] for name in container.files], target.commit)
        if metadata is None or md.content_id(metadata) != container.inspection.content_id:
            return False
    return True


def _commit(api: HfApi, bundle: Bundle, branch: str, target: Target, create_pr: bool) -> tuple[str, str]:
    """Upload what is large and make the one commit; (commit, its address or that of the pull request)."""
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationAdd(item.path, item.content) for item in bundle.items),
        *(CommitOperationDelete(name) for name in sorted(_replaced(bundle, target))),
    ]
    lines = [f"{c.name}: content {c.inspection.content_id}" for c in bundle.containers]
    source = bundle.containers[0].inspection.metadata.source
    if source.repo is not None:
        lines.append(f"from {source.repo} at {source.revision}")
    info = api.create_commit(
        bundle.repo,
        operations,
        commit_message=f"Add {', '.join(c.name for c in bundle.containers)}"[:200],
        commit_description="\n".join(lines),
        revision=branch,
        parent_commit=target.commit,
        create_pr=create_pr,
    )
    return info.oid, (info.pr_url or info.commit_url) if create_pr else info.commit_url


def _compare(bundle: Bundle, commit: str) -> None:
    """Compare the SHA-256 of every file at the commit with the one of the file that was meant."""
    files = list_files(bundle.repo, commit)
    for item in bundle.items:
        file = files.get(item.path)
        found = sha256_of(bundle.repo, file, commit) if file is not None else None
        if found != item.sha256:
            what = "is missing" if found is None else f"has SHA-256 {found[:16]}..., expected {item.sha256[:16]}..."
            raise HubMismatch(
                f"after the push, {escape(item.path)} {what}",
                file=bundle.repo,
                hint=f"no tag was set; revert commit {commit[:12]} on the Hub, and report this",
            )


def total_bytes(items: list[Item]) -> int:
    """Bytes of all files of a push."""
    return sum(i.content.stat().st_size if isinstance(i.content, Path) else len(i.content) for i in items)
