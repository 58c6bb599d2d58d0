"""quantize.block_checksums for whole blocks, with the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hlwq_formats.layout import BLOCK

from ..quantize import CHECKSUM_WEIGHTS
from .block import block_sum, load_block, multiply
from .compiled import kernel


@kernel
def _checksums(items: Any, weights: Any, result: Any) -> None:
    multipliers = load_block(weights, 0)
    for b in range(len(result)):
        result[b] = block_sum(multiply(load_block(items, 128 * b), multipliers))


def checksums(bits: NDArray[np.unsignedinteger]) -> NDArray[np.uint32]:
    """(n_blocks,) checksums of (n_blocks * 128,) bit patterns, uint16 or uint32."""
    result = np.empty(len(bits) // BLOCK, np.uint32)
    _checksums(bits, CHECKSUM_WEIGHTS, result)
    return result
