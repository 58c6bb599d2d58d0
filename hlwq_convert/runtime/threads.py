"""Threads for the parts of one operation: the kernels release the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from ..parallel import default_workers


def run_all(tasks: Sequence[Callable[[], None]]) -> None:
    """Do all tasks, in any order; returns when they are done and raises what the first of them raised."""
    if len(tasks) == 1:
        tasks[0]()
    else:
        list(_pool(os.getpid()).map(lambda task: task(), tasks))


@cache
def workers() -> int:
    """default_workers, asked once: it reads files, and a forward pass has hundreds of operations."""
    return default_workers()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a parent do not live on in its fork."""
    return ThreadPoolExecutor(workers(), "hlwq")
