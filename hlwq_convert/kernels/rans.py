"""hlwq_formats.rans with the same bytes and the same indices.

Whole groups of 32 segments are coded sixteen lanes at once where the CPU can look up and move lanes, all else one lane
after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hlwq_formats import rans
from hlwq_formats.rans import LANES, LOWEST, PRECISION, SEGMENT

from .compiled import kernel, part
from .lookup import WIDE, compress, count, expand, gather
from .transpose import transpose
from .vectors import as_floats, load, ones, select, splat, store, to_floats, to_integers

BLOCK = 128
STRIDE = BLOCK + 16
"""Between the blocks of two lanes: a power of two apart they would share the same few lines of the cache."""
AHEAD = 80
"""Words that a decoder may look at behind the end of a chunk: two a lane in the turn that ends it, and a vector."""

_GROUP = LANES * SEGMENT
_FLOAT, _FLOAT_BITS = np.float32(3 << 22), 0x4B400000  # at 3 * 2**22 floats are one apart


class KernelTables:
    """Both tables of a tensor as the kernels take them: `symbols` of every slot, even before odd, and of every symbol,
    from `width` on those of odd indices, its frequency and, in the upper half, its start."""

    def __init__(self, pairs: NDArray[np.uint16]) -> None:
        tables = rans.make_tables(pairs)
        width = max(len(table.frequencies) for table in tables)
        spans, shares = np.zeros(2 * width, np.uint32), np.zeros(2 * width, np.float32)
        symbols = np.zeros((2 << PRECISION) + 2, np.uint16)  # and as much as `gather` reads more
        escapes = np.array([len(table.frequencies) - 1 for table in tables], np.uint32)
        for parity, table in enumerate(tables):
            first, size = parity * width, len(table.frequencies)
            spans[first : first + size] = table.frequencies | (table.starts << 16)
            shares[first : first + size] = np.float32(1) / table.frequencies.astype(np.float32)
            slots = np.repeat(np.arange(size, dtype=np.uint16), table.frequencies)
            symbols[parity << PRECISION :][: len(slots)] = slots
        self.encoding = (width, spans, shares, escapes)
        self.decoding = (width, spans, symbols, escapes)


@part
def _symbol(index: Any) -> Any:
    """rans.to_symbols of one index."""
    k = index >> 1
    return np.uint32((k << 1) ^ (k >> 31))


@part
def _turn_lanes(t: int, lanes: int, count: int) -> int:
    """How many of `lanes` segments, `count` indices in all, have a turn `t`: only the last may be short."""
    return lanes if (lanes - 1) * SEGMENT + t < count else lanes - 1


@part
def _encode_lane(
    index: Any, states: Any, lane: int, width: int, spans: Any, escapes: Any, words: Any, position: int
) -> int:
    """Encode an index before all that is behind `position`; returns the new one."""
    parity, state = index & 1, states[lane]
    symbol, last = _symbol(index), escapes[parity]
    span = spans[parity * width + np.int64(min(symbol, last))]
    frequency = span & np.uint32(0xFFFF)
    if np.uint64(state) >= np.uint64(frequency) << np.uint64(32 - PRECISION):
        position -= 1
        words[position] = state & np.uint32(0xFFFF)
        state >>= np.uint32(16)
    if symbol >= last:
        position -= 1
        words[position] = symbol - last
    quotient = state // frequency
    states[lane] = (quotient << np.uint32(PRECISION)) + (state - quotient * frequency) + (span >> np.uint32(16))
    return position


@part
def _encode_lanes(
    state: Any, symbol: Any, odd: Any, width: int, spans: Any, shares: Any, words: Any, position: int
) -> tuple[Any, int]:
    """_encode_lane for sixteen lanes of which none escapes: their states, and the new position."""
    entry = select(odd, splat(width), splat(0)) + symbol
    span, share = gather(spans, entry), gather(shares, entry)
    frequency = span & splat(0xFFFF)
    full = state >= (frequency << splat(32 - PRECISION))
    store(words, position - 16, compress(state, full))
    state = select(full, state >> splat(16), state)
    quotient = to_integers(to_floats(state) * share)  # below 2**18, and at most one too large or too small
    rest = state - quotient * frequency
    less = splat(0) - (rest >> splat(31))
    quotient, rest = quotient + less, rest + (less & frequency)
    more = rest >= frequency
    quotient, rest = quotient + ones(more), select(more, rest - frequency, rest)
    return (quotient << splat(PRECISION)) + rest + (span >> splat(16)), position - count(full)


@kernel
def _encode(indices: Any, width: int, spans: Any, shares: Any, escapes: Any, words: Any) -> int:
    """Fill `words` from its end and return where the chunk begins."""
    states = np.full(LANES, LOWEST, np.uint32)
    turns = np.empty(_GROUP, np.int32)  # of a group, turn by turn
    position = len(words)
    segments = (len(indices) + SEGMENT - 1) // SEGMENT
    groups = (segments + LANES - 1) // LANES
    for group in range(groups - 1, -1, -1):
        base = group * _GROUP
        lanes, total = min(LANES, segments - group * LANES), min(_GROUP, len(indices) - base)
        if WIDE and total == _GROUP:
            for lane in range(0, LANES, 16):
                for t in range(0, SEGMENT, 16):
                    transpose(indices, base + lane * SEGMENT + t, SEGMENT, turns, LANES * t + lane, LANES)
            for place in range(_GROUP - 16, -1, -16):
                lane = place & 16
                index = load(turns, place)
                odd = (index & splat(1)) > splat(0)
                symbol = (index - ones(odd)) ^ (splat(0) - (index >> splat(31)))
                if count(symbol >= select(odd, splat(escapes[1]), splat(escapes[0]))) == 0:
                    state = load(states, lane)
                    state, position = _encode_lanes(state, symbol, odd, width, spans, shares, words, position)
                    store(states, lane, state)
                else:
                    for i in range(15, -1, -1):
                        one = turns[place + i]
                        position = _encode_lane(one, states, lane + i, width, spans, escapes, words, position)
        else:
            for t in range(SEGMENT - 1, -1, -1):
                for lane in range(_turn_lanes(t, lanes, total) - 1, -1, -1):
                    index = indices[base + lane * SEGMENT + t]
                    position = _encode_lane(index, states, lane, width, spans, escapes, words, position)
    for lane in range(min(LANES, segments) - 1, -1, -1):
        position -= 2
        words[position] = states[lane] >> np.uint32(16)
        words[position + 1] = states[lane] & np.uint32(0xFFFF)
    return position


def encode(indices: NDArray[np.int32], tables: KernelTables) -> bytes:
    """rans.encode."""
    words = np.empty(2 * len(indices) + 2 * LANES + 16, np.uint16)  # a vector is stored for each, whatever it holds
    start = _encode(indices, *tables.encoding, words)
    return words[start:].tobytes()


@part
def _decode_lane(
    words: Any, position: int, states: Any, trellis: Any, lane: int, width: int, spans: Any, symbols: Any, escapes: Any,
    h0: int, h1: int,
) -> tuple[int, Any]:  # fmt: skip
    """The next index of a lane as float32, after the place of the next word."""
    mask, one = np.uint32((1 << PRECISION) - 1), np.uint32(1)
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
    k = np.int32(symbol >> one) ^ -np.int32(symbol & one)
    trellis[lane] = (at >> one) ^ (parity * np.uint32(h0)) ^ ((np.uint32(k) & one) * np.uint32(h1))
    return position + int(empty), np.float32(2 * k + np.int32(parity))


@part
def _decode_lanes(
    state: Any, at: Any, symbol: Any, width: int, spans: Any, words: Any, position: int, h0: int, h1: int
) -> tuple[Any, Any, Any, int]:
    """_decode_lane for sixteen lanes of which none escapes; returns all that changes, and the indices."""
    parity = at & splat(1)
    span = gather(spans, select(parity > splat(0), splat(width), splat(0)) + symbol)
    slot = state & splat((1 << PRECISION) - 1)
    state = (span & splat(0xFFFF)) * (state >> splat(PRECISION)) + slot - (span >> splat(16))
    empty = state < splat(LOWEST)
    filled = (state << splat(16)) | expand(load(words, position), empty)
    k = (symbol >> splat(1)) ^ (splat(0) - (symbol & splat(1)))
    index = as_floats(k + k + parity + splat(_FLOAT_BITS)) - splat(_FLOAT)
    at = (at >> splat(1)) ^ ((splat(0) - parity) & splat(h0)) ^ ((splat(0) - (k & splat(1))) & splat(h1))
    return select(empty, filled, state), at, index, position + count(empty)


@part
def decode_turns(
    words: Any, position: int, end: int, states: Any, trellis: Any, first: int, lanes: int, total: int,
    width: int, spans: Any, symbols: Any, escapes: Any, h0: int, h1: int, found: Any, values: Any,
) -> int:  # fmt: skip
    """Decode turns first..first+127 of a group of up to 32 segments, `total` indices, to values[lane * STRIDE + i] as
    float32; `states` and `trellis` are those of the lanes, `found` has room for 128 * 32.

    Returns the place of the next word, beyond `end` for a bad chunk. `words` has AHEAD more than `end`.
    """
    if WIDE and total == _GROUP:
        for i in range(0, LANES * BLOCK, 16):
            lane = i & 16
            state, at = load(states, lane), load(trellis, lane)
            parity = at & splat(1)
            symbol = gather(symbols, (state & splat((1 << PRECISION) - 1)) | (parity << splat(PRECISION)))
            if count(symbol >= select(parity > splat(0), splat(escapes[1]), splat(escapes[0]))) == 0:
                state, at, index, position = _decode_lanes(state, at, symbol, width, spans, words, position, h0, h1)
                store(states, lane, state)
                store(trellis, lane, at)
                store(found, i, index)
            else:
                for j in range(16):
                    position, found[i + j] = _decode_lane(
                        words, position, states, trellis, lane + j, width, spans, symbols, escapes, h0, h1
                    )
            if position > end:
                return position
        for lane in range(0, LANES, 16):
            for i in range(0, BLOCK, 16):
                transpose(found, LANES * i + lane, LANES, values, lane * STRIDE + i, STRIDE)
        return position
    for i in range(BLOCK):
        for lane in range(_turn_lanes(first + i, lanes, total)):
            position, index = _decode_lane(
                words, position, states, trellis, lane, width, spans, symbols, escapes, h0, h1
            )
            values[lane * STRIDE + i] = index
        if position > end:
            return position
    return position
