"""Kill conversions at random moments and make pairs of them fail at every operation; see crash_harness.

python scripts/torture.py [--kills 300] [--rows 10000] [--no-pairs] [--signals 200] [--flips 100000]
"""

from __future__ import annotations

import argparse
import bisect
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from crash_harness import MODES, Fault, check, finish, memory_folder, run

import hlwq_convert as h
from hlwq_convert import journal
from hlwq_formats import metadata as md
from hlwq_formats.errors import BadData
from hlwq_formats.layout import place_sections
from hlwq_formats.reader import Reader

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from models import write_model


def make_model(folder: Path, rows: int, matrices: int) -> Path:
    """Some matrices and a norm."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {f"{i:03d}.weight": (rows, 64 + 16 * (i % 12)) for i in range(matrices)}
    shapes["001.norm.weight"] = (80,)
    data = {name: rng.standard_normal(shape).astype(np.float32).tobytes() for name, shape in shapes.items()}
    return write_model(folder, {name: ("F32", shapes[name], data[name]) for name in shapes})


def pairs(folder: Path) -> int:
    """Die at operation i, fail or die at operation j of the next run, for all i, j and modes; return how many."""
    model = make_model(folder / "m", 64, 3)
    out = folder / "out" / "o.hlwq"
    out.parent.mkdir()
    fault = Fault()
    run(model, out, fault, overwrite=True)
    new, count, done = out.read_bytes(), fault.count, 0
    out.unlink()
    for i in range(count):
        for old in (None, b"dear"):
            for mode in MODES:
                for j in range(count):
                    if old is not None:
                        out.write_bytes(old)
                    check(out, old, new, run(model, out, Fault("dies", i), overwrite=True))
                    if out.exists() and out.read_bytes() == new:
                        old = new
                    check(out, old, new, run(model, out, Fault(mode, j), overwrite=True))
                    finish(model, out, new)
                    out.unlink()
                    old = None if old is None else b"dear"
                    done += 1
    return done


def kills(folder: Path, wanted: int, rows: int) -> tuple[int, int]:
    """SIGKILL a child that converts, at a random moment, again and again; return kills and resumed conversions."""
    model = make_model(folder / "m", rows, 12)
    out = folder / "out" / "o.hlwq"
    out.parent.mkdir()
    h.convert(model, out)  # compiles, or loads what was compiled
    began = time.monotonic()
    h.convert(model, out, overwrite=True, workers=2)
    duration = time.monotonic() - began
    new = out.read_bytes()
    journal.CHECKPOINT_SECONDS = 0
    rng = random.Random(0)
    killed = resumed = 0
    while killed < wanted:
        old = rng.choice([None, b"dear", new])
        out.unlink(missing_ok=True)
        if old is not None:
            out.write_bytes(old)
        for _ in range(rng.randint(1, 4)):  # kills in a row, each run resuming what the last one left
            child = os.fork()
            if child == 0:
                h.convert(model, out, overwrite=True, workers=2)
                os._exit(0)
            time.sleep(rng.uniform(0, 1.2 * duration))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            killed += os.WIFSIGNALED(status)
            check(out, old, new, "was killed" if os.WIFSIGNALED(status) else "done")
            if out.exists() and out.read_bytes() == new:
                old = new
        resumed += Path(f"{out}.part.journal").exists()
        finish(model, out, new)
    return killed, resumed


def signals(folder: Path, wanted: int, rows: int) -> tuple[int, int]:
    """Send SIGINT, SIGTERM or SIGHUP to the command, at a random moment from its start to its end; return how many were
    sent, and how many of these conversions were interrupted and not done already."""
    model = make_model(folder / "m", rows, 12)
    out = folder / "out" / "o.hlwq"
    out.parent.mkdir()
    command = [sys.executable, "-c", "from hlwq_convert.cli import start; start.convert()", model, out, "--quiet"]
    subprocess.run(command, check=True)  # compiles, or loads what was compiled
    out.unlink()
    began = time.monotonic()
    subprocess.run(command, check=True)
    duration, new = time.monotonic() - began, out.read_bytes()
    rng = random.Random(0)
    interrupted = 0
    for i in range(wanted):
        out.unlink(missing_ok=True)
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        time.sleep(duration * rng.uniform(0.1, 1.1))
        number = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        child.send_signal(number)
        _, errors = child.communicate(timeout=600)
        left = sorted(path.name for path in out.parent.iterdir())
        if child.returncode == 0:
            assert left == [out.name] and out.read_bytes() == new, (i, left)
        else:  # or before the first line of ours could run: then Python ends, or is ended, in its own way
            assert child.returncode in (128 + number, -number) or "KeyboardInterrupt" in errors, (i, errors)
            assert left == [], (i, number, errors, left)
            interrupted += 1
    return wanted, interrupted


def flips(folder: Path, wanted: int) -> int:
    """Flip random bits of a file of 100 MB, one at a time; return how many of them a reader noticed."""
    model = make_model(folder / "m", 1000, 680)
    path = folder / "o.hlwq"
    h.convert(model, path, 8, effort="fast")
    rng = random.Random(0)
    with Reader(path) as reader, path.open("r+b") as file:
        listed = list(md.all_sections(reader.metadata))
        offsets, end = place_sections(section.length for _, _, section in listed)
        ends = [offset + section.length for offset, (_, _, section) in zip(offsets, listed, strict=True)]
        print(f"{reader.header.file_len} bytes in {len(listed)} sections", flush=True)
        found = 0
        for _ in range(wanted):
            at = rng.randrange(reader.header.file_len)
            byte = os.pread(file.fileno(), 1, at)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << rng.randrange(8)]), at)
            try:
                if 128 <= at < end:  # only what holds the byte, or the padding before it, need be read
                    kind, owner, section = listed[bisect.bisect_right(ends, at)]
                    for _ in reader.iter_section(kind, owner, section.kind):
                        pass
                else:
                    Reader(path).close()
            except BadData:
                found += 1
            os.pwrite(file.fileno(), bytes([byte]), at)
        reader.verify()
    return found


def main() -> None:
    """Run and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--rows", type=int, default=10_000, help="of each matrix of the model that is killed over")
    parser.add_argument("--no-pairs", action="store_true")
    parser.add_argument("--signals", type=int, default=200)
    parser.add_argument("--flips", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads, which are idle here
    folder = Path(tempfile.mkdtemp(dir=memory_folder()))
    try:
        began = time.monotonic()
        (folder / "kills").mkdir()
        killed, resumed = kills(folder / "kills", options.kills, options.rows)
        print(f"{killed} kills survived in {time.monotonic() - began:.0f} s, {resumed} conversions resumed", flush=True)
        if not options.no_pairs:
            began = time.monotonic()
            (folder / "pairs").mkdir()
            print(f"{pairs(folder / 'pairs')} pairs survived in {time.monotonic() - began:.0f} s", flush=True)
        if options.signals:
            began = time.monotonic()
            (folder / "signals").mkdir()
            sent, interrupted = signals(folder / "signals", options.signals, options.rows)
            print(f"{sent} signals survived in {time.monotonic() - began:.0f} s, {interrupted} conversions interrupted")
        if options.flips:
            began = time.monotonic()
            (folder / "flips").mkdir()
            found = flips(folder / "flips", options.flips)
            print(f"{found} of {options.flips} flipped bits found in {time.monotonic() - began:.0f} s")
            sys.exit(found != options.flips)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
