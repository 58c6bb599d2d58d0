"""One block of 128 coordinates in four neighbouring threads: a tuple of 32 (n, 4) tensors, for n blocks.

Lane l of a block holds the coordinates 8 j + 2 l + e for j < 16 and e < 2; tensor 2 j + e of the tuple has them. So a
32-bit word of two 16-bit weights lies in one thread, and only the passes of the transform at the distances 2 and 4
move values between threads. A kernel that holds a whole block in a thread, as triton_block does, would here be too
long for the instruction cache. Each function has the roundings of rotate or hlwq_formats; kernels that call these
must be launched with enable_fp_fusion=False.
"""

from __future__ import annotations

import triton.language as tl

from .triton_block import INTERPRETED, part


@part
def from_lane(x: tl.tensor, mask: tl.constexpr) -> tl.tensor:
    """What the lane whose number differs in the bits of `mask` holds."""
    return tl.gather(x, tl.broadcast_to((tl.arange(0, 4) ^ mask)[None, :], x.shape), 1)


@part
def _lane_pass(x: tl.tuple, mask: tl.constexpr) -> tl.tuple:
    # the lower lane needs a + b, the upper one a - b: its own value times -1, which is exact, plus the other's
    sign = tl.where(tl.arange(0, 4) & mask == 0, 1.0, -1.0)[None, :]
    y = ()
    for i in tl.static_range(32):
        y += (tl.fma(x[i], sign, from_lane(x[i], mask)),)
    return y


@part
def _tuple_pass(x: tl.tuple, distance: tl.constexpr) -> tl.tuple:
    y = ()
    for i in tl.static_range(32):
        if i & distance == 0:
            y += (x[i] + x[i + distance],)
        else:
            y += (x[i - distance] - x[i],)
    return y


@part
def fwht(x: tl.tuple) -> tl.tuple:
    """rotate.fwht: pairs at distance 1, 2, 4, ..., 64 become (a + b, a - b)."""
    x = _tuple_pass(x, 1)
    x = _lane_pass(x, 1)
    x = _lane_pass(x, 2)
    x = _tuple_pass(x, 2)
    x = _tuple_pass(x, 4)
    x = _tuple_pass(x, 8)
    return _tuple_pass(x, 16)


@part
def fold(x: tl.tuple) -> tl.tuple:
    """The first four steps of rotate.block_sums, the upper half added to the lower half: two numbers a lane."""
    for fold in tl.static_range(4):
        y = ()
        for i in tl.static_range(16 >> fold):
            y += (x[i] + x[i + (16 >> fold)],)
        x = y
    return x


@part
def over_lanes(x: tl.tensor) -> tl.tensor:
    """The sum of the lanes, in all of them: the upper half added to the lower half, twice."""
    x += from_lane(x, 2)
    return x + from_lane(x, 1)


@part
def dot(a: tl.tuple, b: tl.tuple) -> tl.tensor:
    """rotate.block_sums of the products, in all four lanes."""
    x = fold(multiply(a, b))
    return over_lanes(x[0]) + over_lanes(x[1])


@part
def four_sums(x: tl.tuple) -> tl.tensor:
    """rotate.block_sums of four blocks at once, from two numbers of each that `fold` gave: that of block l in lane l.

    The same additions as `dot` makes, but a lane gives away what it does not need: half the exchanges.
    """
    lane = tl.arange(0, 4)[None, :]
    y = ()
    for i in tl.static_range(4):
        kept, sent = tl.where(lane < 2, x[i], x[i + 4]), tl.where(lane < 2, x[i + 4], x[i])
        y += (kept + from_lane(sent, 2),)
    z = ()
    for i in tl.static_range(2):
        kept, sent = tl.where(lane % 2 == 0, y[i], y[i + 2]), tl.where(lane % 2 == 0, y[i + 2], y[i])
        z += (kept + from_lane(sent, 1),)
    return z[0] + z[1]


@part
def scale_by(x: tl.tuple, factor: tl.tensor) -> tl.tuple:
    """Every coordinate times a number."""
    y = ()
    for i in tl.static_range(32):
        y += (x[i] * factor,)
    return y


@part
def row_factors(
    factors: tl.tensor, n_rows: tl.tensor, row: tl.tensor, first: tl.tensor, even_rows: tl.constexpr
) -> tl.tuple:
    """32 factors, one for each row of `row` weights, of the weights of blocks that begin at the flat indices `first`,
    (n,) int64: all the same where rows are whole blocks."""
    place = first // row
    every = tl.load(factors + tl.minimum(place, n_rows - 1))[:, None]
    left = tl.minimum(row - (first - place * row), 1 << 20).to(tl.int32)[:, None]  # weights until the next row begins
    y = ()
    for i in tl.static_range(32):
        if even_rows:
            y += (every,)
        else:
            beyond = (8 * (i // 2) + i % 2 + 2 * tl.arange(0, 4))[None, :] - left
            rows = tl.where(beyond < 0, 0, 1 + beyond // tl.minimum(row, 1 << 20).to(tl.int32))
            y += (tl.load(factors + tl.minimum(place[:, None] + rows, n_rows - 1)),)
    return y


@part
def multiply(a: tl.tuple, b: tl.tuple) -> tl.tuple:
    """Coordinate by coordinate."""
    y = ()
    for i in tl.static_range(32):
        y += (a[i] * b[i],)
    return y


@part
def flip(words: tl.tuple, signs: tl.tuple) -> tl.tuple:
    """Weights times signs, both as load_block has them: the signs are the bits of zeros, positive or negative."""
    y = ()
    for i in tl.static_range(len(words)):
        y += (words[i] ^ signs[i],)
    return y


@part
def load_block(start: tl.tensor, kind: tl.constexpr) -> tl.tuple:
    """The weights of type `kind` from (n,) pointers to int32, as they are stored: 16 tensors of two weights each, or
    32 of one float32."""
    lane = tl.arange(0, 4)[None, :]
    words = ()
    for j in tl.static_range(16):
        if kind == tl.float32:
            words += (tl.load(start[:, None] + 2 * lane + 8 * j).to(tl.uint32, bitcast=True),)
            words += (tl.load(start[:, None] + 2 * lane + (8 * j + 1)).to(tl.uint32, bitcast=True),)
        else:
            words += (tl.load(start[:, None] + lane + 4 * j).to(tl.uint32, bitcast=True),)
    return words


@part
def store_block(start: tl.tensor, words: tl.tuple, kind: tl.constexpr, mask: tl.tensor) -> None:
    """Write the words of load_block to (n,) pointers to int32, where `mask`, (n, 1)."""
    lane = tl.arange(0, 4)[None, :]
    for j in tl.static_range(16):
        if kind == tl.float32:
            tl.store(start[:, None] + 2 * lane + 8 * j, words[2 * j].to(tl.int32, bitcast=True), mask=mask)
            tl.store(start[:, None] + 2 * lane + (8 * j + 1), words[2 * j + 1].to(tl.int32, bitcast=True), mask=mask)
        else:
            tl.store(start[:, None] + lane + 4 * j, words[j].to(tl.int32, bitcast=True), mask=mask)


@part
def load_blocks(items: tl.tensor, block: tl.tensor, kind: tl.constexpr) -> tl.tuple:
    """What load_block gives for the blocks `block`, (n,), of int32 `items`, in fewer and wider loads: Triton
    deals the words out through shared memory."""
    each: tl.constexpr = 2 if kind == tl.float32 else 1
    n_words: tl.constexpr = 64 * each
    rows: tl.constexpr = block.shape[0]
    x = tl.load(items + block[:, None].to(tl.int64) * n_words + tl.arange(0, n_words)[None, :]).to(
        tl.uint32, bitcast=True
    )
    x = (tl.permute(tl.reshape(x, [rows, 16, 4, each]), [0, 2, 1, 3]),)
    for fold in tl.static_range(4 if each == 1 else 5):
        even, odd = (), ()
        for i in tl.static_range(1 << fold):
            a, b = tl.split(tl.reshape(x[i], [rows, 4, (8 * each) >> fold, 2]))
            even += (a,)
            odd += (b,)
        x = even + odd
    words = ()
    for i in tl.static_range(16 * each):
        words += (tl.reshape(x[i], [rows, 4]),)
    return words


@part
def widen(words: tl.tuple, kind: tl.constexpr) -> tl.tuple:
    """dtypes.widen: the weights in the words of load_block as 32 float32."""
    x = ()
    for i in tl.static_range(32):
        if kind == tl.float32:
            x += (words[i].to(tl.float32, bitcast=True),)
        elif kind == tl.float16:
            x += ((words[i // 2] >> (16 * (i % 2))).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32),)
        elif i % 2 == 0:
            x += ((words[i // 2] << 16).to(tl.float32, bitcast=True),)
        else:
            x += ((words[i // 2] & 0xFFFF0000).to(tl.float32, bitcast=True),)
    return x


@part
def narrow(x: tl.tuple, kind: tl.constexpr) -> tl.tuple:
    """dtypes.narrow: the words of load_block from 32 float32, ties to even, subnormal numbers kept."""
    words = ()
    for i in tl.static_range(0, 32, 2):
        if kind == tl.float32:
            words += (x[i].to(tl.uint32, bitcast=True), x[i + 1].to(tl.uint32, bitcast=True))
        elif INTERPRETED:
            words += (_narrow_one(x[i], kind) | (_narrow_one(x[i + 1], kind) << 16),)
        else:
            words += (_narrow_two(x[i], x[i + 1], kind),)
    return words


@part
def _narrow_two(a: tl.tensor, b: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    # PTX, because from a pair that is looked at in parts LLVM makes two conversions, which are slow
    name: tl.constexpr = "bf16x2" if kind == tl.bfloat16 else "f16x2"
    asm: tl.constexpr = "cvt.rn." + name + ".f32 $0, $2, $1;"
    return tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1)


@part
def _narrow_one(x: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    if kind == tl.float16:
        bits = x.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return bits


@part
def pack(codes: tl.tuple, bits: tl.constexpr) -> tl.tuple:
    """bitpack.pack: `bits` words (4 n,) of 32 codes each, from 32 int32 tensors (n, 4)."""
    x = ()
    for j in tl.static_range(16):
        # a sum is one instruction, where "or" is two
        x += ((codes[2 * j] + (codes[2 * j + 1] << bits)).to(tl.uint16),)
    for fold in tl.static_range(4):
        y = ()
        for i in tl.static_range(8 >> fold):
            y += (tl.join(x[i], x[i + (8 >> fold)]),)
        x = y
    # (n, lane, j) -> (n, j, lane): then a thread holds the pairs of 32 neighbouring codes
    x = (tl.reshape(tl.permute(x[0], [0, 2, 3, 4, 5, 1]), [x[0].shape[0] * 4, 16]),)
    for fold in tl.static_range(4):
        even, odd = (), ()
        for i in tl.static_range(1 << fold):
            a, b = tl.split(tl.reshape(x[i], [x[i].shape[0], 8 >> fold, 2]))
            even += (a,)
            odd += (b,)
        x = even + odd
    words = ()
    for w in tl.static_range(bits):
        words += (_pack_word(x, w, 2 * bits),)
    return words


@part
def _pack_word(pairs: tl.tuple, w: tl.constexpr, bits: tl.constexpr) -> tl.tensor:
    first: tl.constexpr = 32 * w // bits
    word = pairs[first].to(tl.uint32) >> (32 * w - first * bits)
    for i in tl.static_range(first + 1, (32 * w + 31) // bits + 1):
        word |= pairs[i].to(tl.uint32) << (i * bits - 32 * w)
    return tl.reshape(word, [word.shape[0]])
