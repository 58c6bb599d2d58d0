"""Kill conversions at random moments and make pairs of them fail at every operation; see crash_harness.

python scripts/torture.py [--kills 300] [--no-pairs]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from crash_harness import MODES, Fault, check, finish, memory_folder, run

import hlwq_convert as h
from hlwq_convert import journal

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from models import write_model


def make_model(folder: Path, rows: int, matrices: int) -> Path:
    """Some matrices and a norm."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {f"{i:02d}.weight": (rows, 64 + 16 * i) for i in range(matrices)}
    shapes["01.norm.weight"] = (80,)
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


def kills(folder: Path, wanted: int) -> tuple[int, int]:
    """SIGKILL a child that converts, at a random moment, again and again; return kills and resumed conversions."""
    model = make_model(folder / "m", 10_000, 12)
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


def main() -> None:
    """Run and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--no-pairs", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads, which are idle here
    folder = Path(tempfile.mkdtemp(dir=memory_folder()))
    try:
        began = time.monotonic()
        (folder / "kills").mkdir()
        killed, resumed = kills(folder / "kills", options.kills)
        print(f"{killed} kills survived in {time.monotonic() - began:.0f} s, {resumed} conversions resumed", flush=True)
        if not options.no_pairs:
            began = time.monotonic()
            (folder / "pairs").mkdir()
            print(f"{pairs(folder / 'pairs')} pairs survived in {time.monotonic() - began:.0f} s")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
