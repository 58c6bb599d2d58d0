"""One block of 128 coordinates as eight vectors of sixteen, a tuple that stays in registers.

Each function is one of rotate, scalar or hlwq_formats.dtypes for one block, with the same roundings.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiled import part
from .lookup import take
from .vectors import as_bits, as_floats, evens, first, fold, load, odds, ones, select, splat, store

Block = Any
"""A tuple of eight F32, or of eight U32."""

BF16, F16, F32 = 0, 1, 2
"""What the items of an array of unsigned integers stand for."""


@part
def each(function: Any, x: Block, *more: Any) -> Block:
    """`function` of every vector of a block, with the same further arguments."""
    return (
        function(x[0], *more), function(x[1], *more), function(x[2], *more), function(x[3], *more),
        function(x[4], *more), function(x[5], *more), function(x[6], *more), function(x[7], *more),
    )  # fmt: skip


@part
def both(function: Any, x: Block, y: Block, *more: Any) -> Block:
    """`function` of every pair of vectors of two blocks."""
    return (
        function(x[0], y[0], *more), function(x[1], y[1], *more), function(x[2], y[2], *more),
        function(x[3], y[3], *more), function(x[4], y[4], *more), function(x[5], y[5], *more),
        function(x[6], y[6], *more), function(x[7], y[7], *more),
    )  # fmt: skip


@part
def load_block(array: Any, start: int) -> Block:
    """128 items of a flat array."""
    return (
        load(array, start), load(array, start + 16), load(array, start + 32), load(array, start + 48),
        load(array, start + 64), load(array, start + 80), load(array, start + 96), load(array, start + 112),
    )  # fmt: skip


@part
def store_block(array: Any, start: int, block: Block) -> None:
    """Write a block of U32 to 128 items of a flat array of unsigned integers."""
    store(array, start, block[0])  # a loop over a tuple is one with a jump in it
    store(array, start + 16, block[1])
    store(array, start + 32, block[2])
    store(array, start + 48, block[3])
    store(array, start + 64, block[4])
    store(array, start + 80, block[5])
    store(array, start + 96, block[6])
    store(array, start + 112, block[7])


@part
def subtract(a: Block, b: Block) -> Block:
    """a - b."""
    return both(_subtract, a, b)


@part
def _subtract(a: Any, b: Any) -> Any:
    return a - b


@part
def _multiply(a: Any, b: Any) -> Any:
    return a * b


@part
def multiply(a: Block, b: Block) -> Block:
    """a * b."""
    return both(_multiply, a, b)


@part
def scale(a: Block, factor: Any) -> Block:
    """Every coordinate times a number."""
    return each(_multiply, a, splat(factor))


@part
def _divide(a: Any, b: Any) -> Any:
    return a / b


@part
def divide(a: Block, divisor: Any) -> Block:
    """Every coordinate divided by a number."""
    return each(_divide, a, splat(divisor))


@part
def _add(a: Any, b: Any) -> Any:
    return a + b


@part
def shift(a: Block, offset: Any) -> Block:
    """Every coordinate plus a number."""
    return each(_add, a, splat(offset))


@part
def _to_bits(a: Any) -> Any:
    return as_bits(a)


@part
def to_bits(a: Block) -> Block:
    """The bit patterns of a block of F32."""
    return each(_to_bits, a)


@part
def block_sum(x: Block) -> Any:
    """rotate.block_sums of one block: a tree, the upper half added to the lower half, seven times."""
    return fold(((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])))


@part
def _butterflies(x: Block) -> Block:
    """y[i] = x[2i] + x[2i + 1] and y[i + 64] = x[2i] - x[2i + 1]."""
    a0, a1, a2, a3 = evens(x[0], x[1]), evens(x[2], x[3]), evens(x[4], x[5]), evens(x[6], x[7])
    b0, b1, b2, b3 = odds(x[0], x[1]), odds(x[2], x[3]), odds(x[4], x[5]), odds(x[6], x[7])
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a0 - b0, a1 - b1, a2 - b2, a3 - b3


@part
def fwht(x: Block) -> Block:
    """rotate.fwht of one block.

    Each pass adds neighbours and moves the lowest bit of the index to the top, so that pass p combines what
    was 2**p apart, and after seven passes every coordinate is back in its place: the additions of Sylvester's
    order, with the same memory pattern in each pass (Pease 1968).
    """
    return _butterflies(_butterflies(_butterflies(_butterflies(_butterflies(_butterflies(_butterflies(x)))))))


@part
def _take(index: Any, table: Any) -> Any:
    return take(table, index)


@part
def take_block(table: Any, codes: Block) -> Block:
    """Look up a block of U32 in rows of 16 float32."""
    return each(_take, codes, table)


@part
def _zero(x: Any) -> Any:
    return splat(0)


@part
def _bisect(x: Any, code: Any, below: Any, half: int) -> Any:
    upper = code + splat(half)
    return select(x > take(below, upper), upper, code)


@part
def nearest_level(x: Block, below: Any, n_levels: int) -> Block:
    """scalar.nearest_level of one block: the last level whose midpoint below is less than x, by bisection.

    `below` holds the midpoint below each level, minus infinity below the first.
    """
    codes = each(_zero, x)
    half = n_levels >> 1
    while half > 0:
        codes = both(_bisect, x, codes, below, half)
        half >>= 1
    return codes


@part
def _step(x: Any, code: Any, below: Any, n_levels: int) -> Any:
    # a negative coordinate may have to go one up, another one down: both look at the midpoint between
    upper = code + (as_bits(x) >> splat(31))
    upper = select(upper < splat(n_levels), upper, splat(n_levels - 1))
    return upper - ones(take(below, upper) >= x)


@part
def step_to_nearest(x: Block, codes: Block, below: Any, n_levels: int) -> Block:
    """Move the codes of coordinates that came closer to zero by at most one level, to what nearest_level finds
    if one level is enough."""
    return both(_step, x, codes, below, n_levels)


# --- number formats ----------------------------------------------------------------------------


@part
def _widen_f16(item: Any) -> Any:
    magnitude = item & splat(0x7FFF)
    # as a float32 these bits are the value times 2**-112, subnormal numbers included
    value = as_floats(magnitude << splat(13)) * splat(np.float32(2.0**112))
    value = select(magnitude < splat(0x7C00), value, splat(np.float32(np.inf)))
    return as_floats(as_bits(value) | ((item & splat(0x8000)) << splat(16)))


@part
def _widen(item: Any, kind: int) -> Any:
    if kind == BF16:
        return as_floats(item << splat(16))
    return _widen_f16(item) if kind == F16 else as_floats(item)


@part
def widen(items: Block, kind: int) -> Block:
    """dtypes.widen of a block of bit patterns; what is not finite comes as infinity or NaN."""
    return each(_widen, items, kind)


@part
def _narrow_bf16(bits: Any) -> Any:
    return (bits + splat(0x7FFF) + ((bits >> splat(16)) & splat(1))) >> splat(16)


@part
def _narrow_f16(bits: Any) -> Any:
    magnitude = bits & splat(0x7FFFFFFF)
    odd = (magnitude >> splat(13)) & splat(1)
    normal = ((magnitude + splat(0xFFF) + odd) >> splat(13)) - splat(112 << 10)
    # below 2**-14 the unit is 2**-24: adding 2**23 to a count of units rounds it to a whole one
    units = as_floats(magnitude) * splat(np.float32(2.0**24)) + splat(np.float32(2.0**23))
    small = as_bits(units) - splat(0x4B000000)
    half = select(magnitude < splat(0x38800000), small, normal)
    half = select(magnitude < splat(0x477FF000), half, splat(0x7C00))  # 65520 and beyond
    return half | ((bits >> splat(16)) & splat(0x8000))


@part
def _narrow(value: Any, kind: int) -> Any:
    bits = as_bits(value)
    if kind == BF16:
        return _narrow_bf16(bits)
    return _narrow_f16(bits) if kind == F16 else bits


@part
def narrow(values: Block, kind: int) -> Block:
    """dtypes.narrow of a block: the bit patterns of values that are not NaN, rounded ties to even."""
    return each(_narrow, values, kind)


@part
def scale_to_half(scale: Any) -> Any:
    """The float16 bits of a float32 in 0..65504, ties to even."""
    return first(_narrow_f16(as_bits(splat(scale))))


@part
def half_to_scale(half: Any) -> Any:
    """The float32 of float16 bits."""
    return first(_widen_f16(splat(half)))
