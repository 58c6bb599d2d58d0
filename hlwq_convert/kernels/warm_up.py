"""Compile, or fetch from the cache, the kernels that a conversion will need, before anything is timed."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from hlwq_formats.dtypes import BIT_PATTERNS
from hlwq_formats.layout import BLOCK
from hlwq_formats.rans import SEGMENT

from ..normal_levels import normal_levels
from ..quantize import ScalarCode
from ..rotate import sign_vector
from ..trellis import fit as fit_trellis
from ..trellis import plain_code
from .checksum import checksums, combine
from .decode import decoder
from .encode import encoder
from .fit import fit
from .packing import pack
from .survey import RowEnergies, find_magnitude, survey_weights
from .tables import table_rows
from .trellis import decoder as trellis_decoder
from .trellis import encoder as trellis_encoder
from .trellis import load_steps, search_segments


def warm_up(scalar: Iterable[tuple[str, int]], trellis: Iterable[str]) -> float:
    """Run every kernel once on one block for each (dtype, bits) of scalar codes and each dtype of a trellis; return
    the seconds that took.

    A kernel is compiled once for the size of the weights and the size of the codebook.
    """
    began = time.perf_counter()
    for dtype in {BIT_PATTERNS[dtype].itemsize: dtype for dtype in trellis}.values():
        _warm_up_trellis(dtype)
    done = set()
    for dtype, bits in scalar:
        variant = BIT_PATTERNS[dtype].itemsize, len(table_rows(normal_levels(bits), 0))
        if variant in done:
            continue
        done.add(variant)
        items = np.zeros(BLOCK, BIT_PATTERNS[dtype])
        survey_weights(items.tobytes(), dtype)
        find_magnitude(items.tobytes(), dtype, 0.0)
        fit(items.tobytes(), dtype, 0, sign_vector(), bits)
        code = ScalarCode(dtype, bits, 0, normal_levels(bits), sign_vector())
        chunk = encoder(code)(items.tobytes())
        decoder(code, dtype)(bytes(chunk.codes), np.frombuffer(chunk.scales, np.float16), items)
        combine(checksums(items))
        pack(np.zeros(BLOCK, np.uint8), bits)
    return time.perf_counter() - began


def _warm_up_trellis(dtype: str) -> None:
    items = np.zeros(BLOCK, BIT_PATTERNS[dtype])
    survey_weights(items.tobytes(), dtype)
    find_magnitude(items.tobytes(), dtype, 0.0)
    energies = RowEnergies(dtype, BLOCK, 1)
    energies.add(items.tobytes())
    plain = plain_code(dtype, BLOCK, 8, 0, 1.0, np.zeros(1, np.uint8), sign_vector())
    steps = load_steps(items.tobytes(), 0, plain)
    segment = np.zeros((1, SEGMENT), np.float32)
    search_segments(segment, np.float32(1), 8)
    code = fit_trellis(plain, steps, steps.astype(np.int32))
    (chunk,) = trellis_encoder(code)(items.tobytes(), 0).chunks
    trellis_decoder(code, dtype)(chunk, 0, items)
    combine(checksums(items))
