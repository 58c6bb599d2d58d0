"""trellis.search on a GPU with the same bits: the states of a segment lie in the lanes of a warp, the trellis in place.

Two states go to the same two states of the next turn. So a place keeps what is found there, and instead the states
move over the places: place x is in turn t the state M^t x, with M s = s >> 1 ^ (s & 1) h0, a linear map over bits. The
other state that leads where this one leads is always 2 h1 away, so at place x ^ M^-t 2 h1 (runtime.launch_trellis makes
the tables), and one exchange between lanes is all that moves in a turn.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_block import INTERPRETED, join_quad, part, split_quad
from .triton_lanes import flip, fwht, load_block, multiply, row_factors, scale_by, widen

LARGEST = tl.constexpr(65000.0)  # trellis.LARGEST
LANES = 32

_LANES = tl.constexpr(LANES)
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2**23: added to a float32 and subtracted again, it rounds to a whole number, ties to even."""


@triton.jit(do_not_specialize=["first", "n_rows", "n_blocks", "n_padded"])
def find_steps(
    items: tl.tensor, to_unit: tl.tensor, signs: tl.tensor, factors: tl.tensor, n_rows: tl.tensor, row: tl.tensor,
    first: tl.tensor, per_step: tl.tensor, steps: tl.tensor, n_blocks: tl.tensor, n_padded: tl.tensor,
    kind: tl.constexpr, even_rows: tl.constexpr, rows: tl.constexpr,
) -> None:  # fmt: skip
    """trellis.to_steps of n_blocks whole blocks, and zeros for the blocks up to n_padded: `rows` of them a program.

    items: n_blocks * 128 weights of type `kind`, as int32, from flat index `first` on; to_unit: 2.0**-exponent; signs:
    128 zeros of type `kind`, positive or negative, as int32; factors: (n_rows,) float32 of trellis.inverse_scales, for
    rows of `row` weights, `even_rows` if that is a multiple of 128; steps: (n_padded * 128,) float32.
    """
    block = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    lane = tl.arange(0, 4)[None, :]
    n_words: tl.constexpr = 128 if kind == tl.float32 else 64
    words = load_block(items + tl.minimum(block, n_blocks - 1) * n_words, kind)
    words = flip(words, load_block(signs + tl.zeros([rows], tl.int32), kind))
    x = scale_by(widen(words, kind), to_unit)
    x = multiply(x, row_factors(factors, n_rows, row, first + block * 128, even_rows))
    x = scale_by(fwht(x), per_step)
    for i in tl.static_range(32):
        step = tl.where(x[i] > LARGEST, LARGEST, x[i])
        step = tl.where(step < -LARGEST, -LARGEST, step)
        step = tl.where((block < n_blocks)[:, None], step, 0.0)
        at = block[:, None] * 128 + (8 * (i // 2) + i % 2 + 2 * lane)
        tl.store(steps + at, step, mask=(block < n_padded)[:, None])


@part
def _distance(x: tl.tensor, subset: tl.tensor) -> tl.tensor:
    """Squared distance, in units of 4 steps, to the nearest m of a subset modulo 4."""
    quarter = (x - subset) * 0.25
    error = quarter - ((quarter + _ROUND) - _ROUND)
    return error * error


@part
def _parity(x: tl.tensor) -> tl.tensor:
    """Whether a number below 256 has an odd number of bits, as 0 or 1."""
    x ^= x >> 4
    x ^= x >> 2
    return (x ^ (x >> 1)) & 1


@part
def _exchange(x: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """What the lane whose number differs in the bits of `mask` holds, for (rows, lanes) in one warp."""
    if INTERPRETED:
        lanes: tl.constexpr = x.shape[1]
        index = tl.broadcast_to((tl.arange(0, lanes) ^ mask)[None, :], x.shape)
        return tl.gather(x, index, 1)
    return tl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [x, mask + tl.zeros(x.shape, tl.int32)],
        dtype=tl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@part
def _ballot(x: tl.tensor, lane: tl.tensor) -> tl.tensor:
    """The 32 booleans of a (rows, lanes) tensor as the bits of one int32, in all lanes."""
    if INTERPRETED:
        return tl.sum(tl.sum(x.to(tl.int32) << lane, 1), 0) + 0 * lane
    asm: tl.constexpr = "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }"
    return tl.inline_asm_elementwise(asm, "=r,r", [x.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["n_segments"])
def walk_forward(
    steps: tl.tensor, masks: tl.tensor, parities: tl.tensor, labels: tl.tensor, decisions: tl.tensor,
    ends: tl.tensor, n_segments: tl.tensor, states: tl.constexpr, length: tl.constexpr,
) -> None:  # fmt: skip
    """Search the segments of a warp: 32 // states of them, or one, whose states then take several registers.

    steps: (n_segments, length) float32; masks, parities: (length,) int32, M^-t 2 h1 and what of a place the lowest bit
    of its state is the parity of; labels: (states,) int32, the state of each place after the last turn; decisions:
    (programs, max(1, states // 32), length) int32, bit l for lane l; ends: (n_segments,) int32, the cheapest last
    state. Of equal costs that of the first way wins, and of the lower state.
    """
    lanes: tl.constexpr = min(states, _LANES)
    rows: tl.constexpr = _LANES // lanes
    registers: tl.constexpr = states // lanes
    segment = tl.program_id(0) * rows + tl.arange(0, rows)[:, None]
    row = steps + tl.minimum(segment, n_segments - 1).to(tl.int64) * length
    place = tl.arange(0, lanes)[None, :] + 0 * segment
    lane = tl.arange(0, rows)[:, None] * lanes + tl.arange(0, lanes)[None, :]
    words = decisions + tl.program_id(0).to(tl.int64) * (registers * length) + lane
    costs = ()
    for r in tl.static_range(registers):
        costs += (tl.where(place + r * lanes == 0, 0.0, 1e30),)
    for first in range(0, length, _LANES):
        kept = ()
        for _ in tl.static_range(registers):
            kept += (0 * lane,)
        for j in range(_LANES):
            x = tl.load(row + (first + j))
            mask, parity_mask = tl.load(masks + (first + j)), tl.load(parities + (first + j))
            parity = _parity(place & parity_mask)
            odd = parity.to(tl.float32)
            near, far = _distance(x, odd), _distance(x, odd + 2.0)
            if registers > 1:
                other_near, other_far = _distance(x, 1.0 - odd), _distance(x, 3.0 - odd)
            new, words_kept = (), ()
            for r in tl.static_range(registers):
                here, there = near, far
                if registers > 1:
                    changed = _parity((r * lanes) & parity_mask) == 1
                    here, there = tl.where(changed, other_near, near), tl.where(changed, other_far, far)
                partner = costs[r]
                if registers == 2:
                    partner = tl.where((mask & 32) != 0, costs[r ^ 1], costs[r])
                elif registers == 8:
                    a = tl.where((mask & 32) != 0, costs[r ^ 1], costs[r])
                    b = tl.where((mask & 32) != 0, costs[r ^ 3], costs[r ^ 2])
                    c = tl.where((mask & 32) != 0, costs[r ^ 5], costs[r ^ 4])
                    d = tl.where((mask & 32) != 0, costs[r ^ 7], costs[r ^ 6])
                    a, c = tl.where((mask & 64) != 0, b, a), tl.where((mask & 64) != 0, d, c)
                    partner = tl.where((mask & 128) != 0, c, a)
                first_way, second_way = costs[r] + here, _exchange(partner, mask & (lanes - 1)) + there
                second = second_way < first_way
                new += (tl.where(second, second_way, first_way),)
                words_kept += (tl.where(lane == j, _ballot(second, lane), kept[r]),)
            costs, kept = new, words_kept
        for r in tl.static_range(registers):
            tl.store(words + (r * length + first), kept[r])
    least, label = costs[0], tl.load(labels + place)
    for r in tl.static_range(1, registers):
        state = tl.load(labels + (place + r * lanes))
        better = (costs[r] < least) | ((costs[r] == least) & (state < label))
        least, label = tl.where(better, costs[r], least), tl.where(better, state, label)
    end = tl.min(tl.where(least == tl.min(least, 1)[:, None], label, states), 1)[:, None]
    tl.store(ends + segment, end, mask=segment < n_segments)


@triton.jit(do_not_specialize=["n_segments"])
def walk_back(
    steps: tl.tensor, masks: tl.tensor, parities: tl.tensor, places: tl.tensor, decisions: tl.tensor,
    ends: tl.tensor, indices: tl.tensor, n_segments: tl.tensor, states: tl.constexpr, length: tl.constexpr,
) -> None:  # fmt: skip
    """From the last state of each segment, one a thread, back to the first: write (n_segments, length) int32 indices.
    places: (states,) int32, the place of each state after the last turn; the rest as walk_forward has it."""
    lanes: tl.constexpr = min(states, _LANES)
    rows: tl.constexpr = _LANES // lanes
    registers: tl.constexpr = states // lanes
    segment = tl.program_id(0) * _LANES + tl.arange(0, _LANES)
    inside = segment < n_segments
    segment = tl.minimum(segment, n_segments - 1)
    words = decisions + (segment // rows).to(tl.int64) * (registers * length)
    shift = (segment % rows) * lanes
    place = tl.load(places + tl.load(ends + segment))
    quad = segment.to(tl.int64)[:, None] * length + tl.arange(0, 4)[None, :]
    for back in range(4, length + 4, 4):
        first = length - back
        x = split_quad(tl.load(steps + first + quad))
        found = ()
        for i in tl.static_range(4):
            t = first + (3 - i)
            parity = _parity(place & tl.load(parities + t))
            word = tl.load(words + (place // lanes) * length + t)
            second = (word >> (shift + place % lanes)) & 1
            subset = 2 * second + parity
            quarter = (x[3 - i] - subset.to(tl.float32)) * 0.25
            nearest = (quarter + _ROUND).to(tl.int32, bitcast=True) - 0x4B400000
            found += (4 * nearest + subset,)
            place ^= second * tl.load(masks + t)
        tl.store(indices + first + quad, join_quad(found[3], found[2], found[1], found[0]), mask=inside[:, None])
