"""What the rotation does to a tensor: its coordinates before and after, and the codebook that was fitted to them."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from hlwq_formats import metadata as md
from hlwq_formats.dtypes import ITEM_BITS, widen
from hlwq_formats.layout import BLOCK, count_blocks
from hlwq_formats.reader import Reader
from hlwq_formats.safetensors_dir import ModelDir, SourceTensor

from .codebook import BINS, GROUP, REACH, count, histogram, normalise, sample_groups
from .inspection import Inspection
from .modules import by_module
from .quantize import choose_exponent, power_of_two
from .rotate import to_blocks
from .source import Source

SHOWN_BINS = 256
_MOST = 24  # tensors


class Histogram(msgspec.Struct):
    """Coordinates of sampled blocks, each block divided by its root mean square, in SHOWN_BINS bins over
    -REACH..REACH (what lies farther out is in the last ones). `kurtosis`, before and after the rotation, is 3 for a
    normal distribution. `levels` are those of a codebook, empty for an encoding without one."""

    name: str
    coordinates: int
    before: list[int]
    after: list[int]
    kurtosis: tuple[float, float]
    levels: list[float]


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
    blocks = to_blocks(weights * power_of_two(-choose_exponent(float(np.abs(weights).max()))))
    before, _ = count(normalise(blocks))
    after, n_blocks = histogram(blocks * reader.signs())
    return Histogram(
        name=name,
        coordinates=n_blocks * BLOCK,
        before=_coarse(before),
        after=_coarse(after),
        kurtosis=(_kurtosis(before), _kurtosis(after)),
        levels=reader.levels(entry).tolist() if isinstance(entry, md.ScalarTensor) else [],
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
