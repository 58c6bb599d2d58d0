"""Look through source bytes for the largest magnitude."""

from __future__ import annotations

from typing import Any

import numpy as np

from hlwq_formats.dtypes import widen

from .compiled import kernel
from .tables import items_of
from .vectors import load, select, splat, store

_MAGNITUDE = {"BF16": 0x7FFF, "F16": 0x7FFF, "F32": 0x7FFFFFFF}


@kernel
def _largest(items: Any, mask: int) -> Any:
    lanes = np.zeros(16, np.uint32)
    top = splat(0)
    whole = len(items) // 16 * 16
    for i in range(0, whole, 16):
        magnitude = load(items, i) & splat(mask)
        top = select(top < magnitude, magnitude, top)
    store(lanes, 0, top)
    largest = 0
    for i in range(16):
        largest = max(largest, int(lanes[i]))
    for i in range(whole, len(items)):
        largest = max(largest, int(items[i]) & mask)
    return largest


def largest_magnitude(raw: bytes, dtype: str) -> float:
    """The largest magnitude among weights of `dtype`; infinity or NaN when one of them is not finite."""
    items = items_of(raw, dtype)  # without their signs, bit patterns are in the order of the values
    return float(widen(items.dtype.type(_largest(items, _MAGNITUDE[dtype])).tobytes(), dtype)[0])
