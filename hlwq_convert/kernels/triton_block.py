"""One block of 128 coordinates as a tuple of 32 quads: a GPU thread holds a whole block in its registers.

A quad is an (n, 4) tensor: four neighbouring coordinates of each of n blocks, one block a thread. Each function is
one of rotate, scalar or hlwq_formats for n blocks, with the same roundings. No coordinate ever moves between
threads, so the order of every addition is the order written here. Kernels that call these must be launched with
enable_fp_fusion=False: a fused multiply-add rounds once less.
"""

from __future__ import annotations

import triton
import triton.language as tl

part = triton.jit
"""A function that becomes part of the kernels that call it."""

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether Triton's interpreter runs the kernels, on the CPU: it knows no PTX and truncates to bfloat16."""

KINDS = {"BF16": tl.bfloat16, "F16": tl.float16, "F32": tl.float32}

ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding it to a smaller float32 rounds that to an integer, which stands in the low bits."""


# --- quads -------------------------------------------------------------------------------------


@part
def join_quad(x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor) -> tl.tensor:
    """The quad of four (n,) columns."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [x0.shape[0], 4])


@part
def split_quad(x: tl.tensor) -> tl.tuple:
    """The four (n,) columns of a quad."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@part
def load_words(start: tl.tensor, count: tl.constexpr) -> tl.tuple:
    """`count` 32-bit items, a multiple of 4, from each of (n,) pointers aligned to 16 bytes: a tuple of (n,) uint32.

    All but the first four as PTX, because one of Triton's passes takes time in the square of the number of its own
    loads and stores; the same in store_four and look_up. What is read must not be written while the kernel runs.
    """
    # this load tells Triton that a thread holds all of a quad
    words = split_quad(tl.load(start[:, None] + tl.arange(0, 4)[None, :]).to(tl.uint32, bitcast=True))
    for i in tl.static_range(4, count, 4):
        words += _load_four(start + i)
    return words


@part
def _load_four(start: tl.tensor) -> tl.tuple:
    if INTERPRETED:
        return split_quad(tl.load(start[:, None] + tl.arange(0, 4)[None, :]).to(tl.uint32, bitcast=True))
    return tl.inline_asm_elementwise(
        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [start],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=False, pack=1,
    )  # fmt: skip


@part
def store_four(start: tl.tensor, x: tl.tuple, mask: tl.tensor) -> None:
    """Write four (n,) uint32 one after the other from each of (n,) pointers aligned to 16 bytes."""
    if INTERPRETED:
        quad = join_quad(x[0], x[1], x[2], x[3]).to(start.dtype.element_ty, bitcast=True)
        tl.store(start[:, None] + tl.arange(0, 4)[None, :], quad, mask=mask[:, None])
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.u32 p, $6, 0; @p st.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0; }",
            "=r,l,r,r,r,r,r", [start, x[0], x[1], x[2], x[3], mask.to(tl.uint32)],
            dtype=tl.uint32, is_pure=False, pack=1,
        )  # fmt: skip


@part
def join_block(x: tl.tuple) -> tl.tensor:
    """The (n, 128) tensor of 32 quads."""
    for fold in tl.static_range(5):
        y = ()
        for i in tl.static_range(16 >> fold):
            y += (tl.join(x[i], x[i + (16 >> fold)]),)
        x = y
    return tl.reshape(tl.permute(x[0], [0, 2, 3, 4, 5, 6, 1]), [x[0].shape[0], 128])


@part
def look_up(table: tl.tensor, index: tl.tensor) -> tl.tensor:
    """table[index] of 32-bit items."""
    if INTERPRETED:
        return tl.load(table + index)
    return tl.inline_asm_elementwise(
        "ld.global.nc.b32 $0, [$1];", "=r,l", [table + index], dtype=table.dtype.element_ty, is_pure=True, pack=1
    )


# --- the transform and sums --------------------------------------------------------------------


@part
def _fwht_quad(x: tl.tensor) -> tl.tensor:
    x0, x1, x2, x3 = split_quad(x)
    a, b, c, d = x0 + x1, x0 - x1, x2 + x3, x2 - x3
    return join_quad(a + c, b + d, a - c, b - d)


@part
def fwht(x: tl.tuple) -> tl.tuple:
    """rotate.fwht of a block: pairs at distance 1, 2, 4, ..., 64 become (a + b, a - b)."""
    y = ()
    for i in tl.static_range(32):
        y += (_fwht_quad(x[i]),)
    for p in tl.static_range(5):
        x = y
        y = ()
        for i in tl.static_range(32):
            if i & (1 << p) == 0:
                y += (x[i] + x[i + (1 << p)],)
            else:
                y += (x[i - (1 << p)] - x[i],)
    return y


@part
def sum_quad(x: tl.tensor) -> tl.tensor:
    """(n,) sums of a quad, the end of block_sum: the upper half added to the lower half, twice."""
    x0, x1, x2, x3 = split_quad(x)
    return (x0 + x2) + (x1 + x3)


@triton.constexpr_function
def fold_order(k: int) -> int:
    """The k-th quad to be added: in bit-reversed order, few sums wait for their other half."""
    return (k & 1) << 4 | (k & 2) << 2 | (k & 4) | (k & 8) >> 2 | k >> 4


@part
def fold_in(waiting: tl.tuple, leaf: tl.tuple, k: tl.constexpr) -> tl.tuple:
    """rotate.block_sums for several sums at once: take in the quads `leaf`, one of each sum, of quad fold_order(k).

    After all 32 one tuple is left, of quads for sum_quad: the upper half added to the lower half, five times.
    """
    waiting += (leaf,)
    for bit in tl.static_range(5):
        if (k + 1) % (2 << bit) == 0:
            waiting = _add_last_two(waiting, len(leaf))
    return waiting


@part
def _add_last_two(waiting: tl.tuple, n_sums: tl.constexpr) -> tl.tuple:
    # n_sums is an argument because Triton 3.6 names a compiled function by its arguments with tuples flattened: two
    # tuples of two and four tuples of one would share one
    n: tl.constexpr = len(waiting)
    total = ()
    for i in tl.static_range(n_sums):
        total += (waiting[n - 2][i] + waiting[n - 1][i],)
    return waiting[: n - 2] + (total,)


@part
def flip(x: tl.tensor, s0: tl.tensor, s1: tl.tensor, s2: tl.tensor, s3: tl.tensor, i: tl.constexpr) -> tl.tensor:
    """The float32 `x`, (n, 4) or (n, 1), times the signs of quad i, given as 128 bits in four words: exact, as it
    touches the sign bit alone."""
    word = s0 if i < 8 else (s1 if i < 16 else (s2 if i < 24 else s3))
    sign = (word << (31 - 4 * (i % 8) - tl.arange(0, 4)))[None, :] & -0x80000000
    return (x.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


# --- codes and number formats ------------------------------------------------------------------


@part
def _unpack_code(words: tl.tuple, i: tl.constexpr, bits: tl.constexpr) -> tl.tensor:
    word: tl.constexpr = i * bits // 32
    shift: tl.constexpr = i * bits % 32
    value = words[word] >> shift
    if shift + bits > 32:
        value |= words[word + 1] << (32 - shift)
    return value & ((1 << bits) - 1)


@part
def unpack(words: tl.tuple, bits: tl.constexpr) -> tl.tuple:
    """bitpack.unpack of a block: 32 quads of uint32 from 4 * bits words."""
    codes = ()
    for i in tl.static_range(0, 128, 4):
        codes += (
            join_quad(
                _unpack_code(words, i, bits), _unpack_code(words, i + 1, bits),
                _unpack_code(words, i + 2, bits), _unpack_code(words, i + 3, bits),
            ),
        )  # fmt: skip
    return codes


@part
def _pack_word(codes: tl.tuple, w: tl.constexpr, bits: tl.constexpr) -> tl.tensor:
    first: tl.constexpr = 32 * w // bits
    word = codes[first] >> (32 * w - first * bits)
    for i in tl.static_range(first + 1, (32 * w + 31) // bits + 1):
        word |= codes[i] << (i * bits - 32 * w)
    return word


@part
def pack(codes: tl.tuple, bits: tl.constexpr) -> tl.tuple:
    """bitpack.pack of a block: the opposite of unpack."""
    columns = ()
    for i in tl.static_range(32):
        columns += split_quad(codes[i])
    words = ()
    for w in tl.static_range(4 * bits):
        words += (_pack_word(columns, w, bits),)
    return words


@part
def widen(words: tl.tuple, i: tl.constexpr, kind: tl.constexpr) -> tl.tensor:
    """dtypes.widen: quad i of the weights of type `kind` in a block of 32-bit words, as float32."""
    if kind == tl.float32:
        quad = join_quad(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3])
        return quad.to(tl.float32, bitcast=True)
    a, b = words[2 * i], words[2 * i + 1]
    if kind == tl.bfloat16:
        quad = join_quad(a << 16, a & 0xFFFF0000, b << 16, b & 0xFFFF0000)
        return quad.to(tl.float32, bitcast=True)
    quad = join_quad(a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16)
    return quad.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@part
def narrow(x: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """dtypes.narrow: float32 to `kind`, ties to even, subnormal numbers kept."""
    if kind != tl.bfloat16:
        y = x.to(kind)
    elif INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        y = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # two at once, which Triton takes apart again where single ones are looked at
        y = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return y
