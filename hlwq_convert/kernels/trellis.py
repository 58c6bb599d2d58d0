"""trellis.quantize and trellis.dequantize with the same bits: rotate, search sixteen segments at once, decode what was
found and measure it; and back, from range-coded chunks to weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hlwq_formats import rans
from hlwq_formats.dtypes import BIT_PATTERNS, ITEM_BITS
from hlwq_formats.layout import BLOCK, count_blocks
from hlwq_formats.rans import LANES, LOWEST, SEGMENT

from ..quantize import CHECKSUM_WEIGHTS, power_of_two
from ..trellis import LARGEST, EncodedIndices, TrellisCode, inverse_scales, scale_values
from .block import Block, block_sum, each, fwht, load_block, multiply, narrow, scale, store_block, widen
from .compiled import kernel, part
from .counts import count_magnitudes
from .measure import measure_block
from .rans import AHEAD, STRIDE, KernelTables, decode_turns, encode
from .tables import KINDS, whole_blocks
from .transpose import transpose
from .vectors import load, select, splat, store
from .viterbi import search

_PER_SEGMENT = SEGMENT // BLOCK


@part
def _row_factors(table: Any, row: int, first: int, scratch: Any) -> Block:
    """The factors, one for each row, of 128 weights from flat index `first`."""
    place = first // row
    left = row - (first - place * row)
    if left >= 128:
        factor = splat(table[place])
        for i in range(0, 128, 16):
            store(scratch, i, factor)
        return load_block(scratch, 0)
    for i in range(128):
        if left == 0:
            left, place = row, min(place + 1, len(table) - 1)  # behind the end: weights that nobody sees
        scratch[i] = table[place]
        left -= 1
    return load_block(scratch, 0)


@part
def _limit(x: Any) -> Any:
    x = select(x > splat(np.float32(LARGEST)), splat(np.float32(LARGEST)), x)
    return select(x < splat(np.float32(-LARGEST)), splat(np.float32(-LARGEST)), x)


@part
def _load_steps(
    items: Any, kind: int, to_unit: Any, inverse: Any, row: int, start: int, flip: Block, per_step: Any, first: int,
    scratch: Any, rotated: Any, steps: Any,
) -> None:  # fmt: skip
    """Coordinates in steps of the sixteen segments from block `first`; zeros behind the last block."""
    n_blocks = len(items) // 128
    for j in range(_PER_SEGMENT):
        for lane in range(16):
            b, place = first + _PER_SEGMENT * lane + j, STRIDE * lane
            if b < n_blocks:
                factors = _row_factors(inverse, row, start + 128 * b, scratch)
                source = multiply(scale(widen(load_block(items, 128 * b), kind), to_unit), factors)
                store_block(rotated, place, each(_limit, scale(fwht(multiply(source, flip)), per_step)))
            else:
                rotated[place : place + 128] = np.float32(0)
        for i in range(0, 128, 16):
            transpose(rotated, i, STRIDE, steps, 16 * (128 * j + i), 16)


@part
def _store_found(found: Any, first: int, tile: Any, indices: Any) -> None:
    """Write the indices of sixteen segments from block `first`, as far as there are blocks."""
    for j in range(_PER_SEGMENT):
        for i in range(0, 128, 16):
            transpose(found, 16 * (128 * j + i), 16, tile, i, STRIDE)
        for lane in range(min(16, (len(indices) // 128 - first - j + _PER_SEGMENT - 1) // _PER_SEGMENT)):
            store_block(indices, (first + _PER_SEGMENT * lane + j) * 128, load_block(tile, STRIDE * lane))


@kernel
def _find_indices(
    items: Any, kind: int, to_unit: Any, inverse: Any, row: int, start: int, signs: Any, per_step: Any,
    states: int, h0: int, h1: int, indices: Any,
) -> None:  # fmt: skip
    scratch, rotated = np.empty(128, np.float32), np.empty(16 * STRIDE, np.float32)
    steps, found = np.empty(16 * SEGMENT, np.float32), np.empty(16 * SEGMENT, np.uint32)
    costs = (np.empty(16 * states, np.float32), np.empty(16 * states, np.float32))
    decisions = np.empty(16 * SEGMENT * ((states + 31) >> 5), np.uint32)
    tile = np.empty(16 * STRIDE, np.uint32)
    flip = load_block(signs, 0)
    for first in range(0, len(items) // 128, 16 * _PER_SEGMENT):
        _load_steps(items, kind, to_unit, inverse, row, start, flip, per_step, first, scratch, rotated, steps)
        search(steps, states, h0, h1, costs, decisions, found)
        _store_found(found, first, tile, indices)


@kernel
def _search_all(coordinates: Any, factor: Any, states: int, h0: int, h1: int, indices: Any) -> None:
    steps, found = np.empty(16 * SEGMENT, np.float32), np.empty(16 * SEGMENT, np.uint32)
    costs = (np.empty(16 * states, np.float32), np.empty(16 * states, np.float32))
    decisions = np.empty(16 * SEGMENT * ((states + 31) >> 5), np.uint32)
    padded, tile = np.zeros(16 * SEGMENT, np.float32), np.empty(16 * STRIDE, np.uint32)
    for first in range(0, len(coordinates), 16 * SEGMENT):
        some = coordinates[first : first + 16 * SEGMENT]
        if len(some) < len(padded):
            padded[: len(some)] = some
            some = padded
        for t in range(0, SEGMENT, 16):
            transpose(some, t, SEGMENT, steps, 16 * t, 16)
        for i in range(0, len(steps), 16):
            store(steps, i, _limit(load(steps, i) * splat(factor)))
        search(steps, states, h0, h1, costs, decisions, found)
        _store_found(found, first // 128, tile, indices)


@part
def _restore(values: Any, place: int, flip: Block, factors: Block, kind: int) -> Block:
    """The bit patterns of the weights of 128 float32 indices."""
    return narrow(multiply(flip, multiply(factors, fwht(load_block(values, place)))), kind)


@kernel
def _measure(
    items: Any, count: int, kind: int, to_unit: Any, scales: Any, row: int, start: int, signs: Any, indices: Any,
    weights: Any, sums: Any, checksums: Any,
) -> None:  # fmt: skip
    scratch, values = np.empty(128, np.float32), np.empty(128, np.float32)
    decoded_bits = np.empty(128, np.uint32)
    flip = load_block(signs, 0)
    for b in range(len(items) // 128):
        for i in range(128):
            values[i] = np.float32(indices[128 * b + i])
        decoded = _restore(values, 0, flip, _row_factors(scales, row, start + 128 * b, scratch), kind)
        if count < 128 * b + 128:
            store_block(decoded_bits, 0, decoded)
            decoded_bits[count - 128 * b :] = 0
            decoded = load_block(decoded_bits, 0)
        checksums[b] = block_sum(multiply(decoded, load_block(weights, 0)))
        source = scale(widen(load_block(items, 128 * b), kind), to_unit)
        measure_block(source, scale(widen(decoded, kind), to_unit), sums, b)


@kernel
def _all_steps(
    items: Any, kind: int, to_unit: Any, inverse: Any, row: int, start: int, signs: Any, per_step: Any, steps: Any
) -> None:
    scratch = np.empty(128, np.float32)
    flip = load_block(signs, 0)
    for b in range(len(items) // 128):
        factors = _row_factors(inverse, row, start + 128 * b, scratch)
        source = multiply(scale(widen(load_block(items, 128 * b), kind), to_unit), factors)
        rotated = each(_limit, scale(fwht(multiply(source, flip)), per_step))
        store_block(steps, 128 * b, rotated)


def load_steps(raw: bytes | memoryview, start: int, code: TrellisCode) -> NDArray[np.float32]:
    """trellis.to_steps for source bytes, weights from flat index `start`: (n_blocks * 128,) float32."""
    items = whole_blocks(raw, code.dtype)
    steps = np.empty(len(items), np.float32)
    _all_steps(
        items, KINDS[code.dtype], power_of_two(-code.exponent), inverse_scales(code.row_scales), code.row, start,
        code.signs, code.per_step, steps,
    )  # fmt: skip
    return steps


def search_segments(coordinates: NDArray[np.float32], factor: np.float32, states: int) -> NDArray[np.int32]:
    """trellis.search for (n, 1024) float32 coordinates times `factor`: (n, 1024) int32."""
    indices = np.empty(coordinates.size, np.int32)
    _search_all(coordinates.reshape(-1), factor, states, *rans.taps(states), indices)
    return indices.reshape(coordinates.shape)


def find_indices(raw: bytes | memoryview, start: int, code: TrellisCode) -> NDArray[np.int32]:
    """(n_blocks * 128,) indices of source bytes, weights from flat index `start`."""
    items = whole_blocks(raw, code.dtype)
    indices = np.empty(len(items), np.int32)
    _find_indices(
        items, KINDS[code.dtype], power_of_two(-code.exponent), inverse_scales(code.row_scales), code.row, start,
        code.signs, code.per_step, code.states, *rans.taps(code.states), indices,
    )  # fmt: skip
    return indices


FindIndices = Callable[[bytes | memoryview, int], NDArray[np.int32]]
"""find_indices for one tensor, by this or another device."""


def encoder(code: TrellisCode, find: FindIndices | None = None) -> Callable[[bytes | memoryview, int], EncodedIndices]:
    """trellis.quantize for chunks of one tensor: source bytes and the flat index of their first weight in,
    EncodedIndices out. `find` searches instead of find_indices."""
    tables = KernelTables(code.pairs)
    scales = code.unit * scale_values(code.row_scales)

    def encode_chunk(raw: bytes | memoryview, start: int) -> EncodedIndices:
        indices = find_indices(raw, start, code) if find is None else find(raw, start)
        count, n_blocks = len(raw) * 8 // ITEM_BITS[code.dtype], len(indices) // BLOCK
        sums, checksums = np.empty((4, n_blocks), np.float32), np.empty(n_blocks, np.uint32)
        items = whole_blocks(raw, code.dtype)
        _measure(
            items, count, KINDS[code.dtype], power_of_two(-code.exponent), scales, code.row, start, code.signs,
            indices, CHECKSUM_WEIGHTS, sums, checksums,
        )  # fmt: skip
        chunks = [encode(indices[at : at + rans.CHUNK], tables) for at in range(0, len(indices), rans.CHUNK)]
        return EncodedIndices(chunks, count_magnitudes(indices), sums, checksums)

    return encode_chunk


@kernel
def _decode(
    words: Any, end: int, first: int, n_blocks: int, width: int, spans: Any, symbols: Any, escapes: Any, h0: int,
    h1: int, scales: Any, row: int, signs: Any, kind: int, result: Any, last: Any,
) -> bool:  # fmt: skip
    """Decode a chunk, weights from flat index `first`: all blocks but the last to `result`, that one to `last`."""
    states, trellis = np.empty(LANES, np.uint32), np.empty(LANES, np.uint32)
    found, values = np.empty(LANES * BLOCK, np.float32), np.empty(LANES * STRIDE, np.float32)
    scratch = np.empty(128, np.float32)
    flip = load_block(signs, 0)
    segments = (n_blocks + _PER_SEGMENT - 1) // _PER_SEGMENT
    used = min(LANES, segments)
    if end < 2 * used:
        return False
    for lane in range(used):
        states[lane] = (np.uint32(words[2 * lane]) << np.uint32(16)) | np.uint32(words[2 * lane + 1])
        if states[lane] < np.uint32(LOWEST):
            return False
    position = 2 * used
    for group in range(0, segments, LANES):
        lanes = min(LANES, segments - group)
        total = min(LANES * SEGMENT, n_blocks * 128 - group * SEGMENT)
        trellis[:] = 0
        for j in range(_PER_SEGMENT):
            position = decode_turns(
                words, position, end, states, trellis, 128 * j, lanes, total, width, spans, symbols, escapes, h0, h1,
                found, values,
            )  # fmt: skip
            if position > end:
                return False
            for lane in range(lanes):
                b = (group + lane) * _PER_SEGMENT + j
                if b >= n_blocks:
                    break
                factors = _row_factors(scales, row, first + 128 * b, scratch)
                weights = _restore(values, lane * STRIDE, flip, factors, kind)
                if b == n_blocks - 1:
                    store_block(last, 0, weights)
                else:
                    store_block(result, 128 * b, weights)
    for lane in range(used):
        if states[lane] != np.uint32(LOWEST):
            return False
    return position == end


Decoder = Callable[[bytes, int, NDArray[np.unsignedinteger]], bool]


def decoder(code: TrellisCode, dtype: str) -> Decoder:
    """rans.decode, trellis.dequantize and dtypes.narrow for chunks of one tensor, with the same bits.

    The function returned takes a chunk, the flat index of its first weight and where to put the weights: (count,)
    bit patterns of `dtype`. It returns False for a chunk that is not what an encoder writes.
    """
    settings = (*KernelTables(code.pairs).decoding, *rans.taps(code.states))
    scales = code.unit * scale_values(code.row_scales)

    def decode(chunk: bytes, first: int, result: NDArray[np.unsignedinteger]) -> bool:
        end, n_blocks = len(chunk) // 2, count_blocks(len(result))
        words = np.zeros(end + AHEAD, np.uint16)
        words[:end] = np.frombuffer(chunk, "<u2")
        last = np.empty(BLOCK, BIT_PATTERNS[dtype])
        good = _decode(words, end, first, n_blocks, *settings, scales, code.row, code.signs, KINDS[dtype], result, last)
        tail = (n_blocks - 1) * BLOCK
        result[tail:] = last[: len(result) - tail]
        return bool(good)

    return decode
