"""Cut a container that is finished, but for its header, into the parts of a split set.

Parts are cut off its end, the last one first, and the container is shortened after each: the disk holds the container
and one part more, never all of it twice. The parts get their names at the end, the first one last.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from . import metadata as md
from .atomic import AtomicFile, check_destination, sync_folder
from .errors import HlwqError, IoFailure, SelfCheckFailed
from .file_ops import OPS
from .file_set import SUFFIX, SetReader, part_name, place_of
from .files import InputFile
from .interrupts import uninterrupted
from .layout import place_sections
from .reader import Reader
from .split import header_of

_PIECE = 1 << 20
_UNFINISHED = ".part"


def parts_there(path: str, suffix: str = "") -> list[str]:
    """The parts of sets of this name, the first ones first; with a suffix, what has it behind their names."""
    folder, name = os.path.split(path)
    wanted = name.removesuffix(SUFFIX) + SUFFIX
    try:
        names = sorted(os.listdir(folder or "."))
    except OSError:
        return []
    places = ((name, place_of(name.removesuffix(suffix))) for name in names if name.endswith(suffix))
    return [os.path.join(folder, name) for name, place in places if place and place[0] == wanted]


def check_place(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuse (CannotCreate) a destination of a set as `check_destination` does one of a file, and where there are parts
    of another set already."""
    path = os.fspath(path)
    check_destination(path, overwrite=overwrite)
    for part in parts_there(path):
        check_destination(part, overwrite=overwrite)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove what a process that died while it cut parts of `path` left of them."""
    for part in parts_there(os.fspath(path), _UNFINISHED):
        file = AtomicFile(part.removesuffix(_UNFINISHED), overwrite=True)
        if os.path.exists(file.journal):
            continue  # a conversion of this very name can go on with it
        try:
            file.begin()  # takes the place of one without an owner, and refuses where there is one
        finally:
            file.abandon()


def publish_parts(
    whole: AtomicFile,
    metadata: md.Metadata,
    documents: Sequence[md.Metadata],
    ready: Callable[[Reader], None],
    step: Callable[[int], None],
    *,
    overwrite: bool,
) -> None:
    """Cut `whole`, of which `metadata` is the document and all but the header is written, into parts and publish them.

    `step` is called with numbers of bytes that were cut; `ready` with a reader of the whole set, once every byte of it
    was read back. When this raises nothing is published, and `whole` is shorter.
    """
    files = [
        AtomicFile(part_name(whole.path, index, len(documents)), overwrite=overwrite) for index in range(len(documents))
    ]
    try:
        for file in files:
            file.begin()
        headers = _cut(whole, metadata, documents, files, step)
        with ExitStack() as opened:
            readers = []
            for file, header in zip(files, headers, strict=True):
                readers.append(opened.enter_context(Reader(InputFile(file.part, file.path), header=header)))
                _read_back(readers[-1])
            ready(SetReader(readers))
        for file, header in zip(files, headers, strict=True):
            file.commit(header)
        check_place(whole.path, overwrite=overwrite)  # again: it took long
        _publish(whole, files)
    finally:
        _abandon(files)


@uninterrupted
def _abandon(files: list[AtomicFile]) -> None:
    for file in files:
        file.abandon()


def _cut(
    whole: AtomicFile,
    metadata: md.Metadata,
    documents: Sequence[md.Metadata],
    files: list[AtomicFile],
    step: Callable[[int], None],
) -> list[bytes]:
    """Write all of each part but its header, which is returned, and take it off the end of `whole`."""
    sources = {(kind, owner, s.kind): offset for (kind, owner, s), offset in _placed(metadata)}
    for (kind, owner, section), offset in _placed(documents[0]):
        if kind == "asset":  # they are behind all tensors, in the file that gets shorter
            _copy(whole, sources[kind, owner, section.kind], files[0], offset, section)
    headers = []
    for document, file in reversed(list(zip(documents, files, strict=True))):
        text, header = md.encode(document), header_of(document)
        file.reserve(header.file_len)
        first = None
        for (kind, owner, section), offset in _placed(document):
            source = sources[kind, owner, section.kind]
            if kind == "tensor" and first is None:
                first = source
            if kind != "asset":
                _copy(whole, source, file, offset, section)
            step(section.length)
        file.write(header.meta_off, text)
        file.sync(header.file_len)
        if first is not None:
            whole.cut(first)
        headers.append(header.encode())
    return headers[::-1]


def _placed(metadata: md.Metadata) -> list[tuple[tuple[str, str, md.Section], int]]:
    sections = list(md.all_sections(metadata))
    offsets, _ = place_sections(section.length for _, _, section in sections)
    return list(zip(sections, offsets, strict=True))


def _copy(source: AtomicFile, start: int, target: AtomicFile, offset: int, section: md.Section) -> None:
    digest = hashlib.sha256()
    for at in range(0, section.length, _PIECE):
        piece = source.read(start + at, min(_PIECE, section.length - at))
        digest.update(piece)
        target.write(offset + at, piece)
    if digest.hexdigest() != section.sha256:
        raise SelfCheckFailed(f"a section of kind {section.kind} does not read back", file=source.part)


def _read_back(reader: Reader) -> None:
    """Check every byte of a part. What its bytes decode to was checked in the whole file."""
    for kind, owner, section in md.all_sections(reader.metadata):
        for _ in reader.iter_section(kind, owner, section.kind):
            pass


@uninterrupted
def _publish(whole: AtomicFile, files: list[AtomicFile]) -> None:
    """Give the parts their names, the first one last: without it nobody takes the others for a model. Where that fails
    on the way, those that have theirs are removed."""
    try:
        for file in reversed(files):
            file.rename()
    except HlwqError:
        for file in files:
            if file.published:
                with suppress(OSError):
                    OPS.unlink(file.path)
        raise
    whole.published = True
    whole.abandon()
    sync_folder(whole.path)


def remove_replaced(path: str, documents: Sequence[md.Metadata]) -> None:
    """After `documents` were published at `path` in place of whatever was there, remove the rest of that."""
    count = len(documents)
    written = {path} if count == 1 else {part_name(path, index, count) for index in range(count)}
    for old in [path, *parts_there(path)]:
        if old not in written:
            try:
                OPS.unlink(old)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise IoFailure(f"replaced, but cannot remove: {error.strerror}", file=old) from None
