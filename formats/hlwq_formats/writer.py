"""Write a container: sections as they come, the metadata after them, the header last (spec section 9).

Until the header stands the file starts with 128 zero bytes, which no reader opens. Before it is written
the public reader has checked the finished file from disk.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from types import TracebackType

from . import metadata as md
from .atomic import AtomicFile
from .digest import PipelinedDigest
from .errors import BadData, Internal, SelfCheckFailed, UnsupportedFeature
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
        self._digest = PipelinedDigest(length)

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, items of one byte, to the section."""
        if self._length is not None and self._position + len(data) > self._offset + self._length:
            raise Internal(f"{self._kind} section overflows its {self._length} bytes")
        self._writer.put(self._position, data)
        self._digest.update(data)
        self._position += len(data)

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

    def __init__(
        self, path: str | os.PathLike[str], *, overwrite: bool = False, reserve: int = 0, resume: bool = False
    ) -> None:
        self._file = AtomicFile(path, overwrite=overwrite)
        self._reserve = reserve
        self._resume = resume
        self.part, self.journal = self._file.part, self._file.journal
        self.position = HEADER_LEN
        self.secured = False
        self._gates: dict[int, Gate] = {}

    def _begin(self) -> None:
        self._file.reserve(self._reserve)
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

    def flush(self) -> None:
        """Force what was written to disk."""
        self._file.sync()

    def put(self, position: int, data: bytes | memoryview) -> None:
        """Write bytes of a section."""
        self._file.write(position, data)

    def open_section(self, kind: md.Kind, length: int | None) -> SectionWriter:
        """Take the next place for a section of `length` bytes, or for one that is as long as what will be written.
        Several of known length may be open at once."""
        offset = align(self.position)
        self._file.write(self.position, bytes(offset - self.position))
        self.position = offset + (length or 0)
        return SectionWriter(self, kind, offset, length)

    def write_section(self, kind: md.Kind, data: bytes, *, compress: bool = False) -> md.Section:
        """Write a whole section at once, compressed where that is asked for and pays."""
        section, stored = make_section(kind, data, compress=compress)
        self.open_section(kind, len(stored)).write(stored)
        return section

    def rewind(self, position: int) -> None:
        """Give back every section opened since `position` was the writer's `position`."""
        self.position = position

    def finish(self, metadata: md.Metadata, verify: Callable[[Reader], None] = Reader.verify) -> None:
        """Write the metadata, verify the file through the public reader, commit and publish.

        A `verify` of one's own must read every section; it may raise SelfCheckFailed.
        """
        encoded = self._write_metadata(metadata).encode()
        try:
            with Reader(self._file.part, header=encoded) as reader:
                verify(reader)
        except (BadData, UnsupportedFeature) as error:
            raise SelfCheckFailed(f"the written file does not read back: {error}; nothing was published") from error
        self._file.write(0, encoded)
        self._file.sync()
        if self._file.read(0, HEADER_LEN) != encoded:
            raise SelfCheckFailed("the written header does not read back; nothing was published")
        self._file.publish()

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
