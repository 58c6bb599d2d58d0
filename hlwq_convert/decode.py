"""Read a container back into NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from hlwq_formats import metadata as md
from hlwq_formats.dtypes import BIT_PATTERNS, NUMPY, widen
from hlwq_formats.errors import BadTensor, UnsupportedDtype
from hlwq_formats.layout import BLOCK, numel
from hlwq_formats.reader import Reader

from .parallel import call, default_workers, ordered_map
from .quantize import CHUNK, ScalarCode


@dataclass(frozen=True)
class CodeChunk:
    """A run of whole blocks as stored: packed codes, their scales, and the weights they stand for."""

    start: int  # flat index of the first weight
    count: int
    packed: bytes
    scales: NDArray[np.float16]


def scalar_code(reader: Reader, tensor: md.ScalarTensor) -> ScalarCode:
    """What all chunks of a tensor share, read and verified."""
    return ScalarCode(tensor.dtype, tensor.bits, tensor.exponent, reader.levels(tensor), reader.signs())


def code_chunks(reader: Reader, tensor: md.ScalarTensor, chunk: int = CHUNK) -> Iterator[CodeChunk]:
    """The codes and scales of a tensor, `chunk` weights at a time. They are verified only at exhaustion: throw away
    what was made of them when this raises."""
    n = numel(tensor.shape)
    codes = reader.iter_section("tensor", tensor.name, "codes", chunk * tensor.bits // 8)
    scales = reader.scale_chunks(tensor, chunk // BLOCK)
    starts = range(0, n, chunk)
    # strict: each section is read to its end, where it is verified
    for start, packed, some_scales in zip(starts, codes, scales, strict=True):
        yield CodeChunk(start, min(chunk, n - start), packed, some_scales)


def decode_tasks(
    reader: Reader, tensor: md.ScalarTensor, dtype: str, result: NDArray[np.unsignedinteger]
) -> Iterator[Callable[[], None]]:
    """Tasks, to be done in any order and by any thread, that write the weights of a tensor to `result`: (numel,)
    bit patterns of `dtype`, uint32 for F32 and else uint16. What they wrote is verified only at exhaustion."""
    from .kernels.decode import decoder  # numba takes half a second to import

    decode = decoder(scalar_code(reader, tensor), dtype)
    for chunk in code_chunks(reader, tensor):
        yield partial(decode, chunk.packed, chunk.scales, result[chunk.start : chunk.start + chunk.count])


def decode_scalar(reader: Reader, tensor: md.ScalarTensor) -> NDArray[np.generic]:
    """The weights of a scalar tensor in its dtype, in its shape; BF16 as uint16 bit patterns."""
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
    if isinstance(tensor, md.ScalarTensor):
        values = decode_scalar(reader, tensor)
        return widen(values.tobytes(), "BF16").reshape(tensor.shape) if tensor.dtype == "BF16" else values
    if tensor.dtype != "BF16" and tensor.dtype not in NUMPY:
        raise UnsupportedDtype(f"NumPy has no type for {tensor.dtype}", file=reader.path, tensor=name, hint="use torch")
    raw = read_raw(reader, tensor)
    if tensor.dtype == "BF16":
        return widen(raw, "BF16").reshape(tensor.shape)
    return np.frombuffer(raw, NUMPY[tensor.dtype]).reshape(tensor.shape)
