"""quantize.block_checksums for whole blocks, with the same bits, and one checksum of those of a chunk."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hlwq_formats.layout import BLOCK

from ..quantize import CHECKSUM_WEIGHTS, CHUNK
from .block import block_sum, load_block, multiply
from .compiled import kernel

PRIME = 0x01000193
"""What a checksum of chunks is multiplied by for each block: a change of any one block changes it."""


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


@kernel
def _combine(blocks: Any, per_chunk: int, result: Any) -> None:
    for chunk in range(len(result)):
        found = np.uint32(0)
        for b in range(per_chunk * chunk, min(per_chunk * (chunk + 1), len(blocks))):
            found = np.uint32(found * np.uint32(PRIME) + blocks[b])
        result[chunk] = found


def combine(blocks: NDArray[np.uint32]) -> list[int]:
    """One checksum for each CHUNK of weights, the last maybe less, from the (n_blocks,) of their blocks."""
    per_chunk = CHUNK // BLOCK
    result = np.empty(max(1, -(-len(blocks) // per_chunk)), np.uint32)
    _combine(blocks, per_chunk, result)
    found: list[int] = result.tolist()
    return found
