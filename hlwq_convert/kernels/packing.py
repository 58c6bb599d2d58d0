"""hlwq_formats.bitpack for one block: sixteen groups of eight codes, each group one 64-bit word."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled import kernel, part
from .vectors import load_word, store_word

SLACK = 8
"""Bytes that may be touched behind the last packed one."""


@part
def _mask(bits: int, repeat: int) -> Any:
    """`bits` ones at the bottom of each `repeat` bits of a word."""
    word = np.uint64(0)
    for i in range(0, 64, repeat):
        word |= ((np.uint64(1) << np.uint64(bits)) - np.uint64(1)) << np.uint64(i)
    return word


@part
def pack_block(codes: Any, bits: int, packed: Any, start: int) -> None:
    """Write 128 uint8 codes as the 16 * bits bytes from `start`; the 8 - bits bytes after them are overwritten.

    Three merges halve the number of gaps between the codes of a word: lanes of 8 bits become lanes of 16 with
    2 * bits in use, then of 32, then of 64.
    """
    low8, low16, low32 = _mask(bits, 16), _mask(2 * bits, 32), _mask(4 * bits, 64)
    gap8, gap16, gap32 = np.uint64(8 - bits), np.uint64(16 - 2 * bits), np.uint64(32 - 4 * bits)
    for i in range(16):
        word = load_word(codes, 8 * i)
        word = (word & low8) | ((word >> gap8) & (low8 << np.uint64(bits)))
        word = (word & low16) | ((word >> gap16) & (low16 << np.uint64(2 * bits)))
        word = (word & low32) | ((word >> gap32) & (low32 << np.uint64(4 * bits)))
        store_word(packed, start + bits * i, word)


@part
def unpack_block(packed: Any, start: int, bits: int, codes: Any) -> None:
    """Read 128 codes from the 16 * bits bytes at `start` into uint8 items; 8 - bits bytes after them are read."""
    low8, low16, low32 = _mask(bits, 16), _mask(2 * bits, 32), _mask(4 * bits, 64)
    gap8, gap16, gap32 = np.uint64(8 - bits), np.uint64(16 - 2 * bits), np.uint64(32 - 4 * bits)
    for i in range(16):
        word = load_word(packed, start + bits * i)
        word = (word & low32) | ((word & (low32 << np.uint64(4 * bits))) << gap32)
        word = (word & low16) | ((word & (low16 << np.uint64(2 * bits))) << gap16)
        word = (word & low8) | ((word & (low8 << np.uint64(bits))) << gap8)
        store_word(codes, 8 * i, word)


@kernel
def _pack(codes: Any, bits: int, packed: Any) -> None:
    for b in range(len(codes) // 128):
        pack_block(codes[128 * b : 128 * b + 128], bits, packed, 16 * bits * b)


def pack(codes: NDArray[np.uint8], bits: int) -> bytes:
    """bitpack.pack of whole blocks, each code below 2**bits."""
    packed = np.empty(len(codes) * bits // 8 + SLACK, np.uint8)
    _pack(codes, bits, packed)
    return packed[:-SLACK].tobytes()
