"""A few activations times a packed matrix on a GPU, in the rotated domain: the weights are read as they are stored and
never written. A thread looks up a block of weights; up to FEW activations are multiplied there and then, more by the
tensor cores, for which 32 blocks are rounded to the dtype of the activations. Sums are float32, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_block import join_block, levels_of_lanes, load_words, look_up_code, narrow, part, unpack

ROWS = 32
"""Rows of the matrix that a program takes, one a thread."""
BATCH = 16
"""Activations at most: what the tensor cores multiply with at once."""
FEW = 2
"""Up to so many, multiplying takes a thread less time than handing its weights to the tensor cores."""
EACH = (4, 2)
"""Rows of a thread for 1 to FEW activations: what registers hold."""

_BATCH = tl.constexpr(BATCH)


@part
def _odd(x: tl.tensor) -> tl.tensor:
    """Whether a number below 256 has an odd number of bits."""
    x ^= x >> 4
    x ^= x >> 2
    return ((x ^ (x >> 1)) & 1) == 1


@triton.jit(do_not_specialize=["n", "s0", "s1", "s2", "s3"])
def rotate_rows(
    x: tl.tensor, result: tl.tensor, n: tl.tensor, columns: tl.tensor, s0: tl.tensor, s1: tl.tensor, s2: tl.tensor,
    s3: tl.tensor, factor: tl.constexpr,
) -> None:  # fmt: skip
    """fwht(signs * x) * factor of `n` rows of whole blocks, at most BATCH: program b takes block b of all of them.

    x, result: (n, columns) bfloat16 or float16, result also float32; s0..s3: the 128 sign bits as int32; factor: a
    power of two.
    """
    row, i, j = tl.arange(0, _BATCH), tl.arange(0, 128), tl.arange(0, 128)
    place = row[:, None] * columns + tl.program_id(0) * 128 + i[None, :]
    mask = (row < n)[:, None]
    word = tl.where(i < 32, s0, tl.where(i < 64, s1, tl.where(i < 96, s2, s3)))
    minus = _odd(i[:, None] & j[None, :]) ^ (((word >> (i % 32)) & 1) == 1)[:, None]
    matrix = tl.where(minus, -factor, factor).to(x.dtype.element_ty)
    rotated = tl.dot(tl.load(x + place, mask=mask, other=0), matrix)
    tl.store(result + place, rotated.to(result.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "n_rows", "blocks", "per_program"])
def multiply_rows(
    packed: tl.tensor, scales: tl.tensor, levels: tl.tensor, x: tl.tensor, parts: tl.tensor, unit: tl.tensor,
    n: tl.tensor, n_rows: tl.tensor, blocks: tl.tensor, per_program: tl.tensor, bits: tl.constexpr, rows: tl.constexpr,
) -> None:  # fmt: skip
    """Program (g, p) multiplies `rows` rows from g * rows on by blocks p * per_program ... of all `n` activations.

    packed: (n_rows * blocks * 4 * bits,) int32, 16-byte aligned; scales: (n_rows * blocks,) float16; levels:
    (2**bits,) float32; x: (n, blocks * 128) bfloat16 or float16 of rotate_rows, n at most BATCH; unit: what scales are
    multiplied by; parts: (programs p, n, n_rows) float32.
    """
    kind: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    first = tl.minimum(row, n_rows - 1).to(tl.int64) * blocks
    batch, i = tl.arange(0, _BATCH), tl.arange(0, 128)
    start = tl.program_id(1) * per_program
    total = tl.zeros([rows, _BATCH], tl.float32)
    mine = levels_of_lanes(levels, bits, rows)
    b, end = start, tl.minimum(start + per_program, blocks)
    while b < end:  # the interpreter knows no range of tensors
        words = load_words(packed + (first + b) * (4 * bits), 4 * bits)
        codes = unpack(words, bits)
        weights = ()
        for q in tl.static_range(32):
            weights += (narrow(look_up_code(levels, mine, codes[q], bits), kind),)
        place = batch[None, :] * (blocks * 128) + b * 128 + i[:, None]
        some = tl.load(x + place, mask=(batch < n)[None, :], other=0)
        scale = tl.load(scales + first + b).to(tl.float32) * unit
        total += tl.dot(join_block(weights), some) * scale[:, None]
        b += 1
    place = (tl.program_id(1) * n + batch)[None, :] * n_rows + row[:, None]
    tl.store(parts + place, total, mask=(batch < n)[None, :] & (row < n_rows)[:, None])


@triton.jit(do_not_specialize=["n_rows", "blocks", "per_program"])
def multiply_few_rows(
    packed: tl.tensor, scales: tl.tensor, levels: tl.tensor, x: tl.tensor, parts: tl.tensor, unit: tl.tensor,
    n_rows: tl.tensor, blocks: tl.tensor, per_program: tl.tensor, n: tl.constexpr, bits: tl.constexpr,
    rows: tl.constexpr, each: tl.constexpr,
) -> None:  # fmt: skip
    """multiply_rows for at most FEW activations, x being float32. A thread has `each` rows, so that it reads x less
    often: reading is what takes the time."""
    start, quad = tl.program_id(1) * per_program, tl.arange(0, 4)[None, :]
    mine = levels_of_lanes(levels, bits, rows)
    totals = ()
    for _ in tl.static_range(each * n):
        totals += (tl.zeros([rows, 4], tl.float32),)
    b, end = start, tl.minimum(start + per_program, blocks)
    while b < end:
        codes, scale, sums = (), (), ()
        for k in tl.static_range(each):
            row = (tl.program_id(0) * each + k) * rows + tl.arange(0, rows)
            place = tl.minimum(row, n_rows - 1).to(tl.int64) * blocks + b
            codes += (unpack(load_words(packed + place * (4 * bits), 4 * bits), bits),)
            scale += ((tl.load(scales + place).to(tl.float32) * unit)[:, None],)
        for _ in tl.static_range(each * n):
            sums += (tl.zeros([rows, 4], tl.float32),)
        for q in tl.static_range(32):
            some, added = (), ()
            for i in tl.static_range(n):
                some += (tl.load(x + i * (blocks * 128) + (b * 128 + 4 * q) + quad),)
            for k in tl.static_range(each):
                weight = look_up_code(levels, mine, codes[k][q], bits)
                for i in tl.static_range(n):
                    added += (tl.fma(weight, some[i], sums[k * n + i]),)
            sums = added
        added = ()
        for k in tl.static_range(each):
            for i in tl.static_range(n):
                added += (tl.fma(sums[k * n + i], scale[k], totals[k * n + i]),)
        totals = added
        b += 1
    for k in tl.static_range(each):
        row = (tl.program_id(0) * each + k) * rows + tl.arange(0, rows)
        for i in tl.static_range(n):
            place = parts + (tl.program_id(1) * n + i) * n_rows + row
            tl.store(place, tl.sum(totals[k * n + i], 1), mask=row < n_rows)


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def add_parts(
    parts: tl.tensor, bias: tl.tensor, result: tl.tensor, n_rows: tl.tensor, n_parts: tl.tensor,
    has_bias: tl.constexpr, size: tl.constexpr,
) -> None:  # fmt: skip
    """result[n, row], in its dtype, from the sum of parts[:, n, row], in order, and bias[row]."""
    row = tl.program_id(0) * size + tl.arange(0, size)
    mask, n, batch = row < n_rows, tl.program_id(1), tl.num_programs(1)
    total = tl.zeros([size], tl.float32)
    p = 0
    while p < n_parts:
        total += tl.load(parts + (p * batch + n) * n_rows + row, mask=mask, other=0)
        p += 1
    if has_bias:
        total += tl.load(bias + row, mask=mask, other=0).to(tl.float32)
    tl.store(result + n * n_rows + row, total.to(result.dtype.element_ty), mask=mask)
