"""The tensors of an inspection chosen and put in order, and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from typing import Literal

from hlwq_formats.errors import Usage, escape

from .inspection import TensorInfo
from .report import natural_order

SortKey = Literal["name", "bits", "bytes", "cosine", "sqnr"]

_WORST: dict[str, Callable[[TensorInfo], float | None]] = {
    "bits": lambda t: None if t.bpw is None else -t.bpw,
    "bytes": lambda t: -t.bytes,
    "cosine": lambda t: t.cosine,
    "sqnr": lambda t: t.sqnr_db,
}
_COLUMNS = [
    "name", "shape", "dtype", "encoding", "bits", "bpw", "bytes", "cosine", "sqnr_db", "rel_mse", "entropy_bytes",
    "coder_loss", "reason",
]  # fmt: skip


def compile_filter(pattern: str) -> re.Pattern[str]:
    """Usage (2) for what is no regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise Usage(f"--filter is not a regular expression: {escape(str(error))}") from None


def choose(tensors: list[TensorInfo], key: SortKey, pattern: str | None = None) -> list[TensorInfo]:
    """The tensors whose name the expression finds, by name or worst first: most bits (with all overhead) or bytes,
    lowest cosine or SQNR. What has no such number comes last, and equal ones stand by name."""
    if pattern is not None:
        search = compile_filter(pattern).search
        tensors = [tensor for tensor in tensors if search(tensor.name)]
    tensors = sorted(tensors, key=lambda t: natural_order(t.name))
    if key == "name":
        return tensors
    worst = _WORST[key]
    return sorted(tensors, key=lambda t: (worst(t) is None, worst(t) or 0.0))


def to_csv(tensors: list[TensorInfo]) -> str:
    """One line a tensor under a line of names (RFC 4180); shapes as 576x1536, null as nothing.

    Texts of the file are escaped as in the table, and one that a spreadsheet would take for a formula gets an
    apostrophe before it.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for t in tensors:
        shape = "x".join(map(str, t.shape)) or "0-d"
        numbers = [t.bits, t.bpw, t.bytes, t.cosine, t.sqnr_db, t.rel_mse, t.entropy_bytes, t.coder_loss]
        writer.writerow([_plain(t.name), shape, t.dtype, t.encoding, *numbers, _plain(t.reason)])
    return text.getvalue()


def _plain(text: str) -> str:
    shown = escape(text, 6000)  # 512 bytes, each escaped, are fewer
    return "'" + shown if shown.startswith(("=", "+", "-", "@")) else shown
