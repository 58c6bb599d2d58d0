"""Encode blocks on a GPU, four threads a block, and measure what was encoded: kernels.encode with the same bits."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_block import INTERPRETED, look_up, part
from .triton_lanes import dot, flip, fwht, load_block, narrow, over_lanes, pack, scale_by, widen

ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding it to a smaller float32 rounds that to an integer, which stands in the low bits."""


@part
def _nearest(
    x: tl.tensor, cells: tl.tensor, per_cell: tl.tensor, last_cell: tl.tensor, levels: tl.tensor, above: tl.tensor,
    bits: tl.constexpr, in_cells: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """scalar.nearest_level, the number of midpoints below x, and its level.

    By the tables of runtime.launch.find_cells, or without them by bisection; `above` holds the midpoint above each
    level. The minimum keeps the place in the table for an x that is too small to matter, as its block has scale 0.
    """
    if in_cells:
        place = tl.fma(x, per_cell, ROUNDER).to(tl.uint32, bitcast=True) - 0x4B400000 + (last_cell // 2)
        midpoint, low, high, code = _look_up_cell(cells, tl.minimum(place, last_cell))
        higher = x > midpoint
        code += higher.to(tl.int32)
        level = tl.where(higher, high, low)
    else:
        code = tl.zeros(x.shape, tl.int32)
        for bit in tl.static_range(bits):
            code += (x > look_up(above, code + ((1 << (bits - 1 - bit)) - 1))).to(tl.int32) << (bits - 1 - bit)
        level = look_up(levels, code)
    return code, level


@part
def _look_up_cell(cells: tl.tensor, index: tl.tensor) -> tl.tuple:
    start = cells + 4 * index
    if INTERPRETED:
        midpoint, low, high = tl.load(start), tl.load(start + 1), tl.load(start + 2)
        code = tl.load(start + 3).to(tl.int32, bitcast=True)
    else:
        midpoint, low, high, code = tl.inline_asm_elementwise(
            "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [start],
            dtype=(tl.float32, tl.float32, tl.float32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return midpoint, low, high, code


@part
def _try_step(
    rotated: tl.tuple, inverse: tl.tensor, cells: tl.tensor, per_cell: tl.tensor, last_cell: tl.tensor,
    levels: tl.tensor, above: tl.tensor, price: tl.tensor, bits: tl.constexpr, in_cells: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """scalar._encode_at_gain: codes, their levels, the least-squares scale, and the energy that it captures less the
    price."""
    codes, chosen = (), ()
    for i in tl.static_range(32):
        code, level = _nearest(rotated[i] * inverse, cells, per_cell, last_cell, levels, above, bits, in_cells)
        codes += (code,)
        chosen += (level,)
    product = tl.maximum(dot(rotated, chosen), 0.0) + 0.0
    energy = tl.maximum(dot(chosen, chosen), 1e-30)
    scale = tl.div_rn(product, energy)
    return codes, chosen, scale, scale * product - price * energy


@part
def _checksum(words: tl.tuple, kind: tl.constexpr) -> tl.tensor:
    """quantize.block_checksums, in all four lanes: the multiplier of coordinate c is (2 c + 1) times a constant."""
    x = ()
    for i in tl.static_range(32):
        if kind == tl.float32:
            x += (words[i],)
        else:
            x += ((words[i // 2] >> (16 * (i % 2))) & 0xFFFF,)
    total, weighted = x[0], x[0]
    for i in tl.static_range(1, 32):
        total += x[i]
        weighted += x[i] * (16 * (i // 2) + 2 * (i % 2) + 1)
    weighted += total * (4 * tl.arange(0, 4)).to(tl.uint32)[None, :]
    return (over_lanes(weighted) * 0x9E3779B1).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["n_blocks", "last_cell"])
def encode_blocks(
    items: tl.tensor, to_unit: tl.tensor, from_unit: tl.tensor, signs: tl.tensor, levels: tl.tensor, above: tl.tensor,
    cells: tl.tensor, per_cell: tl.tensor, last_cell: tl.tensor, gains: tl.tensor, penalty: tl.tensor,
    packed: tl.tensor, scales: tl.tensor, sums: tl.tensor, checksums: tl.tensor, n_blocks: tl.tensor,
    kind: tl.constexpr, bits: tl.constexpr, n_gains: tl.constexpr, in_cells: tl.constexpr, rows: tl.constexpr,
) -> None:  # fmt: skip
    """Code n_blocks whole blocks: what kernels.encode does for a chunk, in the same order of operations.

    items: n_blocks * 128 weights of type `kind`, as int32; to_unit: 2.0**-exponent, from_unit its inverse; signs: 128
    zeros of type `kind`, positive or negative, as int32; levels: (2**bits,) float32; above: (2**bits,) float32, the
    midpoints, then infinity; cells, per_cell, last_cell: of runtime.launch.find_cells; gains: (n_gains,) float32;
    penalty: of scalar.penalty_of; packed: (n_blocks * 4 * bits,) int32; scales: (n_blocks,) float16; sums:
    (4, n_blocks) float32; checksums: (n_blocks,) int32. A program codes `rows` blocks.

    All is computed on weights times signs, as the sums are the same: only the checksum takes the signs off.
    """
    block = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    lane = tl.arange(0, 4)[None, :]
    n_words: tl.constexpr = 128 if kind == tl.float32 else 64
    sign_words = load_block(signs + tl.zeros([rows], tl.int32), kind)
    words = flip(load_block(items + tl.minimum(block, n_blocks - 1) * n_words, kind), sign_words)
    source = scale_by(widen(words, kind), to_unit)
    rotated = fwht(source)
    rms = tl.sqrt_rn(dot(rotated, rotated) * 0.0078125)
    unit = tl.where(rms > 0, rms, 1.0)

    price = unit * unit * penalty
    inverse = tl.div_rn(1.0, unit * tl.load(gains))
    if n_gains > 1:
        best, most = inverse, unit * 0 - float("inf")
        for g in range(n_gains):
            inverse = tl.div_rn(1.0, unit * tl.load(gains + g))
            tried = _try_step(rotated, inverse, cells, per_cell, last_cell, levels, above, price, bits, in_cells)
            better = tried[3] > most
            best = tl.where(better, inverse, best)
            most = tl.where(better, tried[3], most)
        inverse = best
    found = _try_step(rotated, inverse, cells, per_cell, last_cell, levels, above, price, bits, in_cells)

    half = tl.minimum(found[2] * 0.0078125, 65504.0).to(tl.float16)
    codes, chosen = (), ()
    for i in tl.static_range(32):
        codes += (tl.where(half > 0, found[0][i], 0),)
        chosen += (tl.where(half > 0, found[1][i], tl.load(levels)),)
    out = pack(codes, bits)
    quarter = tl.program_id(0).to(tl.int64) * (4 * rows) + tl.arange(0, 4 * rows)
    for w in tl.static_range(bits):
        tl.store(packed + quarter * bits + w, out[w].to(tl.int32, bitcast=True), mask=quarter < 4 * n_blocks)

    decoded = narrow(scale_by(fwht(chosen), half.to(tl.float32) * from_unit), kind)
    restored = scale_by(widen(decoded, kind), to_unit)
    error = ()
    for i in tl.static_range(32):
        error += (source[i] - restored[i],)

    place = block[:, None] + 0 * lane
    mask = (block < n_blocks)[:, None] & (lane == 0)  # the lanes have the same sums
    tl.store(scales + place, half, mask=mask)
    tl.store(sums + place, dot(source, source), mask=mask)
    tl.store(sums + n_blocks + place, dot(restored, restored), mask=mask)
    tl.store(sums + 2 * n_blocks + place, dot(source, restored), mask=mask)
    tl.store(sums + 3 * n_blocks + place, dot(error, error), mask=mask)
    tl.store(checksums + place, _checksum(flip(decoded, sign_words), kind), mask=mask)
