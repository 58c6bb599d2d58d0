"""Read a container back into NumPy arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from hlwq_formats import metadata as md
from hlwq_formats import rans
from hlwq_formats.dtypes import BIT_PATTERNS, NUMPY, widen
from hlwq_formats.errors import BadTensor, UnsupportedDtype
from hlwq_formats.files import Memory
from hlwq_formats.layout import BLOCK, numel
from hlwq_formats.reader import Reader

from .parallel import InOrder, call, default_workers, ordered_map
from .quantize import CHUNK, ScalarCode
from .trellis import TrellisCode


@dataclass(frozen=True)
class CodeChunk:
    """A run of whole blocks as stored: packed codes, their scales, and the weights they stand for."""

    start: int  # flat index of the first weight
    count: int
    packed: bytes | memoryview
    scales: NDArray[np.float16]


def scalar_code(reader: Reader, tensor: md.ScalarTensor) -> ScalarCode:
    """What all chunks of a tensor share, read and verified."""
    return ScalarCode(tensor.dtype, tensor.bits, tensor.exponent, reader.levels(tensor), reader.signs())


def code_chunks(
    reader: Reader, tensor: md.ScalarTensor, chunk: int = CHUNK, into: Memory | None = None
) -> Iterator[CodeChunk]:
    """The codes and scales of a tensor, `chunk` weights at a time, a multiple of CHUNK. They are verified only at
    exhaustion: throw away what was made of them when this raises. `into` gives memory for the codes, as in
    Reader.iter_section_into."""
    n = numel(tensor.shape)
    codes: Iterator[bytes | memoryview]
    if into is None:
        codes = reader.code_chunks(tensor, chunk)
    elif tensor.sections[0].zstd_codes is UNSET:
        codes = reader.iter_section_into("tensor", tensor.name, "codes", chunk * tensor.bits // 8, into)
    else:
        codes = (_copy(packed, into) for packed in reader.code_chunks(tensor, chunk))
    scales = reader.scale_chunks(tensor, chunk // BLOCK)
    starts = range(0, n, chunk)
    # strict: each section is read to its end, where it is verified
    for start, packed, some_scales in zip(starts, codes, scales, strict=True):
        yield CodeChunk(start, min(chunk, n - start), packed, some_scales)


def _copy(data: bytes, into: Memory) -> memoryview:
    place = into(len(data))
    place[:] = data
    return place


def stored_bytes(tensor: md.StoredTensor) -> int:
    """Bytes that the sections of a tensor take."""
    return sum(section.length for section in tensor.sections)


@dataclass(frozen=True)
class Piece:
    """A run of weights that can be decoded on its own: `decode` writes (count,) bit patterns, uint32 for F32 and else
    uint16. What it writes is verified when the iterator that it came from is exhausted and all its pieces were decoded.
    """

    start: int  # flat index of the first weight
    count: int
    decode: Callable[[NDArray[np.unsignedinteger]], None]


def pieces(reader: Reader, tensor: md.QuantizedTensor, dtype: str, most: int = CHUNK) -> Iterator[Piece]:
    """All weights of a tensor, in order, to be rounded to `dtype`: CHUNK in a piece, or up to `most`, a multiple."""
    if isinstance(tensor, md.TrellisTensor):
        return _trellis_pieces(reader, tensor, dtype)
    if tensor.sections[0].zstd_codes is not UNSET:
        return _coded_pieces(reader, tensor, dtype)
    return _scalar_pieces(reader, tensor, dtype, most)


def _scalar_pieces(reader: Reader, tensor: md.ScalarTensor, dtype: str, most: int) -> Iterator[Piece]:
    from .kernels.decode import decoder  # numba takes half a second to import

    decode = decoder(scalar_code(reader, tensor), dtype)
    for chunk in code_chunks(reader, tensor, most):
        yield Piece(chunk.start, chunk.count, partial(decode, chunk.packed, chunk.scales))


def _coded_pieces(reader: Reader, tensor: md.ScalarTensor, dtype: str) -> Iterator[Piece]:
    """As `_scalar_pieces`; each piece decompresses its own codes, in its own thread."""
    from .kernels.decode import decoder
    from .kernels.packing import pack

    decode = decoder(scalar_code(reader, tensor), dtype)
    packing, n = tensor.sections[0].zstd_codes, numel(tensor.shape)
    assert packing is not UNSET
    digest, left = hashlib.sha256(), len(packing.frames)

    def take(packed: bytes) -> None:
        nonlocal left
        digest.update(packed)
        left -= 1
        if left == 0:
            reader.check_packed(tensor, digest.hexdigest())

    in_order = InOrder(take)

    def decode_frame(
        number: int, frame: bytes, scales: NDArray[np.float16], result: NDArray[np.unsignedinteger]
    ) -> None:
        packed = reader.repack(tensor, number, frame, pack)
        in_order.add(number, packed)
        decode(packed, scales, result)

    frames = reader.iter_section("tensor", tensor.name, "codes", packing.frames)
    scales = reader.scale_chunks(tensor, CHUNK // BLOCK)
    for number, (frame, some_scales) in enumerate(zip(frames, scales, strict=True)):
        start = number * CHUNK
        yield Piece(start, min(CHUNK, n - start), partial(decode_frame, number, frame, some_scales))


def trellis_code(reader: Reader, tensor: md.TrellisTensor) -> TrellisCode:
    """What all chunks of a tensor share, read and verified. What only an encoder needs is zero."""
    scales, pairs = reader.row_scales(tensor), reader.frequencies(tensor)
    return TrellisCode(
        tensor.dtype, tensor.row, tensor.states, 0, np.float32(0), tensor.step, tensor.exponent, scales, pairs,
        reader.signs(),
    )  # fmt: skip


def _trellis_pieces(reader: Reader, tensor: md.TrellisTensor, dtype: str) -> Iterator[Piece]:
    from .kernels.trellis import decoder

    n = numel(tensor.shape)
    decode = decoder(trellis_code(reader, tensor), dtype)

    def decode_group(number: int, chunks: list[bytes], result: NDArray[np.unsignedinteger]) -> None:
        for chunk in chunks:
            if not decode(chunk, number * rans.CHUNK, result[: rans.CHUNK]):
                raise reader.bad_chunk(tensor, number)
            number, result = number + 1, result[rans.CHUNK :]

    for start, chunks in zip(range(0, n, CHUNK), reader.symbol_chunks(tensor, CHUNK // rans.CHUNK), strict=True):
        yield Piece(start, min(CHUNK, n - start), partial(decode_group, start // rans.CHUNK, chunks))


def decode_tasks(
    reader: Reader, tensor: md.QuantizedTensor, dtype: str, result: NDArray[np.unsignedinteger]
) -> Iterator[Callable[[], None]]:
    """Tasks, to be done in any order and by any thread, that write the weights of a tensor to `result`: (numel,)
    bit patterns of `dtype`, uint32 for F32 and else uint16. What they wrote is verified only at exhaustion."""
    for piece in pieces(reader, tensor, dtype):
        yield partial(piece.decode, result[piece.start : piece.start + piece.count])


def decode_quantized(reader: Reader, tensor: md.QuantizedTensor) -> NDArray[np.generic]:
    """The weights of a quantized tensor in its dtype, in its shape; BF16 as uint16 bit patterns."""
    try:
        result = np.empty(numel(tensor.shape), BIT_PATTERNS[tensor.dtype])
    except MemoryError:
        raise _too_large(reader, tensor, numel(tensor.shape) * BIT_PATTERNS[tensor.dtype].itemsize) from None
    workers = default_workers() if len(result) > CHUNK else 1
    with ThreadPoolExecutor(workers, "hlwq") as pool:
        for _ in ordered_map(pool, 2 * workers, call, decode_tasks(reader, tensor, tensor.dtype, result)):
            pass
    own = NUMPY.get(tensor.dtype)
    return (result if own is None else result.view(own)).reshape(tensor.shape)


def read_raw(reader: Reader, tensor: md.RawTensor) -> bytearray:
    """The bytes of a raw tensor, verified. Memory is taken first: BadTensor (65) when there is not enough."""
    size = tensor.sections[0].length
    try:
        raw = bytearray(size)
    except MemoryError:
        raise _too_large(reader, tensor, size) from None
    start = 0
    for piece in reader.raw_chunks(tensor):
        raw[start : start + len(piece)] = piece
        start += len(piece)
    return raw


def _too_large(reader: Reader, tensor: md.Tensor, size: int) -> BadTensor:
    return BadTensor(f"{size} bytes, for which there is no memory", file=reader.path, tensor=tensor.name)


def get_numpy(reader: Reader, name: str) -> NDArray[np.generic]:
    """A tensor as a NumPy array. BF16, which NumPy lacks, comes as float32 with the same values.

    Raises UnsupportedDtype (69) for 8-bit and smaller floats, which neither NumPy nor float32 stands for.
    """
    tensor = reader.stored_tensor(name)
    if not isinstance(tensor, md.RawTensor):
        values = decode_quantized(reader, tensor)
        return widen(values.tobytes(), "BF16").reshape(tensor.shape) if tensor.dtype == "BF16" else values
    if tensor.dtype != "BF16" and tensor.dtype not in NUMPY:
        raise UnsupportedDtype(f"NumPy has no type for {tensor.dtype}", file=reader.path, tensor=name, hint="use torch")
    raw = read_raw(reader, tensor)
    if tensor.dtype == "BF16":
        return widen(raw, "BF16").reshape(tensor.shape)
    return np.frombuffer(raw, NUMPY[tensor.dtype]).reshape(tensor.shape)
