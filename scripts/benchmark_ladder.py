"""What a ladder saves: several sizes in one pass against a run for each, in turn.

    python scripts/benchmark_ladder.py MODEL_DIR [--bpw 3.5,4.25,5] [--rounds 3] [--effort default]

Prints medians of seconds, the bytes read from the model directory (from disk or its cache), and how many files had to
be made again because they missed their size; fails when a file of the ladder is not that of its own run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmark_report import table

import hlwq_convert as h
from hlwq_convert import conversion
from hlwq_formats.files import InputFile


class Counters:
    """What conversions did since the last `take`."""

    def __init__(self, model: Path) -> None:
        self.read = self.again = 0
        honest_read, honest_correct = InputFile._pread, conversion._correct

        def pread(file: InputFile, length: int, offset: int) -> bytes:
            if Path(file.path).parent == model:
                self.read += length
            return honest_read(file, length, offset)

        def correct(planning: conversion.Planning, size: int, number: int) -> conversion.Planning:
            self.again += 1
            return honest_correct(planning, size, number)

        InputFile._pread = pread  # type: ignore[method-assign]
        conversion._correct = correct
        self.take()

    def take(self) -> tuple[float, float, int, int]:
        """Seconds, seconds of all CPUs, bytes read and files made again."""
        now = time.monotonic(), time.process_time()
        before, self._began = getattr(self, "_began", now), now
        found = now[0] - before[0], now[1] - before[1], self.read, self.again
        self.read = self.again = 0
        return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bpw", default="3.5,4.25,5")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--effort", default="default")
    options = parser.parse_args()
    rates = [float(rate) for rate in options.bpw.split(",")]
    ladders, runs = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        h.convert(options.model, folder / "warm.hlwq", bpw=rates[0], effort=options.effort)  # kernels, page cache
        counters = Counters(options.model)
        for _ in range(options.rounds):
            counters.take()
            made = h.convert_ladder(options.model, folder / "l.hlwq", bpw=rates, effort=options.effort, overwrite=True)
            ladders.append(counters.take())
            for rate in rates:
                h.convert(options.model, folder / f"{rate}.hlwq", bpw=rate, effort=options.effort, overwrite=True)
            runs.append(counters.take())
        same = all(
            Path(one.file).read_bytes() == (folder / f"{rate}.hlwq").read_bytes()
            for one, rate in zip(made, rates, strict=True)
        )
    source = sum(file.stat().st_size for file in options.model.glob("*.safetensors"))
    rows = []
    for what, found in ((f"{len(rates)} runs", runs), ("one ladder", ladders)):
        seconds, cpu, read, again = map(statistics.median, zip(*found, strict=True))
        rows.append([what, f"{seconds:.1f}", f"{cpu:.1f}", f"{read / 1e6:.1f}", f"{read / source:.2f}", f"{again:g}"])
    head = ["", "seconds", "CPU seconds", "MB read", "times the source", "made again"]
    title = f"{options.model.name}, {options.bpw} bits a weight, {os.cpu_count()} CPUs, medians of {options.rounds}"
    print(table(title, head, rows))
    print("\nthe files are the same" if same else "\nTHE FILES DIFFER")
    sys.exit(not same)


if __name__ == "__main__":
    main()
