"""What the rotation does to a tensor: its coordinates before and after, and the codebook that was fitted to them."""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

from hlwq_formats import metadata as md
from hlwq_formats.dtypes import ITEM_BITS, widen
from hlwq_formats.layout import BLOCK, count_blocks, numel
from hlwq_formats.reader import Reader
from hlwq_formats.safetensors_dir import ModelDir, SourceTensor

from .codebook import BINS, GROUP, REACH, count, histogram, normalise, sample_groups
from .decode import trellis_code
from .inspection import Inspection
from .modules import by_module
from .quantize import choose_exponent, power_of_two
from .rotate import fwht, to_blocks
from .source import Source
from .trellis import INVERSE_ROOT, scale_values

SHOWN_BINS = 256
_MOST = 24  # tensors


class Histogram(msgspec.Struct):
    """Coordinates of sampled blocks in SHOWN_BINS bins over -REACH..REACH (what lies farther out is in the last ones).

    For scalar codes each block is divided by its root mean square. For a trellis each row is divided by its scale and
    then all by their root mean square. `kurtosis`, before and after the rotation, is 3 for a normal distribution.
    `levels` are what codes stand for, in the same units: the codebook, or the multiples of the `step` of a trellis that
    have a frequency of their own, as far as REACH."""

    name: str
    coordinates: int
    before: list[int]
    after: list[int]
    kurtosis: tuple[float, float]
    levels: list[float]
    step: float | None = None


def worst_histograms(reader: Reader, source: Source, inspection: Inspection) -> list[Histogram]:
    """The tensor with the lowest SQNR of each module, of the 24 largest modules, largest first. Left out is one whose
    sampled blocks are all zero."""
    modules = sorted((m for m in by_module(inspection.tensors) if m.worst is not None), key=lambda m: -m.weights)
    names = [m.worst for m in modules[:_MOST] if m.worst is not None]
    found = (_measure(reader, source.model, name) for name in names)
    return [one for one in found if one.coordinates]


def _measure(reader: Reader, model: ModelDir, name: str) -> Histogram:
    entry, tensor = reader.stored_tensor(name), model.tensors[name]
    weights = widen(_sample(model, tensor), tensor.dtype)
    if isinstance(entry, md.TrellisTensor):
        return _of_trellis(reader, entry, weights)
    assert isinstance(entry, md.ScalarTensor)
    blocks = to_blocks(weights * power_of_two(-choose_exponent(float(np.abs(weights).max()))))
    before, _ = count(normalise(blocks))
    after, _ = histogram(blocks * reader.signs())
    return _make(name, before, after, reader.levels(entry).tolist())


def _of_trellis(reader: Reader, entry: md.TrellisTensor, weights: NDArray[np.float32]) -> Histogram:
    code, n = trellis_code(reader, entry), numel(entry.shape)
    starts = [first * BLOCK for first in sample_groups(count_blocks(n))]
    places = np.concatenate([np.arange(start, min(start + GROUP * BLOCK, n)) for start in starts])
    units = (code.unit.astype(np.float64) * scale_values(code.row_scales))[places // code.row]
    values = np.divide(weights, units, out=np.zeros(len(weights)), where=units > 0)
    alive = to_blocks(weights).any(axis=1)
    rms = math.sqrt(np.square(values).sum() / max(alive.sum() * BLOCK, 1)) or 1.0
    blocks = to_blocks((values / rms).astype(np.float32))[alive]
    before, _ = count(blocks)
    after, _ = count(fwht(blocks * code.signs) * np.float32(INVERSE_ROOT))
    step = math.sqrt(BLOCK) / rms  # the transform of the indices makes a block that much larger
    most = min(len(code.pairs) - 1, int(REACH / step))
    return _make(entry.name, before, after, [step * m for m in range(-most, most + 1)], step)


def _make(
    name: str, before: NDArray[np.int64], after: NDArray[np.int64], levels: list[float], step: float | None = None
) -> Histogram:
    """From counts in BINS bins."""
    return Histogram(
        name=name,
        coordinates=int(after.sum()),
        before=_coarse(before),
        after=_coarse(after),
        kurtosis=(_kurtosis(before), _kurtosis(after)),
        levels=levels,
        step=step,
    )


def _sample(model: ModelDir, tensor: SourceTensor) -> bytes:
    """The bytes of the blocks that the codebook was fitted on."""
    block_bytes = BLOCK * ITEM_BITS[tensor.dtype] // 8
    starts = (first * block_bytes for first in sample_groups(count_blocks(tensor.numel)))
    return b"".join(model.read_pieces(tensor, ((at, min(GROUP * block_bytes, tensor.length - at)) for at in starts)))


def _coarse(counts: NDArray[np.int64]) -> list[int]:
    summed: list[int] = counts.reshape(SHOWN_BINS, -1).sum(axis=1).tolist()
    return summed


def _kurtosis(counts: NDArray[np.int64]) -> float:
    """Fourth moment over the square of the second, from the centres of the bins."""
    if not (total := counts.sum()):
        return 0.0
    centres = (np.arange(BINS) + 0.5) * (2 * REACH / BINS) - REACH
    second = float((counts * centres**2).sum() / total)
    return float((counts * centres**4).sum() / total) / second**2
