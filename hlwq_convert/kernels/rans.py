"""hlwq_formats.rans with the same bytes and the same indices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hlwq_formats import rans
from hlwq_formats.rans import LANES, LOWEST, PRECISION, SEGMENT

from .compiled import kernel, part

_MASK = (1 << PRECISION) - 1


class KernelTables:
    """Both tables of a tensor as the kernels take them, even before odd."""

    def __init__(self, pairs: NDArray[np.uint16]) -> None:
        tables = rans.make_tables(pairs)
        width = max(len(table.frequencies) for table in tables)
        self.frequencies = np.zeros((2, width), np.uint32)
        self.starts = np.zeros((2, width), np.uint32)
        self.symbols = np.zeros((2, 1 << PRECISION), np.uint16)  # of every slot
        self.escapes = np.array([len(table.frequencies) - 1 for table in tables], np.uint32)
        for parity, table in enumerate(tables):
            size = len(table.frequencies)
            self.frequencies[parity, :size], self.starts[parity, :size] = table.frequencies, table.starts
            self.symbols[parity] = np.repeat(np.arange(size, dtype=np.uint16), table.frequencies)


@part
def _symbol(index: Any) -> Any:
    """rans.to_symbols of one index."""
    k = index >> 1
    return np.uint32((k << 1) ^ (k >> 31))


@kernel
def _encode(indices: Any, frequencies: Any, starts: Any, escapes: Any, words: Any) -> int:
    """Fill `words` from its end and return where the chunk begins."""
    states = np.full(LANES, LOWEST, np.uint32)
    position = len(words)
    segments = (len(indices) + SEGMENT - 1) // SEGMENT
    groups = (segments + LANES - 1) // LANES
    for group in range(groups - 1, -1, -1):
        base = group * LANES * SEGMENT
        lanes = min(LANES, segments - group * LANES)
        for t in range(SEGMENT - 1, -1, -1):
            for lane in range(lanes - 1, -1, -1):
                place = base + lane * SEGMENT + t
                if place >= len(indices):
                    continue
                index = indices[place]
                parity = index & 1
                symbol, last = _symbol(index), escapes[parity]
                slot = min(symbol, last)
                frequency, state = frequencies[parity, slot], states[lane]
                if np.uint64(state) >= np.uint64(frequency) << np.uint64(32 - PRECISION):
                    position -= 1
                    words[position] = state & np.uint32(0xFFFF)
                    state >>= np.uint32(16)
                if slot == last:
                    position -= 1
                    words[position] = symbol - last
                quotient = state // frequency
                states[lane] = (
                    (quotient << np.uint32(PRECISION)) + (state - quotient * frequency) + starts[parity, slot]
                )
    for lane in range(min(LANES, segments) - 1, -1, -1):
        position -= 2
        words[position] = states[lane] >> np.uint32(16)
        words[position + 1] = states[lane] & np.uint32(0xFFFF)
    return position


def encode(indices: NDArray[np.int32], tables: KernelTables) -> bytes:
    """rans.encode."""
    words = np.empty(2 * len(indices) + 2 * LANES, np.uint16)
    start = _encode(indices, tables.frequencies, tables.starts, tables.escapes, words)
    return words[start:].tobytes()


@part
def decode_group(
    words: Any, position: int, end: int, states: Any, lanes: int, count: int, h0: int, h1: int,
    frequencies: Any, starts: Any, symbols: Any, escapes: Any, values: Any, stride: int,
) -> int:  # fmt: skip
    """Decode `count` indices, those of up to 32 segments, to values[lane * stride + t] as float32.

    Returns the place of the next word, beyond `end` for a bad chunk. `words` has 64 more than `end`.
    """
    trellis = np.zeros(LANES, np.uint32)
    whole = count // SEGMENT  # lanes with all of their indices
    rest = count - whole * SEGMENT
    for t in range(SEGMENT):
        turn = lanes if t < rest or whole == lanes else whole
        for lane in range(turn):
            state, at = states[lane], trellis[lane]
            parity = at & np.uint32(1)
            slot = state & np.uint32(_MASK)
            symbol = np.uint32(symbols[parity, slot])
            state = frequencies[parity, symbol] * (state >> np.uint32(PRECISION)) + slot - starts[parity, symbol]
            if symbol == escapes[parity]:
                symbol += np.uint32(words[position])
                position += 1
            empty = np.uint32(state < np.uint32(LOWEST))
            filled = (state << np.uint32(16)) | np.uint32(words[position])
            states[lane] = filled if empty else state
            position += int(empty)
            k = np.int32(symbol >> np.uint32(1)) ^ -np.int32(symbol & np.uint32(1))
            values[lane * stride + t] = np.float32(2 * k + np.int32(parity))
            odd = np.uint32(k) & np.uint32(1)
            trellis[lane] = (at >> np.uint32(1)) ^ (parity * np.uint32(h0)) ^ (odd * np.uint32(h1))
        if position > end:
            return position
    return position
