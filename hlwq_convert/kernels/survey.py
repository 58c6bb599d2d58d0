"""Look through source bytes for the largest magnitude and for zeros."""

from __future__ import annotations

from typing import Any

import numpy as np

from hlwq_formats.dtypes import widen

from .compiled import kernel
from .tables import items_of
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


def survey_weights(raw: bytes, dtype: str) -> tuple[float, int]:
    """The largest magnitude among weights of `dtype`, infinity or NaN when one of them is not finite, and the
    number of zeros of either sign."""
    items = items_of(raw, dtype)  # without their signs, bit patterns are in the order of the values
    largest, zeros = _survey(items, _MAGNITUDE[dtype])
    return float(widen(items.dtype.type(largest).tobytes(), dtype)[0]), zeros
