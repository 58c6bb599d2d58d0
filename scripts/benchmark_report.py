"""What the benchmark prints: tables of what was measured, and the targets of the project beside it."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from benchmark_cases import BITS, Case
from benchmark_peers import version_of

from hlwq_convert.parallel import default_workers

PACKAGES = ("hlwq-convert", "numpy", "numba", "zstandard", "torch", "gguf", "bitsandbytes", "safetensors")


@dataclass(frozen=True)
class Target:
    """What the project wants of itself, and what this run found; None where it could not be measured."""

    name: str
    wanted: float
    found: float | None
    at_most: bool = False
    unit: str = "x"
    judged: bool = True  # False: the model is too small to tell

    @property
    def reached(self) -> bool | None:
        """Whether it is."""
        if self.found is None or not self.judged:
            return None
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, or None when either is missing."""
    return a / b if a is not None and b else None


def make_targets(cases: Mapping[str, Case], places: Sequence[str], *, judge: bool) -> list[Target]:
    """Every target; `places` are those that were converted to, the one of the throughput targets last.

    Ratios of rates count only where `judge` says that the model was large enough for them.
    """

    def rate(name: str) -> float | None:
        return cases[name].rate if name in cases else None

    def seconds(name: str) -> float | None:
        return cases[name].median if name in cases else None

    def kernel(effort: str, bits: int = BITS) -> str:
        return f"encode kernel {bits} bits {effort}"

    def convert(effort: str, place: str) -> str:
        return f"convert {BITS} bits {effort}, {place}"

    copy, place = rate("memcpy"), places[-1]
    found = [
        Target(f"{kernel(effort, bits)} / memcpy", wanted, ratio(rate(kernel(effort, bits)), copy))
        for effort, wanted in (("fast", 0.10), ("default", 0.04))
        for bits in (4, 5)
    ]
    for bits in (4, 5):
        name = f"decode kernel {bits} bits"
        found.append(Target(f"{name} / memcpy", 0.15, ratio(rate(name), copy)))
    trellis = (("encode trellis 8 states", 0.018), ("encode trellis 32 states", 0.006), ("decode trellis", 0.08))
    found += [Target(f"{name} / memcpy", wanted, ratio(rate(name), copy)) for name, wanted in trellis]
    for effort in ("fast", "default"):
        name = convert(effort, place)
        found.append(Target(f"{name} / encode kernel", 0.6, ratio(rate(name), rate(kernel(effort)))))
    for here in places:
        for effort in ("fast", "default"):
            name = convert(effort, here)
            floor = floor_seconds(cases, here, effort)
            found.append(Target(f"time of {name} / (cp + kernel)", 1.5, ratio(seconds(name), floor), at_most=True))
    for peer, effort, wanted in (
        ("gguf-py Q5_0", "fast", 2.5),
        ("bitsandbytes NF4", "fast", 8.0),
        ("gguf-py Q5_0", "default", 1.0),
    ):
        for name in (convert(effort, place), kernel(effort)):
            found.append(Target(f"{name} / {peer}", wanted, ratio(rate(name), rate(peer))))
    found = [replace(target, judged=judge) for target in found]
    for name, wanted in (("hlwq-convert --help", 0.2), ("hlwq-inspect FILE", 0.3)):
        found.append(Target(name, wanted, seconds(name), at_most=True, unit="s"))
    return found


def floor_seconds(cases: Mapping[str, Case], place: str, effort: str) -> float | None:
    """What a conversion cannot be expected to beat: cp of the source, then the kernel over all its weights."""
    copy, kernel = cases[f"cp, {place}"], cases[f"encode kernel {BITS} bits {effort}"].rate
    return None if copy.median is None or kernel is None else copy.median + copy.weights / kernel / 1e9


def number(value: object, digits: int = 3) -> str:
    """Three digits for a person; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.{digits}f}" if value < 100 else f"{value:.0f}"
    return str(value)


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table that is also readable as it is."""
    cells = [list(head), *([number(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([f"\n{title}\n", *lines])


def case_rows(cases: Iterable[Case], memcpy: float | None) -> list[list[object]]:
    """Of the table of rates."""
    return [
        [case.name, case.threads if case.run else None, case.median, case.rate, ratio(case.rate, memcpy), case.note]
        for case in cases
    ]


def target_rows(targets: Iterable[Target]) -> list[list[object]]:
    """Of the table of targets."""
    rows: list[list[object]] = []
    for target in targets:
        verdict = {True: "reached", False: "missed", None: "not measured"}[target.reached]
        if not target.judged and target.found is not None:
            verdict = "too small to tell"
        sign = "<=" if target.at_most else ">="
        rows.append([target.name, f"{sign} {target.wanted} {target.unit}", target.found, verdict])
    return rows


def machine() -> dict[str, object]:
    """What the figures depend on; no names of hosts or folders."""
    names: list[str] = []
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "usable_cpus": default_workers(),
        "numba_cpu": str(import_module("llvmlite.binding").get_host_cpu_name()),
        "system": platform.system(),
    }


def versions() -> dict[str, str | None]:
    """Of Python and of every package that was measured or used; None for what is not installed."""
    return {"python": platform.python_version(), **{package: version_of(package) for package in PACKAGES}}
