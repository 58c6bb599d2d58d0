"""The rarer ways in which a new file cannot be made: races, file systems without locks, failures of each call."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hlwq_formats.atomic import AtomicFile, check_destination
from hlwq_formats.errors import CannotCreate, HlwqError, Internal, IoFailure, Locked
from hlwq_formats.file_ops import OPS


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "o.hlwq"


def fail(monkeypatch: pytest.MonkeyPatch, operation: str, code: int, times: int = 1 << 30) -> list[int]:
    """Let an operation fail with an error number so many times; return a list that grows with each failure."""
    honest: Callable[..., object] = getattr(OPS, operation)
    failures: list[int] = []

    def failing(*arguments: object) -> object:
        if len(failures) >= times:
            return honest(*arguments)
        failures.append(code)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(OPS, operation, failing)
    return failures


def start(out: Path, *, overwrite: bool = False, resume: bool = False) -> AtomicFile:
    file = AtomicFile(out, overwrite=overwrite)
    file.begin(resume=resume)
    return file


def leave_part(out: Path, content: bytes = b"old") -> Path:
    part = Path(f"{out}.part")
    part.write_bytes(content)
    Path(f"{part}.journal").write_bytes(b"theirs")
    return part


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(out: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    fail(monkeypatch, "lock", code)
    file = start(out)
    file.write(0, b"new")
    file.sync()
    file.publish()
    assert out.read_bytes() == b"new"


def test_a_lock_that_fails_leaves_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "lock", errno.EIO)
    with pytest.raises(CannotCreate, match="Input/output error"):
        start(out)
    assert list(out.parent.iterdir()) == []


def test_a_lock_that_fails_when_another_took_the_place(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replaced(fd: int) -> None:
        os.unlink(f"{out}.part")
        leave_part(out, b"theirs")
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(OPS, "lock", replaced)
    with pytest.raises(CannotCreate):
        start(out)
    assert Path(f"{out}.part").read_bytes() == b"theirs"


def test_a_new_file_whose_lock_another_took(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = fail(monkeypatch, "lock", errno.EAGAIN)
    with pytest.raises(Locked):
        start(out)
    assert len(failures) == 2  # of the new file, then of what is now an old one


def test_a_part_that_keeps_being_replaced(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time it is locked, it is another file already."""
    leave_part(out)
    honest = OPS.lock

    def lock_and_lose(fd: int) -> None:
        honest(fd)
        os.unlink(f"{out}.part")
        leave_part(out)

    monkeypatch.setattr(OPS, "lock", lock_and_lose)
    with pytest.raises(Locked):
        start(out)


def test_a_part_that_vanishes_while_it_is_locked(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_part(out)
    honest = OPS.lock

    def lock_and_lose(fd: int) -> None:
        honest(fd)
        Path(f"{out}.part").unlink()
        monkeypatch.setattr(OPS, "lock", honest)

    monkeypatch.setattr(OPS, "lock", lock_and_lose)
    start(out, resume=True).abandon()
    assert list(out.parent.iterdir()) == []


def test_a_new_part_that_is_replaced_before_it_is_locked(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = OPS.lock

    def lock_and_lose(fd: int) -> None:
        honest(fd)
        Path(f"{out}.part").unlink()
        monkeypatch.setattr(OPS, "lock", honest)

    monkeypatch.setattr(OPS, "lock", lock_and_lose)
    start(out).abandon()
    assert list(out.parent.iterdir()) == []


def test_a_part_that_appears_in_between(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = OPS.open

    def open_after_another(path: str, flags: int) -> int:
        if flags & os.O_EXCL:
            leave_part(out, b"of a process that died at once")
            monkeypatch.setattr(OPS, "open", honest)
        return honest(path, flags)

    monkeypatch.setattr(OPS, "open", open_after_another)
    start(out).abandon()
    assert list(out.parent.iterdir()) == []


def test_another_failure_to_create(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = OPS.open

    def no_descriptors(path: str, flags: int) -> int:
        if flags & os.O_EXCL:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return honest(path, flags)

    monkeypatch.setattr(OPS, "open", no_descriptors)
    with pytest.raises(CannotCreate, match="Too many open files"):
        start(out)


@pytest.mark.parametrize("operation", ["open", "lock", "unlink"])
def test_an_old_part_that_cannot_be_had(out: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    part = leave_part(out)
    fail(monkeypatch, operation, errno.EACCES)
    with pytest.raises(CannotCreate, match="cannot replace: Permission denied; remove it"):
        start(out)
    assert part.read_bytes() == b"old"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_part_that_is_no_file(out: Path, make: Callable[[str], None]) -> None:
    make(f"{out}.part")
    with pytest.raises(CannotCreate):
        start(out)
    assert Path(f"{out}.part").exists()


def test_what_is_resumed_can_be_thrown_away(out: Path) -> None:
    leave_part(out)
    file = start(out, resume=True)
    assert file.resumed
    assert file.read(0, 10) == b"old"
    file.restart()
    assert not file.resumed
    assert file.read(0, 10) == b""
    file.leave()
    assert Path(f"{out}.part").exists()


def test_what_is_resumed_may_not_be_removable(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_part(out)
    file = start(out, resume=True)
    fail(monkeypatch, "unlink", errno.EPERM)
    with pytest.raises(CannotCreate, match="cannot replace"):
        file.restart()
    file.leave()


def test_a_failed_read(out: Path) -> None:
    file = start(out)
    with pytest.raises(IoFailure, match="Invalid argument"):
        file.read(-1, 1)
    file.abandon()
    file.abandon()
    assert list(out.parent.iterdir()) == []


def test_abandoning_what_another_took_removes_nothing(out: Path) -> None:
    file = start(out)
    Path(f"{out}.part").unlink()
    theirs = leave_part(out, b"theirs")
    file.abandon()
    assert theirs.read_bytes() == b"theirs"


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "", "no-such-folder/o.hlwq"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(HlwqError) as caught:
        check_destination(f"{tmp_path}/{name}", overwrite=False)
    assert caught.value.exit_status == 73


def test_a_platform_without_the_call_for_a_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a link gives the new name, which cannot replace anything either."""
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    (tmp_path / "a").write_text("a")
    OPS.rename_new(f"{tmp_path}/a", f"{tmp_path}/b")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    (tmp_path / "a").write_text("a2")
    with pytest.raises(FileExistsError):
        OPS.rename_new(f"{tmp_path}/a", f"{tmp_path}/b")
    assert (tmp_path / "b").read_text() == "a"


def test_a_folder_that_may_not_be_written_to(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # for root every folder is writable
    with pytest.raises(CannotCreate, match="its folder is not writable"):
        start(out)


@pytest.mark.parametrize("resume", [False, True])
def test_a_part_whose_lock_cannot_be_tried_is_left(out: Path, monkeypatch: pytest.MonkeyPatch, resume: bool) -> None:
    part = leave_part(out)
    honest, calls = OPS.open, []

    def only_once(path: str, flags: int) -> int:
        calls.append(flags)
        if len(calls) == 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return honest(path, flags)

    monkeypatch.setattr(OPS, "open", only_once)
    with pytest.raises(CannotCreate, match="Too many open files"):
        start(out, resume=resume)
    assert part.read_bytes() == b"old"


def test_a_part_that_vanishes_while_its_lock_is_tried(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = leave_part(out)
    honest, calls = OPS.open, []

    def gone_the_second_time(path: str, flags: int) -> int:
        calls.append(flags)
        if len(calls) == 2:
            part.unlink()
        return honest(path, flags)

    monkeypatch.setattr(OPS, "open", gone_the_second_time)
    start(out).abandon()
    assert list(out.parent.iterdir()) == []


def test_a_part_without_a_journal_is_not_resumed(out: Path) -> None:
    leave_part(out)
    Path(f"{out}.part.journal").unlink()
    file = start(out, resume=True)
    assert not file.resumed
    assert file.read(0, 10) == b""
    file.abandon()


def test_a_journal_that_cannot_be_removed_is_said(out: Path) -> None:
    Path(f"{out}.part.journal").mkdir()
    file = AtomicFile(out, overwrite=False)
    with pytest.raises(CannotCreate, match=r"journal: cannot remove: .*; remove it"):
        file.begin()
    file.abandon()
    assert [path.name for path in out.parent.iterdir()] == ["o.hlwq.part.journal"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_put_in_our_place_is_not_published(out: Path, overwrite: bool) -> None:
    file = start(out, overwrite=overwrite)
    file.write(0, b"ours")
    Path(f"{out}.part").unlink()
    theirs = leave_part(out, b"theirs")
    with pytest.raises(Locked):
        file.publish()
    file.abandon()
    assert not out.exists()
    assert theirs.read_bytes() == b"theirs"


def test_what_appears_at_the_last_moment_is_left_alone(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = start(out)
    file.sync()
    honest = file.check_publishable

    def look() -> None:
        honest()
        out.write_bytes(b"of another")

    monkeypatch.setattr(file, "check_publishable", look)
    with pytest.raises(CannotCreate, match="appeared while"):
        file.publish()
    assert out.read_bytes() == b"of another"
    file.abandon()
    assert list(out.parent.iterdir()) == [out]


def test_a_system_that_cannot_reserve(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    file = start(out)
    file.reserve(1 << 60)  # the writes have to notice
    file.abandon()
    assert list(out.parent.iterdir()) == []


def test_a_file_is_not_closed_while_another_thread_writes(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may belong to another file by then."""
    file = start(out)
    entered, leave, honest, events = threading.Event(), threading.Event(), OPS.write, []

    def slow(fd: int, data: memoryview, offset: int) -> int:
        entered.set()
        assert leave.wait(10)
        events.append("written")
        return honest(fd, data, offset)

    monkeypatch.setattr(OPS, "write", slow)
    honest_close = OPS.close
    monkeypatch.setattr(OPS, "close", lambda fd: events.append("closed") or honest_close(fd))
    writer = threading.Thread(target=file.write, args=(0, b"new"))
    writer.start()
    assert entered.wait(10)
    threading.Timer(0.05, leave.set).start()
    file.abandon()
    writer.join()
    assert events == ["written", "closed"]
    with pytest.raises(Internal, match="closed"), ThreadPoolExecutor(1) as pool:
        pool.submit(file.write, 0, b"late").result()
    assert list(out.parent.iterdir()) == []
