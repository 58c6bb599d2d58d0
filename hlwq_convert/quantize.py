"""One tensor, a straight line down and the same line back up.

Both lines work on any run of whole blocks, so a tensor passes through in chunks. What the encoder measures
is the decoder's own output, rounded to the tensor's dtype: the reported error is that of what is loaded.

This is the reference, in NumPy; kernels.encode and kernels.decode give the same bits, faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hlwq_formats.bitpack import pack, unpack
from hlwq_formats.dtypes import narrow, widen
from hlwq_formats.layout import BLOCK, count_blocks

from .rotate import block_sums, from_blocks, fwht, to_blocks
from .scalar import Effort, encode

CHUNK = 1 << 20
"""Weights that are read, coded and written at once."""

CHECKSUM_WEIGHTS = (2 * np.arange(BLOCK, dtype=np.uint32) + 1) * np.uint32(0x9E3779B1)
"""Odd multipliers for the checksum of a block: a change of any one weight changes it."""

_TOP_EXPONENT = 15


@dataclass(frozen=True)
class ScalarCode:
    """How one tensor is coded: what its chunks share."""

    dtype: str
    bits: int
    exponent: int
    levels: NDArray[np.float32]  # (2**bits,)
    signs: NDArray[np.float32]  # (128,), 1 or -1
    effort: Effort = "default"


@dataclass(frozen=True)
class EncodedChunk:
    """The stored form of a run of blocks, and what was measured on its decoding, for each block."""

    codes: bytes | memoryview  # n_blocks * 16 * bits
    scales: bytes | memoryview  # n_blocks float16
    sums: NDArray[np.float32]  # (4, n_blocks): source energy, decoded energy, their product, error energy
    checksums: NDArray[np.uint32]  # (n_blocks,) of the decoded weights in the tensor's dtype
    frame: bytes = b""  # the codes once more, compressed, where that may pay


def choose_exponent(largest: float) -> int:
    """The tensor's power of two: times 2**-exponent its largest magnitude A lies in [2**15, 2**16).

    The scale of the block that holds it is at least A / 128 and, with the levels of N(0, 1), at most .29 A (when
    one coordinate holds all of the block): the largest scale lies in [2**8, 2**15), well below what fp16 can
    hold and 22 powers of two above what it begins to lose.
    """
    if largest == 0:
        return 0
    return min(max(int(np.frexp(largest)[1]) - 1 - _TOP_EXPONENT, -126), 112)


def quantize(raw: bytes | memoryview, code: ScalarCode) -> EncodedChunk:
    """Encode source bytes of `code.dtype`: whole blocks of weights, but for the end of the tensor."""
    to_unit = power_of_two(-code.exponent)
    weights = widen(raw, code.dtype) * to_unit
    blocks = to_blocks(weights)
    rotated = fwht(blocks * code.signs)
    codes, scales = encode(rotated, code.levels, code.effort)
    packed = pack(np.ascontiguousarray(codes).reshape(-1), code.bits)

    decoded = narrow(dequantize(packed, scales, code, len(weights)), code.dtype)
    restored = to_blocks(widen(decoded.tobytes(), code.dtype) * to_unit)
    return EncodedChunk(packed, scales.tobytes(), measure_blocks(blocks, restored), block_checksums(decoded))


def measure_blocks(source: NDArray[np.float32], restored: NDArray[np.float32]) -> NDArray[np.float32]:
    """(4, n_blocks) sums over blocks: source energy, decoded energy, their product, error energy."""
    with np.errstate(invalid="ignore", over="ignore"):  # not finite: the caller keeps the tensor raw
        error = source - restored
        pairs = ((source, source), (restored, restored), (source, restored), (error, error))
        return np.stack([block_sums(a * b) for a, b in pairs])


def dequantize(
    packed: bytes | memoryview, scales: NDArray[np.float16], code: ScalarCode, count: int
) -> NDArray[np.float32]:
    """Decode the first `count` weights of a run of blocks, as (count,) float32 (spec section 6.3).

    w = signs * (scale * fwht(levels[codes])), multiplied in exactly this order.
    """
    codes = unpack(packed, code.bits, count_blocks(count) * BLOCK)
    # Back to column order: the transform and everything after it run on whole columns.
    values = fwht(code.levels[np.asfortranarray(codes.reshape(-1, BLOCK))])
    scale = scales.astype(np.float32) * power_of_two(code.exponent)
    with np.errstate(over="ignore"):  # the encoder keeps such tensors raw; a stranger's file may hold infinity
        return from_blocks(code.signs * (scale[:, None] * values), count)


def block_checksums(decoded: NDArray[np.generic]) -> NDArray[np.uint32]:
    """(n_blocks,) sums modulo 2**32 of the bit patterns of (count,) weights, each times its multiplier."""
    bits = np.zeros(count_blocks(len(decoded)) * BLOCK, np.uint32)
    bits[: len(decoded)] = decoded.view(f"<u{decoded.itemsize}")
    checksums: NDArray[np.uint32] = (bits.reshape(-1, BLOCK) * CHECKSUM_WEIGHTS).sum(axis=1, dtype=np.uint32)
    return checksums


def power_of_two(exponent: int) -> np.float32:
    """2.0 ** exponent, exact for -126..126."""
    return np.float32(np.ldexp(np.float32(1), exponent))
