"""A new file that appears whole or not at all.

Everything is written to OUT.part beside OUT, under a lock on OUT.part itself, and renamed at the end. The
lock is taken on the open file, so it needs no third file and ends with the process, however that ends.
A leftover of a dead process is continued, when that is asked for and it has no other name, or else unlinked;
it is never truncated: it may be a hard link to something dear. What makes OUT.part or gives it another name is
uninterrupted, so that this object knows of it; whoever uses it sees to it that one of its three ends comes.

Beside it OUT.part.journal may stand, written by others, which says what of OUT.part is good. It means nothing
without OUT.part, and goes when that goes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading

from .errors import CannotCreate, HlwqError, Internal, IoFailure, Locked, SelfCheckFailed
from .file_ops import OPS
from .interrupts import uninterrupted

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_destination(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuse (CannotCreate) a destination that exists, or with `overwrite` one that is no regular file."""
    path = os.fspath(path)
    if not os.path.basename(path):
        raise CannotCreate("names no file", file=path or "(empty)", hint="choose another output")
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        status = None
    except (OSError, ValueError) as error:
        raise _cannot_create(path, error) from None
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise CannotCreate("exists and is not a regular file", file=path, hint="choose another output")
    if status is not None and not overwrite:
        raise CannotCreate("exists already", file=path, hint="choose another output or pass --overwrite")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise CannotCreate("its folder does not exist", file=path, hint="create the folder first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CannotCreate("its folder is not writable", file=path)


class AtomicFile:
    """OUT.part, open for reading and writing by position from `begin` until `publish`, `abandon` or `leave`."""

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool) -> None:
        self.path = os.fspath(path)
        self.part = self.path + ".part"
        self.journal = self.part + ".journal"
        self._overwrite = overwrite
        self.resumed = False
        self.published = False
        self._fd = -1
        self._owner = -1
        self._writing = 0  # threads other than the owner that do
        self._idle = threading.Condition()

    @uninterrupted
    def begin(self, *, resume: bool = False) -> None:
        """Make OUT.part. With `resume` one that a dead process left with a journal is opened as it is, and `resumed` is
        True."""
        check_destination(self.path, overwrite=self._overwrite)
        self._owner = threading.get_ident()
        self._fd = self._open_locked(resume)
        if not self.resumed:
            self._remove_journal()

    @uninterrupted
    def restart(self) -> None:
        """Throw away what a resumed file holds and begin a new one."""
        try:
            OPS.unlink(self.part)
        except OSError as error:
            raise self._cannot_replace(error) from None
        self._close()
        self.resumed = False
        self._fd = self._open_locked(False)
        self._remove_journal()

    def _remove_journal(self) -> None:
        try:
            OPS.unlink(self.journal)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise CannotCreate(f"cannot remove: {error.strerror}", file=self.journal, hint="remove it") from None

    def _open_locked(self, resume: bool) -> int:
        for _ in range(8):  # every round but the first follows a race with another process
            stale = self._lock_stale()
            if stale is not None:
                if resume and os.path.exists(self.journal) and os.fstat(stale).st_nlink == 1:
                    self.resumed = True
                    return stale
                self._unlink_stale(stale)
            try:
                fd = OPS.open(self.part, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                continue
            except OSError as error:
                raise _cannot_create(self.part, error) from None
            try:
                OPS.lock(fd)
                if self._is_ours(fd):
                    return fd
            except BlockingIOError:
                pass
            except OSError as error:  # a file system without locks: O_EXCL still lets one of us in
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    return fd
                with contextlib.suppress(OSError):
                    if self._is_ours(fd):
                        OPS.unlink(self.part)
                OPS.close(fd)
                raise _cannot_create(self.part, error) from None
            OPS.close(fd)
        raise self._locked()

    def _lock_stale(self) -> int | None:
        """The .part of a process that died, locked by us; None when there is none, Locked when its process lives, or
        may live, because locks do nothing here."""
        try:
            fd = OPS.open(self.part, os.O_RDWR | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._cannot_replace(error) from None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise CannotCreate("exists and is not a regular file", file=self.part, hint="remove it")
            OPS.lock(fd)
            if self._is_ours(fd) and self._keeps_others_out():
                return fd
        except BlockingIOError:
            OPS.close(fd)
            raise self._locked() from None
        except OSError as error:
            OPS.close(fd)
            raise self._cannot_replace(error) from None
        except BaseException:
            OPS.close(fd)
            raise
        OPS.close(fd)
        return None

    def _keeps_others_out(self) -> bool:
        """Whether the lock that we hold is one: there are file systems where all get it, and a .part that looks dead
        may be alive. Then only the creation of .part tells who comes first, and only people can tell who died."""
        try:
            other = OPS.open(self.part, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            OPS.lock(other)
        except BlockingIOError:
            return True
        finally:
            OPS.close(other)
        raise Locked(
            "is there, and locks do nothing on this file system: another process may be writing it",
            file=self.part,
            hint="remove it if none does",
        )

    def _cannot_replace(self, error: OSError) -> CannotCreate:
        return CannotCreate(f"cannot replace: {error.strerror}", file=self.part, hint="remove it")

    def _unlink_stale(self, fd: int) -> None:
        try:
            OPS.unlink(self.part)
        except OSError as error:
            raise self._cannot_replace(error) from None
        finally:
            OPS.close(fd)

    def _is_ours(self, fd: int) -> bool:
        """Whether the path still leads to the file that we hold the lock of."""
        try:
            return os.path.samestat(os.fstat(fd), os.lstat(self.part))
        except FileNotFoundError:
            return False

    def _appeared(self) -> CannotCreate:
        return CannotCreate("appeared while the conversion ran", file=self.path)

    def _locked(self) -> Locked:
        return Locked("another process is writing this output", file=self.part, hint="wait for it and try again")

    def reserve(self, size: int) -> None:
        """Ask the file system for `size` bytes now, so that a full disk shows at the start."""
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            OPS.reserve(self._fd, size)
        except OSError as error:
            if error.errno in _FULL:
                raise self._failed(error, size) from None
            status = os.statvfs(os.path.dirname(self.path) or ".")  # cannot reserve here: at least look
            if status.f_bavail * status.f_frsize < size:
                raise self._failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), size) from None

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at `offset`, from any thread. The file is not closed before other threads than the one
        that began it are through: its number may then belong to another file."""
        if threading.get_ident() == self._owner:  # it cannot close and write at once, and signals may interrupt it
            self._write(offset, data)
            return
        with self._idle:
            if self._fd < 0:
                raise Internal("written to when it was closed", file=self.part)
            self._writing += 1
        try:
            self._write(offset, data)
        finally:
            with self._idle:
                self._writing -= 1
                self._idle.notify_all()

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        try:
            while view:
                written = OPS.write(self._fd, view, offset)
                offset += written
                view = view[written:]
        except OSError as error:
            raise self._failed(error, offset + len(view)) from None

    def read(self, offset: int, length: int) -> bytes:
        """What stands at `offset`; shorter at the end of the file."""
        try:
            return os.pread(self._fd, length, offset)
        except OSError as error:
            raise self._failed(error, 0) from None

    def cut(self, size: int) -> None:
        """Drop everything from `size` on."""
        try:
            OPS.truncate(self._fd, size)
        except OSError as error:
            raise self._failed(error, 0) from None

    def sync(self, size: int | None = None) -> None:
        """Force everything to disk, cutting the file to `size` first. A failed fsync is final."""
        try:
            if size is not None:
                OPS.truncate(self._fd, size)
            OPS.sync(self._fd)
        except OSError as error:
            raise self._failed(error, size or 0) from None

    def commit(self, header: bytes) -> None:
        """Write the commit record at the beginning, force everything to disk and read that record back."""
        self.write(0, header)
        self.sync()
        if self.read(0, len(header)) != header:
            raise SelfCheckFailed("the written header does not read back; nothing was published", file=self.path)

    def check_publishable(self) -> None:
        """Raise what `publish` would raise for what has come or gone meanwhile."""
        if not self._is_ours(self._fd):  # someone removed it, or one on another machine took it for dead
            raise self._locked()
        if self._overwrite:
            check_destination(self.path, overwrite=True)
        elif os.path.lexists(self.path):
            raise self._appeared()

    @uninterrupted
    def publish(self) -> None:
        """Give the synced file its name. Without `overwrite` an existing file is never replaced."""
        self.rename()
        sync_folder(self.path)

    def rename(self) -> None:
        """The first half of `publish`; the other is `sync_folder`."""
        self.check_publishable()
        try:
            if self._overwrite:
                OPS.replace(self.part, self.path)
            else:
                OPS.rename_new(self.part, self.path)
        except FileExistsError:
            raise self._appeared() from None
        except OSError as error:
            raise _cannot_create(self.path, error) from None
        self.published = True
        self._close()
        with contextlib.suppress(CannotCreate):  # it means nothing any more
            self._remove_journal()

    def abandon(self) -> None:
        """Remove OUT.part and its journal and close; after `publish` or `abandon` this does nothing."""
        if self._fd >= 0:
            with contextlib.suppress(OSError, CannotCreate):
                if self._is_ours(self._fd):
                    OPS.unlink(self.part)
                    self._remove_journal()
            self._close()

    def leave(self) -> None:
        """Close and keep OUT.part and its journal for a later run to resume."""
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            with self._idle:
                self._idle.wait_for(lambda: self._writing == 0)
                fd, self._fd = self._fd, -1
            OPS.close(fd)

    def _failed(self, error: OSError, needed: int) -> HlwqError:
        if error.errno in _FULL:
            status = os.statvfs(os.path.dirname(self.path) or ".")
            free = status.f_bavail * status.f_frsize
            return IoFailure(
                f"{error.strerror}: the file needs {needed} bytes, {free} more are free",
                file=self.part,
                hint="free space or choose another disk",
            )
        return IoFailure(f"cannot write: {error.strerror}", file=self.part)


def sync_folder(path: str) -> None:
    """Force the name of a published file to disk."""
    try:
        folder = OPS.open_folder(os.path.dirname(path) or ".")
        try:
            OPS.sync(folder)
        finally:
            OPS.close(folder)
    except OSError as error:
        raise IoFailure(
            f"published, but whether it survives a power cut is unconfirmed: {error.strerror}", file=path
        ) from None


def _cannot_create(path: str, error: OSError | ValueError) -> CannotCreate:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return CannotCreate(f"cannot create: {reason}", file=path)
