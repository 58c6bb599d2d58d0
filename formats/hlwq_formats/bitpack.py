"""Codes of 1 to 8 bits as one LSB-first bit stream (spec section 6.1).

Code i takes the bits i*width .. i*width + width - 1 of the stream; bit j of the stream is bit j % 8 of
byte j // 8. Eight codes are therefore exactly `width` bytes, which is how both directions work: eight
codes in one 64-bit word.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def packed_size(count: int, width: int) -> int:
    """Bytes of `count` codes."""
    return (count * width + 7) // 8


def pack(codes: NDArray[np.uint8], width: int) -> bytes:
    """Pack (n,) uint8 codes, each below 2**width; unused bits of the last byte are zero."""
    _check_width(width)
    count = len(codes)
    if width == 8:
        return codes.tobytes()
    words = np.zeros(-(-count // 8), "<u8")
    words.view(np.uint8)[:count] = codes
    for lane in (8, 16, 32):  # neighbours are merged: in each lane of a word the lowest `used` bits are in use
        used = width * lane // 8
        low = np.uint64(sum(((1 << used) - 1) << i for i in range(0, 64, 2 * lane)))
        words = (words & low) | ((words >> np.uint64(lane - used)) & (low << np.uint64(used)))
    stream = words.view(np.uint8).reshape(-1, 8)[:, :width]
    return stream.tobytes()[: packed_size(count, width)]


def unpack(stream: bytes | bytearray | memoryview, width: int, count: int) -> NDArray[np.uint8]:
    """Unpack `count` codes from exactly packed_size(count, width) bytes to (count,) uint8."""
    _check_width(width)
    packed = np.frombuffer(stream, np.uint8)
    if len(packed) != packed_size(count, width):
        raise ValueError(f"{count} codes of {width} bits take {packed_size(count, width)} bytes, not {len(packed)}")
    if width == 8:
        return packed
    n_words = -(-count // 8)
    octets = np.zeros((n_words, 8), np.uint8)
    whole = len(packed) // width
    octets[:whole, :width] = packed[: whole * width].reshape(whole, width)
    octets[whole:, : len(packed) - whole * width] = packed[whole * width :]
    words = octets.view("<u8").reshape(-1)
    codes = np.empty((n_words, 8), np.uint8)
    mask = np.uint64((1 << width) - 1)
    for i in range(8):
        codes[:, i] = (words >> np.uint64(i * width)) & mask
    return codes.reshape(-1)[:count]


def _check_width(width: int) -> None:
    if not 1 <= width <= 8:
        raise ValueError(f"width {width} is not in 1..8")
