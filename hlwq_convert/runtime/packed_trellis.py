"""A matrix of a trellis that stays in memory as its file stores it: range-coded chunks, row scales and frequencies.

A chunk of 2**18 weights can only be decoded whole. One operator, which torch.compile takes as it is, decodes each
chunk that is needed once, by the kernels of the loader and so with its bits. It runs on the CPU alone.
"""

from __future__ import annotations

from functools import partial
from math import lcm

import numpy as np
import torch
from torch import nn

from hlwq_formats import metadata as md
from hlwq_formats.dtypes import BIT_PATTERNS
from hlwq_formats.errors import BadFrames, NotAvailable
from hlwq_formats.layout import BLOCK, numel
from hlwq_formats.rans import CHUNK
from hlwq_formats.reader import Reader

from ..decode import trellis_code
from ..trellis import TrellisCode
from .load import TAGS
from .threads import run_all

_MOST = 1 << 22
"""Weights that are decoded at once, at most."""


class PackedTrellis(nn.Module):
    """A (rows, columns) matrix as the chunks of its indices (spec section 6.7).

    All buffers are integers, bit patterns where floats are meant: model.to(dtype) must not round them.
    """

    symbols: torch.Tensor  # (bytes,) uint8: the chunks, one after the other
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
        self.register_buffer("symbols", torch.empty(sum(lengths), dtype=torch.uint8))
        self.register_buffer("offsets", torch.from_numpy(np.cumsum([0, *lengths])))
        self.register_buffer("scales", torch.from_numpy(code.row_scales.copy()))
        self.register_buffer("pairs", torch.from_numpy(code.pairs.view(np.int16).copy()))
        self.register_buffer("signs", torch.from_numpy(code.signs.astype(np.int8)))
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def step(self) -> int:
        """How many rows to ask for at once: whole chunks where that is not too much."""
        columns = self.shape[1]
        whole = lcm(columns, CHUNK)
        return max(1, (_MOST // whole * whole or _MOST) // columns)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """(stop - start, columns): the same bits as the loader gives, rounded once to `dtype`."""
        first = torch.tensor([start * self.shape[1]])
        return self._decode(first, (stop - start) * self.shape[1], dtype).reshape(stop - start, self.shape[1])

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """(n, columns) rows of (n,) indices, in the dtype of the model."""
        return self._decode(index * self.shape[1], self.shape[1], self.like.dtype)

    def _decode(self, starts: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
        if self.symbols.device.type != "cpu":
            raise not_here(self.symbols.device, self.origin[0])
        weights: torch.Tensor = _decode_runs(
            self.symbols, self.offsets, self.scales, self.pairs, self.signs, self.settings, *self.origin,
            self.shape[0] * self.shape[1], starts, length, dtype,
        )  # fmt: skip
        return weights


def not_here(device: torch.device, file: str) -> NotAvailable:
    """The error for a device on which chunks cannot be decoded step by step."""
    return NotAvailable(
        f"the codes of a trellis can stay packed on the CPU only, not on {device.type}",
        file=file,
        hint='use weights="dense" there, or a file of fixed-rate codes (--bits)',
    )


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
            problem = f"chunk {number} of the symbols is none that an encoder writes"
            raise BadFrames(problem, file=file, tensor=name, section="symbols")
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
    return sum(lengths) + 8 * (len(lengths) + 1) + rows + pairs + BLOCK


def read_trellis(reader: Reader, tensor: md.TrellisTensor, shape: tuple[int, int], dtype: torch.dtype) -> PackedTrellis:
    """A tensor as a matrix of this shape. Its bytes are verified, and what its chunks hold when they are used."""
    matrix = PackedTrellis(shape, tensor, trellis_code(reader, tensor), dtype, reader.path)
    symbols, place = matrix.symbols.numpy(), 0
    for (chunk,) in reader.symbol_chunks(tensor):
        symbols[place : place + len(chunk)] = np.frombuffer(chunk, np.uint8)
        place += len(chunk)
    return matrix
