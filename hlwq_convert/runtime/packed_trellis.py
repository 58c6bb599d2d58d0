"""A matrix of a trellis that stays in memory as its file stores it: range-coded chunks, row scales and frequencies.

A chunk of 2**18 weights can only be decoded whole. Operators that torch.compile takes as they are decode, by the
kernels of the loader and so with its bits: on the CPU each chunk that is needed once, on an NVIDIA GPU, where many
chunks take hardly longer than one, all of them or those of the rows that are asked for (packed_gpu).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import lcm

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from hlwq_formats import metadata as md
from hlwq_formats.dtypes import BIT_PATTERNS
from hlwq_formats.errors import BadFrames, NotAvailable
from hlwq_formats.layout import BLOCK, numel
from hlwq_formats.rans import CHUNK
from hlwq_formats.reader import Reader

from ..decode import trellis_code
from ..trellis import TrellisCode
from .gpu import can_run_kernels
from .load import TAGS
from .threads import run_all

_MOST = 1 << 22
"""Weights that the CPU decodes at once, at most."""


class PackedTrellis(nn.Module):
    """A (rows, columns) matrix as the chunks of its indices (spec section 6.7).

    All buffers are integers, bit patterns where floats are meant: model.to(dtype) must not round them.
    """

    symbols: torch.Tensor  # (bytes,) uint8: the chunks, one after the other, and zeros up to a multiple of four
    offsets: torch.Tensor  # (n_chunks + 1,) int64: where each begins, and the end
    scales: torch.Tensor  # (n_scales,) uint8: upper bytes of float16
    pairs: torch.Tensor  # (n,) int16: frequencies
    signs: torch.Tensor  # (128,) int8: 1 or -1
    like: torch.Tensor  # empty, and of the dtype in which the model wants its weights

    def __init__(
        self, shape: tuple[int, int], tensor: md.TrellisTensor, code: TrellisCode, dtype: torch.dtype, where: str
    ) -> None:
        super().__init__()
        self.shape = shape
        self.settings = [tensor.row, tensor.states, tensor.step, tensor.exponent]
        self.origin = where, tensor.name
        lengths = tensor.sections[-1].chunks
        assert isinstance(lengths, list)
        self.register_buffer("symbols", torch.zeros(_padded(sum(lengths)), dtype=torch.uint8))
        self.register_buffer("offsets", torch.from_numpy(np.cumsum([0, *lengths])))
        self.register_buffer("scales", torch.from_numpy(code.row_scales.copy()))
        self.register_buffer("pairs", torch.from_numpy(code.pairs.view(np.int16).copy()))
        self.register_buffer("signs", torch.from_numpy(code.signs.astype(np.int8)))
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self._has_kernels, self._is_checked = can_run_kernels(), False
        if self._has_kernels:
            from . import packed_gpu  # noqa: F401  # defines the operator; not before there is a GPU: it imports Triton

    @property
    def on_gpu(self) -> bool:
        """Whether the kernels of packed_gpu do the work."""
        return self._has_kernels and self.symbols.is_cuda

    @property
    def step(self) -> int:
        """How many rows to ask for at once: on a GPU all, elsewhere whole chunks where that is not too much."""
        if self.on_gpu:
            return self.shape[0]
        columns = self.shape[1]
        whole = lcm(columns, CHUNK)
        return max(1, (_MOST // whole * whole or _MOST) // columns)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """(stop - start, columns): the same bits as the loader gives, rounded once to `dtype`."""
        first, length = start * self.shape[1], (stop - start) * self.shape[1]
        if self.on_gpu:
            chunk = first // CHUNK
            skip = first - chunk * CHUNK
            weights = self._decode_chunks(chunk, -(-(first + length) // CHUNK), dtype)[0][skip : skip + length]
        else:
            weights = self._decode(torch.tensor([first]), length, dtype)
        return weights.reshape(stop - start, self.shape[1])

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """(n, columns) rows of (n,) indices, in the dtype of the model."""
        if self.on_gpu:  # which alone knows what chunks they lie in
            return F.embedding(index, self.rows(0, self.shape[0], self.like.dtype))
        return self._decode(index * self.shape[1], self.shape[1], self.like.dtype)

    def _decode(self, starts: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
        if self.symbols.device.type != "cpu":
            raise not_here(self.symbols.device, self.origin[0])
        weights: torch.Tensor = _decode_runs(
            self.symbols, self.offsets, self.scales, self.pairs, self.signs, self.settings, *self.origin,
            self.shape[0] * self.shape[1], starts, length, dtype,
        )  # fmt: skip
        return weights

    def _decode_chunks(self, first: int, last: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        decoded: tuple[torch.Tensor, torch.Tensor] = torch.ops.hlwq.decode_chunks(
            self.symbols, self.offsets, self.scales, self.pairs, self.signs, self.settings,
            self.shape[0] * self.shape[1], first, last, dtype,
        )  # fmt: skip
        return decoded

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedTrellis:
        """What .to() and its like call: a GPU looks at what the chunks hold when they come, not in each step."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.on_gpu and not self._is_checked:
            bad = (self._decode_chunks(0, len(self.offsets) - 1, self.like.dtype)[1] == 0).nonzero()
            if len(bad):
                raise _bad_chunk(int(bad[0]), *self.origin)
            self._is_checked = True
        return self


def can_decode_on(device: torch.device) -> bool:
    """Whether chunks can be decoded on a device step by step."""
    return device.type == "cpu" or (device.type == "cuda" and can_run_kernels())


def not_here(device: torch.device, file: str) -> NotAvailable:
    """The error for a device on which they can not."""
    return NotAvailable(
        f"the codes of a trellis can stay packed on the CPU and on NVIDIA GPUs with Triton, not on {device.type}",
        file=file,
        hint='use weights="dense" there, or a file of fixed-rate codes (--bits)',
    )


def _bad_chunk(number: int, file: str, name: str) -> BadFrames:
    problem = f"chunk {number} of the symbols is none that an encoder writes"
    return BadFrames(problem, file=file, tensor=name, section="symbols")


@torch.library.custom_op("hlwq::decode_runs", mutates_args=(), device_types="cpu")
def _decode_runs(
    symbols: torch.Tensor, offsets: torch.Tensor, scales: torch.Tensor, pairs: torch.Tensor, signs: torch.Tensor,
    settings: list[int], file: str, name: str, numel: int, starts: torch.Tensor, length: int, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """(n, length) weights: n runs of a tensor of `numel`, from the flat indices `starts`. The other tensors are the
    buffers of PackedTrellis. Raises BadFrames for a chunk that no encoder writes."""
    from ..kernels.trellis import decoder

    direct = dtype if dtype in TAGS else torch.float32
    tag, halves = TAGS[direct], direct is not torch.float32
    row, states, step, exponent = settings
    code = TrellisCode(
        tag, row, states, 0, np.float32(0), step, exponent, scales.numpy(), pairs.numpy().view(np.uint16),  # type: ignore[arg-type]
        signs.numpy().astype(np.float32),
    )  # fmt: skip
    decode = decoder(code, tag)
    result = torch.empty((len(starts), length), dtype=direct)
    items = result.view(torch.int16 if halves else torch.int32).numpy().view(BIT_PATTERNS[tag])
    chunks, ends = symbols.numpy(), offsets.tolist()
    users: dict[int, list[tuple[int, int]]] = {}  # chunk -> the runs that it is part of, and where these start
    for run, start in enumerate(starts.tolist()):
        for number in range(start // CHUNK, -(-(start + length) // CHUNK)):
            users.setdefault(number, []).append((run, start))

    def decode_chunk(number: int) -> None:
        begin, end = number * CHUNK, min(number * CHUNK + CHUNK, numel)
        run, start = users[number][0]
        whole = len(users[number]) == 1 and start <= begin and end <= start + length
        weights = items[run, begin - start : end - start] if whole else np.empty_like(items, shape=end - begin)
        if not decode(chunks[ends[number] : ends[number + 1]].tobytes(), begin, weights):
            raise _bad_chunk(number, file, name)
        for run, start in users[number] if not whole else ():
            first, last = max(begin, start), min(end, start + length)
            items[run, first - start : last - start] = weights[first - begin : last - begin]

    run_all([partial(decode_chunk, number) for number in users])
    return result.to(dtype)


@_decode_runs.register_fake
def _(symbols, offsets, scales, pairs, signs, settings, file, name, numel, starts, length, dtype):  # type: ignore[no-untyped-def]
    return torch.empty((len(starts), length), dtype=dtype, device=symbols.device)


def trellis_bytes(tensor: md.TrellisTensor) -> int:
    """The memory of the buffers of a PackedTrellis."""
    lengths = tensor.sections[-1].chunks
    assert isinstance(lengths, list)
    rows, pairs = numel(tensor.shape) // tensor.row, md.raw_length(tensor.sections[1])
    return _padded(sum(lengths)) + 8 * (len(lengths) + 1) + rows + pairs + BLOCK


def _padded(size: int) -> int:
    """Bytes that hold `size` bytes as whole words of four, which is how a GPU reads them."""
    return -(-size // 4) * 4


def read_trellis(reader: Reader, tensor: md.TrellisTensor, shape: tuple[int, int], dtype: torch.dtype) -> PackedTrellis:
    """A tensor as a matrix of this shape, on the CPU. Its bytes are verified, but what its chunks hold only when they
    are used, or moved to a GPU."""
    matrix = PackedTrellis(shape, tensor, trellis_code(reader, tensor), dtype, reader.path)
    symbols, place = matrix.symbols.numpy(), 0
    for (chunk,) in reader.symbol_chunks(tensor):
        symbols[place : place + len(chunk)] = np.frombuffer(chunk, np.uint8)
        place += len(chunk)
    return matrix
