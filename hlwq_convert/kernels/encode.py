"""Encode blocks in one pass: widen, signs, transform, scale search, nearest level, pack; then decode what was
packed and measure it. Reads each weight once and writes its codes once; all between stays in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hlwq_formats.dtypes import ITEM_BITS
from hlwq_formats.layout import BLOCK

from ..quantize import CHECKSUM_WEIGHTS, EncodedChunk, ScalarCode, power_of_two, quantize
from ..scalar import gains_of, penalty_of
from .block import (
    Block,
    block_sum,
    fwht,
    half_to_scale,
    load_block,
    multiply,
    narrow,
    nearest_level,
    scale,
    scale_to_half,
    step_to_nearest,
    store_block,
    take_block,
    widen,
)
from .compiled import kernel, part
from .measure import measure_block
from .packing import SLACK, pack_block, unpack_block
from .tables import KINDS, items_of, largest_step, table_rows


@part
def _search(
    rotated: Block, levels: Any, below: Any, n_levels: int, gains: Any, penalty: Any, steps: int
) -> tuple[Block, Any]:
    """scalar.encode of one block: the codes and the scale, before it is rounded, of the best gain.

    All gains are tried, but only the first looks for its codes from scratch: at the next gain a coordinate
    crosses at most `steps` midpoints towards zero.
    """
    rms = np.sqrt(block_sum(multiply(rotated, rotated)) * np.float32(1 / 128))
    unit = rms if rms > 0 else np.float32(1)
    price = penalty * (unit * unit)
    first = nearest_level(scale(rotated, np.float32(1) / (unit * gains[0])), below, n_levels)
    codes = first
    best, best_scale, most = 0, np.float32(0), np.float32(-np.inf)
    for g in range(len(gains)):
        if g > 0:
            coordinates = scale(rotated, np.float32(1) / (unit * gains[g]))
            for _ in range(steps):
                codes = step_to_nearest(coordinates, codes, below, n_levels)
        chosen = take_block(levels, codes)
        product = max(block_sum(multiply(rotated, chosen)), np.float32(0)) + np.float32(0)
        energy = max(block_sum(multiply(chosen, chosen)), np.float32(1e-30))
        fitted = product / energy
        gained = fitted * product - price * energy
        if gained > most:
            best, best_scale, most = g, fitted, gained
    if best == 0:
        return first, best_scale
    return nearest_level(scale(rotated, np.float32(1) / (unit * gains[best])), below, n_levels), best_scale


@kernel
def _encode(
    items: Any, kind: int, to_unit: Any, from_unit: Any, signs: Any, levels: Any, below: Any, bits: int,
    gains: Any, penalty: Any, steps: int, weights: Any, packed: Any, scales: Any, sums: Any, checksums: Any,
) -> None:  # fmt: skip
    codes_in_memory = np.empty(128, np.uint8)
    flip = load_block(signs, 0)
    for b in range(len(scales)):
        source = scale(widen(load_block(items, 128 * b), kind), to_unit)
        codes, fitted = _search(fwht(multiply(source, flip)), levels, below, 1 << bits, gains, penalty, steps)
        half = scale_to_half(min(fitted * np.float32(1 / 128), np.float32(65504)))
        scales[b] = half
        store_block(codes_in_memory, 0, codes)
        if half == 0:
            codes_in_memory[:] = 0
        pack_block(codes_in_memory, bits, packed, 16 * bits * b)

        unpack_block(packed, 16 * bits * b, bits, codes_in_memory)
        values = fwht(take_block(levels, load_block(codes_in_memory, 0)))
        decoded = narrow(multiply(flip, scale(values, half_to_scale(half) * from_unit)), kind)
        checksums[b] = block_sum(multiply(decoded, load_block(weights, 0)))
        measure_block(source, scale(widen(decoded, kind), to_unit), sums, b)


def encoder(code: ScalarCode) -> Callable[[bytes | memoryview], EncodedChunk]:
    """quantize.quantize for chunks of one tensor, with the same bits: source bytes in, EncodedChunk out."""
    gains, penalty = gains_of(code.effort), penalty_of(code.effort, code.bits)
    midpoints = (code.levels[:-1] + code.levels[1:]) * np.float32(0.5)
    levels = table_rows(code.levels, 0)
    below = table_rows(np.concatenate([[-np.inf], midpoints]), np.inf)
    steps = largest_step(midpoints, gains)
    block_bytes = BLOCK * ITEM_BITS[code.dtype] // 8

    def encode(raw: bytes | memoryview) -> EncodedChunk:
        n_blocks = len(raw) // block_bytes
        packed = np.empty(n_blocks * 16 * code.bits + SLACK, np.uint8)
        scales = np.empty(n_blocks, np.uint16)
        sums = np.empty((4, n_blocks), np.float32)
        checksums = np.empty(n_blocks, np.uint32)
        items = items_of(raw, code.dtype)[: n_blocks * BLOCK]
        _encode(
            items, KINDS[code.dtype], power_of_two(-code.exponent), power_of_two(code.exponent), code.signs, levels,
            below, code.bits, gains, penalty, steps, CHECKSUM_WEIGHTS, packed, scales, sums, checksums,
        )  # fmt: skip
        chunk = EncodedChunk(packed[:-SLACK].data, scales.view(np.uint8).data, sums, checksums)
        if len(raw) == n_blocks * block_bytes:
            return chunk
        return join(chunk, quantize(raw[n_blocks * block_bytes :], code))  # the padded block, once a tensor

    return encode


def join(a: EncodedChunk, b: EncodedChunk) -> EncodedChunk:
    """Two chunks, one after the other, as one."""
    return EncodedChunk(
        bytes(a.codes) + b.codes,
        bytes(a.scales) + b.scales,
        np.concatenate([a.sums, b.sums], axis=1),
        np.concatenate([a.checksums, b.checksums]),
    )
