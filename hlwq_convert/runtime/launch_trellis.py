"""The GPU kernels of a trellis as functions on torch tensors, as launch has those of scalar codes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from hlwq_formats import rans
from hlwq_formats.layout import BLOCK, count_blocks
from hlwq_formats.rans import SEGMENT

from ..kernels.triton_block import KINDS
from ..kernels.triton_rans import SCRATCH, decode_chunks
from ..kernels.triton_viterbi import LANES, find_steps, walk_back, walk_forward
from ..quantize import power_of_two
from ..trellis import TrellisCode, inverse_scales
from .launch import OWN, launching, zeros_with

DECODING: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": False}
"""A warp a program, and 64 registers a thread: a multiprocessor has room for 32 of them."""


STEPPING: dict[str, Any] = {"rows": 16, "num_warps": 2, "enable_fp_fusion": False}
SEARCHING: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": False}


class DeviceTrellis:
    """What the chunks of one tensor share, on a device. Its tables are made there, of what a file stores."""

    def __init__(
        self, row: int, states: int, unit: float, scales: torch.Tensor, pairs: torch.Tensor, signs: torch.Tensor
    ) -> None:
        """`row`, `states` and `unit` as in TrellisCode; on the device (n_rows,) uint8 scales, (n,) int16 frequencies
        and (128,) int8 signs."""
        self._row, self._taps, self._signs = row, rans.taps(states), signs
        self._symbols, self._spans, self._escapes = spread_frequencies(pairs)
        self._factors = (scales.to(torch.int16) << 7).view(torch.float16).float() * unit

    @classmethod
    def of(cls, code: TrellisCode, device: torch.device) -> DeviceTrellis:
        """That of a code in host memory."""
        arrays = code.row_scales, code.pairs.view(np.int16), code.signs.astype(np.int8)
        stored = [torch.from_numpy(array.copy()).to(device) for array in arrays]
        return cls(code.row, code.states, float(code.unit), *stored)

    def decode(
        self, words: torch.Tensor, places: torch.Tensor, first_chunk: int, result: torch.Tensor, last: torch.Tensor
    ) -> torch.Tensor:
        """Write the weights of chunks, the tensor's from number `first_chunk` on, to `result`: (count,) of a dtype of
        weights, aligned to 16 bytes. A last block that is cut short goes to `last`, (128,), instead.

        `words` is int16 and holds chunk c from word places[c] to places[c + 1], int64. Returns (n_chunks,) int32: 0
        for a chunk that is not what an encoder writes.
        """
        n_chunks, tag = len(places) - 1, next(tag for tag, dtype in OWN.items() if dtype == result.dtype)
        n_whole = len(result) // BLOCK
        scratch = torch.empty(n_chunks * SCRATCH, dtype=torch.float32, device=words.device)
        good = torch.empty(n_chunks, dtype=torch.int32, device=words.device)
        even_rows = self._row % BLOCK == 0
        zeros = (self._signs.to(result.dtype) * 0).view(torch.int32)
        with launching(decode_chunks, tag, self._symbols.dtype, even_rows, self._row):
            decode_chunks[n_chunks,](
                words, places, first_chunk, self._symbols, self._spans, len(self._spans) // 2, *self._escapes,
                *self._taps, self._factors, len(self._factors), self._row, zeros, scratch,
                result[: n_whole * BLOCK].view(torch.int32), last.view(torch.int32), count_blocks(len(result)), n_whole,
                good, kind=KINDS[tag], even_rows=even_rows, **DECODING,
            )  # fmt: skip
        return good


def spread_frequencies(pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """The tables of kernels.triton_rans from (n,) int16 frequencies of |m| = 0, 1, ..., on their device: (2 << 14,)
    `symbols`, (2 * width,) `spans` and the escapes, as rans.make_tables has them."""
    n, device, slots = len(pairs), pairs.device, 1 << rans.PRECISION
    escapes = 2 * ((n + 1) // 2) - 1, 2 * (n // 2)
    width = max(escapes) + 1
    parity = torch.arange(2, device=device)[:, None]
    symbol = torch.arange(width, device=device)
    escape = escapes[0] + (escapes[1] - escapes[0]) * parity
    magnitude = (symbol + 1 - parity) // 2 * 2 + parity
    listed = pairs[magnitude.clamp(max=n - 1)].long() & 0xFFFF
    listed = torch.where(symbol < escape, listed, 0)
    ends = listed.cumsum(1)
    starts = ends - listed
    spans = torch.where(symbol == escape, slots - starts, listed) | starts << 16
    slot = torch.arange(2 * slots, device=device).view(2, slots) & (slots - 1)
    symbols = torch.searchsorted(ends, slot, right=True).minimum(escape)
    narrow = torch.uint8 if width <= 256 else torch.int16
    return symbols.to(narrow).view(-1), spans.to(torch.int32).view(-1), escapes


@cache
def trellis_in_place(states: int, length: int) -> tuple[torch.Tensor, ...]:
    """The tables of kernels.triton_viterbi, int32: for each turn `masks` and `parities`, and after the last one the
    state of each place, `labels`, and the place of each state."""
    h0, h1 = rans.taps(states)
    label = np.arange(states)
    bits = 1 << np.arange(states.bit_length() - 1)
    masks, parities = np.empty(length, np.int32), np.empty(length, np.int32)
    for t in range(length):
        masks[t] = np.argmax(label == 2 * h1)
        parities[t] = ((label[bits] & 1) * bits).sum()
        label = (label >> 1) ^ (label & 1) * h0
    tables = masks, parities, label.astype(np.int32), np.argsort(label).astype(np.int32)
    return tuple(torch.from_numpy(table) for table in tables)


class DeviceSearch:
    """Finds the indices of a tensor, on a device."""

    def __init__(self, code: TrellisCode, device: torch.device) -> None:
        self._code = code
        self._factors = torch.from_numpy(inverse_scales(code.row_scales)).to(device)
        self._signs = zeros_with(code.signs, code.dtype, device)
        self._tables = [table.to(device) for table in trellis_in_place(code.states, SEGMENT)]

    def find(self, items: torch.Tensor, first: int, n_blocks: int) -> torch.Tensor:
        """(n_segments * 1024,) int32 indices of n_blocks whole blocks of weights, of flat indices from `first` on, as
        int32 aligned to 16 bytes. Behind the last block they are those of zeros."""
        steps = self.steps(items, first, n_blocks)
        return search(steps.view(-1, SEGMENT), self._code.states, self._tables)

    def steps(self, items: torch.Tensor, first: int, n_blocks: int) -> torch.Tensor:
        """The coordinates of the same weights in steps: (n_segments * 1024,) float32, zeros behind the last block."""
        code, n_segments = self._code, -(-n_blocks * BLOCK // SEGMENT)
        n_padded = n_segments * SEGMENT // BLOCK
        steps = torch.empty(n_segments * SEGMENT, dtype=torch.float32, device=items.device)
        even_rows = code.row % BLOCK == 0
        with launching(find_steps, code.dtype, even_rows, code.row):
            find_steps[-(-n_padded // STEPPING["rows"]),](
                items, float(power_of_two(-code.exponent)), self._signs, self._factors, len(self._factors), code.row,
                first, float(code.per_step), steps, n_blocks, n_padded, kind=KINDS[code.dtype],
                even_rows=even_rows, **STEPPING,
            )  # fmt: skip
        return steps


def search(steps: torch.Tensor, states: int, tables: list[torch.Tensor]) -> torch.Tensor:
    """trellis.search of (n, length) float32 coordinates, `length` a multiple of 32: (n * length,) int32."""
    masks, parities, labels, places = tables
    n, length = steps.shape
    programs, device = -(-n * min(states, LANES) // LANES), steps.device
    decisions = torch.empty(programs * max(1, states // LANES) * length, dtype=torch.int32, device=device)
    ends = torch.empty(n, dtype=torch.int32, device=device)
    indices = torch.empty(n * length, dtype=torch.int32, device=device)
    with launching(walk_forward, states, length):
        walk_forward[programs,](
            steps, masks, parities, labels, decisions, ends, n, states=states, length=length, **SEARCHING
        )
        walk_back[-(-n // LANES),](
            steps, masks, parities, places, decisions, ends, indices, n, states=states, length=length, **SEARCHING
        )
    return indices
