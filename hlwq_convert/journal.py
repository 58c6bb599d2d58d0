"""OUT.part.journal: which tensors of an unfinished file are done, so that the same command can go on from there.

One line for each tensor, written after its sections are on disk. A line starts with a digest of itself and of the
line before, so that whatever happened to the file, what is believed of it is a beginning of what was written.
The sections themselves are hashed again before they are believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time

import msgspec

from hlwq_formats import metadata as md
from hlwq_formats.errors import HlwqError, IoFailure
from hlwq_formats.file_ops import OPS
from hlwq_formats.files import InputFile
from hlwq_formats.interrupts import uninterrupted

from .inspection import TensorReport

CHECKPOINT_SECONDS = 60.0
CHECKPOINT_BYTES = 1 << 30
"""A checkpoint is due after so much time or so many source bytes: what an interrupted conversion can lose."""

_DIGEST = 32  # hexadecimal digits at the start of a line
_MAX_BYTES = 1 << 30


class Fingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What must not have changed since: a digest of each."""

    tool: str
    options: str
    source: str

    def difference(self, other: Fingerprint) -> str | None:
        """What differs, in words."""
        names = {"tool": "the tool's version", "options": "the options", "source": "the source"}
        changed = [words for name, words in names.items() if getattr(self, name) != getattr(other, name)]
        return " and ".join(changed) or None


class Done(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stored tensor: its entry, and for a quantized one what was measured on it."""

    tensor: md.StoredTensor
    report: TensorReport | None = None
    checksums: list[int] = []


class Journal:
    """The journal beside an OUT.part whose lock is held, which also removes it."""

    def __init__(self, path: str, fingerprint: Fingerprint) -> None:
        self.path = path
        self._fingerprint = fingerprint
        self._fd = -1
        self._ends = [(b"", 0)]  # digest and end of each line, after none, one, two ...
        self._waiting: list[Done] = []
        self._bytes = 0
        self._last = time.monotonic()

    def load(self) -> tuple[list[Done], str | None]:
        """The tensors that an earlier run of the same conversion stored, and why they are of no use, if so."""
        try:
            with InputFile(self.path) as file:
                text = file.read(0, min(file.size, _MAX_BYTES))
        except HlwqError:
            return [], None
        lines, ends = [], [(b"", 0)]
        for line in text.splitlines(keepends=True):
            chain, end = ends[-1]
            digest, body = line[:_DIGEST], line[_DIGEST + 1 : -1]
            if line != digest + b" " + body + b"\n" or digest != _link(chain, body):
                break
            lines.append(body)
            ends.append((digest, end + len(line)))
        try:
            earlier = msgspec.json.decode(lines[0], type=Fingerprint)
            done = [msgspec.json.decode(line, type=Done) for line in lines[1:]]
        except (IndexError, msgspec.MsgspecError):
            return [], "its journal is damaged"
        if (difference := self._fingerprint.difference(earlier)) is not None:
            return [], f"{difference} changed"
        if done:
            self._ends = ends
        return done, None

    @uninterrupted
    def resume(self, kept: int) -> None:
        """Go on after the first `kept` of the tensors that were loaded, forgetting the others."""
        self._ends = self._ends[: kept + 2]
        try:
            self._fd = OPS.open(self.path, os.O_WRONLY)
            OPS.truncate(self._fd, self._ends[-1][1])
        except OSError as error:
            raise IoFailure(f"cannot write: {error.strerror}", file=self.path) from None

    def note(self, done: Done, source_bytes: int) -> bool:
        """Remember a stored tensor; return whether a checkpoint is due."""
        self._waiting.append(done)
        self._bytes += source_bytes
        return self._bytes >= CHECKPOINT_BYTES or time.monotonic() - self._last >= CHECKPOINT_SECONDS

    @uninterrupted
    def checkpoint(self) -> None:
        """Write down what was noted. The sections must be on disk already."""
        if not self._waiting:
            return
        try:
            if self._fd < 0:
                self._fd = OPS.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                self._write(msgspec.json.encode(self._fingerprint))
            for done in self._waiting:
                self._write(msgspec.json.encode(done))
            OPS.sync(self._fd)
        except OSError as error:
            raise IoFailure(f"cannot write: {error.strerror}", file=self.path) from None
        self._waiting.clear()
        self._bytes, self._last = 0, time.monotonic()

    def _write(self, body: bytes) -> None:
        chain, end = self._ends[-1]
        digest = _link(chain, body)
        view = memoryview(digest + b" " + body + b"\n")
        while view:
            written = OPS.write(self._fd, view, end)
            end += written
            view = view[written:]
        self._ends.append((digest, end))

    def close(self) -> None:
        """Close the journal."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                OPS.close(self._fd)
            self._fd = -1


def _link(chain: bytes, body: bytes) -> bytes:
    return hashlib.sha256(chain + body).hexdigest()[:_DIGEST].encode()
