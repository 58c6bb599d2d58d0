"""Measure the peak memory of one conversion, in a process of its own (Linux).

    python scripts/benchmark_memory.py WARM_UP_MODEL_DIR MODEL_DIR EMPTY_FOLDER WORKERS

Prints one JSON object, in MiB of resident memory: `bare_import` when hlwq_convert.convert was imported, `baseline`
when a small conversion has loaded the compiled kernels too, and `peak` while the model is converted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hlwq_convert import convert
from hlwq_convert.cli.memory import keep_freed_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process, in MiB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Measure and print."""
    keep_freed_memory()
    warm_up, model, folder = map(Path, sys.argv[1:4])
    workers = int(sys.argv[4])
    found = {"bare_import": resident("VmRSS")}
    convert(warm_up, folder / "warm.hlwq", workers=workers)
    found["baseline"] = resident("VmRSS")
    _CLEAR.write_text("5")  # makes the present size the highest so far
    convert(model, folder / "model.hlwq", workers=workers)
    found["peak"] = resident("VmHWM")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
