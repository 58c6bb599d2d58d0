"""trellis.search for sixteen segments at once, one in each lane, with the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from hlwq_formats.rans import SEGMENT

from .compiled import part
from .vectors import as_bits, load, select, splat, store

_ROUND = np.float32(3 << 22)
_ROUND_BITS = 0x4B400000


@part
def _distance(x: Any, subset: Any) -> Any:
    """Squared distance, in units of 4 steps, to the nearest m of a subset modulo 4."""
    quarter = (x - splat(subset)) * splat(np.float32(0.25))
    error = quarter - ((quarter + splat(_ROUND)) - splat(_ROUND))
    return error * error


@part
def _enter(old: Any, new: Any, first: int, last: int, flip: int, h1: int, odd: int, near: Any, far: Any) -> Any:
    """Costs of the states first..last-1, all entered from states of one parity, and which took the second way."""
    taken = splat(0)
    for state in range(first, last):
        before = state ^ flip
        a = load(old, 16 * (2 * before + odd)) + near
        b = load(old, 16 * (2 * (before ^ h1) + odd)) + far
        second = b < a
        store(new, 16 * state, select(second, b, a))
        taken = taken | select(second, splat(1 << (state & 31)), splat(0))
    return taken


@part
def _walk_forward(steps: Any, states: int, h0: int, h1: int, costs: Any, decisions: Any) -> Any:
    """Fill `decisions`, a bit for each turn, state and lane, and return the costs of the last states."""
    old, new = costs[0], costs[1]
    for state in range(states):
        store(old, 16 * state, splat(np.float32(1e30)))
    store(old, 0, splat(np.float32(0)))
    half, words = states >> 1, (states + 31) >> 5
    for t in range(SEGMENT):
        x = load(steps, 16 * t)
        d0, d1 = _distance(x, np.float32(0)), _distance(x, np.float32(1))
        d2, d3 = _distance(x, np.float32(2)), _distance(x, np.float32(3))
        for w in range(words):
            first, last = 32 * w, min(32 * w + 32, states)
            middle = min(max(half, first), last)
            taken = _enter(old, new, first, middle, 0, h1, 0, d0, d2)
            taken = taken | _enter(old, new, middle, last, h0, h1, 1, d1, d3)
            store(decisions, 16 * (t * words + w), taken)
        old, new = new, old
    return old


@part
def _to_float(subset: Any) -> Any:
    low = select(subset < splat(1), splat(np.float32(0)), splat(np.float32(1)))
    high = select(subset < splat(3), splat(np.float32(2)), splat(np.float32(3)))
    return select(subset < splat(2), low, high)


@part
def _walk_back(steps: Any, states: int, h0: int, h1: int, costs: Any, decisions: Any, indices: Any) -> None:
    """From the cheapest last state back to the first, writing the index of every turn."""
    words, top = (states + 31) >> 5, 0
    while states >> (top + 2) > 0:
        top += 1
    best, state = load(costs, 0), splat(0)
    for s in range(1, states):
        cost = load(costs, 16 * s)
        better = cost < best
        best, state = select(better, cost, best), select(better, splat(s), state)
    for t in range(SEGMENT - 1, -1, -1):
        word = load(decisions, 16 * t * words)
        for w in range(1, words):
            word = select((state >> splat(5)) < splat(w), word, load(decisions, 16 * (t * words + w)))
        second = (word >> (state & splat(31))) & splat(1)
        odd = state >> splat(top)
        before = state ^ ((splat(0) - odd) & splat(h0)) ^ ((splat(0) - second) & splat(h1))
        state = (before << splat(1)) | odd
        subset = (second << splat(1)) | odd
        quarter = (load(steps, 16 * t) - _to_float(subset)) * splat(np.float32(0.25))
        nearest = as_bits(quarter + splat(_ROUND)) - splat(_ROUND_BITS)
        store(indices, 16 * t, (nearest << splat(2)) + subset)


@part
def search(steps: Any, states: int, h0: int, h1: int, costs: Any, decisions: Any, indices: Any) -> None:
    """Write the indices, (1024 * 16,) uint32 bit patterns, of (1024 * 16,) float32 coordinates; lane l of turn t is
    item 16 * t + l. `costs` are two arrays of 16 * states float32, `decisions` has a word for each turn, lane and
    32 states."""
    last = _walk_forward(steps, states, h0, h1, costs, decisions)
    _walk_back(steps, states, h0, h1, last, decisions, indices)
