"""The whole job: resolve, skip what is published already, convert, verify, evaluate, gate, describe, publish.

Everything is made in one folder, so that a job that was stopped goes on where it was, and that a job without
credentials can hand it over to one that has them and trusts only the digest of `handover.json`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from hlwq_formats import metadata as md
from hlwq_formats.errors import BadDigest, HlwqError, HubUnreadable, IoFailure, Usage
from hlwq_formats.file_set import open_set, whole_of
from hlwq_formats.files import InputFile
from hlwq_formats.paths import unsafe_path

from .. import __version__, conversion
from ..dry_run import dry_run as plan_size
from ..inspection import inspect_reader
from ..job import Job as Prepared
from ..job import prepare
from ..recipe import make_recipe
from ..report import human_bytes
from ..target import make_target
from ..verification import check_symbols
from . import evaluate
from .bundle import CARD, Bundle, hash_file, make_bundle
from .card import Container
from .download import Remote, download, find_weights, is_wanted, resolve
from .evaluation import Evaluation, read_evaluation
from .gates import Check, check
from .job import FileJob, Job
from .push import Outcome, publish
from .remote import find_container, list_files, list_tags, read_container

HANDOVER = "handover.json"
Progress = Callable[[str, int, int], None]


class HandedFile(msgspec.Struct, frozen=True):
    """A file of the work folder, by its plain name, and what it must be when it is published."""

    name: str
    sha256: str


class Handover(msgspec.Struct, frozen=True):
    """All that the publishing side is told; where to publish and what must be reached it has from its job file."""

    containers: list[HandedFile]
    evaluations: list[HandedFile]


@dataclass
class Result:
    """How far a job came: "unchanged", "stopped" (by a gate), "ready" or "published"."""

    base: str
    commit: str
    state: str
    containers: list[Container] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    digest: str | None = None
    outcome: Outcome | None = None


def requantize(job: Job, work: Path, progress: Progress, *, dry_run: bool = False) -> Result:
    """Do all of a job; with `dry_run` all but the push. Raises an HlwqError for what goes wrong.

    A gate that fails is no error: the result is "stopped", and nothing was published.
    """
    remote = resolve(job.base.repo, job.base.revision)
    result = Result(job.base.repo, remote.commit, "unchanged")
    progress(f"{remote.repo} at {remote.commit[:12]}", 0, 0)
    if is_published(job, remote):
        return result
    if job.evaluation is not None:
        evaluate.find_tool()  # now, not after hours
    work.mkdir(parents=True, exist_ok=True)
    weights = sum(remote.files[name] for name in find_weights(remote) if not _is_cached(remote, name))
    _check_disk(Path(_cache_folder()), weights, "to fetch the model")
    model = download(remote)
    jobs = [(f, _prepare(model, f)) for f in job.file]
    missing = [(f, prepared) for f, prepared in jobs if not _is_made(work / f.name, prepared)]
    planned = sum(plan_size(prepared, work / f.name).file_bytes for f, prepared in missing)
    once_more = max((prepared.split_size or 0 for _, prepared in missing), default=0)  # one part, while they are cut
    _check_disk(work, planned + min(once_more, planned), "for the files")
    if job.evaluation is not None:
        _check_memory(sum(tensor.length for tensor in jobs[0][1].source.tensors))
    for f, prepared in missing:
        conversion.run([prepared], [work / f.name], overwrite=True, progress=progress)
        result.warnings += prepared.warnings
    evaluations: dict[Path, Evaluation] = {}
    for f in job.file:
        progress(f"verifying {f.name}", 0, 0)
        with open_set(work / f.name) as reader:
            reader.verify(check_symbols)
            inspection = inspect_reader(reader)
        found = None
        if job.evaluation is not None:
            progress(f"evaluating {f.name}", 0, 0)
            path = evaluate.evaluate(work / f.name, str(inspection.content_id), model, job.evaluation)
            found = evaluations[path] = read_evaluation(path)
        container = Container(f.name, inspection, found)
        result.containers.append(container)
        result.checks += check(container, f.gates)
    if not all(one.good for one in result.checks):
        result.state = "stopped"
        return result
    files = [work / f.name for f in job.file]
    bundle = make_bundle(files, job.target.repo, list(evaluations.values()))
    result.warnings += bundle.warnings
    result.digest = _hand_over(bundle, list(evaluations), work)
    result.state = "ready"
    if not dry_run:
        published = publish_handed(work, result.digest, job)
        result.outcome, result.state = published.outcome, published.state
    return result


def _prepare(model: Path, f: FileJob) -> Prepared:
    return prepare(
        model, f.bits, recipe=f.recipe, sets=f.set, effort=f.effort, bpw=f.bpw, size=f.size, split_size=f.split_size
    )


def publish_handed(work: Path, digest: str, job: Job) -> Result:
    """Publish what `requantize` left in a folder, when it is still that: `digest` is of its handover.json.

    The gates are looked at again, on the files at hand: who converted a stranger's model is not trusted.
    """
    with InputFile(work / HANDOVER) as file:
        document = file.read(0, min(file.size, md.MAX_ASSET))
    if hashlib.sha256(document).hexdigest() != digest:
        raise BadDigest(f"is not the file with the SHA-256 {digest[:16]}... that was handed over", file=HANDOVER)
    try:
        handover = msgspec.json.decode(document, type=Handover)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise BadDigest("is no hand-over", file=HANDOVER) from None
    for handed in [*handover.containers, *handover.evaluations]:
        if unsafe_path(handed.name) or "/" in handed.name or hash_file(work / handed.name) != handed.sha256:
            raise BadDigest("is not the file that was handed over", file=handed.name)
    wholes = {whole_of(handed.name) for handed in handover.containers}
    if wholes != {f.name for f in job.file}:
        raise Usage("was made by a job with other files", file=HANDOVER)
    evaluations = [read_evaluation(work / handed.name) for handed in handover.evaluations]
    bundle = make_bundle([work / handed.name for handed in handover.containers], job.target.repo, evaluations)
    found = {item.path: item.sha256 for item in bundle.items if isinstance(item.content, Path)}
    if found != {handed.name: handed.sha256 for handed in handover.containers}:
        raise BadDigest("some parts of a set are not those that were handed over", file=HANDOVER)
    source = bundle.containers[0].inspection.metadata.source
    commit = str(source.revision)
    result = Result(str(source.repo), commit, "stopped", bundle.containers, warnings=bundle.warnings)
    gates = {f.name: f.gates for f in job.file}
    result.checks = [one for container in bundle.containers for one in check(container, gates[container.name])]
    if all(one.good for one in result.checks):
        target = job.target
        result.outcome = publish(bundle, branch=target.branch, tag=_tag(job, commit), private=target.private)
        result.state = "published"
    return result


def _tag(job: Job, commit: str) -> str | None:
    """The tag for files made from a commit of the base."""
    return None if job.target.tag is None else job.target.tag.replace("{commit}", commit[:12])


def is_published(job: Job, remote: Remote) -> bool:
    """Whether the target holds files of this base, made by these options and this version, and their tag."""
    try:
        files = list_files(job.target.repo, job.target.branch)
    except HubUnreadable:
        return False
    revisions = set()
    for f in job.file:
        found = read_container(job.target.repo, find_container(files, f.name), job.target.branch)
        if found is None or found.recipe != make_recipe(f.bits, f.recipe, f.set, f.effort, make_target(f.bpw, f.size)):
            return False
        if found.source.repo != remote.repo or found.tool.version != __version__:
            return False
        revisions.add(str(found.source.revision))
    if any(revision != remote.commit and not _is_same_model(remote, revision) for revision in revisions):
        return False
    tags = {_tag(job, revision) for revision in revisions} - {None}
    return tags <= list_tags(job.target.repo)


def _is_same_model(remote: Remote, earlier: str) -> bool:
    """Whether no file that a conversion reads differs between two commits; a card may."""
    try:
        before, now = list_files(remote.repo, earlier), list_files(remote.repo, remote.commit)
    except HubUnreadable:  # the history was rewritten
        return False
    blobs = [{n: f.blob for n, f in files.items() if is_wanted(n) and n != CARD} for files in (before, now)]
    return blobs[0] == blobs[1]


def _is_made(path: Path, prepared: Prepared) -> bool:
    """Whether an earlier run of the same job has finished this file."""
    try:
        with open_set(path) as reader:
            found, split, size = reader.metadata, reader.parts[0].metadata.split, reader.header.file_len
    except HlwqError:
        return False
    limit = prepared.split_size
    if limit != split.size if split is not None else limit is not None and size > limit:
        return False
    wanted = (prepared.source.provenance, prepared.recipe, __version__)
    return (found.source, found.recipe, found.tool.version) == wanted


def _hand_over(bundle: Bundle, evaluations: list[Path], work: Path) -> str:
    """Write handover.json, and the card and the report to be looked at; the SHA-256 of the first."""
    for item in bundle.items:
        if item.path in (CARD, md.REPORT) and isinstance(item.content, bytes):
            (work / item.path).write_bytes(item.content)
    containers = [HandedFile(item.path, item.sha256) for item in bundle.items if isinstance(item.content, Path)]
    measured = [HandedFile(path.name, hash_file(path)) for path in sorted(evaluations)]
    document = msgspec.json.encode(Handover(containers, measured))
    (work / HANDOVER).write_bytes(document)
    return hashlib.sha256(document).hexdigest()


def _cache_folder() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _is_cached(remote: Remote, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(remote.repo, name, revision=remote.commit), str)


def _check_disk(folder: Path, needed: int, what: str) -> None:
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise IoFailure(
            f"{human_bytes(needed)} are needed {what}, {human_bytes(free)} are free",
            file=os.fspath(folder),
            hint="free space, choose another --work, or set HF_HOME",
        )


def _check_memory(needed: int) -> None:
    """An evaluation holds the source in memory; better to know now than to be killed in hours."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise IoFailure(
            f"the evaluation holds {human_bytes(needed)} of weights, this machine has {human_bytes(memory)} of memory",
            hint="leave out [evaluation], or use a larger machine",
        )
