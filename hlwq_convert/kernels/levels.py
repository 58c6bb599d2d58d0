"""Decode blocks as they lie in the rotated domain: unpack, look up, scale, round, and no transform."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quantize import ScalarCode, power_of_two
from .block import half_to_scale, load_block, narrow, scale, store_block, take_block
from .compiled import kernel
from .packing import SLACK, unpack_block
from .tables import KINDS, table_rows


@kernel
def _scaled_levels(packed: Any, bits: int, scales: Any, unit: Any, levels: Any, kind: int, result: Any) -> None:
    scratch = np.empty(128, np.uint8)
    for b in range(len(scales)):
        unpack_block(packed, 16 * bits * b, bits, scratch)
        values = take_block(levels, load_block(scratch, 0))
        store_block(result, 128 * b, narrow(scale(values, half_to_scale(scales[b]) * unit), kind))


def scaled_levels(
    code: ScalarCode, dtype: str, packed: NDArray[np.uint8], scales: NDArray[np.uint16],
    result: NDArray[np.unsignedinteger],
) -> None:  # fmt: skip
    """Write scale * levels[codes] of (n_blocks, 16 * bits) packed codes and (n_blocks,) fp16 bit patterns to
    `result`: (n_blocks * 128,) bit patterns of `dtype`, uint32 for F32 and else uint16."""
    levels = table_rows(code.levels, 0)
    settings = (power_of_two(code.exponent), levels, KINDS[dtype])
    inner = len(scales) - 1
    _scaled_levels(packed[:inner].reshape(-1), code.bits, scales[:inner], *settings, result)
    last = np.zeros(packed.shape[1] + SLACK, np.uint8)  # the kernel reads a little beyond each block
    last[:-SLACK] = packed[inner]
    _scaled_levels(last, code.bits, scales[inner:], *settings, result[128 * inner :])
