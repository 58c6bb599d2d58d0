"""Compile, or fetch from the cache, the kernels that a conversion will need, before anything is timed."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from hlwq_formats.dtypes import BIT_PATTERNS
from hlwq_formats.layout import BLOCK

from ..normal_levels import normal_levels
from ..quantize import ScalarCode
from ..rotate import sign_vector
from .checksum import checksums
from .decode import decoder
from .encode import encoder
from .fit import fit
from .survey import survey_weights
from .tables import table_rows


def warm_up(codes: Iterable[tuple[str, int]]) -> float:
    """Run every kernel once on one block for each (dtype, bits); return the seconds that took.

    A kernel is compiled once for the size of the weights and the size of the codebook.
    """
    began = time.perf_counter()
    done = set()
    for dtype, bits in codes:
        variant = BIT_PATTERNS[dtype].itemsize, len(table_rows(normal_levels(bits), 0))
        if variant in done:
            continue
        done.add(variant)
        items = np.zeros(BLOCK, BIT_PATTERNS[dtype])
        survey_weights(items.tobytes(), dtype)
        fit(items.tobytes(), dtype, 0, sign_vector(), bits)
        code = ScalarCode(dtype, bits, 0, normal_levels(bits), sign_vector())
        chunk = encoder(code)(items.tobytes())
        decoder(code, dtype)(bytes(chunk.codes), np.frombuffer(chunk.scales, np.float16), items)
        checksums(items)
    return time.perf_counter() - began
