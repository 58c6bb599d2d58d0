"""Every operation by which a writer changes the file system, in one object: a test that replaces `before` can
count them, and fail or kill at any of them."""

from __future__ import annotations

import ctypes
import errno
import os
import sys

_RENAME_NOREPLACE = 1
_RENAME_EXCL = 4
_AT_FDCWD = -100


class FileOps:
    """Thin names for system calls; each announces itself to `before` first."""

    def before(self, operation: str) -> None:
        """Called before each operation with its name. Does nothing."""

    def open(self, path: str, flags: int) -> int:
        """Open a file of the writer's own, never through a symlink, never inherited."""
        self.before("open")
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

    def open_folder(self, path: str) -> int:
        """Open a folder, which may be a symlink, to sync its entries."""
        self.before("open")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def lock(self, fd: int) -> None:
        """Take the exclusive lock on an open file, or raise BlockingIOError at once."""
        import fcntl  # not on Windows, which only reads

        self.before("lock")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def reserve(self, fd: int, size: int) -> None:
        """Ask the file system for the first `size` bytes."""
        self.before("reserve")
        os.posix_fallocate(fd, 0, size)

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        """Write some of `data`; return how much."""
        self.before("write")
        return os.pwrite(fd, data, offset)

    def truncate(self, fd: int, size: int) -> None:
        """Cut or extend a file."""
        self.before("truncate")
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        """Force a file, or a folder's entries, to disk."""
        self.before("sync")
        os.fsync(fd)

    def unlink(self, path: str) -> None:
        """Remove a name."""
        self.before("unlink")
        os.unlink(path)

    def replace(self, source: str, target: str) -> None:
        """Rename over whatever is there."""
        self.before("replace")
        os.replace(source, target)

    def rename_new(self, source: str, target: str) -> None:
        """Rename within a folder, failing with FileExistsError rather than replacing `target`."""
        self.before("rename")
        libc = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(source), os.fsencode(target)
        if sys.platform == "darwin":  # pragma: no cover
            result = libc.renamex_np(*names, ctypes.c_uint(_RENAME_EXCL))
        elif hasattr(libc, "renameat2"):
            result = libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_NOREPLACE))
        else:
            result = -1
            ctypes.set_errno(errno.ENOSYS)
        if result == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise OSError(code, os.strerror(code), target)
        os.link(source, target)  # the file system lacks the flag: a link cannot replace either
        os.unlink(source)

    def close(self, fd: int) -> None:
        """Close; not announced, because it can neither lose nor keep anything that was synced."""
        os.close(fd)


OPS = FileOps()
