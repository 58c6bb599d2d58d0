"""Divergence against size, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import PurePath
from typing import TYPE_CHECKING

from hlwq_formats.errors import MissingInput, escape

from .labels import Box, place_labels
from .results import Entry, Evaluation
from .tables import shown_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FLOOR = 1e-9  # a logarithmic axis has no 0
_MARK = 8  # pixels: half a marker and some air
_SERIES = (("scalar", "o", "C0"), ("trellis", "D", "C2"), ("hlwq", "o", "C4"), ("peer", "s", "C1"))


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
    measured.sort(key=lambda entry: -entry.quality.kl_mean)  # so that labels stand in the order of their points
    line = pareto(measured)
    axes.plot([e.bpw for e in line], [_height(e) for e in line], color="0.7", zorder=1, label="Pareto line")
    for series, marker, color in _SERIES:
        some = [entry for entry in measured if _series(entry) == series]
        if some:
            x, y = [entry.bpw for entry in some], [_height(entry) for entry in some]
            spread = _spread(some) if some[0].quality.kl_interval else None
            axes.errorbar(x, y, yerr=spread, fmt=marker, color=color, capsize=3, markersize=5, label=series)
    axes.set_yscale("log")
    axes.margins(x=0.1)
    axes.set_xlabel("bits a weight, whole file")
    axes.set_ylabel("mean KL(source || model), nats")
    title = f"{PurePath(evaluation.model).name}: {evaluation.tokens:,} predictions, 95 % intervals"
    axes.set_title(escape(title, 100), fontsize=10, parse_math=False)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    _draw_labels(figure, axes, measured, line)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})  # the same bytes each time
    return picture.getvalue()


def _draw_labels(figure: Figure, axes: Axes, measured: list[Entry], line: list[Entry]) -> None:
    """The name of each entry, with a thin line to its point where it had to go farther away."""
    figure.draw_without_rendering()  # from here on it is known where things are, in pixels
    to_pixels = axes.transData.transform
    frame, legend = axes.get_window_extent(), axes.get_legend()
    obstacles = [Box(*legend.get_window_extent().extents)] if legend is not None else []
    points = [tuple(to_pixels((entry.bpw, _height(entry)))) for entry in measured]
    for entry, (x, _) in zip(measured, points, strict=True):
        down, up = ([0.0], [0.0]) if entry.quality.kl_interval is None else _spread([entry])
        low, high = (to_pixels((entry.bpw, _height(entry) + by))[1] for by in (-down[0], up[0]))
        obstacles.append(Box(x - _MARK, low - _MARK, x + _MARK, high + _MARK))
    corners = [to_pixels((entry.bpw, _height(entry))) for entry in line]
    for (x0, y0), (x1, y1) in pairwise(corners):  # a line is a row of small boxes
        n = int(max(abs(x1 - x0), abs(y1 - y0)) / 4) + 1
        along = [(x0 + (x1 - x0) * i / n, y0 + (y1 - y0) * i / n) for i in range(n + 1)]
        obstacles += [Box(x - 2, y - 2, x + 2, y + 2) for x, y in along]
    names = [escape(name.removesuffix(".hlwq"), 40) for name in shown_names(measured)]
    labels = [axes.text(0, 0, name, fontsize=8, parse_math=False, transform=None) for name in names]
    extents = [label.get_window_extent() for label in labels]
    places = place_labels(points, [(e.width, e.height) for e in extents], obstacles, Box(*frame.extents))
    for label, place, extent, (x, y) in zip(labels, places, extents, points, strict=True):
        label.set_position((place.left - extent.x0, place.bottom - extent.y0))
        near = (min(max(x, place.left), place.right), min(max(y, place.bottom), place.top))
        if max(abs(near[0] - x), abs(near[1] - y)) > 2 * _MARK:
            axes.plot(
                [x, near[0]], [y, near[1]], color="0.5", linewidth=0.6, transform=None, scalex=False, scaley=False
            )


def _series(entry: Entry) -> str:
    return entry.encoding or entry.kind


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
