"""Look through source bytes for the largest magnitude and for zeros."""

from __future__ import annotations

from typing import Any

import numpy as np

from hlwq_formats.dtypes import BIT_PATTERNS, ITEM_BITS, narrow
from hlwq_formats.dtypes import widen as widen_bytes

from .block import load_block, widen
from .compiled import kernel
from .tables import KINDS, items_of, whole_blocks
from .vectors import load, ones, select, splat, store

_MAGNITUDE = {"BF16": 0x7FFF, "F16": 0x7FFF, "F32": 0x7FFFFFFF}


@kernel
def _survey(items: Any, mask: int) -> tuple[int, int]:
    tops, counts = np.zeros(16, np.uint32), np.zeros(16, np.uint32)
    top, zeros = splat(0), splat(0)
    whole = len(items) // 16 * 16
    for i in range(0, whole, 16):
        magnitude = load(items, i) & splat(mask)
        top = select(top < magnitude, magnitude, top)
        zeros = zeros + ones(magnitude < splat(1))
    store(tops, 0, top)
    store(counts, 0, zeros)
    largest, count = 0, 0
    for i in range(16):
        largest = max(largest, int(tops[i]))
        count += int(counts[i])
    for i in range(whole, len(items)):
        largest = max(largest, int(items[i]) & mask)
        count += int(items[i]) & mask == 0
    return largest, count


@kernel
def _add_energies(items: Any, count: int, kind: int, row: int, start: int, sums: Any, energies: Any) -> None:
    values = np.empty(128, np.float32)
    place = start // row
    column = start - place * row
    for first in range(0, len(items), 128):
        widened = widen(load_block(items, first), kind)
        for v in range(8):
            store(values, 16 * v, widened[v])
        for i in range(min(128, count - first)):
            value = np.float64(values[i])
            sums[column & 7] += value * value
            column += 1
            if column == row:
                even, odd = (sums[0] + sums[4]) + (sums[2] + sums[6]), (sums[1] + sums[5]) + (sums[3] + sums[7])
                energies[place] = even + odd
                sums[:] = 0
                place, column = place + 1, 0


class RowEnergies:
    """trellis.row_energies of a tensor that comes in pieces."""

    def __init__(self, dtype: str, row: int, n_rows: int) -> None:
        self.energies = np.zeros(n_rows)
        self._kind, self._dtype, self._row = KINDS[dtype], dtype, row
        self._sums, self._start = np.zeros(8), 0

    def add(self, raw: bytes | memoryview) -> None:
        """The next piece."""
        count = len(raw) * 8 // ITEM_BITS[self._dtype]
        items = whole_blocks(raw, self._dtype)
        _add_energies(items, count, self._kind, self._row, self._start, self._sums, self.energies)
        self._start += count


def survey_weights(raw: bytes | memoryview, dtype: str) -> tuple[float, int]:
    """The largest magnitude among weights of `dtype`, infinity or NaN when one of them is not finite, and the
    number of zeros of either sign."""
    items = items_of(raw, dtype)  # without their signs, bit patterns are in the order of the values
    largest, zeros = _survey(items, _MAGNITUDE[dtype])
    return float(widen_bytes(items.dtype.type(largest).tobytes(), dtype)[0]), zeros


@kernel
def _find(items: Any, mask: int, wanted: int) -> int:
    for i in range(len(items)):
        if int(items[i]) & mask == wanted:
            return i
    return len(items)


def find_magnitude(raw: bytes | memoryview, dtype: str, magnitude: float) -> int:
    """The index of the first weight of this magnitude."""
    bits = int(narrow(np.array([magnitude], np.float32), dtype).view(BIT_PATTERNS[dtype])[0])
    return int(_find(items_of(raw, dtype), _MAGNITUDE[dtype], bits))
