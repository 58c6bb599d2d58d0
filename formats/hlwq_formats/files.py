"""Reading by position from regular files only: what every reader of this package stands on."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from .errors import IoFailure, MissingInput, SourceChanged

Memory = Callable[[int], memoryview]
"""Gives writable memory of so many bytes, for something to be read to."""

_SEEK_LOCK = threading.Lock()


def new_memory(size: int) -> memoryview:
    """Memory of its own for each call."""
    return memoryview(bytearray(size))


class ByteSource(Protocol):
    """What a container is read from: bytes by position. `name` stands for it in errors."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def size(self) -> int: ...  # noqa: D102

    def read(self, offset: int, length: int, /) -> bytes:
        """Exactly `length` bytes from `offset`, or an HlwqError; from any thread."""
        ...

    def close(self) -> None:
        """Let go of it; twice is once."""
        ...


class InputFile:
    """A regular file opened for positioned reads from any thread.

    Opening never blocks on a FIFO and never follows to a device; all failures are MissingInput (66) or
    IoFailure (74). `identity` tells whether a path still leads to the same, unchanged file.
    """

    def __init__(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        self.path = os.fspath(path)
        self.name = self.path if name is None else name
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            self._fd = os.open(self.path, flags)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise MissingInput(f"cannot open: {reason}", file=self.name) from None
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise MissingInput("not a regular file", file=self.name)
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; SourceChanged (75) when the file ends before."""
        parts = []
        wanted = length
        while wanted:
            try:
                part = self._pread(min(wanted, 1 << 30), offset)
            except OSError as error:
                raise IoFailure(f"cannot read at {offset}: {error.strerror}", file=self.name) from None
            if not part:
                raise self._cut(wanted, offset)
            parts.append(part)
            offset += len(part)
            wanted -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill writable bytes from `offset`: `read` without new memory, which takes as long as the reading itself."""
        if not hasattr(os, "preadv"):
            buffer[:] = self.read(offset, len(buffer))
            return
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done : done + (1 << 30)]], offset + done)
            except OSError as error:
                raise IoFailure(f"cannot read at {offset + done}: {error.strerror}", file=self.name) from None
            if not count:
                raise self._cut(len(buffer) - done, offset + done)
            done += count

    def _cut(self, wanted: int, offset: int) -> SourceChanged:
        return SourceChanged(f"{wanted} bytes at {offset} are gone: the file was cut while it was read", file=self.name)

    def _pread(self, length: int, offset: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._fd, length, offset)
        with _SEEK_LOCK:  # Windows has no pread
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.read(self._fd, length)

    def close(self) -> None:
        """Close the file; twice is once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> InputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
