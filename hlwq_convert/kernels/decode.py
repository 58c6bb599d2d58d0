"""Decode blocks in one pass: unpack, look up, transform, scale, signs, round (spec section 6.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hlwq_formats.layout import BLOCK

from ..quantize import ScalarCode, power_of_two
from .block import fwht, half_to_scale, load_block, multiply, narrow, scale, store_block, take_block
from .compiled import kernel
from .packing import SLACK, unpack_block
from .tables import KINDS, table_rows


@kernel
def _decode(
    packed: Any, bits: int, scales: Any, unit: Any, levels: Any, signs: Any, kind: int, result: Any
) -> None:  # fmt: skip
    scratch = np.empty(128, np.uint8)
    flip = load_block(signs, 0)
    for b in range(len(scales)):
        unpack_block(packed, 16 * bits * b, bits, scratch)
        values = fwht(take_block(levels, load_block(scratch, 0)))
        weights = multiply(flip, scale(values, half_to_scale(scales[b]) * unit))
        store_block(result, 128 * b, narrow(weights, kind))


Decoder = Callable[[bytes | memoryview, NDArray[np.float16], NDArray[np.unsignedinteger]], None]


def decoder(code: ScalarCode, dtype: str) -> Decoder:
    """quantize.dequantize and dtypes.narrow for runs of blocks of one tensor, with the same bits.

    The function returned takes the packed codes of a run, its (n_blocks,) scales and where to put the weights:
    (count,) bit patterns of `dtype`, uint32 for F32 and else uint16, count in the last of the n_blocks blocks.
    """
    levels = table_rows(code.levels, 0)
    settings = (power_of_two(code.exponent), levels, code.signs, KINDS[dtype])
    block_bytes = 16 * code.bits

    def decode(packed: bytes | memoryview, scales: NDArray[np.float16], result: NDArray[np.unsignedinteger]) -> None:
        bits = scales.view(np.uint16)
        # the kernel reads a little beyond each block and writes whole ones: the last goes through a copy
        inner = len(scales) - 1
        _decode(np.frombuffer(packed, np.uint8), code.bits, bits[:inner], *settings, result)
        last_packed = np.zeros(block_bytes + SLACK, np.uint8)
        last_packed[:block_bytes] = np.frombuffer(packed, np.uint8)[-block_bytes:]
        last = np.empty(BLOCK, result.dtype)
        _decode(last_packed, code.bits, bits[inner:], *settings, last)
        result[inner * BLOCK :] = last[: len(result) - inner * BLOCK]

    return decode
