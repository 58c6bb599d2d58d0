"""Run the targets of fuzz_targets.py under atheris, guided by coverage, with the mutators of fuzz_mutators.py.

    scripts/fuzz all --runs 2000000
    scripts/fuzz container --seconds 600

Each target runs in a process of its own, which goes on after a finding unless that kills it. A finding is an
exception that is no HlwqError, a broken promise, more than 2 s, or more than 512 MiB; it is written to
tests/fuzz_corpus/TARGET, one input for each place in the code. The corpus is kept in build/fuzz and used again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("container", "metadata", "section", "safetensors", "index", "differential", "readers")
MAX_SECONDS = 2.0
MAX_GROWTH = 512 << 20
STUCK = 1200  # seconds of wall time until libFuzzer ends a run; a machine that was asleep must not look like a hang
MAX_KINDS = 20  # of findings, in one run of one target
MEMORY_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass
class Result:
    """What a run of one target did."""

    executions: int = 0
    seconds: float = 0.0
    slowest: float = 0.0  # seconds of CPU time: other processes do not count
    peak: int = 0  # bytes of RSS
    growth: int = 0  # the same above what it was when all seeds had run
    outcomes: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


def peak_rss() -> int:
    """The largest RSS of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MEMORY_UNIT


def signature(error: BaseException) -> str:
    """A name for a bug: the class of the exception, the innermost place of ours that it passed, the broken promise."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and f.name != "require"]
    where = f"{Path(ours[-1].filename).stem}-{ours[-1].name}-{ours[-1].lineno}" if ours else "elsewhere"
    broken = re.sub(r"[^a-z]+", "-", str(error).lower())[:60] if type(error).__name__ == "Violation" else ""
    return re.sub(r"[^A-Za-z0-9_.-]", "", f"{type(error).__name__}-{where}-{broken}").strip("-")


class Session:
    """The process that fuzzes one target."""

    def __init__(self, name: str, runs: int, seconds: float, report: Path) -> None:
        self.name, self.runs, self.deadline, self.report = name, runs, time.monotonic() + seconds, report
        self.result = Result()
        self.seen: set[str] = set()
        self.targets: ModuleType = importlib.import_module("fuzz_targets")
        for seed in self.targets.TARGETS[name].seeds():  # also compiles kernels, which is not the fault of an input
            with contextlib.suppress(Exception):
                self.targets.check(name, seed)
        self.started = time.monotonic()
        self.base = self.known_peak = peak_rss()

    def one(self, data: bytes) -> None:
        """Run one input and measure it; ends the process when enough was done."""
        began = time.process_time()
        try:
            outcome = self.targets.check(self.name, data)
        except Exception as error:
            outcome = "bug"
            self.found(signature(error), data, error)
        elapsed = time.process_time() - began
        result = self.result
        result.executions += 1
        result.outcomes[outcome] = result.outcomes.get(outcome, 0) + 1
        if elapsed > result.slowest:
            result.slowest = elapsed
            if elapsed > MAX_SECONDS:
                self.found("slow", data)
        peak = peak_rss()
        if peak > self.known_peak:
            if peak - max(self.known_peak, self.base) > MAX_GROWTH // 2 or peak - self.base > MAX_GROWTH:
                self.found("memory", data)
            self.known_peak = peak
        if result.executions >= self.runs or time.monotonic() >= self.deadline:
            self.finish()

    def found(self, kind: str, data: bytes, error: Exception | None = None) -> None:
        """Keep the first input of each kind, made smaller when it raises."""
        if kind in self.seen or len(self.seen) >= MAX_KINDS:
            return
        self.seen.add(kind)
        if error is not None:
            traceback.print_exception(error)
            data = self.smaller(data, kind)
        self.result.findings.append(keep(self.name, kind, data))

    def smaller(self, data: bytes, kind: str, budget: int = 2000) -> bytes:
        """Leave out pieces, half of it first, as long as the same bug shows."""
        size = len(data) // 2
        while size and budget > 0:
            at = 0
            while at < len(data) and budget > 0:
                budget -= 1
                shorter = data[:at] + data[at + size :]
                try:
                    self.targets.check(self.name, shorter)
                    at += size
                except Exception as error:
                    if signature(error) == kind:
                        data = shorter
                    else:
                        at += size
            size //= 2
        return data

    def finish(self) -> NoReturn:
        """Write the report and leave at once: libFuzzer offers no way back."""
        result = self.result
        result.seconds = time.monotonic() - self.started
        result.peak, result.growth = self.known_peak, self.known_peak - self.base
        self.report.write_text(json.dumps(asdict(result)))
        for folder in self.targets.folders.values():
            folder.remove()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def keep(target: str, kind: str, data: bytes) -> str:
    """Write a finding to where tests replay it; returns its path."""
    path = ROOT / "tests" / "fuzz_corpus" / target / f"{kind}-{hashlib.sha256(data).hexdigest()[:8]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path.relative_to(ROOT))


def fuzz(name: str, runs: int, seconds: float, report: Path, folders: list[str]) -> None:
    """The work of the child process; does not return."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["hlwq_formats"]):
        session = Session(name, runs, seconds, report)
    mutator = importlib.import_module("fuzz_mutators").MUTATORS[name]
    max_length: int = session.targets.TARGETS[name].max_length

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        def plain(piece: bytes) -> bytes:
            return bytes(atheris.Mutate(piece, max(len(piece), min(max_size, len(piece) + 64), 1)))

        changed: bytes = mutator(data, Random(seed), plain)
        return changed if len(changed) <= max_size else changed[:max_size]

    # seeds that reach no line of their own are kept: much of what they reach is in compiled code, which is not seen;
    # and changes are not piled up, because what one of them has broken ends most of the others early
    options = [
        f"-max_len={max_length}",
        "-len_control=0",
        "-keep_seed=1",
        "-mutate_depth=2",
        "-reload=0",
        f"-timeout={STUCK}",
        "-rss_limit_mb=4096",
        f"-artifact_prefix={report.parent}/",
    ]
    atheris.Setup([sys.argv[0], *options, *folders], session.one, custom_mutator=mutate)
    atheris.Fuzz()


def supervise(name: str, runs: int, seconds: float) -> Result:
    """Run a child until the work is done, or until an input kills it: its counts are lost, the input is kept."""
    corpus = ROOT / "build" / "fuzz" / name
    corpus.mkdir(parents=True, exist_ok=True)
    result = Result()
    known = ROOT / "tests" / "fuzz_corpus" / name
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        seeds = work / "seeds"
        seeds.mkdir()
        for i, seed in enumerate(importlib.import_module("fuzz_targets").TARGETS[name].seeds()):
            (seeds / f"{i:04}").write_bytes(seed)
        folders = [str(folder) for folder in (corpus, seeds, known) if folder.is_dir()]
        report, log = work / "report.json", ROOT / "build" / "fuzz" / f"{name}.log"
        command = [sys.executable, __file__, name, "--runs", str(runs), "--seconds", str(seconds)]
        with log.open("wb") as output:
            child = subprocess.run([*command, "--child", str(report), *folders], stdout=output, stderr=output)
        if report.exists():
            result = Result(**json.loads(report.read_text()))
        killers = [path for kind in ("crash", "timeout", "oom") for path in work.glob(f"{kind}-*")]
        result.findings += [keep(name, path.name.split("-")[0], path.read_bytes()) for path in killers]
        if not report.exists() and not killers:
            raise SystemExit(f"the fuzzer ended with status {child.returncode}, see {log}")
        result.outcomes["corpus"] = sum(1 for folder in folders for _ in Path(folder).iterdir())  # seeds included
    return result


def line(name: str, result: Result) -> str:
    """One row of the table."""
    rate = result.executions / result.seconds if result.seconds else 0
    accepted, corpus = result.outcomes.get("accepted", 0), result.outcomes.pop("corpus")
    return (
        f"{name:12}  {result.executions:>10,}  {result.seconds:>7,.0f}  {rate:>7,.0f}  {accepted:>9,}  {corpus:>6,}  "
        f"{len(result.findings):>8}  {result.slowest * 1000:>10.1f}  {result.peak >> 20:>8,}  {result.growth >> 20:>6,}"
    )


def main() -> int:
    """Fuzz; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=(*NAMES, "all"))
    parser.add_argument("--runs", type=int, default=100_000, help="inputs for each target (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1e9, help="and at most this long for each")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        report, *folders = options.child
        fuzz(options.target, options.runs, options.seconds, Path(report), folders)
    print(f"{'target':12}  {'executions':>10}  {'seconds':>7}  {'a sec.':>7}  {'accepted':>9}  {'corpus':>6}  "
          f"{'findings':>8}  {'slowest ms':>10}  {'peak MiB':>8}  {'growth':>6}", flush=True)  # fmt: skip
    status = 0
    for name in NAMES if options.target == "all" else (options.target,):
        result = supervise(name, options.runs, options.seconds)
        print(line(name, result), flush=True)
        for finding in result.findings:
            print(f"  found: {finding}", flush=True)
        status |= bool(result.findings)
    return status


if __name__ == "__main__":
    sys.exit(main())
