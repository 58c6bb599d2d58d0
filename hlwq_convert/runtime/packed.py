"""A matrix that stays in memory as its file stores it, and gives its rows when they are asked for.

On the CPU and on NVIDIA GPUs kernels work on it, behind operators that torch.compile takes as they are. Elsewhere
plain torch operations do, which compile into whatever they meet.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn

from hlwq_formats import metadata as md
from hlwq_formats.dtypes import BIT_PATTERNS
from hlwq_formats.layout import BLOCK, numel, scalar_lengths
from hlwq_formats.reader import Reader

from ..decode import code_chunks, scalar_code
from ..quantize import ScalarCode
from .dequantize import fwht, unpack
from .gpu import can_run_kernels, sign_words
from .load import TAGS
from .packed_trellis import PackedTrellis, read_trellis, trellis_bytes
from .threads import run_all, workers

_ROTATED_EXPONENT = 3
"""Rotated weights are multiplied by 2**3, and rotated activations by 2**-3: both then have about the magnitude
that they have unrotated (the transform multiplies by sqrt(128)), which fp16 needs."""

_STEP = 1 << 21
"""Weights that are decoded at once."""
_GPU_STEP = 1 << 26
"""The same on a GPU, which is idle between small pieces."""

_FUSED = 16
"""Activations up to which a GPU multiplies with weights as they are stored, the BATCH of kernels.triton_linear."""

_PART = 1 << 18
"""Weights for which another thread is worth while."""


class PackedMatrix(nn.Module):
    """A (rows, columns) matrix as packed codes, fp16 scales and a codebook (spec section 6).

    All buffers are integers, bit patterns where floats are meant: model.to(dtype) must not round them.
    """

    codes: torch.Tensor  # (n_blocks, 16 * bits) uint8
    scales: torch.Tensor  # (n_blocks,) int16: fp16
    levels: torch.Tensor  # (2**bits,) int32: float32
    signs: torch.Tensor  # (128,) int8: 1 or -1
    like: torch.Tensor  # empty, and of the dtype in which the model wants its weights

    def __init__(self, shape: tuple[int, int], code: ScalarCode, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.shape = shape
        self.exponent = code.exponent
        n_blocks = -(-shape[0] * shape[1] // BLOCK)
        self.register_buffer("codes", torch.empty((n_blocks, 16 * code.bits), dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty(n_blocks, dtype=torch.int16, device=device))
        self.register_buffer("levels", torch.from_numpy(code.levels.copy()).view(torch.int32).to(device))
        self.register_buffer("signs", torch.from_numpy(code.signs.astype(np.int8)).to(device))
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self._has_kernels, self._sign_words = can_run_kernels(), sign_words(code.signs)
        if self._has_kernels:
            from . import packed_gpu  # noqa: F401  # defines the operators; not before there is a GPU: it imports Triton

    @property
    def whole_blocks(self) -> bool:
        """Whether no block lies in two rows, so that rows can be multiplied in the rotated domain."""
        return self.shape[1] % BLOCK == 0

    @property
    def step(self) -> int:
        """How many rows to ask for at once."""
        return max(1, (_GPU_STEP if self.on_gpu else _STEP) // self.shape[1])

    @property
    def on_gpu(self) -> bool:
        """Whether the kernels of packed_gpu do the work."""
        return self._has_kernels and self.codes.is_cuda

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """(stop - start, columns): the same bits as the loader gives, rounded once to `dtype`."""
        first, last = start * self.shape[1], stop * self.shape[1]
        block = slice(first // BLOCK, -(-last // BLOCK))
        values = self._decode(self.codes[block], self.scales[block], dtype, False).reshape(-1)
        skip = first - block.start * BLOCK
        return values[skip : skip + last - first].reshape(stop - start, self.shape[1])

    def rotated_rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """(stop - start, columns) in the rotated domain: `rows(...) @ x` is this @ `rotate(x)`, but for rounding."""
        blocks = self.shape[1] // BLOCK
        part = slice(start * blocks, stop * blocks)
        return self._decode(self.codes[part], self.scales[part], dtype, True).reshape(stop - start, self.shape[1])

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """What `rotated_rows` is to be multiplied by: (..., columns), computed in float32, in the dtype of `x`. Where
        `can_multiply`, what `multiply` takes."""
        if self.can_multiply(x):
            rotated: torch.Tensor = torch.ops.hlwq.rotate_rows(x.reshape(-1, self.shape[1]), self._sign_words)
            return rotated.reshape(x.shape)
        blocks = x.reshape(-1, BLOCK).float() * self.signs
        return (fwht(blocks) * 2.0**-_ROTATED_EXPONENT).to(x.dtype).reshape(x.shape)

    def can_multiply(self, x: torch.Tensor) -> bool:
        """Whether `multiply` takes so many activations, (..., columns), of this dtype."""
        few = 0 < x.numel() <= _FUSED * self.shape[1] and x.dtype in (torch.bfloat16, torch.float16)
        return self.on_gpu and self.whole_blocks and few and not (torch.is_grad_enabled() and x.requires_grad)

    def multiply(self, rotated: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """(..., rows) of what `rotate` gave: the weights are read once, as they are stored."""
        flat = rotated.reshape(-1, self.shape[1])
        product: torch.Tensor = torch.ops.hlwq.multiply_rows(
            flat, self.codes, self.scales, self.levels, self.exponent, bias, dtype
        )
        return product.reshape(*rotated.shape[:-1], self.shape[0])

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """(n, columns) rows of (n,) indices, in the dtype of the model."""
        columns = self.shape[1]
        first = index * columns
        spanned = columns // BLOCK if self.whole_blocks else (columns + BLOCK - 2) // BLOCK + 1
        start = torch.div(first, BLOCK, rounding_mode="floor")
        blocks = start[:, None] + torch.arange(spanned, device=index.device)
        blocks = blocks.clamp(max=len(self.scales) - 1).reshape(-1)
        values = self._decode(self.codes[blocks], self.scales[blocks], self.like.dtype, False)
        place = (first - start * BLOCK)[:, None] + torch.arange(columns, device=index.device)
        return values.reshape(len(index), spanned * BLOCK).gather(1, place)

    def _decode(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, rotated: bool) -> torch.Tensor:
        if self.on_gpu and not rotated:
            decoded: torch.Tensor = torch.ops.hlwq.decode_rows(
                codes, scales, self.levels, self._sign_words, self.exponent, dtype
            )
            return decoded
        decode = _decode_on_cpu if codes.device.type == "cpu" else decode_blocks
        return decode(codes, scales, self.levels, self.signs, self.exponent, dtype, rotated)


def decode_blocks(
    codes: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, signs: torch.Tensor,
    exponent: int, dtype: torch.dtype, rotated: bool,
) -> torch.Tensor:  # fmt: skip
    """(n, 128) weights of n blocks, on any device: signs * (scale * fwht(levels[codes])), or scale * levels[codes]
    times 2**3 when `rotated`. The tensors are the buffers of PackedMatrix, or rows of them."""
    values = levels.view(torch.float32)[unpack(codes, codes.shape[1] // 16).int()].reshape(-1, BLOCK)
    scale = scales.view(torch.float16).float() * 2.0 ** (exponent + _ROTATED_EXPONENT * rotated)
    return (scale[:, None] * values if rotated else signs * (scale[:, None] * fwht(values))).to(dtype)


@torch.library.custom_op("hlwq::decode_blocks", mutates_args=(), device_types="cpu")
def _decode_on_cpu(
    codes: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, signs: torch.Tensor,
    exponent: int, dtype: torch.dtype, rotated: bool,
) -> torch.Tensor:  # fmt: skip
    """decode_blocks by the kernels, with the same bits."""
    from ..kernels.decode import decoder
    from ..kernels.levels import scaled_levels

    direct = dtype if dtype in TAGS else torch.float32
    tag = TAGS[direct]
    bits = codes.shape[1] // 16
    code = ScalarCode(tag, bits, exponent, levels.numpy().view(np.float32), signs.numpy().astype(np.float32))
    result = torch.empty((len(scales), BLOCK), dtype=direct)
    if len(scales) == 0:
        return result.to(dtype)
    items = result.view(torch.int32 if direct is torch.float32 else torch.int16).numpy().view(BIT_PATTERNS[tag])
    packed, halves = codes.contiguous().numpy(), scales.contiguous().numpy().view(np.uint16)
    full = decoder(code, tag)
    rotated_code = replace(code, exponent=exponent + _ROTATED_EXPONENT)

    def decode(part: slice) -> None:
        if rotated:
            scaled_levels(rotated_code, tag, packed[part], halves[part], items[part].reshape(-1))
        else:
            full(packed[part].reshape(-1).data, halves[part].view(np.float16), items[part].reshape(-1))

    step = max(_PART // BLOCK, -(-len(scales) // workers()))
    run_all([partial(decode, slice(start, start + step)) for start in range(0, len(scales), step)])
    return result.to(dtype)


@_decode_on_cpu.register_fake
def _(codes, scales, levels, signs, exponent, dtype, rotated):  # type: ignore[no-untyped-def]
    return torch.empty((len(scales), BLOCK), dtype=dtype, device=codes.device)


Packed = PackedMatrix | PackedTrellis


def packed_bytes(tensor: md.Tensor) -> int | None:
    """The memory that a tensor takes packed, or None when it cannot stay so: a matrix, or a stack of matrices."""
    if len(tensor.shape) not in (2, 3) or numel(tensor.shape) == 0:
        return None
    if isinstance(tensor, md.TrellisTensor):
        return trellis_bytes(tensor)
    if isinstance(tensor, md.ScalarTensor):
        return sum(scalar_lengths(numel(tensor.shape), tensor.bits).values()) + BLOCK
    return None


def read_packed(reader: Reader, tensor: md.Tensor, dtype: torch.dtype, device: torch.device) -> Packed:
    """A tensor of which `packed_bytes` is not None, verified; a stack of matrices as one with all their rows."""
    shape = numel(tensor.shape[:-1]), tensor.shape[-1]
    if isinstance(tensor, md.TrellisTensor):
        return read_trellis(reader, tensor, shape, dtype).to(device)
    assert isinstance(tensor, md.ScalarTensor)
    matrix = PackedMatrix(shape, scalar_code(reader, tensor), dtype, device)
    for chunk in code_chunks(reader, tensor):
        block = slice(chunk.start // BLOCK, chunk.start // BLOCK + len(chunk.scales))
        matrix.codes[block] = torch.frombuffer(bytearray(chunk.packed), dtype=torch.uint8).reshape(-1, 16 * tensor.bits)
        matrix.scales[block] = torch.from_numpy(chunk.scales.view(np.int16).copy())
    return matrix
