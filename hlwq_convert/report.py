"""Tables for people."""

from __future__ import annotations

import re
import sys

from msgspec import UNSET
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hlwq_formats import metadata as md
from hlwq_formats.errors import escape

from .inspection import Inspection, TensorInfo


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part[:18]), "") if part[0] in "0123456789" else (1, 0, part) for part in parts]


def human_bytes(count: float) -> str:
    """Decimal units, as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(count, 1) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def tensor_table(tensors: list[TensorInfo]) -> Table:
    """One row a tensor, in the given order: encoding, bits, size, closeness to the source, and why it is stored so."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    for column in ("shape", "dtype", "encoding"):
        table.add_column(column, no_wrap=True)
    for column in ("bits", "bytes", "cosine", "SQNR dB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("reason", overflow="fold")
    for tensor in tensors:
        table.add_row(
            Text(escape(tensor.name, 600)),
            "x".join(map(str, tensor.shape)) or "0-d",
            tensor.dtype,
            tensor.encoding,
            number(tensor.bits, "d") if tensor.encoding != "trellis" else number(tensor.bpw, ".2f"),
            f"{tensor.bytes:,}",
            number(tensor.cosine, ".5f"),
            number(tensor.sqnr_db, ".2f"),
            Text(escape(tensor.reason)),
        )
    return table


def default_width(recipe: md.Recipe) -> str:
    """What a tensor gets that no rule names."""
    if recipe.target is not UNSET:
        return escape(recipe.target)
    return "raw" if recipe.bits is None else f"{recipe.bits} bits"


def totals(inspection: Inspection) -> str:
    """The last lines of an inspection."""
    s = inspection.summary
    parts = ", ".join(f"{kind} {human_bytes(n)}" for kind, n in s.bytes_by_encoding.items() if n)
    source = inspection.metadata.source
    origin = f"{source.repo}@{source.revision}" if source.repo else f"{len(source.files)} local files"
    recipe = inspection.metadata.recipe
    width = default_width(recipe)
    lines = [
        f"{s.quantized} quantized, {s.raw} raw, {s.aliased} aliased; {inspection.weights:,} weights in "
        f"{human_bytes(inspection.file_bytes)}, {number(inspection.bpw, '.3f')} bits a weight",
        f"bytes: {parts}",
        f"from {escape(origin)}; default {width}, effort {escape(recipe.effort)}, {len(recipe.rules)} rules"
        + (f", recipe {escape(recipe.name)}" if recipe.name else ""),
    ]
    if inspection.split is not None:
        names, most = [part.name for part in inspection.split.parts], human_bytes(inspection.split.size)
        lines.insert(1, f"{len(names)} parts of at most {most}: {escape(names[0])} to {escape(names[-1])}")
    if s.cosine_min is not None:
        lines.insert(
            1,
            f"cosine min {s.cosine_min:.5f}, mean {number(s.cosine_mean, '.5f')}; "
            f"SQNR mean {number(s.sqnr_db_mean, '.2f')} dB",
        )
    if s.coder_loss is not None:
        lines.append(
            f"coder: {s.coder_loss:.2%} or {s.coder_loss_bpw:.4f} bits a weight above the entropy of its symbols"
        )
    if inspection.content_id is not None:
        tool = inspection.metadata.tool
        lines.append(f"format {inspection.format_version}, {escape(tool.name)} {escape(tool.version)}")
        lines.append(f"content {inspection.content_id}")
    return "\n".join(lines)


def print_inspection(inspection: Inspection, tensors: list[TensorInfo] | None = None) -> None:
    """Table and totals on stdout. `tensors` are those to list, by default all, by name."""
    if tensors is None:
        tensors = sorted(inspection.tensors, key=lambda t: natural_order(t.name))
    show(Group(tensor_table(tensors), Text(""), Text(totals(inspection))))


def show(content: RenderableType) -> None:
    """Print on stdout, wide enough for any name when that is no terminal."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=220, no_color=True)
    with console.capture() as capture:  # rich would turn a closed pipe into exit status 1
        console.print(content)
    sys.stdout.write(capture.get())


def number(value: float | None, form: str) -> str:
    """A number in a format, or a dash."""
    return "-" if value is None else format(value, form)
