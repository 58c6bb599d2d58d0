"""Decode chunks of a trellis on a GPU, one warp a chunk and one thread a lane: rans.decode, then trellis.dequantize and
dtypes.narrow, with the same bits (spec section 6.7).

After 128 turns each lane has a block of indices. They are put aside, four by four, and blocks are transformed eight at
a time by four lanes each, so that a warp needs few registers and a multiprocessor has room for many.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hlwq_formats.rans import LANES, LOWEST, PRECISION, SEGMENT

from .triton_block import INTERPRETED, join_quad, part
from .triton_lanes import flip, fwht, load_block, multiply, narrow, row_factors, store_block

SCRATCH = LANES * 128
"""Float32 numbers that a program puts aside."""

_LANES, _LOWEST, _PRECISION, _SEGMENT = (tl.constexpr(x) for x in (LANES, LOWEST, PRECISION, SEGMENT))
_MASK = tl.constexpr((1 << PRECISION) - 1)


_RANK = tl.constexpr("""{
    .reg .pred p; .reg .b32 all, below;
    setp.ne.s32 p, $2, 0;
    vote.sync.ballot.b32 all, p, 0xffffffff;
    mov.u32 below, %lanemask_lt;
    and.b32 below, below, all;
    popc.b32 $0, below;
    popc.b32 $1, all;
}""")
"""How many lanes of the warp before this one have 1, and how many in all."""


@part
def _from_lane(x: tl.tensor, lane: tl.tensor) -> tl.tensor:
    """What lane `lane` % 32 of the warp has in a (32,) int32."""
    if INTERPRETED:
        return tl.gather(x, lane & 31, 0)
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [x, lane], dtype=tl.int32, is_pure=False, pack=1
    )


@part
def _load_line(pairs: tl.tensor, line: tl.tensor, end: tl.tensor) -> tl.tensor:
    """The 64 words of a line of the stream, two a lane; zeros behind the end."""
    place = line * 32 + tl.arange(0, _LANES)
    return tl.load(pairs + place, mask=2 * place < end, other=0)


@part
def _four_turns(
    words: tl.tensor, end: tl.tensor, here: tl.tensor, after: tl.tensor, line: tl.tensor, position: tl.tensor,
    state: tl.tensor, at: tl.tensor, active: tl.tensor, symbols: tl.tensor, spans: tl.tensor, width: tl.tensor,
    escape0: tl.tensor, escape1: tl.tensor, h0: tl.tensor, h1: tl.tensor,
) -> tl.tuple:  # fmt: skip
    """Four indices of each lane as float32 (32, 4), and what follows them: the position in the stream, the states of
    the coder and of the trellis. `here` and `after` are line number `line` of the stream and the next one: what lies
    behind them, more than an encoder writes for so few turns, is fetched from memory.

    No part of its own for the smaller steps: the interpreter takes long to enter one.
    """
    x = ()
    for _ in tl.static_range(4):
        parity = at & 1
        slot = state & _MASK
        symbol = tl.load(symbols + ((parity << _PRECISION) | slot)).to(tl.int32)
        span = tl.load(spans + (parity * width + symbol)).to(tl.uint32, bitcast=True)
        coded = (span & 0xFFFF) * (state >> _PRECISION) + slot.to(tl.uint32) - (span >> 16)
        escaped = (active & (symbol == tl.where(parity == 0, escape0, escape1))).to(tl.int32)
        is_empty = active & (coded < _LOWEST)
        empty = is_empty.to(tl.int32)
        if INTERPRETED:
            escapes_before, all_escapes = tl.cumsum(escaped, 0) - escaped, tl.sum(escaped, 0)
            empty_before, all_empty = tl.cumsum(empty, 0) - empty, tl.sum(empty, 0)
        else:
            escapes_before, all_escapes = tl.inline_asm_elementwise(
                _RANK, "=r,=r,r", [escaped], dtype=(tl.int32, tl.int32), is_pure=False, pack=1
            )
            empty_before, all_empty = tl.inline_asm_elementwise(
                _RANK, "=r,=r,r", [empty], dtype=(tl.int32, tl.int32), is_pure=False, pack=1
            )
        # an escaped symbol lies before the word that fills its lane's state up again
        place = position + escapes_before + empty_before
        more = tl.load(words + place, mask=(escaped == 1) & (place < end), other=0).to(tl.uint16, bitcast=True)
        place += escaped
        at_hand = place - line * 64
        pair = tl.where((at_hand & 64) == 0, _from_lane(here, at_hand >> 1), _from_lane(after, at_hand >> 1))
        word = (pair >> (16 * (place & 1))).to(tl.int16)
        word = tl.load(words + place, mask=is_empty & (at_hand >= 128) & (place < end), other=word)
        word = word.to(tl.uint16, bitcast=True)
        position += all_escapes + all_empty
        state = tl.where(active, tl.where(is_empty, (coded << 16) | word.to(tl.uint32), coded), state)
        symbol += more.to(tl.int32)
        k = (symbol >> 1) ^ -(symbol & 1)
        x += ((2 * k + parity).to(tl.float32),)
        at = (at >> 1) ^ (parity * h0) ^ ((k & 1) * h1)
    return join_quad(x[0], x[1], x[2], x[3]), position, state, at


@triton.jit(do_not_specialize=["first_chunk", "n_blocks", "h0", "h1", "width", "escape0", "escape1", "n_rows"])
def decode_chunks(
    words: tl.tensor, places: tl.tensor, first_chunk: tl.tensor, symbols: tl.tensor, spans: tl.tensor,
    width: tl.tensor, escape0: tl.tensor, escape1: tl.tensor, h0: tl.tensor, h1: tl.tensor, factors: tl.tensor,
    n_rows: tl.tensor, row: tl.tensor, signs: tl.tensor, scratch: tl.tensor, result: tl.tensor, last: tl.tensor,
    n_blocks: tl.tensor, n_whole: tl.tensor, good: tl.tensor, kind: tl.constexpr, even_rows: tl.constexpr,
) -> None:  # fmt: skip
    """Decode a chunk each: program c that from word places[c] on, the tensor's number first_chunk + c.

    words: (places[-1],) int16, aligned and padded to four bytes; places: (programs + 1,) int64; symbols: (2 << 14,)
    uint8 or int16, the symbol of every slot, even before odd; spans: (2 * width,) int32, of kernels.rans.KernelTables;
    escape0, escape1: the escapes of both; h0, h1: of rans.taps; factors: (n_rows,) float32, unit times scale of each
    row of `row` weights, `even_rows` if `row` is a multiple of 128; signs: 128 zeros of type `kind`, positive or
    negative, as int32; scratch: (programs, SCRATCH) float32; result: the weights of the tensor as `kind`, by int32
    pointer, `n_whole` whole blocks of them from the first of these chunks on; last: the block after those; good:
    (programs,) int32, 1 for a chunk that is what an encoder writes. `n_blocks` is counted from the first chunk too.
    """
    chunk = tl.program_id(0)
    lane = tl.arange(0, _LANES)
    # a stream begins at any word, and lines of it at even ones
    start = tl.load(places + chunk)
    odd = (start & 1).to(tl.int32)
    end = (tl.load(places + chunk + 1) - start).to(tl.int32) + odd
    words += start - odd
    pairs = words.to(tl.pointer_type(tl.int32), bitcast=True)
    scratch += chunk * (_LANES * 128)
    first_block = chunk * 2048
    blocks = tl.minimum(n_blocks - first_block, 2048)
    segments = (blocks + 7) // 8
    used = lane < segments
    place = odd + 2 * lane
    inside = used & (place + 1 < end)
    high = tl.load(words + place, mask=inside, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    low = tl.load(words + place + 1, mask=inside, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    state = tl.where(used, (high << 16) | low, _LOWEST).to(tl.uint32)
    fine = state >= _LOWEST
    position = odd + 2 * tl.minimum(segments, _LANES) + 0 * lane
    line = 0
    here, after, later = _load_line(pairs, 0, end), _load_line(pairs, 1, end), _load_line(pairs, 2, end)
    quad, pair = lane[:, None] * 4 + tl.arange(0, 4)[None, :], tl.arange(0, 4)
    n_words: tl.constexpr = 128 if kind == tl.float32 else 64
    group = 0
    while group < segments:
        at = 0 * lane
        j = 0
        while j < tl.minimum(8, blocks - 8 * group):
            block = 8 * (group + lane) + j
            active = block < blocks
            for q in range(32):
                while tl.max(position, 0) >= 64 * line + 64:  # `later` has had time to arrive
                    line += 1
                    here, after, later = after, later, _load_line(pairs, line + 2, end)
                x, position, state, at = _four_turns(
                    words, end, here, after, line, position, state, at, active, symbols, spans, width, escape0, escape1,
                    h0, h1,
                )  # fmt: skip
                tl.store(scratch + q * 128 + quad, x, cache_modifier=".cg")
            tl.debug_barrier()
            for quarter in range(4):  # eight blocks at a time, four lanes each
                mine = quarter * 8 + tl.arange(0, 8)
                aside = scratch + 4 * mine[:, None, None] + (pair // 2 * 128 + pair % 2 * 2)[None, :, None]
                x = ()
                for i in tl.static_range(16):
                    x += tl.split(tl.load(aside + 256 * i + tl.arange(0, 2)[None, None, :], cache_modifier=".cg"))
                number = first_block + 8 * (group + mine) + j
                first = (first_chunk.to(tl.int64) * 2048 + number) * 128
                x = multiply(fwht(x), row_factors(factors, n_rows, row, first, even_rows))
                flips = load_block(signs + 0 * number, kind)
                to = tl.where(number < n_whole, result + number.to(tl.int64) * n_words, last)
                store_block(to, flip(narrow(x, kind), flips), kind, (number < first_block + blocks)[:, None])
            tl.debug_barrier()
            j += 1
        group += _LANES
    fine = fine & (state == _LOWEST) & (position == end)
    tl.store(good + chunk, tl.min(fine.to(tl.int32), 0))
