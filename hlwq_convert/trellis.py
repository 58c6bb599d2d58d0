"""ENCODE at a variable rate: entropy-coded trellis-coded quantization (Fischer & Wang 1992; Ungerboeck 1982).

Each row is divided by its scale, blocks are rotated, and every coordinate becomes a multiple m of one step. Which
multiples a coordinate may take, the even or the odd ones, follows from those before it in its segment of 1,024
coordinates through a trellis; the Viterbi search finds the sequence with the least squared error. Only its entropy
costs bytes, so the rate is any that the step asks for.

This is the reference, in NumPy; kernels.viterbi and kernels.trellis give the same bits, faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hlwq_formats import rans
from hlwq_formats.dtypes import narrow, widen
from hlwq_formats.layout import BLOCK, count_blocks
from hlwq_formats.metadata import States
from hlwq_formats.rans import SEGMENT

from .frequencies import count_magnitudes, fit_pairs
from .quantize import block_checksums, measure_blocks, power_of_two
from .rotate import from_blocks, fwht, to_blocks

LARGEST = 65_000
"""What a coordinate is cut to, in steps: one block in a row that holds next to nothing else could be beyond."""

INVERSE_ROOT = 0.08838834764831845  # of 128: rotated coordinates are that much larger than weights

STATES: dict[str, States] = {"fast": 8, "default": 32, "best": 256}
"""States of the trellis by effort. Decoding takes the same time for all."""

_LEAST_ROW = 64

_ROUND = np.float32(3 << 22)
"""Added to a float32 within 2**22 of zero and subtracted again, it rounds to a whole number, ties to even."""


@dataclass(frozen=True)
class TrellisCode:
    """How one tensor is coded: what its chunks share."""

    dtype: str
    row: int  # elements that share a scale
    states: States
    exponent: int  # weights are multiplied by 2**-exponent first
    per_step: np.float32  # from a rotated coordinate, with the factor 128 of two transforms, to steps
    step: int  # a decoded coordinate is m * step * 2**step_exponent * its row's scale
    step_exponent: int
    row_scales: NDArray[np.uint8]  # (n_rows,)
    pairs: NDArray[np.uint16]  # frequencies of |m| = 0, 1, ..., spec section 6.7
    signs: NDArray[np.float32]  # (128,)

    @property
    def unit(self) -> np.float32:
        """step * 2**step_exponent."""
        return unit_of(self.step, self.step_exponent)


@dataclass(frozen=True)
class EncodedIndices:
    """The stored form of a run of blocks, and what was measured on its decoding, for each block."""

    chunks: list[bytes]  # of rans.CHUNK indices each, the last shorter
    counts: NDArray[np.int64]  # of the magnitudes 0, 1, ... of all indices
    sums: NDArray[np.float32]  # (4, n_blocks), as in quantize.EncodedChunk
    checksums: NDArray[np.uint32]  # (n_blocks,)


def plain_code(
    dtype: str,
    row: int,
    states: States,
    exponent: int,
    step: float,
    scales: NDArray[np.uint8],
    signs: NDArray[np.float32],
) -> TrellisCode:
    """The code of a tensor before anything was fitted: `step` is in units of a row's RMS, for coordinates of variance
    1, and there are no frequencies."""
    in_block = step * INVERSE_ROOT
    per_step, none = np.float32(1 / (BLOCK * in_block)), np.empty(0, np.uint16)
    code = TrellisCode(dtype, row, states, exponent, per_step, 0, 0, scales, none, signs)
    return _with_unit(code, 2 * in_block)


def is_storable(code: TrellisCode) -> bool:
    """Whether the unit lies where the format has room: not so for weights at an end of the range of float32."""
    return -149 <= code.step_exponent <= 88


def _with_unit(code: TrellisCode, unit: float) -> TrellisCode:
    """`unit` is what an index stands for in a row of scale 1, before the exponent."""
    mantissa, exponent = np.frexp(unit)
    return replace(code, step=int(mantissa * (1 << 24)), step_exponent=int(exponent) - 24 + code.exponent)


def fit(code: TrellisCode, steps: NDArray[np.float32], indices: NDArray[np.int32]) -> TrellisCode:
    """`code` with the frequencies of a sample, and with the unit that decodes it with the least squared error: the
    indices lie a little farther out than what they stand for."""
    products, squares = steps.ravel().astype(np.float64) * indices.ravel(), indices.ravel().astype(np.float64) ** 2
    captured, energy = float(np.cumsum(products)[-1]), float(np.cumsum(squares)[-1])
    gain = captured / energy if energy > 0 else 1.0
    unit = float(np.ldexp(float(code.step), code.step_exponent - code.exponent))
    return replace(_with_unit(code, unit * gain), pairs=fit_pairs(count_magnitudes(indices)))


def unit_of(step: int, step_exponent: int) -> np.float32:
    """step * 2**step_exponent as float32, exact for a step below 2**24."""
    return np.float32(np.ldexp(np.float32(step), step_exponent))


def row_of(shape: Sequence[int]) -> int:
    """Elements that share a scale: a row, or all of a tensor whose rows are so short that scales would cost more than
    they give."""
    return shape[-1] if shape[-1] >= _LEAST_ROW else math.prod(shape)


def row_scales(energies: NDArray[np.float64], row: int, exponent: int) -> NDArray[np.uint8]:
    """Half the root mean square of each row, times 2**-exponent, as a float of 5 and 3 bits: the upper byte, without
    the sign, of a float16.

    `energies` are the sums of squares of the rows. Coarse scales lose nothing but that steps differ by up to 6 %
    between rows: the encoder divides by what is stored (spec/decisions/0010).
    """
    half_rms = np.sqrt(energies / row) * np.ldexp(0.5, -exponent)
    bits = half_rms.astype(np.float16).view(np.uint16).astype(np.uint32)
    scales: NDArray[np.uint8] = np.minimum((bits + 64) >> 7, 247).astype(np.uint8)
    return scales


def scale_values(scales: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The scales that bytes stand for."""
    return (scales.astype(np.uint16) << 7).view(np.float16).astype(np.float32)


def inverse_scales(scales: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the weights of each row are multiplied by before they are rotated; 0 for a row of scale 0."""
    values = np.float32(2) * scale_values(scales)
    inverse = np.zeros(len(scales), np.float32)
    np.divide(np.float32(1), values, out=inverse, where=scales > 0)
    return inverse


def row_energies(weights: NDArray[np.float32], row: int) -> NDArray[np.float64]:
    """Sums of squares of the rows of flat weights: eight running sums for the columns modulo 8, folded as a tree."""
    columns = np.zeros((len(weights) // row, -(-row // 8) * 8))
    columns[:, :row] = weights.reshape(-1, row)
    sums = np.cumsum((columns * columns).reshape(len(columns), -1, 8), axis=1)[:, -1]
    four = sums[:, :4] + sums[:, 4:]
    two = four[:, :2] + four[:, 2:]
    energies: NDArray[np.float64] = two[:, 0] + two[:, 1]
    return energies


def to_steps(weights: NDArray[np.float32], start: int, code: TrellisCode) -> NDArray[np.float32]:
    """(n_blocks, 128) coordinates, in steps, of flat weights from index `start`, already times 2**-exponent."""
    rows = (start + np.arange(len(weights))) // code.row
    blocks = to_blocks(weights * inverse_scales(code.row_scales)[rows])
    steps: NDArray[np.float32] = fwht(blocks * code.signs) * code.per_step
    return steps.clip(np.float32(-LARGEST), np.float32(LARGEST))


def _distances(steps: NDArray[np.float32], subset: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Squared distance, in units of 4 steps, to the nearest m with m % 4 == `subset`, and that m."""
    quarter = (steps - np.float32(subset)) * np.float32(0.25)
    nearest = (quarter + _ROUND) - _ROUND
    error = quarter - nearest
    return error * error, 4 * nearest.astype(np.int32) + np.int32(subset)


def search(steps: NDArray[np.float32], states: int) -> NDArray[np.int32]:
    """The indices, (n, 1024) int32, of (n, 1024) coordinates: the path of least squared error through the trellis.

    Of two ways into a state the one whose last index is even or one more than a multiple of 4 wins a tie, of two last
    states the lower one.
    """
    n, length = steps.shape
    h0, h1 = rans.taps(states)
    top = states.bit_length() - 2
    following = np.arange(states)
    parity = following >> top  # of the state before: its lowest bit has become the highest
    before = [2 * (following ^ parity * h0 ^ odd * h1) + parity for odd in (0, 1)]
    cost = np.full((n, states), 1e30, np.float32)
    cost[:, 0] = 0
    decisions = np.empty((length, n, states), np.bool_)
    for t in range(length):
        distance = np.stack([_distances(steps[:, t], subset)[0] for subset in range(4)], axis=1)
        ways = [cost[:, before[odd]] + distance[:, 2 * odd + parity] for odd in (0, 1)]
        decisions[t] = ways[1] < ways[0]
        cost = np.where(decisions[t], ways[1], ways[0])
    state = cost.argmin(axis=1)
    indices = np.empty((n, length), np.int32)
    for t in range(length - 1, -1, -1):
        odd = decisions[t, np.arange(n), state].astype(np.int64)
        subset = 2 * odd + parity[state]
        nearest = np.stack([_distances(steps[:, t], s)[1] for s in range(4)], axis=1)
        indices[:, t] = nearest[np.arange(n), subset]
        state = np.where(odd == 1, before[1][state], before[0][state])
    return indices


def find_indices(steps: NDArray[np.float32], states: int) -> NDArray[np.int32]:
    """`search` for (n_blocks, 128) coordinates cut into segments, the last one padded with zeros: (n_blocks, 128)."""
    n = steps.size
    padded = np.zeros(-(-n // SEGMENT) * SEGMENT, np.float32)
    padded[:n] = np.ascontiguousarray(steps).ravel()
    return search(padded.reshape(-1, SEGMENT), states).reshape(-1)[:n].reshape(-1, BLOCK)


def quantize(raw: bytes | memoryview, start: int, code: TrellisCode) -> EncodedIndices:
    """Encode source bytes of `code.dtype`, weights from flat index `start`: whole chunks, but for the tensor's end."""
    to_unit = power_of_two(-code.exponent)
    weights = widen(raw, code.dtype) * to_unit
    indices = find_indices(to_steps(weights, start, code), code.states).reshape(-1)
    decoded = narrow(dequantize(indices, start, code, len(weights)), code.dtype)
    restored = to_blocks(widen(decoded.tobytes(), code.dtype) * to_unit)
    tables = rans.make_tables(code.pairs)
    chunks = [rans.encode(indices[at : at + rans.CHUNK], tables) for at in range(0, len(indices), rans.CHUNK)]
    sums, counts = measure_blocks(to_blocks(weights), restored), count_magnitudes(indices)
    return EncodedIndices(chunks, counts, sums, block_checksums(decoded))


def dequantize(indices: NDArray[np.int32], start: int, code: TrellisCode, count: int) -> NDArray[np.float32]:
    """Decode the first `count` weights from index `start` on, as (count,) float32 (spec section 6.7):

    w = signs * (unit * scale * fwht(m)), where fwht is exact: its sums are integers below 2**24.
    """
    values = fwht(np.asfortranarray(indices.reshape(-1, BLOCK).astype(np.float32)))
    rows = np.minimum((start + np.arange(count_blocks(count) * BLOCK)) // code.row, len(code.row_scales) - 1)
    with np.errstate(over="ignore"):
        scales = (code.unit * scale_values(code.row_scales))[rows].reshape(-1, BLOCK)
        return from_blocks(code.signs * (scales * values), count)
