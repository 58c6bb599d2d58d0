"""The decoder in torch: the same float32 operations in the same order as quantize.dequantize, so the same
bits, on any device (spec section 6.3)."""

from __future__ import annotations

import numpy as np
import torch

from hlwq_formats.layout import BLOCK

from ..decode import CodeChunk
from ..quantize import ScalarCode, power_of_two


class TorchCode:
    """What the chunks of one tensor share, on the device."""

    def __init__(self, code: ScalarCode, device: torch.device) -> None:
        self._bits = code.bits
        self._device = device
        self._unit = float(power_of_two(code.exponent))
        self._levels = torch.from_numpy(code.levels.copy()).to(device)
        self._signs = torch.from_numpy(code.signs).to(device)

    def dequantize(self, chunk: CodeChunk) -> torch.Tensor:
        """(count,) float32 weights: signs * (scale * fwht(levels[codes]))."""
        packed = torch.frombuffer(bytearray(chunk.packed), dtype=torch.uint8).to(self._device)
        bits = torch.from_numpy(chunk.scales.astype(np.float32)).to(self._device)
        values = fwht(self._levels[unpack(packed, self._bits).int()].reshape(-1, BLOCK))
        scale = bits * self._unit
        return (self._signs * (scale[:, None] * values)).reshape(-1)[: chunk.count]


def unpack(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Unpack an LSB-first stream of codes, a multiple of 8 of them: (n * width / 8,) to (n,) uint8."""
    octets = torch.nn.functional.pad(packed.reshape(-1, width), (0, 8 - width))
    words = octets.contiguous().view(torch.int64)
    shifts = torch.arange(0, 8 * width, width, device=packed.device)
    return ((words >> shifts) & ((1 << width) - 1)).to(torch.uint8).reshape(-1)


def fwht(blocks: torch.Tensor) -> torch.Tensor:
    """The transform of rotate.fwht for each row of (n, 128) float32."""
    distance = 1
    while distance < BLOCK:
        pairs = blocks.reshape(-1, BLOCK // (2 * distance), 2, distance)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        blocks = torch.stack((a + b, a - b), dim=2).reshape(-1, BLOCK)
        distance *= 2
    return blocks
