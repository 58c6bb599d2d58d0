"""Indices of a trellis as a range-coded stream: static interleaved rANS (Duda 2013; spec section 6.7).

A chunk of up to 2**18 indices is cut into segments of 1,024. Lane l of 32 holds the segments l, l + 32, ...; the lanes
take turns, one index each, and share one stream of 16-bit words. A segment starts in state 0 of its trellis; the
parity of the state says which of two frequency tables the next index is coded with, and of which parity the index is.

This is the reference, in NumPy; the compiled kernels give the same bytes and the same indices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SEGMENT = 1024
CHUNK = 1 << 18
LANES = 32
PRECISION = 14
"""Frequencies of a table sum to 2**14, the escape's included."""
MAX_FREQUENCIES = 1 << PRECISION
MAX_CHUNK_BYTES = 4 * (LANES + CHUNK)
"""A lane's state, and for each index at most an escaped symbol and one word more."""
LOWEST = 1 << 16
"""States lie in LOWEST..2**32 - 1; every lane starts, for the encoder, and ends, for the decoder, at LOWEST."""

TRELLISES = {
    8: ("1011", "0100"),
    32: ("100101", "001000"),
    64: ("1000011", "0010100"),
    256: ("101001101", "011110010"),
}
"""States -> coefficients 0, 1, ... of the parity polynomials h0 and h1 (Ungerboeck 1982)."""


class BadStream(ValueError):
    """A chunk that is not what an encoder writes."""


def taps(states: int) -> tuple[int, int]:
    """The masks g0 and g1 of spec section 6.7: a state s is followed by s >> 1, XORed with g0 where s is odd and with
    g1 where k is odd."""
    h0, h1 = (sum(1 << (i - 1) for i, bit in enumerate(h) if i and bit == "1") for h in TRELLISES[states])
    return h0, h1


def next_state(state: NDArray[np.uint32], step: NDArray[np.uint32], states: int) -> NDArray[np.uint32]:
    """The state after `step` % 2: step is k where the index is m = 2 * k + state % 2."""
    h0, h1 = taps(states)
    one = np.uint32(1)
    following: NDArray[np.uint32] = (state >> one) ^ ((state & one) * np.uint32(h0)) ^ ((step & one) * np.uint32(h1))
    return following


@dataclass(frozen=True)
class Table:
    """Frequencies of the symbols of one parity; the last is the escape's. `starts` are their running sums."""

    frequencies: NDArray[np.uint32]
    starts: NDArray[np.uint32]


def make_tables(pairs: NDArray[np.uint16]) -> tuple[Table, Table]:
    """The tables for even and odd indices from the frequencies of |m| = 0, 1, ...: m and -m share one.

    Raises ValueError for frequencies that leave nothing for the escape, or that are zero.
    """
    tables = []
    for parity in (0, 1):
        magnitudes = np.arange(parity, len(pairs), 2)
        signed = np.repeat(pairs[magnitudes].astype(np.int64), 2)[1 - parity :]
        escape = (1 << PRECISION) - int(signed.sum())
        if escape < 1 or (signed < 1).any():
            raise ValueError(f"the frequencies of {('even', 'odd')[parity]} indices must be positive and sum to less "
                             f"than {1 << PRECISION}; they leave {escape}")  # fmt: skip
        frequencies = np.append(signed, escape).astype(np.uint32)
        tables.append(Table(frequencies, (np.cumsum(frequencies) - frequencies).astype(np.uint32)))
    return tables[0], tables[1]


def to_symbols(indices: NDArray[np.int32]) -> NDArray[np.uint32]:
    """k = (m - m % 2) / 2 as an unsigned number: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..."""
    k = indices >> 1
    return ((k << 1) ^ (k >> 31)).astype(np.uint32)


def _turns(count: int) -> tuple[NDArray[np.int64], int]:
    """Place of the index that lane l codes in turn t, (turns, 32), and -1 where a lane has none; and the lanes."""
    segments = -(-count // SEGMENT)
    groups = -(-segments // LANES)
    places = np.arange(groups * LANES * SEGMENT).reshape(groups, LANES, SEGMENT).swapaxes(1, 2).reshape(-1, LANES)
    return np.where(places < count, places, -1), min(segments, LANES)


def encode(indices: NDArray[np.int32], tables: tuple[Table, Table]) -> bytes:
    """Encode a chunk of 1..CHUNK indices, each of the parity that its trellis allows."""
    places, lanes = _turns(len(indices))
    symbols, parities = to_symbols(indices), indices & 1
    state = np.full(LANES, LOWEST, np.uint64)
    words: list[NDArray[np.uint64]] = []
    for turn in places[::-1]:
        mine = turn >= 0
        symbol, parity = symbols[turn], parities[turn]
        last = np.array([len(table.frequencies) - 1 for table in tables])[parity]
        escaped = mine & (symbol >= last)
        slot = np.minimum(symbol, last)
        frequency, start = (
            np.choose(parity, [getattr(table, name)[np.minimum(slot, len(table.starts) - 1)] for table in tables])
            for name in ("frequencies", "starts")
        )
        frequency, start = frequency.astype(np.uint64), start.astype(np.uint64)
        full = mine & (state >= frequency << np.uint64(32 - PRECISION))
        # a decoder reads a lane's escaped symbol before the word that fills its state up again
        words.append(np.stack([symbol - last, state & np.uint64(0xFFFF)], axis=1)[np.stack([escaped, full], axis=1)])
        state = np.where(full, state >> np.uint64(16), state)
        coded = ((state // frequency) << np.uint64(PRECISION)) + state % frequency + start
        state = np.where(mine, coded, state)
    first = np.stack([state >> np.uint64(16), state & np.uint64(0xFFFF)], axis=1)[:lanes].ravel()
    return np.concatenate([first, *words[::-1]]).astype("<u2").tobytes()


def decode(data: bytes, count: int, tables: tuple[Table, Table], states: int) -> NDArray[np.int32]:
    """Decode a chunk of `count` indices to (count,) int32. Raises BadStream unless `data` is exactly such a chunk."""
    places, lanes = _turns(count)
    words = np.frombuffer(data, "<u2").astype(np.uint32)
    if len(words) < 2 * lanes:
        raise BadStream(f"{len(data)} bytes are too few for {lanes} lanes")
    state = np.full(LANES, LOWEST, np.uint32)
    state[:lanes] = (words[0 : 2 * lanes : 2] << 16) | words[1 : 2 * lanes : 2]
    if (state < LOWEST).any():
        raise BadStream(f"a state is below {LOWEST}")
    position = 2 * lanes
    by_slot = [np.repeat(np.arange(len(t.frequencies), dtype=np.uint32), t.frequencies) for t in tables]
    trellis = np.zeros(LANES, np.uint32)
    result = np.zeros(count, np.int32)
    for number, turn in enumerate(places):
        if number % SEGMENT == 0:
            trellis[:] = 0
        mine = turn >= 0
        parity = trellis & 1
        slot = state & ((1 << PRECISION) - 1)
        symbol = np.choose(parity, [by_slot[0][slot], by_slot[1][slot]])
        last = np.choose(parity, [np.uint32(len(table.frequencies) - 1) for table in tables])
        chosen = [np.minimum(symbol, len(table.starts) - 1) for table in tables]
        frequency = np.choose(parity, [table.frequencies[c] for table, c in zip(tables, chosen, strict=True)])
        start = np.choose(parity, [table.starts[c] for table, c in zip(tables, chosen, strict=True)])
        coded = frequency * (state >> PRECISION) + slot - start
        escaped, empty = mine & (symbol == last), mine & (coded < LOWEST)
        read = np.cumsum(escaped.astype(np.int64) + empty) + position
        if read[-1] > len(words):
            raise BadStream("it ends before its last index")
        symbol[escaped] += words[(read - empty - 1)[escaped]]
        coded[empty] = (coded[empty] << 16) | words[(read - 1)[empty]]
        state, position = np.where(mine, coded, state), int(read[-1])
        one = np.uint32(1)
        k = (symbol >> one) ^ (np.uint32(0) - (symbol & one))
        result[turn[mine]] = (np.uint32(2) * k + parity).view(np.int32)[mine]
        trellis = next_state(trellis, k, states)
    if position != len(words) or (state != LOWEST).any():
        raise BadStream(f"{len(words) - position} words are left, or a state does not end at {LOWEST}")
    return result
