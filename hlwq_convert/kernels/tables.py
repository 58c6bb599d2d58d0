"""What the kernels take from Python: tables of floats in rows of sixteen, source bytes as bit patterns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hlwq_formats.dtypes import BIT_PATTERNS, ITEM_BITS
from hlwq_formats.layout import BLOCK

from .block import BF16, F16, F32

Rows = tuple[NDArray[np.float32], ...]

KINDS = {"BF16": BF16, "F16": F16, "F32": F32}


def items_of(raw: bytes | memoryview, dtype: str) -> NDArray[np.unsignedinteger]:
    """The bit patterns of weights, uint32 for F32 and else uint16, read-only: kernels are compiled for that."""
    items = np.frombuffer(raw, BIT_PATTERNS[dtype])
    items.flags.writeable = False
    return items


def whole_blocks(raw: bytes | memoryview, dtype: str) -> NDArray[np.unsignedinteger]:
    """The same with zeros behind the end of the last block."""
    if lacking := -len(raw) % (BLOCK * ITEM_BITS[dtype] // 8):
        raw = bytes(raw) + bytes(lacking)
    return items_of(raw, dtype)


def table_rows(values: NDArray[np.float32], fill: float) -> Rows:
    """A table of up to 256 float32 as the rows of 16 of one array, at least two, with `fill` behind its end."""
    size = max(32, 1 << (len(values) - 1).bit_length())
    table = np.full(size, fill, np.float32)
    table[: len(values)] = values
    return tuple(table.reshape(-1, 16))


def largest_step(midpoints: NDArray[np.float32], gains: NDArray[np.float32]) -> int:
    """How many midpoints a coordinate can cross, at most, when it is divided by the next of increasing gains.

    The quotient shrinks towards zero by the ratio of the gains, or by an ulp or two more: that is allowed for.
    """
    if len(gains) < 2:
        return 0
    ratio = float((gains[:-1] / gains[1:]).min()) * (1 - 1e-6)
    crossed = 1  # a coordinate that underflows to zero crosses the midpoint there
    for side in (midpoints > 0, midpoints < 0):
        distances = np.sort(np.abs(midpoints[side].astype(np.float64)))
        if len(distances):
            # from just beyond midpoint i, everything down to its distance times the ratio
            lowest = np.searchsorted(distances, distances * ratio, "left")
            highest = np.searchsorted(distances, distances, "right")
            crossed = max(crossed, int((highest - lowest).max()))
    return crossed
