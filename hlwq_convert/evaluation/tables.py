"""An evaluation as a table for people: Markdown, and the same for a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import PurePath

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hlwq_formats.errors import escape

from ..report import human_bytes
from .results import Entry, Evaluation
from .sensitivity import Sensitivity
from .statistics import Interval

COLUMNS = ("model", "size", "bpw", "perplexity", "/ source", "KL mean", "median", "p95", "p99", "max", "same top 1")
TASK_COLUMNS = ("task", "metric", "model", "samples", "value", "- source", "source better", "model better")
_ENDS = 10  # most and least sensitive tensors that are shown


def rows(evaluation: Evaluation) -> list[list[str]]:
    """One row an entry, as texts; a figure with an interval as `value (low to high)`."""
    return [_row(entry, name) for entry, name in zip(evaluation.entries, shown_names(evaluation.entries), strict=True)]


def shown_names(entries: Sequence[Entry]) -> list[str]:
    """Names without their folders, where that leaves them different."""
    short = [entry.name if entry.kind == "peer" else PurePath(entry.name).name for entry in entries]
    return short if len(set(short)) == len(short) else [entry.name for entry in entries]


def _row(entry: Entry, name: str) -> list[str]:
    q = entry.quality
    start = [name, human_bytes(entry.bytes), f"{entry.bpw:.3f}", f"{q.perplexity:.3f}"]
    if entry.kind == "source":
        return [*start, "1", *["-"] * 6]
    return [
        *start,
        f"{q.perplexity_ratio:.4f}" + _between(q.perplexity_ratio_interval, ".4f"),
        _kl(q.kl_mean) + (f" ({_kl(q.kl_interval.low)} to {_kl(q.kl_interval.high)})" if q.kl_interval else ""),
        *(_kl(value) for value in (q.kl_median, q.kl_p95, q.kl_p99, q.kl_max)),
        f"{100 * q.top1:.2f} %",
    ]


def task_rows(evaluation: Evaluation) -> list[list[str]]:
    """One row for each task, metric and model: what it scored, and where it and the source differ."""
    names = dict(zip((entry.name for entry in evaluation.entries), shown_names(evaluation.entries), strict=True))
    return [
        [
            score.task, score.metric, names[score.name], f"{score.samples:,}",
            f"{score.value:.4f} ± {score.standard_error:.4f}",
            f"{score.difference:+.4f}" + _between(score.difference_interval, "+.4f"),
            str(score.source_better), str(score.model_better),
        ]
        for score in evaluation.tasks
    ]  # fmt: skip


def notes(evaluation: Evaluation) -> list[str]:
    """What the reader of the table must know."""
    e = evaluation
    lines = [
        f"{escape(e.text)}: {e.tokens:,} predictions in {e.windows} windows of {e.ctx} tokens, {e.dtype} on "
        f"{escape(e.device)}. KL is of the source's prediction to the model's, in nats: exact over its {e.top_k} most "
        f"likely tokens, estimated by {e.samples} samples for the others ({100 * e.rest:.2g} % of the probability).",
        "Parentheses hold 95 % intervals: Student's t over windows, paired with the source."
        if e.entries[0].quality.kl_interval
        else "No intervals: they take three windows.",
    ]
    if any(entry.kind == "peer" for entry in e.entries):
        lines.append("Peers quantize the linear layers and leave the embeddings as they are; bpw counts all of them.")
    lines += [f"Not measured: {escape(missing.name)} ({missing.why})." for missing in e.missing]
    if e.tasks:
        lines.append("Tasks: ± is a standard error; differences are paired, question by question.")
    return lines


def markdown(evaluation: Evaluation) -> str:
    """Tables and notes in Markdown."""
    parts = [_markdown_table(COLUMNS, rows(evaluation), 1)]
    if evaluation.tasks:
        parts.append(_markdown_table(TASK_COLUMNS, task_rows(evaluation), 3))
    return "\n\n".join([*parts, *notes(evaluation)])


def print_evaluation(evaluation: Evaluation, *, as_markdown: bool) -> None:
    """On stdout: Markdown when asked for, or when stdout is no terminal."""
    console = Console(highlight=False)
    if as_markdown or not console.is_terminal:
        sys.stdout.write(markdown(evaluation) + "\n")
        return
    with console.capture() as capture:  # rich would turn a closed pipe into exit status 1
        console.print(_terminal_table(COLUMNS, rows(evaluation), 1))
        if evaluation.tasks:
            console.print(_terminal_table(TASK_COLUMNS, task_rows(evaluation), 3))
        for note in notes(evaluation):
            console.print(Text(note))
    sys.stdout.write(capture.get())


def _markdown_table(columns: tuple[str, ...], content: list[list[str]], texts: int) -> str:
    """A table whose first `texts` columns are aligned to the left, the others to the right."""
    marks = ["---"] * texts + ["---:"] * (len(columns) - texts)
    lines = [list(columns), marks, *([escape(cell).replace("|", "\\|") for cell in row] for row in content)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _terminal_table(columns: tuple[str, ...], content: list[list[str]], texts: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < texts else "right", overflow="fold")
    for row in content:
        table.add_row(*(Text(escape(cell)) for cell in row))
    return table


def _kl(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.3g}" if value >= 1e-4 or value <= 0 else f"{value:.2e}"


def _between(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f" ({interval.low:{form}} to {interval.high:{form}})"


def print_sensitivity(found: Sensitivity) -> None:
    """The most and least sensitive tensors, and what the weights promise."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    for column in ("s", "bits more", "KL alone"):
        table.add_column(column, justify="right")
    ranked = sorted(found.tensors, key=lambda name: -found.tensors[name])
    shown = ranked if len(ranked) <= 2 * _ENDS else ranked[:_ENDS] + ranked[-_ENDS:]
    for name in shown:
        s, measured = found.tensors[name], found.measured.get(name)
        alone = "predicted" if measured is None else _kl(measured.kl)
        table.add_row(Text(escape(name, 120)), f"{s:.3g}", f"{math.log2(s) / 2:+.2f}", alone)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    with console.capture() as capture:
        console.print(table)
    sys.stdout.write(capture.get())
    print(f"at equal bits these weights promise {found.gain:.3f} of the divergence of one error for all tensors")
