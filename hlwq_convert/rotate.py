"""Blocks of 128 weights and their Walsh-Hadamard rotation (DESIGN: QuaRot, arXiv:2404.00456; HIGGS,
arXiv:2411.17525; spec section 6.2).

A block array has shape (n_blocks, 128) and Fortran order: each butterfly then works on whole contiguous
columns, which NumPy does five times faster than on short strided runs. The order of memory changes no bit.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from hlwq_formats.layout import BLOCK, count_blocks

SIGN_BYTES = hashlib.sha256(b"hlwq signs v1").digest()[: BLOCK // 8]
"""The sign vector every file gets: bit i % 8 of byte i // 8 is 1 where coordinate i changes its sign."""


def sign_vector() -> NDArray[np.float32]:
    """SIGN_BYTES as (128,) float32 of 1 and -1."""
    return 1 - 2 * np.unpackbits(np.frombuffer(SIGN_BYTES, np.uint8), bitorder="little").astype(np.float32)


def to_blocks(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut flat (n,) float32 weights into (ceil(n / 128), 128), the last block padded with zeros."""
    n_blocks = count_blocks(len(weights))
    if len(weights) != n_blocks * BLOCK:
        weights = np.concatenate([weights, np.zeros(n_blocks * BLOCK - len(weights), np.float32)])
    return np.asfortranarray(weights.reshape(n_blocks, BLOCK))


def from_blocks(blocks: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Join (n_blocks, 128) to the first `count` flat weights."""
    return np.ascontiguousarray(blocks).reshape(-1)[:count]


def fwht(blocks: NDArray[np.float32]) -> NDArray[np.float32]:
    """The unnormalised Walsh-Hadamard transform of each row of (n, 128) float32, in Sylvester order.

    Pairs (a, b) at distance 1, 2, 4, ..., 64, in that order, become (a + b, a - b). Applied twice it
    multiplies by 128. Nothing but float32 additions in this order gives these bits.
    """
    result = blocks.copy(order="F")
    distance = 1
    while distance < BLOCK:
        pairs = result.reshape(len(result), BLOCK // (2 * distance), 2, distance, order="C", copy=False)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        total = a + b
        np.subtract(a, b, out=b)
        a[...] = total
        distance *= 2
    return result


def block_sums(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum each row of (n, 128) float32 as a tree: the upper half is added to the lower half, seven times."""
    width = BLOCK // 2
    sums = values[:, :width] + values[:, width:]
    while width > 1:
        width //= 2
        sums = sums[:, :width] + sums[:, width:]
    return sums[:, 0]
