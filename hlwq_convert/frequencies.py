"""FIT for the trellis: frequency tables for its indices, and what indices cost, both in integers alone.

A rate decides bytes, so it may not depend on the logarithm of some C library: what is here repeats anywhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hlwq_formats.rans import PRECISION

_TOTAL = 1 << PRECISION
_FRACTION = 16  # bits behind the point of logarithms
_MOST = 4096  # magnitudes with a frequency of their own


def log2_fixed(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """log2 of positive integers below 2**52, times 2**16, rounded down (squaring, one bit at a time)."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    x = (mantissa * (1 << 31)).astype(np.int64)  # 1..2 with 30 bits behind the point
    result = exponent.astype(np.int64) - 1
    for _ in range(_FRACTION):
        x = (x * x) >> 30
        carry = x >> 31
        x >>= carry
        result = 2 * result + carry
    return result


def count_magnitudes(indices: NDArray[np.int32]) -> NDArray[np.int64]:
    """How often each magnitude 0, 1, ... occurs; at least two counts."""
    return np.bincount(np.abs(indices).ravel(), minlength=2)


def cost(counts: NDArray[np.int64]) -> float:
    """Bits that indices with these counts of magnitudes take at least: even and odd ones have a table each, and a sign
    takes one bit."""
    bits = 0
    for parity in (0, 1):
        some = counts[parity::2][counts[parity::2] > 0]
        total = int(some.sum())
        if total:
            bits += total * int(log2_fixed(np.array([total]))[0]) - int((some * log2_fixed(some)).sum())
    return bits / (1 << _FRACTION) + float(counts[1:].sum())


def add_counts(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """The counts of two runs of indices together."""
    if len(a) < len(b):
        a, b = b, a
    return a + np.pad(b, (0, len(a) - len(b)))


def fit_pairs(counts: NDArray[np.int64]) -> NDArray[np.uint16]:
    """The frequencies of |m| = 0, 1, ... for indices with these counts: m and -m share one (spec section 6.7).

    What is too rare to be worth a frequency, and all that a sample did not show, is left to the escape, which gets one
    or two of 2**14 parts more than its own.
    """
    pairs = np.ones(_reach(counts) + 1, np.int64)
    for parity in (0, 1):
        mine = counts[parity::2]
        inside, total = mine[: len(pairs[parity::2])], int(mine.sum())
        weight = np.full(len(inside), 2)  # m and -m
        if parity == 0:
            weight[0] = 1
        escape = 1 + parity + (_TOTAL * int(mine[len(inside) :].sum()) // total if total else 0)
        room = _TOTAL - escape
        fitted = np.maximum(1, room * inside // (weight * max(int(inside.sum()), 1)))
        fitted += _shares(room - int((fitted * weight).sum()), fitted, weight)
        pairs[parity::2] = fitted
    return pairs.astype(np.uint16)


def _reach(counts: NDArray[np.int64]) -> int:
    """The largest magnitude with a frequency of its own, at least 1.

    An escape takes some 16 bits more than a symbol of the lowest frequency, and such a frequency takes two parts of
    2**14 from all others, as do those of the magnitudes in between that do not occur.
    """
    totals = int(counts[0::2].sum()), int(counts[1::2].sum())
    reach = 1
    for magnitude in np.flatnonzero(counts[:_MOST]).tolist():
        if magnitude > reach and int(counts[magnitude]) << 16 >= totals[magnitude % 2] * (magnitude - reach):
            reach = magnitude
    return reach


def _shares(rest: int, fitted: NDArray[np.int64], weight: NDArray[np.int64]) -> NDArray[np.int64]:
    """How much each frequency changes so that `rest` parts, left over by rounding, are given out or taken back: one
    after another from the most frequent on, round after round."""
    whole_rounds = max(rest, 0) // int(weight.sum())
    changes = np.full_like(fitted, whole_rounds)
    rest -= whole_rounds * int(weight.sum())
    order = np.argsort(-fitted, kind="stable")
    step = 1 if rest > 0 else -1
    while abs(rest) >= weight.min():
        before = rest
        for i in order:
            if abs(rest) >= weight[i] and fitted[i] + changes[i] + step >= 1:
                changes[i] += step
                rest -= step * int(weight[i])
        if rest == before:
            break
    return changes
