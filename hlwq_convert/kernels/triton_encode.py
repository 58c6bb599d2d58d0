"""Encode blocks on a GPU, four threads a block, and measure what was encoded: kernels.encode with the same bits.

A program is one warp and codes eight blocks a turn. Look-ups are its most frequent work, and go through the same unit
as exchanges between lanes: so tables lie in the lanes of the warp or in shared memory, where rows are short.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_block import INTERPRETED, look_up, part
from .triton_lanes import (
    dot,
    flip,
    fold,
    four_sums,
    fwht,
    load_blocks,
    multiply,
    narrow,
    over_lanes,
    pack,
    scale_by,
    widen,
)

ROWS = 8
"""Blocks that a program codes at once: a warp of them."""

IN_LANES = 512
"""Cells whose table a program copies to shared memory; the levels then lie in the lanes of the warp."""


# --- the nearest level -------------------------------------------------------------------------


_COPY_CELLS = tl.constexpr("""{
    .shared .align 16 .b8 cells[512];
    .reg .b32 a, b, c, d, place;
    ld.global.nc.v4.b32 {a, b, c, d}, [$1];
    mov.u32 $0, cells;
    add.u32 place, $0, $2;
    st.shared.v4.b32 [place], {a, b, c, d};
    bar.warp.sync -1;
}""")
"""Copy 16 bytes a thread to shared memory, and give its address: look-ups need that, so none is made before."""

_FIND_IN_LANES = tl.constexpr("""{
    .reg .f32 cell, midpoint;
    .reg .b32 place;
    .reg .pred above;
    fma.rn.sat.f32 cell, $2, $3, $4;
    mov.b32 place, cell;
    add.u32 place, place, $5;
    ld.shared.u8 $1, [place];
    shfl.sync.idx.b32 midpoint, $6, $1, 31, -1;
    setp.gt.f32 above, $2, midpoint;
    @above add.u32 $1, $1, 1;
    shfl.sync.idx.b32 $0, $7, $1, 31, -1;
}""")


@part
def _load_tables(
    cells: tl.tensor, levels: tl.tensor, above: tl.tensor, bits: tl.constexpr, find: tl.constexpr
) -> tl.tuple:
    """The tables as _nearest takes them: pointers, or with `find` "lanes" the address of the cells in shared memory,
    and the level and the midpoint that each thread of the warp keeps for all."""
    tables = cells, levels, above
    if find == "lanes" and not INTERPRETED:
        thread = 4 * tl.arange(0, 8)[:, None] + tl.arange(0, 4)[None, :]
        place = tl.inline_asm_elementwise(
            _COPY_CELLS, "=&r,l,r", [cells.to(tl.int64) + 16 * thread, 16 * thread], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip
        mine = thread % (1 << bits)
        tables = place, tl.load(levels + mine), tl.load(above + mine)
    return tables


@part
def _cell(x: tl.tensor, per_cell: tl.tensor, first: tl.tensor) -> tl.tensor:
    """The cell of x: the bits of a float32 that is so small that it counts in units of 2**-149. Nothing that is not in
    a cell of the table comes from finite weights; NaN and all below give cell 0."""
    if INTERPRETED:
        return tl.maximum(tl.fma(x, per_cell, first), 0.0).to(tl.int32, bitcast=True)
    return tl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, $3;", "=r,r,r,r", [x, per_cell, first], dtype=tl.int32, is_pure=True, pack=1
    )


@part
def _look_up_byte(table: tl.tensor, index: tl.tensor) -> tl.tensor:
    if INTERPRETED:
        return tl.load(table + index).to(tl.int32)
    return tl.inline_asm_elementwise(
        "ld.global.nc.u8 $0, [$1];", "=r,l", [table + index], dtype=tl.int32, is_pure=True, pack=1
    )


@part
def _nearest(
    x: tl.tensor, tables: tl.tuple, per_cell: tl.tensor, first: tl.tensor, bits: tl.constexpr, find: tl.constexpr
) -> tl.tuple:
    """scalar.nearest_level, the number of midpoints below x, and its level: by the cells of runtime.launch.find_cells,
    their tables in "lanes" or in "memory", or without them by "halves"."""
    cells, levels, above = tables
    if find == "halves":
        code = tl.zeros(x.shape, tl.int32)
        for bit in tl.static_range(bits):
            code += (x > look_up(above, code + ((1 << (bits - 1 - bit)) - 1))).to(tl.int32) << (bits - 1 - bit)
        level = look_up(levels, code)
    elif INTERPRETED or find == "memory":
        code = _look_up_byte(cells, _cell(x, per_cell, first))
        code += (x > look_up(above, code)).to(tl.int32)
        level = look_up(levels, code)
    else:
        level, code = tl.inline_asm_elementwise(
            _FIND_IN_LANES, "=&r,=&r,r,r,r,r,r,r", [x, per_cell, first, cells, above, levels],
            dtype=(tl.float32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return code, level


@part
def _find_codes(
    rotated: tl.tuple, inverse: tl.tensor, tables: tl.tuple, per_cell: tl.tensor, first: tl.tensor, bits: tl.constexpr,
    find: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    codes, chosen = (), ()
    for i in tl.static_range(32):
        code, level = _nearest(rotated[i] * inverse, tables, per_cell, first, bits, find)
        codes += (code,)
        chosen += (level,)
    return codes, chosen


@part
def _fit_scale(rotated: tl.tuple, chosen: tl.tuple, price: tl.tensor) -> tl.tuple:
    """scalar._encode_at_gain: the least-squares scale of the levels, and the energy that it captures less the price."""
    product = tl.maximum(dot(rotated, chosen), 0.0) + 0.0
    energy = tl.maximum(dot(chosen, chosen), 1e-30)
    scale = tl.div_rn(product, energy)
    return scale, scale * product - price * energy


# --- signs and scales of pairs -----------------------------------------------------------------


@part
def _load_signs(start: tl.tensor, kind: tl.constexpr) -> tl.tuple:
    """The words of runtime.launch.signs_of, a lane's one after the other, as the (ROWS, 4) words of a block."""
    n_words: tl.constexpr = 32 if kind == tl.float32 else 16
    place = start + n_words * tl.arange(0, 4)[None, :] + 0 * tl.arange(0, 8)[:, None]
    words = ()
    for j in tl.static_range(0, n_words, 4):
        if INTERPRETED:
            for i in tl.static_range(4):
                words += (tl.load(place + (j + i)).to(tl.uint32, bitcast=True),)
        else:
            words += tl.inline_asm_elementwise(
                "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [place + j],
                dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1,
            )  # fmt: skip
    return words


@part
def _multiply_pairs(words: tl.tuple, factors: tl.tuple) -> tl.tuple:
    """Words of two bfloat16 times powers of two of either sign: exact but for numbers so small that float32 has them
    only as subnormal ones. For those the caller must not make weights smaller."""
    y = ()
    for i in tl.static_range(16):
        y += (
            tl.inline_asm_elementwise(
                "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [words[i], factors[i]], dtype=tl.uint32, is_pure=True, pack=1
            ),
        )
    return y


@part
def _sign_bits(factors: tl.tuple, kind: tl.constexpr) -> tl.tuple:
    y = ()
    for i in tl.static_range(len(factors)):
        y += (factors[i] & (0x80000000 if kind == tl.float32 else 0x80008000),)
    return y


# --- the checksum ------------------------------------------------------------------------------


@part
def _checksum(words: tl.tuple, kind: tl.constexpr) -> tl.tensor:
    """quantize.block_checksums, in all four lanes: the multiplier of coordinate c is (2 c + 1) times a constant."""
    lane = tl.arange(0, 4).to(tl.uint32)[None, :]
    weighted = tl.zeros(words[0].shape, tl.uint32)
    if kind == tl.float32 or INTERPRETED:
        for i in tl.static_range(32):
            x = words[i] if kind == tl.float32 else (words[i // 2] >> (16 * (i % 2))) & 0xFFFF
            weighted += x * (16 * (i // 2) + 2 * (i % 2) + 1 + 4 * lane)
    else:  # four multipliers in the bytes of a word, two weights and their multipliers an instruction
        for j in tl.static_range(0, 16, 2):
            multipliers = (16 * j + 1) * 0x01010101 + 0x12100200 + lane * 0x04040404
            weighted = tl.inline_asm_elementwise(
                "{ dp2a.lo.u32.u32 $0, $1, $3, $4; dp2a.hi.u32.u32 $0, $2, $3, $0; }", "=&r,r,r,r,r",
                [words[j], words[j + 1], multipliers, weighted], dtype=tl.uint32, is_pure=True, pack=1,
            )  # fmt: skip
    return (over_lanes(weighted) * 0x9E3779B1).to(tl.int32, bitcast=True)


# --- all of it ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_blocks", "per_cell", "first"])
def encode_blocks(
    items: tl.tensor, to_unit: tl.tensor, from_unit: tl.tensor, signs: tl.tensor, levels: tl.tensor, above: tl.tensor,
    cells: tl.tensor, per_cell: tl.tensor, first: tl.tensor, gains: tl.tensor, penalty: tl.tensor,
    packed: tl.tensor, scales: tl.tensor, sums: tl.tensor, checksums: tl.tensor, n_blocks: tl.tensor,
    kind: tl.constexpr, bits: tl.constexpr, n_gains: tl.constexpr, find: tl.constexpr, in_pairs: tl.constexpr,
) -> None:  # fmt: skip
    """Code n_blocks whole blocks: what kernels.encode does for a chunk, in the same order of operations.

    items: n_blocks * 128 weights of type `kind`, as int32; to_unit: 2.0**-exponent, from_unit its inverse; signs: of
    runtime.launch.signs_of; levels: (2**bits,) float32; above: (2**bits,) float32, the midpoints, then infinity;
    cells, per_cell, first: of runtime.launch.find_cells; gains: (n_gains,) float32; penalty: of scalar.penalty_of;
    packed: (n_blocks * 4 * bits,) int32; scales: (n_blocks,) float16; sums: (4, n_blocks) float32; checksums:
    (n_blocks,) int32. find: of _nearest; in_pairs: whether `signs` are multiplied with the weights, two at once.
    A program codes ROWS blocks, with one warp.

    All is computed on weights times signs, as the sums are the same: only the checksum takes the signs off.
    """
    block = tl.program_id(0) * 8 + tl.arange(0, 8)
    lane = tl.arange(0, 4)[None, :]
    factors = _load_signs(signs, kind)
    flips = _sign_bits(factors, kind)
    words = load_blocks(items, tl.minimum(block, n_blocks - 1), kind)
    if in_pairs and not INTERPRETED:
        source = widen(_multiply_pairs(words, factors), kind)
    else:
        source = scale_by(widen(flip(words, flips), kind), to_unit)
    rotated = fwht(source)
    rms = tl.sqrt_rn(dot(rotated, rotated) * 0.0078125)
    unit = tl.where(rms == 0, 1.0, rms)  # NaN stays: it finds cell 0

    # as floats these small integers are multiples of the smallest one
    per_cell, first = per_cell.to(tl.float32, bitcast=True), first.to(tl.float32, bitcast=True)
    tables = _load_tables(cells, levels, above, bits, find)
    price = unit * unit * penalty
    inverse = tl.div_rn(1.0, unit * tl.load(gains))
    if n_gains > 1:
        best, scale, most = inverse, unit, unit * 0 - float("inf")
        for g in range(n_gains):
            inverse = tl.div_rn(1.0, unit * tl.load(gains + g))
            fitted = _fit_scale(rotated, _find_codes(rotated, inverse, tables, per_cell, first, bits, find)[1], price)
            better = fitted[1] > most
            best = tl.where(better, inverse, best)
            scale = tl.where(better, fitted[0], scale)
            most = tl.where(better, fitted[1], most)
        codes, chosen = _find_codes(rotated, best, tables, per_cell, first, bits, find)
    else:
        codes, chosen = _find_codes(rotated, inverse, tables, per_cell, first, bits, find)
        scale = _fit_scale(rotated, chosen, price)[0]

    half = tl.minimum(scale * 0.0078125, 65504.0).to(tl.float16)
    # a block of scale 0 has codes 0, and zeros: their sum alone, coordinate 0, has the sign of the lowest level
    kept = tl.where(half > 0, 0xFFFFFFFF, 0).to(tl.uint32)
    out = pack(codes, bits)
    quarter = tl.program_id(0) * 32 + tl.arange(0, 32)
    kept_words = tl.reshape(tl.broadcast_to(kept, [8, 4]), [32])
    for w in tl.static_range(bits):
        word = (out[w] & kept_words).to(tl.int32, bitcast=True)
        tl.store(packed + quarter.to(tl.int64) * bits + w, word, mask=quarter < 4 * n_blocks)

    raw = narrow(scale_by(fwht(chosen), half.to(tl.float32) * from_unit), kind)
    sign = tl.load(levels).to(tl.uint32, bitcast=True) & 0x80000000
    if kind != tl.float32:
        sign = sign >> 16
    decoded = ((raw[0] & kept) | tl.where((lane == 0) & (half == 0), sign, 0),)
    for i in tl.static_range(1, len(raw)):
        decoded += (raw[i] & kept,)
    if in_pairs and not INTERPRETED:
        pair = (to_unit.to(tl.uint32, bitcast=True) >> 16) * 0x10001 + tl.zeros([8, 4], tl.uint32)
        restored = widen(_multiply_pairs(decoded, (pair,) * 16), kind)
    else:
        restored = scale_by(widen(decoded, kind), to_unit)
    error = ()
    for i in tl.static_range(32):
        error += (source[i] - restored[i],)

    place = block[:, None] + 0 * lane
    mask = (block < n_blocks)[:, None]
    energies = fold(multiply(source, source)) + fold(multiply(restored, restored))
    four = four_sums(energies + fold(multiply(source, restored)) + fold(multiply(error, error)))
    tl.store(sums + lane.to(tl.int64) * n_blocks + place, four, mask=mask)
    mask = mask & (lane == 0)  # the lanes have the same
    tl.store(scales + place, half, mask=mask)
    tl.store(checksums + place, _checksum(flip(decoded, flips), kind), mask=mask)
