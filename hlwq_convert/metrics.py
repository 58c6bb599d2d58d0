"""How close a decoded tensor is to its source, from sums over blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class ErrorSums:
    """Running sums over a tensor: block sums are added one by one, in block order, in float64, so the result
    does not depend on how the tensor was cut into chunks."""

    def __init__(self) -> None:
        self._totals = np.zeros(4)

    def add(self, sums: NDArray[np.float32]) -> None:
        """Add the (4, n_blocks) sums of the next chunk: source energy, decoded energy, product, error energy."""
        from .kernels.measure import add_sums

        add_sums(sums, self._totals)

    def is_finite(self) -> bool:
        """Whether every decoded weight of what was added is finite."""
        return math.isfinite(self._totals[1])

    def closeness(self) -> Closeness | None:
        """The measures of everything added; None when the source was all zero."""
        source, decoded, product, error = (float(total) for total in self._totals)
        if source == 0:
            return None
        norms = math.sqrt(source) * math.sqrt(decoded)
        return Closeness(cosine=min(1.0, product / norms) if norms > 0 else 0.0, rel_mse=error / source)


@dataclass(frozen=True)
class Closeness:
    """cosine of the angle between source and decoded tensor; squared error over squared norm of the source."""

    cosine: float
    rel_mse: float


def sqnr_db(rel_mse: float) -> float | None:
    """Signal-to-quantization-noise ratio in decibels; None for an exact tensor."""
    return -10 * math.log10(rel_mse) if rel_mse > 0 else None
