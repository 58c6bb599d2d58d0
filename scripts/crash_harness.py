"""A small conversion that fails or dies at a chosen operation on the file system, and what must hold afterwards.

Shared by tests/test_crash.py and scripts/torture.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import hlwq_convert as h
from hlwq_convert import journal
from hlwq_formats.file_ops import OPS

MODES = ("fails once", "fails from then on", "dies")


def memory_folder() -> str | None:
    """A folder in memory, whose syncs cost nothing; None where there is none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None


class Died(BaseException):
    """The process is gone: no operation after this one happens, not even to clean up."""


class Fault:
    """Counts operations and makes one of them fail; `count` after a run is how many there were."""

    def __init__(self, mode: str = "", at: int = -1) -> None:
        self.mode, self.at, self.count = mode, at, 0

    def before(self, operation: str) -> None:
        """Stand-in for FileOps.before."""
        i = self.count
        self.count += 1
        if i < self.at or self.at < 0 or (self.mode == "fails once" and i > self.at):
            return
        if self.mode == "dies":
            raise Died
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@contextlib.contextmanager
def injected(fault: Fault) -> Iterator[None]:
    """Run with a fault and as many checkpoints as possible; close the descriptors of the dead, as the kernel would."""
    opened: list[int] = []
    real_open, real_seconds = OPS.open, journal.CHECKPOINT_SECONDS

    def open_and_remember(path: str, flags: int) -> int:
        opened.append(real_open(path, flags))
        return opened[-1]

    OPS.before, OPS.open = fault.before, open_and_remember  # type: ignore[method-assign]
    journal.CHECKPOINT_SECONDS = 0
    try:
        yield
    finally:
        del OPS.before, OPS.open
        journal.CHECKPOINT_SECONDS = real_seconds
        for fd in opened:
            with contextlib.suppress(OSError):
                os.close(fd)


def run(model: Path, out: Path, fault: Fault, *, overwrite: bool, split_size: int | None = None) -> str:
    """Convert under a fault; return "done", "died" or the name of the error."""
    with injected(fault):
        try:
            h.convert(model, out, workers=1, overwrite=overwrite, split_size=split_size)
        except Died:
            return "died"
        except h.HlwqError as error:
            assert error.exit_status in (73, 74, 75), error
            return type(error).__name__
    return "done"


def check(out: Path, old: bytes | None, new: bytes, result: str) -> None:
    """The output is what it was or what it should become; what is left beside it is only what can be resumed."""
    content = out.read_bytes() if out.exists() else None
    assert content in (old, new), f"the output is neither old nor new after a run that {result}"
    if result == "done":
        assert content == new
    others = {path.name for path in out.parent.iterdir()} - {out.name}
    allowed = {out.name + ".part", out.name + ".part.journal"}
    assert others <= allowed, others


def finish(model: Path, out: Path, new: bytes) -> None:
    """The same command again, undisturbed: it succeeds, and leaves the output alone."""
    if not out.exists() or out.read_bytes() != new:
        assert run(model, out, Fault(), overwrite=True) == "done"
    else:  # published already; what is left beside it goes with the next run
        assert run(model, out, Fault(), overwrite=True) == "done"
    assert out.read_bytes() == new
    assert [path.name for path in out.parent.iterdir()] == [out.name]
