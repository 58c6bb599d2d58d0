"""What the first look at a tensor promises: scalar codes of what it lets pass decode to something."""

from __future__ import annotations

import numpy as np
import pytest

from hlwq_convert.kernels.encode import encoder
from hlwq_convert.kernels.fit import fit
from hlwq_convert.metrics import ErrorSums
from hlwq_convert.quantize import ScalarCode, all_finite, choose_exponent
from hlwq_convert.rotate import sign_vector
from hlwq_convert.scalar import Effort
from hlwq_convert.survey import _SAFE
from hlwq_formats.dtypes import narrow


def blocks(largest: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Blocks of 128 that are hard on a scale: all energy in one weight, in one coordinate, and between."""
    rng = np.random.default_rng(5)
    values = np.zeros((64, 128), np.float32)
    values[0, 3] = 1
    values[1] = 1
    values[2] = sign_vector()
    values[3] = -sign_vector() * (1 + np.arange(128) % 2) / 2
    values[4:] = rng.standard_t(1.5, (60, 128))
    return (values / np.abs(values).max(axis=1, keepdims=True) * np.float32(largest)).astype(np.float32)


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("dtype", sorted(_SAFE))
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("effort", ["fast", "best"])
def test_what_is_safe_decodes_to_something_finite(dtype: str, end: int, bits: int, effort: Effort) -> None:
    """Each block as a tensor of its own, with the codebook that is fitted to it, and with that of all of them."""
    largest = _SAFE[dtype][end] * (0.996 if end else 1.01)
    together = narrow(blocks(largest).ravel(), dtype)
    exponent = choose_exponent(largest)
    for one in narrow(blocks(largest).ravel(), dtype).reshape(-1, 128):
        for sample in (one, together):
            levels = fit(sample.tobytes(), dtype, exponent, sign_vector(), bits)
            chunk = encoder(ScalarCode(dtype, bits, exponent, levels, sign_vector(), effort))(one.tobytes())
            assert all_finite(chunk.sums)
            sums = ErrorSums()
            sums.add(chunk.sums)
            closeness = sums.closeness()
            assert closeness is not None
            assert closeness.cosine > 0
