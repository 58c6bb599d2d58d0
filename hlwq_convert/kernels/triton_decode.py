"""Decode blocks of scalar codes on a GPU, one a thread: unpack, look up, transform, scale, signs, round (spec
section 6.3). The bits are those of quantize.dequantize and dtypes.narrow."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_block import flip, fwht, join_block, levels_of_lanes, load_words, look_up_code, narrow, part, unpack


@part
def restore(
    codes: tl.tuple, scale: tl.tensor, levels: tl.tensor, s0: tl.tensor, s1: tl.tensor, s2: tl.tensor, s3: tl.tensor,
    bits: tl.constexpr, kind: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """The weights of blocks as `kind`, from their codes and float32 scales."""
    mine = levels_of_lanes(levels, bits, scale.shape[0])
    x = ()
    for i in tl.static_range(32):
        x += (look_up_code(levels, mine, codes[i], bits),)
    x = fwht(x)
    y = ()
    for i in tl.static_range(32):
        # (scale * x) * sign and x * (scale * sign) are the same bits: a sign is never rounded
        y += (narrow(x[i] * flip(scale[:, None], s0, s1, s2, s3, i), kind),)
    return y


@triton.jit(do_not_specialize=["n_blocks", "s0", "s1", "s2", "s3"])
def decode_blocks(
    packed: tl.tensor, scales: tl.tensor, levels: tl.tensor, s0: tl.tensor, s1: tl.tensor, s2: tl.tensor,
    s3: tl.tensor, unit: tl.tensor, result: tl.tensor, n_blocks: tl.tensor, bits: tl.constexpr, rows: tl.constexpr,
) -> None:  # fmt: skip
    """Weights of n_blocks whole blocks.

    packed: (n_blocks * 4 * bits,) int32, 16-byte aligned; scales: (n_blocks,) float16; levels: (2**bits,) float32;
    s0..s3: the 128 sign bits as int32; unit: 2.0**exponent; result: (n_blocks * 128,) bfloat16, float16 or float32.
    `rows` blocks are decoded by each program.
    """
    block = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    mask = block < n_blocks
    words = load_words(packed + tl.minimum(block, n_blocks - 1) * (4 * bits), 4 * bits)
    scale = tl.load(scales + block, mask=mask, other=0).to(tl.float32) * unit
    kind: tl.constexpr = result.dtype.element_ty
    weights = restore(unpack(words, bits), scale, levels, s0, s1, s2, s3, bits, kind)
    place = result + block[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(place, join_block(weights), mask=mask[:, None])
