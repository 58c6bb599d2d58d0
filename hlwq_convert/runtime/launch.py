"""The GPU kernels as functions on torch tensors: which tables they need, how they are launched.

Everything but the tables is chosen so that the bits are those of the CPU kernels. With TRITON_INTERPRET=1 the
tensors may lie on the CPU. Importing this module imports Triton, which only a CUDA build of torch brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..kernels import triton_block
from ..kernels.triton_decode import decode_blocks
from ..kernels.triton_encode import encode_blocks
from ..quantize import ScalarCode, power_of_two
from ..scalar import gains_of

ROWS = 128
"""Threads of a program: the decoder has one for each block, the encoder four."""

DECODING: dict[str, Any] = {"rows": ROWS, "num_warps": ROWS // 32, "enable_fp_fusion": False}
ENCODING: dict[str, Any] = {"rows": ROWS // 4, "num_warps": ROWS // 32, "enable_fp_fusion": False}

OWN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

_FEW_STEPS = 2


def sign_words(signs: NDArray[np.float32]) -> list[int]:
    """(128,) signs as four signed 32-bit words of sign bits."""
    bits: list[int] = np.packbits(signs < 0, bitorder="little").view("<i4").tolist()
    return bits


@dataclass(frozen=True)
class Cells:
    """Equal cells over the reach of the midpoints between levels, to find the nearest level of x in a step or two.

    cell(x) = round(min(max(x * per_cell, -reach), reach)) never decreases as x grows. So every midpoint in an earlier
    cell than that of x is below x, and none in a later cell: `first[cell]` midpoints are, and at most `steps`, those in
    the cell of x, are left to compare with. `steps` is 0 when too many share a cell: then x is found by bisection.
    """

    first: NDArray[np.int32]  # (2 * reach + 1,)
    per_cell: float
    reach: float
    origin: int  # what to add to the bits of a cell's place plus ROUNDER
    steps: int


def find_cells(midpoints: NDArray[np.float32]) -> Cells:
    """The coarsest cells, a power of two of them, that hold one of the increasing midpoints each, or the finest."""
    furthest = np.abs(midpoints).max()
    rounder = np.float32(triton_block.ROUNDER.value)
    for exponent in range(5, 13):
        reach = np.float32(1 << exponent)
        with np.errstate(over="ignore"):
            per_cell = np.minimum(reach / furthest, np.float32(1e30))
        place = np.clip(midpoints * per_cell, -reach, reach) + rounder
        counts = np.bincount((place - rounder + reach).astype(np.int64), minlength=(2 << exponent) + 1)
        steps = int(counts.max())
        if steps == 1:
            break
    first = (np.cumsum(counts) - counts).astype(np.int32)
    return Cells(
        first,
        float(per_cell),
        float(reach),
        int(reach) - rounder.view(np.int32).item(),
        steps if steps <= _FEW_STEPS else 0,
    )


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
        decode_blocks[-(-n_blocks // ROWS),](
            packed, scales, self._levels, *self._signs, self._unit, result, n_blocks, bits=self.bits, **DECODING
        )


class DeviceEncoder(DeviceCode):
    """The same for encoding."""

    def __init__(self, code: ScalarCode, device: torch.device) -> None:
        super().__init__(code, device)
        midpoints = (code.levels[:-1] + code.levels[1:]) * np.float32(0.5)
        self._cells = find_cells(midpoints)
        gains = gains_of(code.effort)
        self._to_unit = float(power_of_two(-code.exponent))
        self._first = torch.from_numpy(self._cells.first).to(device)
        self._above = torch.from_numpy(np.append(midpoints, np.float32(np.inf))).to(device)
        self._gains = torch.from_numpy(gains).to(device)
        self._dtype = code.dtype

    def result_bytes(self, n_blocks: int) -> int:
        """Bytes that `encode` writes for so many blocks."""
        return n_blocks * (16 * self.bits + 16 + 4 + 2)

    def encode(self, items: torch.Tensor, n_blocks: int, result: torch.Tensor) -> None:
        """Code n_blocks blocks of weights, as int32, and write to `result`, (result_bytes,) uint8, what
        split_result takes apart; both aligned to 16 bytes."""
        packed, sums, checksums, scales = self._parts(n_blocks, result)
        encode_blocks[-(-n_blocks // ENCODING["rows"]),](
            items, self._to_unit, self._unit, *self._signs, self._levels, self._first, self._above, self._cells.reach,
            self._cells.per_cell, self._cells.origin, self._gains, packed.view(torch.int32), scales.view(torch.float16),
            sums.view(torch.float32), checksums.view(torch.int32), n_blocks, kind=triton_block.KINDS[self._dtype],
            bits=self.bits, n_gains=len(self._gains), steps=self._cells.steps, **ENCODING,
        )  # fmt: skip

    def split_result(
        self, n_blocks: int, result: torch.Tensor
    ) -> tuple[bytes, bytes, NDArray[np.float32], NDArray[np.uint32]]:
        """Copies of what EncodedChunk holds, from a result of `encode` in host memory."""
        packed, sums, checksums, scales = (part.numpy() for part in self._parts(n_blocks, result))
        columns = sums.view(np.float32).reshape(4, n_blocks).copy()
        return packed.tobytes(), scales.tobytes(), columns, checksums.view(np.uint32).copy()

    def _parts(self, n_blocks: int, result: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(result, [n_blocks * 16 * self.bits, n_blocks * 16, n_blocks * 4, n_blocks * 2])
