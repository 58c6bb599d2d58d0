"""Bars for terminals: where the bytes are, and SQNR from layer to layer."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hlwq_formats.errors import escape

from .inspection import Inspection
from .modules import Module, by_module
from .report import human_bytes, number

_WIDTH = 30  # characters of the longest bar
_LISTED = 40  # modules
_COLUMNS = 64  # layers of a line of bars
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_HEIGHTS = "▁▂▃▄▅▆▇█"
_SPAN = 1.0  # dB: a difference smaller than this is not drawn large


def charts(inspection: Inspection) -> RenderableType:
    """Size by encoding, and for each module of quantized tensors its size and a bar of SQNR for each layer."""
    parts = {kind: count for kind, count in inspection.summary.bytes_by_encoding.items() if count}
    modules = by_module(inspection.tensors)
    largest = sorted((m for m in modules if m.quantized), key=lambda m: -m.bytes)
    return Group(_sizes(parts, inspection.file_bytes), Text(""), _modules(largest))


def bar(share: float, width: int = _WIDTH) -> str:
    """A bar of `share` (0 to 1) of `width` characters, to an eighth of one; the smallest share is still seen."""
    eighths = max(1, round(share * width * 8))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def heights(values: list[float | None], low: float, high: float) -> str:
    """One character a value, from low (▁) to high (█); a dot for none."""
    step = (high - low) / len(_HEIGHTS)
    marks = [None if v is None else _HEIGHTS[min(max(int((v - low) / step), 0), len(_HEIGHTS) - 1)] for v in values]
    return "".join("·" if mark is None else mark for mark in marks)


def scale(modules: list[Module]) -> tuple[float, float] | None:
    """The lowest and highest SQNR to draw, at least 1 dB apart; None when nothing was measured."""
    found = [value for module in modules for value in module.sqnrs]
    if not found:
        return None
    middle, span = (max(found) + min(found)) / 2, max(max(found) - min(found), _SPAN)
    return middle - span / 2, middle + span / 2


def _sizes(parts: dict[str, int], total: int) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for justify in ("left", "left", "right", "right"):
        table.add_column(justify=justify, no_wrap=True)
    largest = max(parts.values(), default=1)
    for kind, count in parts.items():
        table.add_row(kind, bar(count / largest), human_bytes(count), f"{100 * count / total:.1f} %")
    return table


def _modules(modules: list[Module]) -> RenderableType:
    limits = scale(modules)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("module", overflow="fold")
    table.add_column("size", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("bits", justify="right", no_wrap=True)
    title = "SQNR by layer" if limits is None else f"SQNR by layer, {limits[0]:.1f} to {limits[1]:.1f} dB"
    table.add_column(title, overflow="fold")
    table.add_column("worst", justify="right", no_wrap=True)
    largest = max((m.bytes for m in modules), default=1) or 1
    for module in modules[:_LISTED]:
        layers = [cell.sqnr_db for cell in module.cells.values()]
        shown = heights(layers[:_COLUMNS], *limits) if limits else ""
        table.add_row(
            Text(escape(module.name, 120)),
            bar(module.bytes / largest, 12),
            human_bytes(module.bytes),
            number(module.bits, ".2f"),
            shown + ("..." if len(layers) > _COLUMNS else ""),
            number(min(module.sqnrs, default=None), ".2f"),
        )
    hidden = len(modules) - _LISTED
    return Group(table, Text(f"and {hidden} smaller modules")) if hidden > 0 else table
