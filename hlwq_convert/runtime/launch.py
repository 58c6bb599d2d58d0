"""The GPU kernels as functions on torch tensors: which tables they need, how they are launched.

Everything but the tables is chosen so that the bits are those of the CPU kernels. With TRITON_INTERPRET=1 the
tensors may lie on the CPU. Importing this module imports Triton, which only a CUDA build of torch brings.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hlwq_formats.dtypes import ITEM_BITS
from hlwq_formats.layout import BLOCK

from ..kernels import triton_block
from ..kernels.triton_decode import decode_blocks
from ..kernels.triton_encode import IN_LANES, encode_blocks
from ..kernels.triton_encode import ROWS as ENCODED_ROWS
from ..quantize import ScalarCode, power_of_two
from ..scalar import gains_of, penalty_of
from .gpu import sign_words

ROWS = 32
"""Blocks that a program decodes, one a thread: one warp, so that no thread waits for those of another."""

DECODING: dict[str, Any] = {"rows": ROWS, "num_warps": 1, "enable_fp_fusion": False}
ENCODING: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": False}

_compiling = threading.Lock()
_compiled: set[tuple[object, ...]] = set()


@contextlib.contextmanager
def launching(*kernel: object) -> Iterator[None]:
    """Around the launch of a kernel, named by all that it is compiled for. Triton compiles one in every thread that
    finds it not compiled: the first launch is made by one thread at a time, so that it is done once."""
    if kernel in _compiled:
        yield
        return
    with _compiling:
        yield
    _compiled.add(kernel)


OWN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def zeros_with(signs: NDArray[np.float32], dtype: str, device: torch.device) -> torch.Tensor:
    """128 zeros of `dtype` with the signs of a block, as int32."""
    return torch.from_numpy(signs * np.float32(0)).to(OWN[dtype]).view(torch.int32).to(device)


def signs_of(code: ScalarCode, device: torch.device) -> tuple[torch.Tensor, bool]:
    """What the encoder takes signs from, (64,) int32 or (128,) for F32, all of a lane's one after the other; and
    whether it may multiply by them: 128 times 2.0**-exponent, positive or negative.

    For BF16 that do not become smaller the products are exact. F16 has no number for most of these factors.
    """
    in_pairs = code.dtype == "BF16" and code.exponent <= 0
    factor = power_of_two(-code.exponent) if in_pairs else np.float32(0)
    words = torch.from_numpy(code.signs * factor).to(OWN[code.dtype]).view(torch.int32)
    return words.view(16, 4, -1).transpose(0, 1).contiguous().view(-1).to(device), in_pairs


@dataclass(frozen=True)
class Cells:
    """Equal cells over all coordinates that a block can have, to find the nearest level of x in one step.

    cell(x) = max(0, round(x * per_cell + first)) never decreases as x grows, and per_cell is a power of two, so
    nothing but the sum is rounded. With at most one midpoint in a cell, those in earlier cells are below x, and one is
    left to compare with.
    """

    table: NDArray[np.uint8]  # (n,), the number of midpoints in earlier cells
    per_cell: int
    first: int


_FURTHEST = 19
"""No coordinate of a block is beyond sqrt(128) times its RMS, the smallest gain is .76, and where squares are so small
that they are rounded, which makes the RMS up to sqrt(1.5) too small, that is 18.3."""


def find_cells(levels: NDArray[np.float32]) -> Cells | None:
    """The coarsest cells with at most one midpoint in each, None when 2**12 for a unit are not enough."""
    midpoints = ((levels[:-1] + levels[1:]) * np.float32(0.5)).astype(np.float64)
    for exponent in range(13):
        place = np.rint(np.clip(midpoints, -_FURTHEST, _FURTHEST + 1) * (1 << exponent)).astype(np.int64)
        first = 1 - int(place[0])
        counts = np.bincount(np.maximum(place + first, 0), minlength=(_FURTHEST << exponent) + first + 1)
        counts = counts[: (_FURTHEST << exponent) + first + 1]
        if counts.max() <= 1:
            return Cells((np.cumsum(counts) - counts).astype(np.uint8), 1 << exponent, first)
    return None


class DeviceCode:
    """What the chunks of one tensor share, on a device."""

    def __init__(self, code: ScalarCode, device: torch.device) -> None:
        self.bits = code.bits
        self._unit = float(power_of_two(code.exponent))
        self._signs = sign_words(code.signs)
        self._levels = torch.from_numpy(code.levels.copy()).to(device)

    def decode(self, packed: torch.Tensor, scales: torch.Tensor, result: torch.Tensor) -> None:
        """Write the weights of (n_blocks,) float16 `scales` and their packed codes, (n_blocks * 4 * bits,) int32
        aligned to 16 bytes, to `result`: (n_blocks * 128,) of a dtype of weights, aligned too."""
        n_blocks = len(scales)
        with launching(decode_blocks, self.bits, result.dtype):
            decode_blocks[-(-n_blocks // ROWS),](
                packed, scales, self._levels, *self._signs, self._unit, result, n_blocks, bits=self.bits, **DECODING
            )


class Parts(NamedTuple):
    """What becomes of blocks on a device: the fields of EncodedChunk, packed codes as int32."""

    packed: torch.Tensor
    sums: torch.Tensor
    checksums: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True, eq=False)
class Room:
    """Memory of a device for some blocks, as int32, and for what becomes of them: `parts` of `result`."""

    dtype: str
    bits: int
    items: torch.Tensor
    result: torch.Tensor
    parts: Parts


class DeviceEncoder(DeviceCode):
    """The same for encoding."""

    def __init__(self, code: ScalarCode, device: torch.device) -> None:
        super().__init__(code, device)
        midpoints = (code.levels[:-1] + code.levels[1:]) * np.float32(0.5)
        cells = find_cells(code.levels) or Cells(np.zeros(1, np.uint8), 1, 0)
        self._per_cell, self._first = cells.per_cell, cells.first
        if len(cells.table) == 1:
            self._find = "halves"
        else:
            self._find = "lanes" if code.bits <= 5 and len(cells.table) <= IN_LANES else "memory"
        table = np.pad(cells.table, (0, max(0, IN_LANES - len(cells.table))))
        self._cells = torch.from_numpy(table).to(device)
        self._above = torch.from_numpy(np.append(midpoints, np.float32(np.inf))).to(device)
        self._gains = torch.from_numpy(gains_of(code.effort)).to(device)
        self._penalty = float(penalty_of(code.effort, code.bits))
        self._to_unit = float(power_of_two(-code.exponent))
        self._factors, self._in_pairs = signs_of(code, device)
        self.dtype = code.dtype

    def result_bytes(self, n_blocks: int) -> int:
        """Bytes that `encode` writes for so many blocks."""
        return sum(self._lengths(n_blocks))

    def room(self, n_blocks: int) -> Room:
        """Memory for so many blocks and what becomes of them."""
        words = n_blocks * BLOCK * ITEM_BITS[self.dtype] // 32
        result = torch.empty(self.result_bytes(n_blocks), dtype=torch.uint8, device=self._levels.device)
        items = torch.empty(words, dtype=torch.int32, device=result.device)
        return Room(self.dtype, self.bits, items, result, self.parts(n_blocks, result))

    def fits(self, room: Room, n_blocks: int) -> bool:
        """Whether that is what `room` would give."""
        return (room.dtype, room.bits, len(room.parts.scales)) == (self.dtype, self.bits, n_blocks)

    def encode(self, items: torch.Tensor, parts: Parts) -> None:
        """Code blocks of weights, as int32 aligned to 16 bytes, and write what becomes of them to `parts`."""
        n_blocks = len(parts.scales)
        with launching(encode_blocks, self.dtype, self.bits, len(self._gains), self._find, self._in_pairs):
            encode_blocks[-(-n_blocks // ENCODED_ROWS),](
                items, self._to_unit, self._unit, self._factors, self._levels, self._above, self._cells, self._per_cell,
                self._first, self._gains, self._penalty, parts.packed, parts.scales, parts.sums, parts.checksums,
                n_blocks, kind=triton_block.KINDS[self.dtype], bits=self.bits, n_gains=len(self._gains),
                find=self._find, in_pairs=self._in_pairs, **ENCODING,
            )  # fmt: skip

    def parts(self, n_blocks: int, result: torch.Tensor) -> Parts:
        """Where in `result`, (result_bytes,) uint8 aligned to 16 bytes, `encode` is to write for so many blocks."""
        parts = torch.split(result, self._lengths(n_blocks))
        dtypes = torch.int32, torch.float32, torch.int32, torch.float16
        return Parts(*(part.view(dtype) for part, dtype in zip(parts, dtypes, strict=True)))

    def split_result(
        self, n_blocks: int, result: NDArray[np.uint8]
    ) -> tuple[memoryview, memoryview, NDArray[np.float32], NDArray[np.uint32]]:
        """What EncodedChunk holds, of a result of `encode` in host memory, which is copied."""
        copied, ends = result.copy(), np.cumsum(self._lengths(n_blocks))
        packed, sums, checksums, scales = np.split(copied, ends[:-1])
        return packed.data, scales.data, sums.view(np.float32).reshape(4, n_blocks), checksums.view(np.uint32)

    def _lengths(self, n_blocks: int) -> list[int]:
        return [n_blocks * 16 * self.bits, n_blocks * 16, n_blocks * 4, n_blocks * 2]
