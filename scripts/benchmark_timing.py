"""How scripts/benchmark_cuda.py takes times on a GPU."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

ROUNDS = 20
Row = dict[str, object]


def seconds_on_device(work: Callable[[], object]) -> float:
    """The median time of one call, by events on the stream; two calls go before."""
    for _ in range(2):
        work()
    times = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


class Copies:
    """Copies on the device of some total of bytes read plus bytes written."""

    def __init__(self, largest: int) -> None:
        self._from = torch.randint(256, (largest // 2,), dtype=torch.uint8, device="cuda")
        self._to = torch.empty_like(self._from)

    def seconds(self, moved: int) -> float:
        """The median time of a copy that reads and writes half of `moved` each."""
        half = moved // 2
        return seconds_on_device(lambda: self._to[:half].copy_(self._from[:half]))


def measure_kernel(name: str, copies: Copies, weights: int, moved: int, work: Callable[[], object]) -> Row:
    """One row of the table: `moved` is bytes read plus bytes written by one call of `work`."""
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    first, seconds, copy = time.perf_counter() - began, seconds_on_device(work), copies.seconds(moved)
    print(f"{name}: {copy / seconds:.3f} of the copy, first call {first:.1f} s", file=sys.stderr)
    return {
        "kernel": name, "Gw/s": weights / seconds / 1e9, "GB/s": moved / seconds / 1e9,
        "copy GB/s": moved / copy / 1e9, "of the copy": copy / seconds, "first call s": first,
    }  # fmt: skip
