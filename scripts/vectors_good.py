"""Files that every reader takes (spec/vectors/good).

Codes and scales are drawn from SHAKE-256 and not chosen by the encoder, so that a better encoder changes none of them.
Compressed assets use hand-made frames, so that no version of libzstd does either.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from vector_parts import Parts, empty, zstd_frame

from hlwq_convert.normal_levels import normal_levels
from hlwq_formats import metadata as md
from hlwq_formats import rans
from hlwq_formats.bitpack import pack, unpack
from hlwq_formats.dtypes import ITEM_BITS, WEIGHT_DTYPES
from hlwq_formats.layout import BLOCK, count_blocks, numel

SIZES: tuple[list[int], ...] = ([1], [7], [64], [127], [129], [1, 576], [3, 256], [5, 100, 2])


def drawn(seed: str, length: int) -> bytes:
    """`length` bytes that follow from `seed`."""
    return hashlib.shake_256(seed.encode()).digest(length)


def add_scalar(parts: Parts, name: str, dtype: str, shape: list[int], bits: int, **options: Any) -> None:
    """A scalar tensor with drawn codes; `levels`, `scales` (fp16 bits) and `exponent` are options."""
    n_blocks = count_blocks(numel(shape))
    levels = np.asarray(options.get("levels", normal_levels(bits)), "<f4")
    scales = options.get("scales")
    if scales is None:  # 2**-9 to 2**-5
        scales = 0x1800 + np.frombuffer(drawn(name + " scales", 2 * n_blocks), "<u2") % 0x1000
    codes = drawn(f"{name} {bits} codes", n_blocks * BLOCK * bits // 8)
    stored = np.resize(np.asarray(scales, "<u2"), n_blocks).tobytes()
    parts.scalar(name, dtype, shape, options.get("exponent", 0), codes, levels.tobytes(), stored)


def widths(bits: int) -> Parts:
    """One width at every size, the dtypes in turn."""
    parts = empty(signs=True)
    for i, shape in enumerate(SIZES):
        add_scalar(parts, f"w{i}", WEIGHT_DTYPES[(i + bits) % 3], shape, bits)
    return parts


def add_trellis(
    parts: Parts, name: str, dtype: str, shape: list[int], row: int, states: int, pairs: list[int], **options: Any
) -> None:
    """A trellis tensor whose numbers k are drawn: `spread` bounds them, `far` of them are up to 40,000 larger;
    `scales` (bytes) and `exponent` are options."""
    count = count_blocks(numel(shape)) * BLOCK
    spread, far = options.get("spread", 2), options.get("far", 0)
    drawn_k = (
        np.frombuffer(drawn(f"{name} {states} symbols", count), np.uint8).astype(np.int32) % (2 * spread + 1) - spread
    )
    k = np.zeros(-(-count // rans.SEGMENT) * rans.SEGMENT, np.int32)
    k[:count] = drawn_k
    k[: far * 97 : 97] += np.linspace(-40_000, 40_000, far).astype(np.int32)
    segments, state = k.reshape(-1, rans.SEGMENT), np.zeros(-(-count // rans.SEGMENT), np.uint32)
    indices = np.empty_like(segments)
    for t in range(rans.SEGMENT):
        indices[:, t] = 2 * segments[:, t] + (state & 1).astype(np.int32)
        state = rans.next_state(state, segments[:, t].astype(np.uint32), states)
    flat, tables = indices.ravel()[:count], rans.make_tables(np.array(pairs, np.uint16))
    chunks = [rans.encode(flat[at : at + rans.CHUNK], tables) for at in range(0, count, rans.CHUNK)]
    n_rows = numel(shape) // row
    scales = options.get("scales") or bytes(64 + b % 64 for b in drawn(f"{name} scales", n_rows))
    stored = np.resize(np.frombuffer(scales, np.uint8), n_rows).tobytes()
    exponent = options.get("exponent", -30)
    parts.trellis(name, dtype, shape, row, states, exponent, stored, np.array(pairs, "<u2").tobytes(), chunks)


PAIRS = [5000, 3000, 1800, 1200, 800, 900]


def trellis_sizes(states: int) -> Parts:
    """One trellis at every size, the dtypes in turn, and a little more than one group of 32 segments."""
    parts = empty(signs=True)
    for i, shape in enumerate([*SIZES, [33, 1024], [35, 960]]):
        add_trellis(parts, f"w{i}", WEIGHT_DTYPES[i % 3], shape, shape[-1], states, PAIRS)
    return parts


def trellis_rows() -> Parts:
    """Rows of any length, one row for all, scales of 0, subnormal, largest and compressed; no signs."""
    parts = empty()
    scales = bytes([0, 1, 7, 8, 64, 247])
    for i, row in enumerate((1, 50, 120, 300, 3600)):
        add_trellis(parts, f"w{i}", WEIGHT_DTYPES[i % 3], [12, 300], row, 8, PAIRS, scales=scales)
    add_trellis(parts, "w5", "BF16", [300, 12], 12, 8, PAIRS, scales=b"a")
    parts.compress_scales(zstd_frame(300), b"a" * 300)
    return parts


def trellis_symbols() -> Parts:
    """Escapes, far ones among them, frequencies of one kind alone, and two chunks."""
    parts = empty(signs=True)
    add_trellis(parts, "escapes", "BF16", [4, 512], 512, 32, [9000, 4000], spread=6, far=9)
    add_trellis(parts, "few", "F16", [3, 384], 384, 8, [1, 1])
    add_trellis(parts, "many", "F32", [3, 384], 384, 8, [16] * 500, spread=250)
    add_trellis(parts, "two-chunks", "BF16", [261, 1024], 1024, 8, [16000, 8191], spread=0, far=2000)
    return parts


def trellis_extremes() -> Parts:
    """Both ends of the exponent in every dtype: overflow, underflow and -0."""
    parts = empty(signs=True)
    scales = bytes([0, 1, 7, 8, 120, 247])
    for dtype in WEIGHT_DTYPES:
        for exponent in (-149, -60, -23, 88):
            add_trellis(parts, f"{dtype}.{exponent + 149:03}", dtype, [6, 128], 128, 8, PAIRS, scales=scales,
                        exponent=exponent)  # fmt: skip
    return parts


def coded() -> Parts:
    """Every width with compressed codes, whatever that takes, and one tensor of two frames."""
    parts = empty(signs=True)

    def compress(name: str, dtype: str, shape: list[int], bits: int) -> None:
        count = count_blocks(numel(shape)) * BLOCK
        add_scalar(parts, name, dtype, shape, bits, exponent=-8)
        codes = unpack(parts.blobs[-3], bits, count).copy()
        codes[4096:] = 1
        parts.blobs[-3] = pack(codes, bits)
        starts = range(0, count, md.FRAME)
        sizes = [min(md.FRAME, count - start) for start in starts]
        texts = [codes[start : start + size][:4096].tobytes() for start, size in zip(starts, sizes, strict=True)]
        pairs = zip(sizes, texts, strict=True)
        parts.compress_codes([zstd_frame(size, text, letter=b"\1") for size, text in pairs])

    for bits in range(2, 9):
        compress(f"w{bits}", WEIGHT_DTYPES[bits % 3], [3, 123], bits)
    compress("w9.two-frames", "BF16", [1025, 1024], 3)
    return parts


def no_signs() -> Parts:
    """Every width without signs."""
    parts = empty()
    for bits in range(2, 9):
        add_scalar(parts, f"w{bits}", WEIGHT_DTYPES[bits % 3], [2, 65], bits)
    return parts


def extremes() -> Parts:
    """Both ends of the exponent, each kind of scale, the largest levels: overflow, underflow and -0."""
    parts = empty(signs=True)
    scales = [0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF]
    wide = [-65504.0, -1.0, 0.0, 65504.0]
    for dtype in WEIGHT_DTYPES:
        for exponent in (-126, -16, 0, 112):
            add_scalar(parts, f"{dtype}.{exponent + 126:03}", dtype, [6 * BLOCK], 2, scales=scales, exponent=exponent)
        add_scalar(parts, f"{dtype}.wide", dtype, [6 * BLOCK], 2, scales=scales, levels=wide)
        add_scalar(parts, f"{dtype}.wide.112", dtype, [6 * BLOCK], 2, scales=scales, levels=wide, exponent=112)
    return parts


def rounding() -> Parts:
    """Whole numbers with one bit more than the dtype holds: each odd one is a tie."""
    parts = empty()
    add_scalar(parts, "bf16", "BF16", [1024], 2, levels=[-40, -9, 22, 33], scales=[0x3C00])
    add_scalar(parts, "f16", "F16", [1024], 2, levels=[-400, -91, 222, 333], scales=[0x3C00])
    add_scalar(parts, "f16.subnormal", "F16", [1024], 2, levels=[-4, -1, 2, 3], scales=[0x3C00], exponent=-25)
    add_scalar(parts, "f32", "F32", [1024], 2, levels=[-1 / 3, -1e-3, 0.7, 65504], scales=[0x3555, 0x2E66])
    return parts


def shapes() -> Parts:
    """Aliases, tensors of no dimension and of no element; the last section is empty and ends the data."""
    parts = empty(signs=True)
    add_scalar(parts, "a", "BF16", [9, 16], 4)
    parts.alias("a.tied", "BF16", [9, 16], "a")
    parts.raw("b", "F32", [], struct.pack("<f", -0.0))
    parts.alias("b.tied", "F32", [], "b")
    add_scalar(parts, "c", "F32", [], 3)
    parts.raw("d", "F16", [0], b"")
    parts.alias("d.tied", "F16", [0], "d")
    parts.raw("e", "I64", [1, 1, 1, 1, 1, 1, 1, 1], struct.pack("<q", -1))
    parts.raw("f", "BF16", [3, 0, 2], b"")
    return parts


def raw_dtypes() -> Parts:
    """A raw tensor of each dtype; floats hold whatever bits they hold, NaN included."""
    parts = empty()
    for dtype, bits in sorted(ITEM_BITS.items()):
        data = drawn(dtype, bits)  # 8 elements
        parts.raw(dtype, dtype, [2, 4], bytes(b & 1 for b in data) if dtype == "BOOL" else data)
    return parts


def assets() -> Parts:
    """Plain, empty and compressed assets, one of two frames, report.json after what sorts behind it."""
    parts = empty()
    parts.asset("1_Pooling/config.json", b"{}\n")
    parts.asset("LICENSE", b"")
    size, text = (1 << 20) + 200_000, b"The second block of this frame is one letter many times.\n"
    frames = [zstd_frame(1 << 20, text), zstd_frame(size - (1 << 20))]
    parts.asset("tokenizer.json", text + b"a" * (size - len(text)), frames)
    parts.asset("vocab-\U0001d54a.txt", "\U0001d54a\n".encode())
    parts.asset("report.json", b'{"opaque":"to readers of the format"}\n')
    return parts


def names() -> Parts:
    """Names that need an escape, or that sort otherwise by UTF-16 than by UTF-8."""
    parts = empty()
    plain = ['quote"back\\slash', "a/b<>&", "A", "a", "é", "e\u0301", "\u2028", "ｗ", "\U0001f600", "\x80", "x" * 512]
    for name in sorted(plain, key=str.encode):
        parts.raw(name, "U8", [1], drawn(name, 1))
    return parts


def smallest() -> Parts:
    """The example of the specification: one raw tensor of two elements."""
    parts = empty()
    parts.raw("w", "BF16", [2], struct.pack("<2H", 0x3F80, 0xC000))
    return parts


def good() -> Iterator[tuple[str, bytes]]:
    """All of spec/vectors/good: (name, file)."""
    cases: list[Callable[[], Parts]] = [smallest, no_signs, extremes, rounding, shapes, raw_dtypes, assets, names]
    for case in cases:
        yield case.__name__.replace("_", "-"), case().build()
    for bits in range(2, 9):
        yield f"bits-{bits}", widths(bits).build()
    yield "nothing", empty().build()
    yield "compat-bit", smallest().build(compat=1 << 63 | 1)
    yield "minor-2", smallest().build(minor=2)
    yield "minor-3", smallest().build(minor=3)
    yield "coded", coded().build()
    for states in rans.TRELLISES:
        yield f"trellis-{states}", trellis_sizes(states).build()
    yield "trellis-rows", trellis_rows().build()
    yield "trellis-symbols", trellis_symbols().build()
    yield "trellis-extremes", trellis_extremes().build()
