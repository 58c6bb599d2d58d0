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
    loads; the same in look_up. What is read must not be written while the kernel runs.
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
def join_block(x: tl.tuple) -> tl.tensor:
    """The (n, 128) tensor of 32 quads."""
    for fold in tl.static_range(5):
        y = ()
        for i in tl.static_range(16 >> fold):
            y += (tl.join(x[i], x[i + (16 >> fold)]),)
        x = y
    return tl.reshape(tl.permute(x[0], [0, 2, 3, 4, 5, 6, 1]), [x[0].shape[0], 128])


@part
def look_up_code(levels: tl.tensor, mine: tl.tensor, code: tl.tensor, bits: tl.constexpr) -> tl.tensor:
    """levels[code] for an (n, 4) tensor of codes of `bits` bits, of whatever further bits they have, and what
    `levels_of_lanes` gave. Up to 32 levels are spread over the lanes of the warp, which is faster than memory."""
    if bits > 5 or INTERPRETED:
        return look_up(levels, code & ((1 << bits) - 1))
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [mine, code], dtype=tl.float32, is_pure=True, pack=1
    )


@part
def levels_of_lanes(levels: tl.tensor, bits: tl.constexpr, rows: tl.constexpr) -> tl.tensor:
    """(rows, 1) levels, one a thread where a thread has a row: over and over where there are fewer than 32."""
    return tl.load(levels + tl.arange(0, rows) % (1 << bits))[:, None]


@part
def look_up(table: tl.tensor, index: tl.tensor) -> tl.tensor:
    """table[index] of 32-bit items."""
    if INTERPRETED:
        return tl.load(table + index)
    return tl.inline_asm_elementwise(
        "ld.global.nc.b32 $0, [$1];", "=r,l", [table + index], dtype=table.dtype.element_ty, is_pure=True, pack=1
    )


# --- the transform ----------------------------------------------------------------------------


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
    return value


@part
def unpack(words: tl.tuple, bits: tl.constexpr) -> tl.tuple:
    """bitpack.unpack of a block: 32 quads of uint32 from 4 * bits words, above each code some bits of the next."""
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
