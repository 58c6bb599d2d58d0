"""What a disk may hold after a power cut: every operation of a writer is recorded, and replayed without some of those
that no fsync had secured."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hlwq_formats.file_ops import OPS

FOLDER = -1  # stands for the folder among the numbers of files


@dataclass(frozen=True)
class Event:
    """An operation on a file: write (at `offset`), size, sync; or on the folder: create, unlink, rename, sync."""

    kind: str
    file: int
    name: str = ""
    target: str = ""
    offset: int = 0
    data: bytes = b""


class Recorder:
    """Takes down what OPS does in one folder, doing it all the same."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self._folder = os.stat(folder).st_ino
        self._inodes: dict[int, int] = {}  # inode -> number of the file
        self._count = 0
        for name in ("open", "write", "reserve", "truncate", "sync", "unlink", "replace", "rename_new"):
            monkeypatch.setattr(OPS, "_real_" + name, getattr(OPS, name), raising=False)
            monkeypatch.setattr(OPS, name, getattr(self, "_" + name), raising=False)

    def _number(self, fd: int) -> int:
        inode = os.fstat(fd).st_ino
        return FOLDER if inode == self._folder else self._inodes[inode]

    def _add(self, kind: str, file: int, path: str = "", target: str = "", offset: int = 0, data: bytes = b"") -> None:
        self.events.append(Event(kind, file, os.path.basename(path), os.path.basename(target), offset, data))

    def _open(self, path: str, flags: int) -> int:
        fd: int = OPS._real_open(path, flags)  # type: ignore[attr-defined]
        if flags & os.O_CREAT:
            self._inodes[os.fstat(fd).st_ino] = self._count
            self._add("create", self._count, path)
            self._count += 1
        return fd

    def _write(self, fd: int, data: memoryview, offset: int) -> int:
        written: int = OPS._real_write(fd, data, offset)  # type: ignore[attr-defined]
        self._add("write", self._number(fd), offset=offset, data=bytes(data[:written]))
        return written

    def _reserve(self, fd: int, size: int) -> None:
        OPS._real_reserve(fd, size)  # type: ignore[attr-defined]
        self._add("size", self._number(fd), offset=size)

    def _truncate(self, fd: int, size: int) -> None:
        OPS._real_truncate(fd, size)  # type: ignore[attr-defined]
        self._add("size", self._number(fd), offset=size)

    def _sync(self, fd: int) -> None:
        self._add("sync", self._number(fd))  # first: what another thread writes meanwhile is not secured
        OPS._real_sync(fd)  # type: ignore[attr-defined]

    def _unlink(self, path: str) -> None:
        OPS._real_unlink(path)  # type: ignore[attr-defined]
        self._add("unlink", FOLDER, path)

    def _replace(self, source: str, target: str) -> None:
        OPS._real_replace(source, target)  # type: ignore[attr-defined]
        self._add("rename", FOLDER, source, target)

    def _rename_new(self, source: str, target: str) -> None:
        OPS._real_rename_new(source, target)  # type: ignore[attr-defined]
        self._add("rename", FOLDER, source, target)


def after_power_cuts(events: list[Event], before: dict[str, bytes], seed: int = 0) -> Iterator[dict[str, bytes]]:
    """Name -> content of the folder, for cuts after each event: nothing unsynced survived, all of it, or some, torn
    and in no order. Changes of names survive in their order, as journals keep them."""
    chance = random.Random(seed)
    for end in range(len(events) + 1):
        done = events[:end]
        last = {event.file: i for i, event in enumerate(done) if event.kind == "sync"}
        for share in (0.0, 1.0, 0.3, 0.7):
            names = [e for e in done if e.kind in ("create", "unlink", "rename")]
            secured = sum(done.index(e) < last.get(FOLDER, 0) for e in names)
            kept = names[: secured + round(share * (len(names) - secured))]
            files: dict[int, bytearray] = {}
            for i, event in enumerate(done):
                if event.kind not in ("write", "size"):
                    continue
                content = files.setdefault(event.file, bytearray())
                if i < last.get(event.file, 0) or chance.random() < share:
                    torn = 0 < share < 1 and i > last.get(event.file, 0) and chance.random() < 0.5
                    _apply(content, event, chance.randrange(len(event.data) + 1) if torn else len(event.data))
            yield _named(kept, files, before)


def _apply(content: bytearray, event: Event, count: int) -> None:
    if event.kind == "size":
        del content[event.offset :]
        content.extend(bytes(event.offset - len(content)))
    else:
        content.extend(bytes(max(0, event.offset - len(content))))
        content[event.offset : event.offset + count] = event.data[:count]


def _named(changes: list[Event], files: dict[int, bytearray], before: dict[str, bytes]) -> dict[str, bytes]:
    names: dict[str, bytes] = dict(before)
    for event in changes:
        if event.kind == "create":
            names[event.name] = bytes(files.get(event.file, b""))
        elif event.kind == "unlink":
            names.pop(event.name)
        else:
            names[event.target] = names.pop(event.name)
    return names
