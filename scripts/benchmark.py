"""Measure this project against memcpy, cp and other quantizers, on a synthetic model or on a given one.

    python scripts/benchmark.py [--weights 1e9] [--repeat 5] [--json FILE]      --help lists every option

Rates are billions of weights a second (Gw/s), medians over rounds in which every case takes its turn, so that a
busy machine slows all of them alike. As much memory as a case takes is used and given back before it, off the
clock: on a virtual machine the first to use memory pays for it, and that would often be cp. Everything is measured
in this run: a figure that could not be is "-".
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmark_cases import (
    BITS,
    Case,
    Conversions,
    command_case,
    kernel_cases,
    load_case,
    peer_cases,
    place_cases,
    source_bytes,
    take_sample,
)
from benchmark_model import MIN_WEIGHTS, Shapes, one_tensor, qwen_shapes, write_model
from benchmark_report import (
    case_rows,
    floor_seconds,
    machine,
    make_targets,
    number,
    ratio,
    table,
    target_rows,
    versions,
)

import hlwq_convert as h
from hlwq_convert.cli.memory import keep_freed_memory
from hlwq_convert.job import prepare
from hlwq_convert.parallel import default_workers

SCRIPTS = Path(__file__).parent
SHM = Path("/dev/shm")
KERNEL_BYTES = 256_000_000  # a memcpy of less stays in some caches


def first_use(tiny: Path, folder: Path) -> dict[str, object]:
    """Seconds for importing numba and for compiling or loading the kernels, which the first conversion does."""
    began = time.perf_counter()
    from hlwq_convert.kernels.compiled import CACHE_FOLDER

    cached = CACHE_FOLDER is not None and any(Path(CACHE_FOLDER).rglob("*.nbi"))
    marks = [began, time.perf_counter()]
    for turn in range(2):
        h.convert(tiny, folder / f"first{turn}.hlwq", BITS)
        marks.append(time.perf_counter())
    names = ("import_numba", "first_tiny_conversion", "second_tiny_conversion")
    durations = {name: round(b - a, 4) for name, a, b in zip(names, marks[:-1], marks[1:], strict=True)}
    return {**durations, "kernels_were_compiled_before": cached}


def peak_memory(name: str, model_dir: Path, tiny: Path, folder: Path, workers: int) -> dict[str, object]:
    """MiB that a conversion takes, measured in another process; without figures where there is no /proc."""
    result: dict[str, object] = {"model": name, "source_mb": round(source_bytes(model_dir) / 1e6, 1)}
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return result
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, str(SCRIPTS / "benchmark_memory.py"), str(tiny), str(model_dir), out, str(workers)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    over = {f"over_{base}": found["peak"] - found[base] for base in ("baseline", "bare_import")}
    return result | {key: round(value, 1) for key, value in {**found, **over}.items()}


def memory_rows(options: argparse.Namespace, model_dir: Path, tiny: Path, work: Path) -> list[dict[str, object]]:
    """The model of this run; with --memory a tenth of it, and as many weights in one tensor."""
    rows = [peak_memory("this model", model_dir, tiny, work, options.workers)]
    if options.memory:
        tenth = max(MIN_WEIGHTS, options.weights // 10)
        shapes: dict[str, Shapes] = {"a tenth of the weights": qwen_shapes(tenth)}
        if options.model_dir:
            shapes["as many weights"] = qwen_shapes(options.weights)
        shapes["as many weights in one tensor"] = one_tensor(options.weights)
        for name, of_model in shapes.items():
            with tempfile.TemporaryDirectory(dir=work) as folder:
                other = write_model(Path(folder, "model"), of_model)
                rows.append(peak_memory(name, other, tiny, work, options.workers))
    return rows


def file_system(folder: Path) -> str:
    """Type of the file system that a folder is on, as Linux names it."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    folder = folder.resolve()
    above = [(len(point), kind) for point, kind in mounts if folder.is_relative_to(point)]
    return max(above, default=(0, "unknown"))[1]


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""

    def count(text: str) -> int:
        return int(float(text))

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=count, help=f"of the synthetic model, {MIN_WEIGHTS:,} or more; default 1e9")
    parser.add_argument("--model-dir", type=Path, help="measure on this model instead")
    parser.add_argument("--smollm2", action="store_true", help="measure on the model that scripts/smollm2.py makes")
    parser.add_argument("--repeat", type=int, help="rounds; default 5")
    parser.add_argument("--workers", type=int, default=default_workers(), help="threads; default %(default)s")
    parser.add_argument("--sample-weights", type=count, default=200_000_000, help="in memory; default %(default)s")
    parser.add_argument("--peer-weights", type=count, default=200_000_000, help="of those; default %(default)s")
    parser.add_argument("--no-peers", action="store_true", help="leave out other packages")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of models of other sizes")
    parser.add_argument("--quick", action="store_true", help="one round with 5e6 weights, unless told otherwise")
    parser.add_argument("--work", type=Path, help="folder for temporary files, on a disk; default: the system's")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args(arguments)
    options.weights = options.weights or (5_000_000 if options.quick else 1_000_000_000)
    options.repeat = options.repeat or (1 if options.quick else 5)
    if options.weights < MIN_WEIGHTS or min(options.repeat, options.workers) < 1 or options.sample_weights < 1 << 16:
        parser.error("too few weights, rounds or workers")
    return options


def find_model(options: argparse.Namespace, work: Path) -> Path:
    """The model to measure on, made if need be; `options.weights` becomes what it has."""
    if options.smollm2:
        made = subprocess.run(
            [sys.executable, str(SCRIPTS / "smollm2.py")], check=True, stdout=subprocess.PIPE, text=True
        )
        options.model_dir = Path(made.stdout.strip())
    if options.model_dir is None:
        if shutil.disk_usage(work).free < 6 * options.weights:
            sys.exit(f"{6 * options.weights / 1e9:.1f} GB of temporary files do not fit: see --work and --weights")
        model_dir = write_model(work / "source", qwen_shapes(options.weights))
    else:
        model_dir = options.model_dir
    options.weights = sum(tensor.numel for tensor in prepare(model_dir, BITS).source.tensors)
    for shard in model_dir.glob("*.safetensors"):  # into the page cache
        with shard.open("rb") as file:
            while file.read(1 << 24):
                pass
    return model_dir


def find_places(model_dir: Path, work: Path, stack: ExitStack, workers: int) -> tuple[dict[str, Conversions], str]:
    """Where to convert to: disk, and tmpfs where there is room; and what to say about them."""
    (work / "out").mkdir()
    places = {"disk": Conversions(model_dir, work / "out", workers)}
    kind = file_system(work)
    said = f"disk is {kind}" + (", which is no disk: see --work" if kind == "tmpfs" else "")
    need = 2 * source_bytes(model_dir)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if SHM.is_dir() else 0
    for line in Path("/proc/meminfo").read_text().splitlines() if SHM.is_dir() else []:
        if line.startswith("MemAvailable:"):
            available = 1024 * int(line.split()[1])
    if not (SHM.is_dir() and os.access(SHM, os.W_OK) and file_system(SHM) == "tmpfs"):
        return places, said + "; no tmpfs: its targets are taken on disk"
    if min(shutil.disk_usage(SHM).free, available) < need:
        return places, said + f"; tmpfs has no room for {need / 1e9:.1f} GB: its targets are taken on disk"
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hlwq-bench-", dir=SHM)))
    return places | {"tmpfs": Conversions(model_dir, folder, workers)}, said


def measure(options: argparse.Namespace, stack: ExitStack) -> dict[str, object]:
    """Everything, printed as tables and returned as a document."""
    work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hlwq-bench-", dir=options.work)))
    tiny = write_model(work / "tiny", qwen_shapes(MIN_WEIGHTS))
    first = first_use(tiny, work)
    model_dir = find_model(options, work)
    places, said = find_places(model_dir, work, stack, options.workers)
    weights = options.weights

    pool = stack.enter_context(ThreadPoolExecutor(options.workers))
    parts = take_sample(model_dir, options.sample_weights)
    sample = sum(part.weights for part in parts)
    listed = list(kernel_cases(parts, pool, options.workers))
    for case in listed:  # also compiles or loads every kernel that the first conversion did not use
        case.time_once()
        case.seconds.clear()
    for place, here in places.items():
        listed += place_cases(here, place, weights)
    listed.append(load_case(places["disk"].file, weights, options.workers))
    commands = [command_case("hlwq-convert", "--help"), command_case("hlwq-inspect", places["disk"].file)]
    if not options.no_peers:
        (folder := list(places.values())[-1].folder / "peers").mkdir()
        listed += peer_cases(parts, options.peer_weights, folder)
    cases = {case.name: case for case in [*listed, *commands]}
    shown = sys.stderr.isatty()
    for done in range(options.repeat):
        for name, case in cases.items():
            if shown:
                print(f"\r{f'round {done + 1} of {options.repeat}: {name}':79}", end="", file=sys.stderr, flush=True)
            case.time_once()
    if shown:
        print(f"\r{'':79}\r", end="", file=sys.stderr)
    return report(options, cases, places, first, memory_rows(options, model_dir, tiny, work), sample, said)


def report(
    options: argparse.Namespace,
    cases: dict[str, Case],
    places: dict[str, Conversions],
    first: dict[str, object],
    memory: list[dict[str, object]],
    sample: int,
    said: str,
) -> dict[str, object]:
    """Print the tables and return them, with every single time, as a document."""
    memcpy, targets = cases["memcpy"].rate, make_targets(cases, list(places), judge=2 * sample >= KERNEL_BYTES)
    about, versions_ = machine(), versions()
    kind = "a given model" if options.model_dir else "a synthetic model"
    print(
        f"{about['cpu']}, {about['usable_cpus']} usable CPUs, {about['numba_cpu']} to numba, {options.workers} workers"
    )
    print(", ".join(f"{name} {found or '-'}" for name, found in versions_.items()))
    print(f"{kind} of {options.weights:,} weights, a sample of {sample:,} in memory; rounds: {options.repeat}; {said}")
    if 2 * sample < KERNEL_BYTES:
        print("the sample may stay in a cache, which tells nothing about the targets: use --weights 2e8 or more")
    print("first use: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in first.items()))

    rates = [case for case in cases.values() if case.weights]
    head = ["case", "threads", "s", "Gw/s", "of memcpy", "note"]
    print(table("Rates, billions of weights a second (2 bytes each)", head, case_rows(rates, memcpy)))
    stages = [
        {"place": place, "effort": effort, "cp + kernel": floor_seconds(cases, place, effort)}
        | {name: median(part[name] for part in parts) for name in parts[0]}
        for place, here in places.items()
        for effort, parts in here.parts.items()
    ]
    if stages:
        print(table("Where a conversion spends its time, s", list(stages[0]), [list(row.values()) for row in stages]))
    head = ["model", "source_mb", "bare_import", "baseline", "peak", "over_baseline", "over_bare_import"]
    rows = [[number(row.get(name), 1) for name in head] for row in memory]
    print(table("Peak memory of a conversion, MiB resident", head, rows))
    commands = [case for case in cases.values() if not case.weights]
    latency = {case.name: 1000 * case.median for case in commands if case.median is not None}
    print(table("Commands, ms", ["command", "ms"], [[name, number(ms, 0)] for name, ms in latency.items()]))
    print(table("Targets", ["target", "wanted", "found", ""], target_rows(targets)))

    settings = {"model": kind, "weights": options.weights, "sample_weights": sample, "bits": BITS}
    settings |= {name: getattr(options, name) for name in ("repeat", "workers", "peer_weights")}
    return {
        "machine": about,
        "versions": versions_,
        "settings": settings | {"places": list(places), "about_places": said},
        "first_use_seconds": first,
        "cases": [
            {"name": case.name, "threads": case.threads if case.run else None, "weights": case.weights}
            | {"seconds": case.seconds, "median_seconds": case.median, "gigaweights_per_second": case.rate}
            | {"of_memcpy": ratio(case.rate, memcpy), "note": case.note}
            for case in rates
        ],
        "conversion_stages": stages,
        "memory_mib": memory,
        "latency_ms": latency,
        "targets": [asdict(target) | {"reached": target.reached} for target in targets],
    }


def main() -> None:
    """Measure, print, and write the JSON file that was asked for."""
    options = read_options()
    keep_freed_memory()  # as hlwq-convert does
    with ExitStack() as stack:
        document = measure(options, stack)
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
