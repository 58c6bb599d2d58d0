"""PLAN for the trellis: the step of each tensor with which the whole file gets the size that was asked for.

Every row of every tensor gets the same relative error: one step, in units of the row's root mean square, for the whole
model. At a fixed size that is the least squared error when rows matter as much as their energy says; a sensitivity s
divides a tensor's step by the root of s (reverse water-filling). How many bytes a step costs is found on samples of
every tensor, with the search that the conversion uses and in arithmetic that repeats on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hlwq_formats.dtypes import ITEM_BITS, widen
from hlwq_formats.errors import Usage
from hlwq_formats.layout import BLOCK, count_blocks
from hlwq_formats.rans import CHUNK, LANES, SEGMENT
from hlwq_formats.safetensors_dir import ModelDir, SourceTensor

from .frequencies import cost, count_magnitudes, fit_pairs
from .parallel import ordered_map
from .quantize import choose_exponent, power_of_two
from .rotate import fwht, sign_vector, to_blocks
from .target import Target, Wish
from .trellis import INVERSE_ROOT, inverse_scales, row_energies, row_of, row_scales

LEAST_STEP, LARGEST_STEP = 2.0**-9, 8.0
_SAMPLED = 4 << 20  # weights of all tensors together
_MOST_OF_A_ROW = 1 << 16
_LN2 = 0.6931471805599453
_ROUNDS = 40


@dataclass(frozen=True, eq=False)
class Sample:
    """Rotated coordinates of some rows of a tensor, of variance 1 in each row: (n, 1024) float32."""

    tensor: SourceTensor
    coordinates: NDArray[np.float32]
    wish: Wish
    lengths: dict[float, int] = field(default_factory=dict)  # of symbols and frequencies, by step


def take_samples(
    model: ModelDir, tensors: Sequence[SourceTensor], target: Target, pool: ThreadPoolExecutor
) -> list[Sample]:
    """A sample of each tensor, from whole rows at an even stride: four million weights in all, or two segments each."""
    each = max(2 * SEGMENT, _SAMPLED // max(len(tensors), 1))
    return list(ordered_map(pool, 8, lambda t: Sample(t, _coordinates(model, t, each), target.wish(t.name)), tensors))


def _coordinates(model: ModelDir, tensor: SourceTensor, wanted: int) -> NDArray[np.float32]:
    row = row_of(tensor.shape)
    used = min(row, _MOST_OF_A_ROW)  # of a longer row, what comes first stands for all
    rows_in_run = min(-(-SEGMENT // used), tensor.numel // row)
    n_runs = min(max(1, wanted // (rows_in_run * used)), tensor.numel // (rows_in_run * row))
    stride = tensor.numel // row // n_runs
    parts = []
    for run in range(n_runs):
        first, size = run * stride * row, used if used < row else rows_in_run * row
        raw = model.read(tensor, first * ITEM_BITS[tensor.dtype] // 8, size * ITEM_BITS[tensor.dtype] // 8)
        parts.append(_normalise(widen(raw, tensor.dtype), used))
    joined = np.concatenate(parts)
    padded = np.zeros(-(-len(joined) // SEGMENT) * SEGMENT, np.float32)
    padded[: len(joined)] = joined
    whole = max(1, len(joined) // SEGMENT)  # a part of a segment would count its padding
    return padded.reshape(-1, SEGMENT)[:whole]


def _normalise(weights: NDArray[np.float32], row: int) -> NDArray[np.float32]:
    """Coordinates of whole rows as the encoder sees them, with a factor to make their variance 1."""
    finite = np.where(np.isfinite(weights), weights, np.float32(0))
    exponent = choose_exponent(float(np.abs(finite).max(initial=0)))
    scaled = finite * power_of_two(-exponent)
    factors = np.repeat(inverse_scales(row_scales(row_energies(scaled, row), row, 0)), row)
    rotated = fwht(to_blocks(scaled * factors) * sign_vector())
    return np.ascontiguousarray(rotated * np.float32(INVERSE_ROOT)).ravel()


def predict(sample: Sample, step: float, states: int) -> int:
    """Bytes of the symbols and frequencies of a tensor with this step."""
    if step not in sample.lengths:
        from .kernels.trellis import search_segments

        counts = count_magnitudes(search_segments(sample.coordinates, np.float32(1 / step), states))
        kinds, size = np.count_nonzero(counts), sample.coordinates.size
        # the entropy of a sample is that much too low (Miller 1955)
        bits = cost(counts) / size + kinds / (2 * _LN2 * size)
        n = count_blocks(sample.tensor.numel) * BLOCK
        lanes = sum(min(LANES, -(-min(CHUNK, n - start) // SEGMENT)) for start in range(0, n, CHUNK))
        sample.lengths[step] = int(n * bits / 8) + 4 * lanes + 2 * len(fit_pairs(counts))
    return sample.lengths[step]


def _step_for(sample: Sample, step: float, states: int) -> float:
    """The step of one tensor when that of the model is `step`."""
    wish = sample.wish
    own = min(max(step / math.sqrt(wish.sensitivity), LEAST_STEP), LARGEST_STEP)
    if wish.least_bits == 0 and wish.most_bits == math.inf:
        return own
    found = _bits(sample, own, states)
    bounded = min(max(found, wish.least_bits), wish.most_bits)
    return own if bounded == found else _solve(lambda s: _bits(sample, s, states) - bounded, own, 0.001)


def _bits(sample: Sample, step: float, states: int) -> float:
    return 8 * predict(sample, step, states) / sample.tensor.numel


def _solve(excess: Callable[[float], float], step: float, good: float) -> float:
    """The step at which `excess`, in bits a weight, is between -good and 0, or near that: a larger step by a factor
    f takes log2(f) bits less."""
    low, high = LEAST_STEP, LARGEST_STEP
    for _ in range(_ROUNDS):
        over = excess(step)
        if -good <= over <= 0 or high - low < 1e-7 * step:
            break
        low, high = (max(low, step), high) if over > 0 else (low, min(high, step))
        guess = step * (1 + _LN2 * (over + good / 2))
        step = guess if low < guess < high else (low + high) / 2
    return step


def choose_steps(
    samples: list[Sample],
    states: int,
    wanted: int,
    size_of: Callable[[dict[str, int]], int],
    pool: ThreadPoolExecutor,
    *,
    nearest: bool = False,
) -> tuple[dict[str, float], dict[str, int]]:
    """The step of each sampled tensor with which `size_of`, from the bytes of the symbols of each, comes to `wanted`
    bytes or a little less; and those bytes.

    Raises Usage when no step does, unless the `nearest` size is wanted.
    """
    weights = sum(sample.tensor.numel for sample in samples)

    def at(step: float) -> tuple[dict[str, float], dict[str, int]]:
        def look(sample: Sample) -> tuple[float, int]:
            own = _step_for(sample, step, states)
            return own, predict(sample, own, states)

        names = [sample.tensor.name for sample in samples]
        found = list(ordered_map(pool, 8, look, samples))
        return dict(zip(names, (s for s, _ in found), strict=True)), dict(
            zip(names, (n for _, n in found), strict=True)
        )

    def size_at(step: float) -> int:
        return size_of(at(step)[1])

    least, most = size_at(LARGEST_STEP), size_at(LEAST_STEP)
    if nearest:
        wanted = min(max(wanted, least), most)
    elif not least <= wanted <= most:
        raise Usage(
            f"no file has the size that was asked for: with these options it takes {least} to {most} bytes",
            hint="what is kept raw, the assets and the bounds of --min-bits and --max-bits leave no other size",
        )
    step = _solve(lambda s: 8 * (size_at(s) - wanted) / weights, 0.2, 0.0002 * 8 * wanted / weights)
    return at(step)
