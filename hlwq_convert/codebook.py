"""FIT: a Lloyd-Max codebook for a tensor's own rotated, normalised coordinates (Lloyd 1982, Max 1960).

The fit runs on an integer histogram: counts and first moments are exact, so the only roundings are one
division for each level, and the result does not depend on the machine.

This is the reference, in NumPy; kernels.fit gives the same bits, faster.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .normal_levels import normal_levels
from .rotate import block_sums, fwht

BINS = 1 << 16
REACH = 8.0
"""Of N(0, 1): what lies farther out counts in the last bin."""
MAX_ITERATIONS = 10_000

GROUP = 16
_SAMPLED_GROUPS = 128


def sample_groups(n_blocks: int) -> range:
    """First blocks of the groups of 16 blocks that the codebook is fitted on: at most 255 groups, evenly
    strided over the tensor.

    That is 262,144 weights or more of a large tensor. Fitting all weights of one instead changes its error by less
    than .01 dB at 5 bits (spec/decisions/0005).
    """
    n_groups = -(-n_blocks // GROUP)
    return range(0, n_blocks, GROUP * max(1, n_groups // _SAMPLED_GROUPS))


def normalise(rotated: NDArray[np.float32]) -> NDArray[np.float32]:
    """Divide each row of (n, 128) float32 by its root mean square; rows of zeros are left out."""
    rms = np.sqrt(block_sums(rotated * rotated) * np.float32(1 / 128))
    alive = rms > 0
    normalised: NDArray[np.float32] = rotated[alive] / rms[alive, None]
    return normalised


def fit_lloyd_max(blocks: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Fit (2**bits,) float32 levels to sampled blocks: (n, 128) float32, signs applied, not yet rotated."""
    return fit_histogram(*histogram(blocks), bits, lloyd_max)


def histogram(blocks: NDArray[np.float32]) -> tuple[NDArray[np.int64], int]:
    """Count the rotated, normalised coordinates of blocks in BINS equal bins over -REACH..REACH; and the blocks
    that are not zero."""
    return count(normalise(fwht(blocks)))


def count(coordinates: NDArray[np.float32]) -> tuple[NDArray[np.int64], int]:
    """Count (n, 128) coordinates in BINS equal bins over -REACH..REACH; and n."""
    bins = np.clip(coordinates * np.float32(BINS / (2 * REACH)) + np.float32(BINS // 2), 0, BINS - 1)
    return np.bincount(bins.astype(np.int32).ravel(order="K"), minlength=BINS), len(coordinates)


def fit_histogram(
    counts: NDArray[np.int64],
    n_blocks: int,
    bits: int,
    iterate: Callable[[NDArray[np.int64], NDArray[np.float64]], NDArray[np.float64]],
) -> NDArray[np.float32]:
    """The levels for a histogram: from the optimum for N(0, 1), iterated to a fixed point.

    With fewer than 8 * 2**bits blocks the sample would fit noise: the constant N(0, 1) table is used.
    """
    start = normal_levels(bits)
    if n_blocks < 8 << bits:
        return start
    half_bin = REACH / BINS
    levels = (iterate(counts, start.astype(np.float64) / half_bin) * half_bin).astype(np.float32)
    return levels if (levels[1:] > levels[:-1]).all() else start


def lloyd_max(counts: NDArray[np.int64], levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lloyd's iteration on a histogram: cells from midpoints, levels from centroids, until no cell changes.

    Levels are in half bins from the middle, where the centres of bins are odd integers and their sums exact.
    """
    centres = 2 * np.arange(BINS, dtype=np.int64) + 1 - BINS
    count_below = np.concatenate([[0], np.cumsum(counts)])
    moment_below = np.concatenate([[0], np.cumsum(counts * centres)])
    cells = None
    for _ in range(MAX_ITERATIONS):
        inner = np.searchsorted(centres, (levels[:-1] + levels[1:]) * 0.5)
        if cells is not None and np.array_equal(cells, inner):
            break
        cells = inner
        edges = np.concatenate([[0], cells, [BINS]])
        count = np.diff(count_below[edges])
        moment = np.diff(moment_below[edges])
        # An empty cell keeps its level: it lies between its neighbours still.
        levels = np.where(count > 0, moment / np.maximum(count, 1), levels)
    return levels
