"""A comparison of two files for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hlwq_formats import metadata as md
from hlwq_formats.errors import escape

from .comparison import Comparison, Status, TensorPair
from .inspection import Inspection, TensorInfo
from .listing import SortKey, compile_filter
from .report import default_width, human_bytes, natural_order, number

_VALUES: dict[str, Callable[[TensorInfo], float | None]] = {
    "bits": lambda t: t.bpw,
    "bytes": lambda t: t.bytes,
    "cosine": lambda t: t.cosine,
    "sqnr": lambda t: t.sqnr_db,
}

_WORDS: dict[Status, str] = {
    "equal": "equal", "different": "different", "only_a": "only in the first", "only_b": "only in the second"
}  # fmt: skip


def choose_pairs(pairs: list[TensorPair], key: SortKey, pattern: str | None = None) -> list[TensorPair]:
    """The pairs that are not equal and whose name the expression finds, by name or by the size of the change."""
    search = compile_filter(pattern or "").search
    chosen = sorted(
        (pair for pair in pairs if pair.status != "equal" and search(pair.name)), key=lambda p: natural_order(p.name)
    )
    if key == "name":
        return chosen
    return sorted(chosen, key=lambda pair: -_change(pair, _VALUES[key]))


def _change(pair: TensorPair, value: Callable[[TensorInfo], float | None]) -> float:
    a, b = (value(side) if side is not None else None for side in (pair.a, pair.b))
    return abs(b - a) if a is not None and b is not None else 0.0


def comparison_report(comparison: Comparison, pairs: list[TensorPair]) -> RenderableType:
    """Totals side by side, what changed in the plan, and the given pairs."""
    parts: list[RenderableType] = [_totals_table(comparison.a, comparison.b), Text(""), Text(_verdict(comparison))]
    if pairs:
        parts += [Text(""), _pair_table(pairs)]
    return Group(*parts)


def _totals_table(a: Inspection, b: Inspection) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", escape(a.file), escape(b.file)):
        table.add_column(Text(title), overflow="fold")
    change = f" ({100 * (b.file_bytes / a.file_bytes - 1):+.1f} %)"
    table.add_row("size", human_bytes(a.file_bytes), human_bytes(b.file_bytes) + change)
    for kind in a.summary.bytes_by_encoding:
        sizes = [side.summary.bytes_by_encoding[kind] for side in (a, b)]
        if any(sizes):
            table.add_row(f"  {kind}", *map(human_bytes, sizes))
    rows: list[tuple[str, Callable[[Inspection], str]]] = [
        ("weights", lambda side: f"{side.weights:,}"),
        ("bits a weight", lambda side: number(side.bpw, ".3f")),
        ("cosine min", lambda side: number(side.summary.cosine_min, ".5f")),
        ("SQNR mean, dB", lambda side: number(side.summary.sqnr_db_mean, ".2f")),
        ("recipe", _recipe),
        ("tool", lambda side: escape(f"{side.metadata.tool.name} {side.metadata.tool.version}")),
        ("content", lambda side: (side.content_id or "-")[:16]),
    ]
    for title, value in rows:
        table.add_row(title, Text(value(a)), Text(value(b)))
    return table


def _recipe(side: Inspection) -> str:
    recipe = side.metadata.recipe
    name = f"{escape(recipe.name, 60)}, " if recipe.name else ""
    return f"{name}{default_width(recipe)}, effort {escape(recipe.effort, 40)}, {len(recipe.rules)} rules"


def _verdict(comparison: Comparison) -> str:
    """What is equal, and how the plan changed, most frequent change first."""
    counts = Counter(_WORDS[pair.status] for pair in comparison.tensors)
    found = ", ".join(f"{counts[words]} {words}" for words in _WORDS.values() if counts[words])
    lines = ["the tensors of both files are the same" if comparison.same_content else f"tensors: {found}"]
    changes = Counter(_plan_change(pair) for pair in comparison.tensors if pair.status == "different")
    lines += [f"  {count} x {change}" for change, count in changes.most_common(12) if change]
    foreign = sum(pair.same_source is False for pair in comparison.tensors)
    if foreign:
        lines.append(f"{foreign} tensors were made from other source weights: these are not two forms of one model")
    assets = [asset for asset in comparison.assets if asset.status != "equal" and asset.name != md.REPORT]
    lines += [f'file "{escape(asset.name)}": {_WORDS[asset.status]}' for asset in assets[:12]]
    if len(assets) > 12:
        lines.append(f"and {len(assets) - 12} more files")
    return "\n".join(lines)


def _plan_change(pair: TensorPair) -> str:
    if pair.a is None or pair.b is None:
        return ""
    a, b = (side.encoding if side.bits is None else f"{side.encoding} {side.bits}" for side in (pair.a, pair.b))
    return f"{a} -> {b}" if a != b else f"{a}, other values"


def _pair_table(pairs: list[TensorPair]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    table.add_column("encoding", no_wrap=True)
    for column in ("bits", "bytes", "cosine", "SQNR dB"):
        table.add_column(column, justify="right", no_wrap=True)
    for pair in pairs:
        table.add_row(
            Text(escape(pair.name, 600)),
            _both(pair, lambda t: t.encoding),
            _both(pair, lambda t: number(t.bpw, ".2f") if t.bits is None else str(t.bits)),
            _both(pair, lambda t: f"{t.bytes:,}"),
            _both(pair, lambda t: number(t.cosine, ".5f")),
            _both(pair, lambda t: number(t.sqnr_db, ".2f")),
        )
    return table


def _both(pair: TensorPair, text: Callable[[TensorInfo], str]) -> str:
    """The text of both sides, once where it is the same; "absent" for a side without the tensor."""
    a, b = ("absent" if side is None else text(side) for side in (pair.a, pair.b))
    return a if a == b else f"{a} -> {b}"
