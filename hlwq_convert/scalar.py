"""ENCODE at a fixed rate: the nearest level for each coordinate, one fp16 scale for each block.

The scale that serves a block best is rarely its root mean square: with few levels, a somewhat smaller or
larger grid has less error. The search tries gains around the RMS, then takes the least-squares scale of the
codes it chose. Which scale was chosen is invisible to a decoder. "best" tries more gains, and weighs error against
the bytes that the codes will take when they are compressed.

This is the reference, in NumPy; kernels.encode gives the same bits, faster.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .rotate import block_sums

GAINS = tuple(np.float32(0.88 + 0.03 * i) for i in range(9))
"""Multiples of the block's RMS that the search tries: .88, .91, ..., 1.12."""
BEST_GAINS = tuple(np.float32(0.76 + 0.02 * i) for i in range(25))
"""Those that "best" tries: .76, .78, ..., 1.24."""

PENALTIES = {3: 0.0069, 4: 0.00285, 5: 0.00075, 6: 0.000192, 7: 0.000049}
"""Width -> what "best" takes a coordinate of a square level of 1 to cost, in units of the block's mean square.

Codes of large levels are rare, so take more bits: with levels fitted to N(0, 1), -log2 of their frequency is about
.48 level**2 and a constant. Each penalty is .3 (.2 at 3 bits) of the error at that width: more would save more than it
costs, but the error would be above that of the default search (spec/decisions/0011). At 2 and 8 bits none pays.
"""

Effort = str
EFFORTS = ("default", "fast", "best")


def gains_of(effort: Effort) -> NDArray[np.float32]:
    """The gains that an effort tries, increasing; "fast" tries 1 alone."""
    return np.array({"fast": (1,), "best": BEST_GAINS}.get(effort, GAINS), np.float32)


def penalty_of(effort: Effort, bits: int) -> np.float32:
    """What an effort adds to the error of a block for each square of a chosen level, in units of its mean square."""
    return np.float32(PENALTIES.get(bits, 0) if effort == "best" else 0)


def nearest_level(values: NDArray[np.float32], levels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Index of the nearest of 2**bits increasing levels for each value, any shape; a tie takes the lower level.

    The index is the number of midpoints below the value. Counting them one comparison at a time is exact
    and, up to 7 bits, faster in NumPy than a binary search for each value.
    """
    midpoints = (levels[:-1] + levels[1:]) * np.float32(0.5)
    codes = np.zeros_like(values, np.uint8)
    above = np.empty_like(values, np.bool_)
    for midpoint in midpoints:
        codes += np.greater(values, midpoint, out=above).view(np.uint8)
    return codes


def encode(
    rotated: NDArray[np.float32], levels: NDArray[np.float32], effort: Effort
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Encode (n, 128) float32 rotated blocks: (n, 128) uint8 codes and (n,) float16 scales.

    A block is approximated by 128 * scale * levels[codes]: the factor is what two unnormalised transforms
    leave. `effort` "fast" tries the gain 1 alone. Blocks of zeros, and those whose scale rounds to zero, get
    scale 0 and codes 0.
    """
    rms = np.sqrt(block_sums(rotated * rotated) * np.float32(1 / 128))
    unit = np.where(rms > 0, rms, np.float32(1))  # a block of zeros must not divide by zero
    price = penalty_of(effort, len(levels).bit_length() - 1) * (unit * unit)
    gains = gains_of(effort)
    codes, scale, gained = _encode_at_gain(rotated, levels, unit * gains[0], price)
    for gain in gains[1:]:
        new_codes, new_scale, new_gained = _encode_at_gain(rotated, levels, unit * gain, price)
        better = new_gained > gained
        codes = np.where(better[:, None], new_codes, codes)
        scale = np.where(better, new_scale, scale)
        gained = np.where(better, new_gained, gained)
    # the limit is for fitted levels so far inside that one outlier would need a scale beyond fp16
    scales = np.minimum(scale * np.float32(1 / 128), np.float32(65504)).astype(np.float16)
    codes[scales == 0] = 0
    return codes, scales


def _encode_at_gain(
    rotated: NDArray[np.float32], levels: NDArray[np.float32], step: NDArray[np.float32], price: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Codes of (n, 128) at the scale `step` (n,), the least-squares scale of these codes, and the energy that
    it captures less the `price` of the levels: the squared error is the block's energy less what is captured, so the
    largest is the best."""
    codes = nearest_level(rotated * (np.float32(1) / step)[:, None], levels)
    chosen = levels[codes]
    # + 0 makes a zero of either sign positive: the sign would go into the scale
    product: NDArray[np.float32] = np.maximum(block_sums(rotated * chosen), np.float32(0)) + np.float32(0)
    energy: NDArray[np.float32] = np.maximum(block_sums(chosen * chosen), np.float32(1e-30))
    scale = product / energy
    return codes, scale, scale * product - price * energy
