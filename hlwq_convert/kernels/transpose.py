"""Sixteen lanes of sixteen turns, the other way round."""

from __future__ import annotations

from typing import Any

from .compiled import part
from .vectors import evens, load, odds, store


@part
def _quarter(v: Any) -> Any:
    """Row and column are one number of eight bits; this turns it right by one."""
    return (
        evens(v[0], v[1]), evens(v[2], v[3]), evens(v[4], v[5]), evens(v[6], v[7]),
        evens(v[8], v[9]), evens(v[10], v[11]), evens(v[12], v[13]), evens(v[14], v[15]),
        odds(v[0], v[1]), odds(v[2], v[3]), odds(v[4], v[5]), odds(v[6], v[7]),
        odds(v[8], v[9]), odds(v[10], v[11]), odds(v[12], v[13]), odds(v[14], v[15]),
    )  # fmt: skip


@part
def transpose(source: Any, start: int, stride: int, target: Any, to: int, to_stride: int) -> None:
    """target[to + i * to_stride + j] = source[start + j * stride + i] for i and j below 16, in flat arrays."""
    v = (
        load(source, start), load(source, start + stride), load(source, start + 2 * stride),
        load(source, start + 3 * stride), load(source, start + 4 * stride), load(source, start + 5 * stride),
        load(source, start + 6 * stride), load(source, start + 7 * stride), load(source, start + 8 * stride),
        load(source, start + 9 * stride), load(source, start + 10 * stride), load(source, start + 11 * stride),
        load(source, start + 12 * stride), load(source, start + 13 * stride), load(source, start + 14 * stride),
        load(source, start + 15 * stride),
    )  # fmt: skip
    w = _quarter(_quarter(_quarter(_quarter(v))))
    store(target, to, w[0])
    store(target, to + to_stride, w[1])
    store(target, to + 2 * to_stride, w[2])
    store(target, to + 3 * to_stride, w[3])
    store(target, to + 4 * to_stride, w[4])
    store(target, to + 5 * to_stride, w[5])
    store(target, to + 6 * to_stride, w[6])
    store(target, to + 7 * to_stride, w[7])
    store(target, to + 8 * to_stride, w[8])
    store(target, to + 9 * to_stride, w[9])
    store(target, to + 10 * to_stride, w[10])
    store(target, to + 11 * to_stride, w[11])
    store(target, to + 12 * to_stride, w[12])
    store(target, to + 13 * to_stride, w[13])
    store(target, to + 14 * to_stride, w[14])
    store(target, to + 15 * to_stride, w[15])
