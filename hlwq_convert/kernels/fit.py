"""codebook.fit_lloyd_max for the source bytes of sampled blocks, with the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codebook import BINS, MAX_ITERATIONS, REACH, fit_histogram
from ..quantize import power_of_two
from .block import block_sum, divide, fwht, load_block, multiply, scale, shift, store_block, to_bits, widen
from .compiled import kernel
from .tables import KINDS, whole_blocks


@kernel
def _histogram(items: Any, kind: int, to_unit: Any, signs: Any, counts: Any) -> int:
    place = np.empty(128, np.float32)
    place_bits = place.view(np.uint32)
    flip = load_block(signs, 0)
    alive = 0
    for b in range(len(items) // 128):
        rotated = fwht(multiply(scale(widen(load_block(items, 128 * b), kind), to_unit), flip))
        rms = np.sqrt(block_sum(multiply(rotated, rotated)) * np.float32(1 / 128))
        if rms > 0:
            alive += 1
            bins = shift(scale(divide(rotated, rms), np.float32(BINS / (2 * REACH))), np.float32(BINS // 2))
            store_block(place_bits, 0, to_bits(bins))
            for i in range(128):
                counts[int(min(max(place[i], np.float32(0)), np.float32(BINS - 1)))] += 1
    return alive


@kernel
def _lloyd_max(counts: Any, levels: Any) -> Any:
    count_below = np.zeros(BINS + 1, np.int64)
    moment_below = np.zeros(BINS + 1, np.int64)
    for i in range(BINS):
        count_below[i + 1] = count_below[i] + counts[i]
        moment_below[i + 1] = moment_below[i] + counts[i] * (2 * i + 1 - BINS)
    levels = levels.copy()
    edges = np.zeros(len(levels) + 1, np.int64)
    edges[-1] = BINS
    for iteration in range(MAX_ITERATIONS):
        moved = iteration == 0
        for k in range(1, len(levels)):
            edge = _first_centre_from((levels[k - 1] + levels[k]) * 0.5)
            moved |= edge != edges[k]
            edges[k] = edge
        if not moved:
            break
        for k in range(len(levels)):
            count = count_below[edges[k + 1]] - count_below[edges[k]]
            if count > 0:
                levels[k] = (moment_below[edges[k + 1]] - moment_below[edges[k]]) / count
    return levels


@kernel
def _first_centre_from(value: float) -> int:
    """Index of the first bin whose centre, 2 * i + 1 - BINS, is not below `value`."""
    i = min(max(int((value + (BINS - 1)) * 0.5), 0), BINS)
    while i > 0 and 2 * i - 1 - BINS >= value:
        i -= 1
    while i < BINS and 2 * i + 1 - BINS < value:
        i += 1
    return i


def fit(raw: bytes, dtype: str, exponent: int, signs: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """(2**bits,) float32 levels for a tensor of `dtype`, from the bytes of its sampled blocks."""
    counts = np.zeros(BINS, np.int64)
    alive = _histogram(whole_blocks(raw, dtype), KINDS[dtype], power_of_two(-exponent), signs, counts)
    return fit_histogram(counts, alive, bits, _lloyd_max)
