"""The four sums by which a decoded block is compared with its source."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hlwq_formats.layout import BLOCK

from ..quantize import power_of_two
from .block import Block, block_sum, load_block, multiply, scale, subtract, widen
from .compiled import kernel, part
from .tables import KINDS


@part
def measure_block(source: Block, restored: Block, sums: Any, b: int) -> None:
    """Write column b of (4, n_blocks): source energy, decoded energy, their product, error energy."""
    error = subtract(source, restored)
    sums[0, b] = block_sum(multiply(source, source))
    sums[1, b] = block_sum(multiply(restored, restored))
    sums[2, b] = block_sum(multiply(source, restored))
    sums[3, b] = block_sum(multiply(error, error))


@kernel
def _measure(items: Any, decoded: Any, kind: int, to_unit: Any, sums: Any) -> None:
    for b in range(sums.shape[1]):
        source = scale(widen(load_block(items, 128 * b), kind), to_unit)
        restored = scale(widen(load_block(decoded, 128 * b), kind), to_unit)
        measure_block(source, restored, sums, b)


def measure(
    items: NDArray[np.unsignedinteger], decoded: NDArray[np.unsignedinteger], dtype: str, exponent: int
) -> NDArray[np.float32]:
    """(4, n_blocks) sums, those of EncodedChunk, for (n_blocks * 128,) bit patterns of a tensor and its decoding."""
    sums = np.empty((4, len(items) // BLOCK), np.float32)
    _measure(items, decoded, KINDS[dtype], power_of_two(-exponent), sums)
    return sums


@kernel
def add_sums(sums: Any, totals: Any) -> None:
    """Add (4, n_blocks) float32 to (4,) float64, block after block: threads that do so do not wait for each other."""
    source, decoded, product, error = totals
    for b in range(sums.shape[1]):
        source += np.float64(sums[0, b])
        decoded += np.float64(sums[1, b])
        product += np.float64(sums[2, b])
        error += np.float64(sums[3, b])
    totals[0], totals[1], totals[2], totals[3] = source, decoded, product, error
