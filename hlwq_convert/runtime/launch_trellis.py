"""The GPU kernels of a trellis as functions on torch tensors, as launch has those of scalar codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hlwq_formats import rans
from hlwq_formats.layout import BLOCK, count_blocks

from ..kernels.rans import KernelTables
from ..kernels.triton_rans import SCRATCH, decode_chunks
from ..trellis import TrellisCode, scale_values
from .gpu import sign_words
from .launch import launching

DECODING: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": False, "maxnreg": 168}
"""Twelve warps on a multiprocessor; with more of them, registers would not hold a block."""


class DeviceTrellis:
    """What the chunks of one tensor share, on a device."""

    def __init__(self, code: TrellisCode, device: torch.device) -> None:
        tables = KernelTables(code.pairs)
        self._width = tables.width
        self._escapes = [int(escape) for escape in tables.escapes]
        self._taps = rans.taps(code.states)
        self._row = code.row
        self._signs = sign_words(code.signs)
        symbols = tables.symbols.astype(np.uint8) if tables.width <= 256 else tables.symbols.view(np.int16)
        self._symbols = torch.from_numpy(symbols).to(device)
        self._spans = torch.from_numpy(tables.spans.view(np.int32)).to(device)
        self._factors = torch.from_numpy(code.unit * scale_values(code.row_scales)).to(device)

    def decode(
        self, words: torch.Tensor, places: torch.Tensor, first_chunk: int, result: torch.Tensor, last: torch.Tensor
    ) -> torch.Tensor:
        """Write the weights of chunks, the tensor's from number `first_chunk` on, to `result`: (count,) of a dtype of
        weights, aligned to 16 bytes. A last block that is cut short goes to `last`, (128,), instead.

        `words` is int16 and holds chunk c from word places[c] to places[c + 1], int64. Returns (n_chunks,) int32: 0
        for a chunk that is not what an encoder writes.
        """
        n_chunks = len(places) - 1
        scratch = torch.empty(n_chunks * SCRATCH, dtype=torch.float32, device=words.device)
        good = torch.empty(n_chunks, dtype=torch.int32, device=words.device)
        with launching:
            decode_chunks[n_chunks,](
                words, places, first_chunk, self._symbols, self._spans, self._width, *self._escapes, *self._taps,
                self._factors, len(self._factors), self._row, *self._signs, scratch, result, last,
                count_blocks(len(result)), len(result) // BLOCK, good, even_rows=self._row % BLOCK == 0, **DECODING,
            )  # fmt: skip
        return good
