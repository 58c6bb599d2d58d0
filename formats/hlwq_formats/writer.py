"""Write a container: sections as they come, the metadata after them, the header last (spec section 9).

Until the header stands the file starts with 128 zero bytes, which no reader opens. Before it is written
the public reader has checked the finished file from disk.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType

from . import metadata as md
from .atomic import AtomicFile
from .cut import publish_parts
from .digest import PipelinedDigest
from .errors import BadData, HlwqError, Internal, SelfCheckFailed, UnsupportedFeature
from .interrupts import Gate, lift_gates, set_gates, uninterrupted
from .layout import HEADER_LEN, Header, align, make_header, place_sections
from .reader import Reader
from .sections import make_section

_PIECE = 1 << 20


class SectionWriter:
    """One section at a known place, written front to back and hashed on the way. Without a `length` it takes what
    comes, and nothing may be opened before it is done."""

    def __init__(self, writer: Writer, kind: md.Kind, offset: int, length: int | None) -> None:
        self._writer = writer
        self._kind = kind
        self._offset = self._position = offset
        self._length = length
        self._digest = PipelinedDigest()

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, items of one byte, to the section."""
        self.place(self._position - self._offset, data)
        self._digest.update(data)
        self._position += len(data)

    def place(self, start: int, data: bytes | memoryview) -> None:
        """Write `data` at byte `start` of the section, from any thread and in any order. All of it must be given to
        `count` too, in order."""
        if self._length is not None and start + len(data) > self._length:
            raise Internal(f"{self._kind} section overflows its {self._length} bytes")
        self._writer.put(self._offset + start, data)

    def count(self, data: bytes | memoryview) -> None:
        """Hash the next bytes of the section, which are written, before this returns."""
        self._digest.add(data)
        self._position += len(data)

    def shrink(self, following: Sequence[SectionWriter]) -> None:
        """Give back what was reserved and not written. What was written to the sections `following`, all of which are
        opened since, moves up."""
        self._length = self._position - self._offset
        self._writer.position = self._position
        for section in following:
            section._move(self._writer.advance(section._length or 0))

    def _move(self, offset: int) -> None:
        written = self._position - self._offset
        for start in range(0, written, _PIECE):
            data = self._writer.take(self._offset + start, min(_PIECE, written - start))
            self._writer.put(offset + start, data)
        self._offset, self._position = offset, offset + written

    def done(self) -> md.Section:
        """The entry of the finished section."""
        length = self._position - self._offset
        if self._length is None:
            self._writer.position = self._position
        elif length != self._length:
            raise Internal(f"{self._kind} section lacks {self._length - length} of {self._length} bytes")
        return md.Section(self._kind, length, self._digest.hexdigest())


class Writer:
    """A container in the making, within a `with`. Leaving that before `finish` has returned removes what was written.
    Leaving it by an interrupt when its journal tells how to go on, because it is `resumed` or `secured` was set, leaves
    OUT.part and the journal for a later run. In between, handlers of signals run as ever, but not within what must not
    be interrupted.

    Sections must be opened in the order of the file: signs, tensors by name with their kinds in order,
    assets by name. With `resume`, an OUT.part of a dead process is continued: `resumed` tells, and `holds` which of
    its sections are good.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, resume: bool = False) -> None:
        self._file = AtomicFile(path, overwrite=overwrite)
        self._overwrite = overwrite
        self._resume = resume
        self.part, self.journal = self._file.part, self._file.journal
        self.position = HEADER_LEN
        self.secured = False
        self._gates: dict[int, Gate] = {}

    def _begin(self) -> None:
        self._file.write(0, bytes(HEADER_LEN))

    @property
    def resumed(self) -> bool:
        """Whether OUT.part and a journal were there."""
        return self._file.resumed

    @property
    def published(self) -> bool:
        """Whether the file has its name."""
        return self._file.published

    def restart(self) -> None:
        """Throw away what is resumed, with its journal, and begin anew."""
        self._file.restart()
        self._begin()

    def holds(self, section: md.Section, offset: int) -> bool:
        """Whether the bytes at `offset` are this section's."""
        digest = hashlib.sha256()
        for start in range(0, section.length, _PIECE):
            digest.update(self._file.read(offset + start, min(_PIECE, section.length - start)))
        return digest.hexdigest() == section.sha256

    def reserve(self, size: int) -> None:
        """Ask for a disk that holds `size` bytes now, so that a full one shows at the start."""
        self._file.reserve(size)

    def flush(self) -> None:
        """Force what was written to disk."""
        self._file.sync()

    def take(self, position: int, length: int) -> bytes:
        """Read back bytes of a section."""
        return self._file.read(position, length)

    def advance(self, length: int) -> int:
        """The next place for a section, behind padding; what follows it follows `length` bytes."""
        offset = align(self.position)
        self._file.write(self.position, bytes(offset - self.position))
        self.position = offset + length
        return offset

    def put(self, position: int, data: bytes | memoryview) -> None:
        """Write bytes of a section, from any thread."""
        self._file.write(position, data)

    def open_section(self, kind: md.Kind, length: int | None) -> SectionWriter:
        """Take the next place for a section of `length` bytes, or for one that is as long as what will be written.
        Several of known length may be open at once."""
        return SectionWriter(self, kind, self.advance(length or 0), length)

    def write_section(self, kind: md.Kind, data: bytes, *, compress: bool = False) -> md.Section:
        """Write a whole section at once, compressed where that is asked for and pays."""
        section, stored = make_section(kind, data, compress=compress)
        self.open_section(kind, len(stored)).write(stored)
        return section

    def rewind(self, position: int) -> None:
        """Give back every section opened since `position` was the writer's `position`."""
        self.position = position

    def finish(self, metadata: md.Metadata, verify: Callable[[Reader], None] = Reader.verify) -> None:
        """`commit` and publish."""
        self.commit(metadata, verify)
        self.publish()

    def commit(self, metadata: md.Metadata, verify: Callable[[Reader], None] = Reader.verify) -> None:
        """Write the metadata, verify the file through the public reader and write the header: all but its name.

        A `verify` of one's own must read every section, best by several threads; it may raise SelfCheckFailed.
        """
        self._file.commit(self.prepare(metadata, verify))

    def prepare(self, metadata: md.Metadata, verify: Callable[[Reader], None] = Reader.verify) -> bytes:
        """`commit` without the header, which is returned: for `publish_parts`."""
        encoded = self._write_metadata(metadata).encode()
        try:
            with Reader(self._file.part, header=encoded, pipelined=False) as reader:
                verify(reader)
        except (BadData, UnsupportedFeature) as error:
            raise SelfCheckFailed(f"the written file does not read back: {error}; nothing was published") from error
        return encoded

    def publish_parts(
        self,
        metadata: md.Metadata,
        documents: Sequence[md.Metadata],
        ready: Callable[[Reader], None],
        step: Callable[[int], None],
    ) -> None:
        """Cut the prepared file into the parts of a set that `documents` describe, and publish those. The rest of the
        arguments are those of `cut.publish_parts`."""
        publish_parts(self._file, metadata, documents, ready, step, overwrite=self._overwrite)

    def check_publishable(self) -> None:
        """Raise what `publish` would raise for what has come or gone meanwhile."""
        self._file.check_publishable()

    def publish(self) -> None:
        """Give the committed file its name."""
        self._file.publish()

    def abandon(self) -> None:
        """Remove what was written, before the `with` is left."""
        self._file.abandon()

    def _write_metadata(self, metadata: md.Metadata) -> Header:
        document = md.encode(metadata)
        if place_sections(section.length for _, _, section in md.all_sections(metadata))[1] != self.position:
            raise Internal("the metadata does not list the sections that were written")
        header = make_header(self.position, document, hashlib.sha256(document).digest(), md.incompat_of(metadata))
        self._file.write(self.position, bytes(header.meta_off - self.position))
        self._file.write(header.meta_off, document)
        self._file.sync(header.file_len)
        return header

    def __enter__(self) -> Writer:
        try:
            set_gates(self._gates)
            self._file.begin(resume=self._resume)
            self._begin()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self  # nothing is called between here and the `with`, so no handler runs

    @uninterrupted
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, Exception) and (self.secured or self.resumed):
            self._file.leave()
        else:
            self._file.abandon()
        lift_gates(self._gates)


class Writers:
    """Several writers that are left together, as a single one is, when this `with` is left. Signals are not handled
    between two of them, and their files get their names together."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    @uninterrupted
    def enter(self, writer: Writer) -> Writer:
        """Begin a file."""
        return self._stack.enter_context(writer)

    @uninterrupted
    def publish(self, committed: Sequence[Writer]) -> None:
        """Give all committed files their names, or none when something fails before the first has its own.

        What fails later is raised when the others have theirs.
        """
        for writer in committed:
            writer.check_publishable()
        failure: HlwqError | None = None
        for writer in committed:
            try:
                writer.publish()
            except HlwqError as error:
                failure = failure or error
                if not any(one.published for one in committed):
                    break
        if failure is not None:
            raise failure

    def __enter__(self) -> Writers:
        return self

    @uninterrupted
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)  # the first last: it holds the signals back
