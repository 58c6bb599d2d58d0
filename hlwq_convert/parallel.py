"""Work on the pieces of a stream in several threads, results in order, few pieces in memory."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, repeat
from pathlib import Path
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """The CPUs that this process may use: by affinity and, on Linux, by the quota of its control groups."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))


def _cgroup_quota(membership: Path, root: Path) -> float | None:
    """CPUs that the control groups of a process allow it (version 1 or 2), None without a limit."""
    found = []
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                base, read = root, _quota_v2
            elif "cpu" in controllers.split(","):
                base, read = root / controllers, _quota_v1
            else:
                continue
            group = base / path.lstrip("/")
            # a container may see its own group as the root: every ancestor that is there counts
            for folder in (group, *group.parents):
                if folder == base or base in folder.parents:
                    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                        found.append(read(folder))
    return min((quota for quota in found if quota is not None and quota > 0), default=None)


def _quota_v2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return quota / int((folder / "cpu.cfs_period_us").read_text()) if quota > 0 else None


def ordered_map(pool: ThreadPoolExecutor, ahead: int, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Like map, with at most `ahead` items begun and not yet taken. Nothing is begun before a result is asked for."""
    yield from begin_map(pool, ahead, work, items)


def begin_map(pool: ThreadPoolExecutor, ahead: int, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The same, with the first items begun at once."""
    rest, waiting = iter(items), deque[Future[R]]()

    def begin(count: int) -> None:
        for item in islice(rest, count):
            waiting.append(pool.submit(work, item))

    def cancel() -> None:
        for future in waiting:
            future.cancel()

    def results() -> Iterator[R]:
        try:
            while waiting:
                yield waiting.popleft().result()
                begin(1)
        finally:
            cancel()

    try:
        begin(ahead)
    except BaseException:
        cancel()
        raise
    return results()


def take_turns(iterators: Iterable[Iterator[T]], width: int) -> Iterator[T]:
    """The items of all iterators, `width` of which take turns: the next one joins when one is exhausted."""
    waiting = iter(iterators)
    active = deque(islice(waiting, width))
    while active:
        iterator = active.popleft()
        for item in islice(iterator, 1):
            yield item
            active.append(iterator)
            break
        else:
            active.extend(islice(waiting, 1))


class Helpers:
    """Threads that have nothing else to do, who take tasks from those that have too much."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = threading.Semaphore(0)
        self._given: SimpleQueue[Callable[[], object] | None] = SimpleQueue()

    def tasks(self) -> Iterable[Callable[[], None]]:
        """What a pool is to do behind everything else; these tasks end at `stop`."""
        return repeat(self._help, self._count)

    def _help(self) -> None:
        self._free.release()
        while (task := self._given.get()) is not None:
            task()
            self._free.release()

    def give(self, task: Callable[[], object]) -> None:
        """Have it done by a thread that is free, and here and now when none is. An error there ends that helper."""
        if self._free.acquire(blocking=False):
            self._given.put(task)
        else:
            task()

    def stop(self) -> None:
        """Nothing more will be given: helpers end when they have done what was."""
        for _ in range(self._count):
            self._given.put(None)


class InOrder(Generic[T]):
    """Gives pieces that threads bring in any order to `take`, one at a time in the order of their numbers, from 0.

    A piece is taken by the thread that brought it or an earlier one, before that returns: who has waited for those who
    brought all pieces up to one knows that it is taken. When `take` raises, so does `add` there, and nothing more is
    taken.
    """

    def __init__(self, take: Callable[[T], object]) -> None:
        self._take = take
        self._next = 0
        self._waiting: dict[int, T] = {}
        self._busy = False
        self._lock = threading.Lock()

    def add(self, number: int, piece: T) -> None:
        """Bring a piece. Whoever brings the next one takes it, and those that have waited for it; nobody else waits."""
        with self._lock:
            self._waiting[number] = piece
            if self._busy:
                return
            self._busy = True
        while (found := self._pop()) is not None:
            self._take(found[0])

    def _pop(self) -> tuple[T] | None:
        with self._lock:
            if self._next not in self._waiting:
                self._busy = False
                return None
            self._next += 1
            return (self._waiting.pop(self._next - 1),)


def call(task: Callable[[], R]) -> R:
    """Do it: the `work` for items that are tasks."""
    return task()
