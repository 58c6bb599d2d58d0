"""hlwq_formats.rans with the same bytes and the same indices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hlwq_formats import rans
from hlwq_formats.rans import LANES, LOWEST, PRECISION, SEGMENT

from .compiled import kernel, part


class KernelTables:
    """Both tables of a tensor as the kernels take them: `symbols` of every slot, even before odd, and of every symbol,
    from `width` on those of odd indices, its frequency and, in the upper half, its start."""

    def __init__(self, pairs: NDArray[np.uint16]) -> None:
        tables = rans.make_tables(pairs)
        self.width = max(len(table.frequencies) for table in tables)
        self.spans = np.zeros(2 * self.width, np.uint32)
        self.symbols = np.zeros(2 << PRECISION, np.uint16)
        self.escapes = np.array([len(table.frequencies) - 1 for table in tables], np.uint32)
        for parity, table in enumerate(tables):
            first, size = parity * self.width, len(table.frequencies)
            self.spans[first : first + size] = table.frequencies | (table.starts << 16)
            slots = np.repeat(np.arange(size, dtype=np.uint16), table.frequencies)
            self.symbols[parity << PRECISION :][: len(slots)] = slots


@part
def _symbol(index: Any) -> Any:
    """rans.to_symbols of one index."""
    k = index >> 1
    return np.uint32((k << 1) ^ (k >> 31))


@part
def _turn_lanes(t: int, lanes: int, count: int) -> int:
    """How many of `lanes` segments, `count` indices in all, have a turn `t`: only the last may be short."""
    return lanes if (lanes - 1) * SEGMENT + t < count else lanes - 1


@kernel
def _encode(indices: Any, width: int, spans: Any, escapes: Any, words: Any) -> int:
    """Fill `words` from its end and return where the chunk begins."""
    states = np.full(LANES, LOWEST, np.uint32)
    turns = np.empty(LANES * SEGMENT, np.int32)  # of a group, turn by turn
    position = len(words)
    segments = (len(indices) + SEGMENT - 1) // SEGMENT
    groups = (segments + LANES - 1) // LANES
    for group in range(groups - 1, -1, -1):
        base = group * LANES * SEGMENT
        lanes, count = min(LANES, segments - group * LANES), min(LANES * SEGMENT, len(indices) - base)
        for lane in range(lanes):
            for t in range(min(SEGMENT, count - lane * SEGMENT)):
                turns[LANES * t + lane] = indices[base + lane * SEGMENT + t]
        for t in range(SEGMENT - 1, -1, -1):
            for lane in range(_turn_lanes(t, lanes, count) - 1, -1, -1):
                index, state = turns[LANES * t + lane], states[lane]
                parity = index & 1
                symbol, last = _symbol(index), escapes[parity]
                span = spans[parity * width + np.int64(min(symbol, last))]
                frequency = span & np.uint32(0xFFFF)
                full = np.uint64(state) >= np.uint64(frequency) << np.uint64(32 - PRECISION)
                words[position - 1] = state & np.uint32(0xFFFF)  # kept if the state is full
                position -= int(full)
                state = state >> np.uint32(16) if full else state
                if symbol >= last:
                    position -= 1
                    words[position] = symbol - last
                quotient = state // frequency
                rest = state - quotient * frequency
                states[lane] = (quotient << np.uint32(PRECISION)) + rest + (span >> np.uint32(16))
    for lane in range(min(LANES, segments) - 1, -1, -1):
        position -= 2
        words[position] = states[lane] >> np.uint32(16)
        words[position + 1] = states[lane] & np.uint32(0xFFFF)
    return position


def encode(indices: NDArray[np.int32], tables: KernelTables) -> bytes:
    """rans.encode."""
    words = np.empty(2 * len(indices) + 2 * LANES + 1, np.uint16)
    start = _encode(indices, tables.width, tables.spans, tables.escapes, words)
    return words[start:].tobytes()


@part
def decode_group(
    words: Any, position: int, end: int, states: Any, lanes: int, count: int, h0: int, h1: int,
    width: int, spans: Any, symbols: Any, escapes: Any, values: Any, stride: int,
) -> int:  # fmt: skip
    """Decode `count` indices, those of up to 32 segments, to values[lane * stride + t] as float32.

    Returns the place of the next word, beyond `end` for a bad chunk. `words` has 64 more than `end`.
    """
    trellis = np.zeros(LANES, np.uint32)
    mask, one = np.uint32((1 << PRECISION) - 1), np.uint32(1)
    for t in range(SEGMENT):
        for lane in range(_turn_lanes(t, lanes, count)):
            state, at = states[lane], trellis[lane]
            parity = at & one
            slot = state & mask
            symbol = np.uint32(symbols[np.uint64((parity << np.uint32(PRECISION)) | slot)])
            span = spans[np.uint64(parity * np.uint32(width) + symbol)]
            state = (span & np.uint32(0xFFFF)) * (state >> np.uint32(PRECISION)) + slot - (span >> np.uint32(16))
            if symbol == escapes[np.uint64(parity)]:
                symbol += np.uint32(words[np.uint64(position)])
                position += 1
            word = np.uint32(words[np.uint64(position)])
            empty = state < np.uint32(LOWEST)
            states[lane] = (state << np.uint32(16)) | word if empty else state
            position += int(empty)
            k = np.int32(symbol >> one) ^ -np.int32(symbol & one)
            values[lane * stride + t] = np.float32(2 * k + np.int32(parity))
            trellis[lane] = (at >> one) ^ (parity * np.uint32(h0)) ^ ((np.uint32(k) & one) * np.uint32(h1))
        if position > end:
            return position
    return position
