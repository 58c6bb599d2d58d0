"""Encode blocks on a GPU, four threads a block, and measure what was encoded: kernels.encode with the same bits."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_block import ROUNDER, look_up, part
from .triton_lanes import block_sum, dot, flip, fwht, load_block, narrow, pack, scale_by, widen


@part
def _nearest_level(
    x: tl.tensor, cells: tl.tensor, above: tl.tensor, reach: tl.tensor, per_cell: tl.tensor, origin: tl.tensor,
    bits: tl.constexpr, steps: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """scalar.nearest_level: the number of midpoints below x.

    `above` holds the midpoint above each level. With the cells of runtime.launch.find_cells at most `steps` midpoints
    are to be compared with; without them (0 steps) x is found by bisection.
    """
    if steps == 0:
        code = tl.zeros(x.shape, tl.int32)
        for bit in tl.static_range(bits):
            code += (x > look_up(above, code + ((1 << (bits - 1 - bit)) - 1))).to(tl.int32) << (bits - 1 - bit)
    else:
        place = tl.minimum(tl.maximum(x * per_cell, -reach), reach) + ROUNDER
        code = look_up(cells, place.to(tl.int32, bitcast=True) + origin)
        for _ in tl.static_range(steps):
            code += (x > look_up(above, code)).to(tl.int32)
    return code


@part
def _try_step(
    rotated: tl.tuple, inverse: tl.tensor, levels: tl.tensor, cells: tl.tensor, above: tl.tensor, reach: tl.tensor,
    per_cell: tl.tensor, origin: tl.tensor, bits: tl.constexpr, steps: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """scalar._encode_at_gain: codes, the least-squares scale of their levels, and the energy that it captures."""
    codes, chosen = (), ()
    for i in tl.static_range(32):
        code = _nearest_level(rotated[i] * inverse, cells, above, reach, per_cell, origin, bits, steps)
        codes += (code,)
        chosen += (look_up(levels, code),)
    product = tl.maximum(dot(rotated, chosen), 0.0) + 0.0
    energy = tl.maximum(dot(chosen, chosen), 1e-30)
    scale = tl.div_rn(product, energy)
    return codes, scale, scale * product


@part
def _checksum(words: tl.tuple, kind: tl.constexpr) -> tl.tensor:
    """quantize.block_checksums, in all four lanes."""
    odd = (4 * tl.arange(0, 4) + 1).to(tl.uint32)[None, :]
    x = ()
    for i in tl.static_range(32):
        if kind == tl.float32:
            bits = words[i]
        else:
            bits = (words[i // 2] >> (16 * (i % 2))) & 0xFFFF
        x += (bits * ((odd + (16 * (i // 2) + 2 * (i % 2))) * 0x9E3779B1),)
    return block_sum(x)


@triton.jit(do_not_specialize=["n_blocks", "origin", "s0", "s1", "s2", "s3"])
def encode_blocks(
    items: tl.tensor, to_unit: tl.tensor, from_unit: tl.tensor, s0: tl.tensor, s1: tl.tensor, s2: tl.tensor,
    s3: tl.tensor, levels: tl.tensor, cells: tl.tensor, above: tl.tensor, reach: tl.tensor, per_cell: tl.tensor,
    origin: tl.tensor, gains: tl.tensor, packed: tl.tensor, scales: tl.tensor, sums: tl.tensor,
    checksums: tl.tensor, n_blocks: tl.tensor, kind: tl.constexpr, bits: tl.constexpr, n_gains: tl.constexpr,
    steps: tl.constexpr, rows: tl.constexpr,
) -> None:  # fmt: skip
    """Code n_blocks whole blocks: what kernels.encode does for a chunk, in the same order of operations.

    items: n_blocks * 128 weights of type `kind`, as int32; to_unit: 2.0**-exponent, from_unit its inverse; s0..s3:
    the 128 sign bits as int32; levels: (2**bits,) float32; cells, above, reach, per_cell, origin, steps: of
    runtime.launch.find_cells; gains: (n_gains,) float32; packed: (n_blocks * 4 * bits,) int32; scales: (n_blocks,)
    float16; sums: (4, n_blocks) float32; checksums: (n_blocks,) int32. A program codes `rows` blocks.
    """
    block = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    n_words: tl.constexpr = 128 if kind == tl.float32 else 64
    words = load_block(items + tl.minimum(block, n_blocks - 1) * n_words, kind)
    source = scale_by(widen(words, kind), to_unit)
    rotated = fwht(flip(source, s0, s1, s2, s3))
    rms = tl.sqrt_rn(dot(rotated, rotated) * 0.0078125)
    unit = tl.where(rms > 0, rms, 1.0)

    inverse = tl.div_rn(1.0, unit * tl.load(gains))
    if n_gains > 1:
        best, captured = inverse, unit * 0 - 1.0
        for g in range(n_gains):
            inverse = tl.div_rn(1.0, unit * tl.load(gains + g))
            _, _, more = _try_step(rotated, inverse, levels, cells, above, reach, per_cell, origin, bits, steps)
            better = more > captured
            best = tl.where(better, inverse, best)
            captured = tl.where(better, more, captured)
        inverse = best
    found = _try_step(rotated, inverse, levels, cells, above, reach, per_cell, origin, bits, steps)

    half = tl.minimum(found[1] * 0.0078125, 65504.0).to(tl.float16)
    codes, chosen = (), ()
    for i in tl.static_range(32):
        codes += (tl.where(half > 0, found[0][i], 0),)
        chosen += (look_up(levels, codes[i]),)
    out = pack(codes, bits)
    part_of_block = tl.program_id(0).to(tl.int64) * (4 * rows) + tl.arange(0, 4 * rows)
    for w in tl.static_range(bits):
        tl.store(
            packed + part_of_block * bits + w, out[w].to(tl.int32, bitcast=True), mask=part_of_block < 4 * n_blocks
        )

    weights = flip(scale_by(fwht(chosen), half.to(tl.float32) * from_unit), s0, s1, s2, s3)
    decoded = narrow(weights, kind)
    restored = scale_by(widen(decoded, kind), to_unit)
    error = ()
    for i in tl.static_range(32):
        error += (source[i] - restored[i],)

    place = block[:, None] + tl.zeros([rows, 4], tl.int64)
    mask = (block < n_blocks)[:, None] & (tl.arange(0, 4) == 0)[None, :]  # the lanes have the same sums
    tl.store(scales + place, half, mask=mask)
    tl.store(sums + place, dot(source, source), mask=mask)
    tl.store(sums + n_blocks + place, dot(restored, restored), mask=mask)
    tl.store(sums + 2 * n_blocks + place, dot(source, restored), mask=mask)
    tl.store(sums + 3 * n_blocks + place, dot(error, error), mask=mask)
    tl.store(checksums + place, _checksum(decoded, kind).to(tl.int32, bitcast=True), mask=mask)
