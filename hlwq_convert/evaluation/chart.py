"""Divergence against size, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import PurePath

from hlwq_formats.errors import MissingInput, escape

from .results import Entry, Evaluation
from .tables import shown_names

_FLOOR = 1e-9  # a logarithmic axis has no 0


def pareto(entries: Sequence[Entry]) -> list[Entry]:
    """The entries that no other one beats in both size and divergence, by size."""
    best: list[Entry] = []
    for entry in sorted(entries, key=lambda e: (e.bpw, e.quality.kl_mean)):
        if not best or entry.quality.kl_mean < best[-1].quality.kl_mean:
            best.append(entry)
    return best


def draw_chart(evaluation: Evaluation) -> bytes:
    """A PNG: mean KL divergence (logarithmic) against bits a weight, with the Pareto line; MissingInput without
    matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingInput("--chart needs matplotlib", hint='pip install "hlwq-convert[eval]"') from None
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    measured = [entry for entry in evaluation.entries if entry.kind != "source"]
    line = pareto(measured)
    axes.plot([e.bpw for e in line], [_height(e) for e in line], color="0.7", zorder=1, label="Pareto line")
    for kind, marker, color in (("hlwq", "o", "C0"), ("peer", "s", "C1")):
        some = [entry for entry in measured if entry.kind == kind]
        if some:
            x, y = [entry.bpw for entry in some], [_height(entry) for entry in some]
            spread = [[], []] if not some[0].quality.kl_interval else _spread(some)
            axes.errorbar(x, y, yerr=spread if spread[0] else None, fmt=marker, color=color, capsize=3, label=kind)
    for entry, name in zip(measured, shown_names(measured), strict=True):
        axes.annotate(
            escape(name.removesuffix(".hlwq"), 40),
            (entry.bpw, _height(entry)),
            (6, 4),
            textcoords="offset points",
            fontsize=8,
            parse_math=False,
        )
    axes.set_yscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("bits a weight, whole file")
    axes.set_ylabel("mean KL(source || model), nats")
    title = f"{PurePath(evaluation.model).name}: {evaluation.tokens:,} predictions, 95 % intervals"
    axes.set_title(escape(title, 100), fontsize=10, parse_math=False)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})  # the same bytes each time
    return picture.getvalue()


def _height(entry: Entry) -> float:
    return max(entry.quality.kl_mean, _FLOOR)


def _spread(entries: list[Entry]) -> list[list[float]]:
    """Lengths of the error bars down and up; what would reach below 0 ends just above it."""
    down, up = [], []
    for entry in entries:
        interval = entry.quality.kl_interval
        assert interval is not None
        down.append(_height(entry) - max(interval.low, _FLOOR))
        up.append(max(interval.high - entry.quality.kl_mean, 0))
    return [down, up]
