"""Before a file is published: every byte as it was written, and every quantized tensor decodes from the file to
the bits that its error was measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from hlwq_formats import metadata as md
from hlwq_formats.dtypes import BIT_PATTERNS, ITEM_BITS
from hlwq_formats.errors import SelfCheckFailed
from hlwq_formats.layout import BLOCK
from hlwq_formats.reader import Reader

from .decode import CodeChunk, code_chunks, scalar_code
from .parallel import call, ordered_map
from .quantize import ScalarCode, combine


def self_check(
    reader: Reader, checksums: dict[str, list[int]], pool: ThreadPoolExecutor, ahead: int, step: Callable[[int], None]
) -> None:
    """Verify a whole file; `checksums` are those of the chunks of its quantized tensors.

    Raises what Reader.verify raises, or SelfCheckFailed (70).
    """
    reader.verify_shared()
    for done in ordered_map(pool, ahead, call, _tasks(reader, checksums)):
        step(done)


def _tasks(reader: Reader, checksums: dict[str, list[int]]) -> Iterator[Callable[[], int]]:
    """Tasks that each look at some bytes and return the number of source bytes that those stand for."""
    for tensor in reader.metadata.tensors:
        match tensor:
            case md.RawTensor():
                yield partial(_check_raw, reader, tensor)
            case md.ScalarTensor():
                code, expected = scalar_code(reader, tensor), checksums[tensor.name]
                for i, chunk in enumerate(code_chunks(reader, tensor)):
                    yield partial(_check_chunk, reader.path, tensor.name, code, chunk, expected[i])


def _check_raw(reader: Reader, tensor: md.RawTensor) -> int:
    reader.verify_tensor(tensor)
    return tensor.sections[0].length


def _check_chunk(file: str, name: str, code: ScalarCode, chunk: CodeChunk, expected: int) -> int:
    from .kernels.checksum import checksums
    from .kernels.decode import decoder

    bits: NDArray[np.unsignedinteger] = np.empty(len(chunk.scales) * BLOCK, BIT_PATTERNS[code.dtype])
    bits[chunk.count :] = 0
    decoder(code, code.dtype)(chunk.packed, chunk.scales, bits[: chunk.count])
    found = combine(checksums(bits))
    if found != expected:
        raise SelfCheckFailed(
            f"weights from {chunk.start} decode to checksum {found:08x}, encoded were {expected:08x}; "
            "nothing was published",
            file=file,
            tensor=name,
        )
    return chunk.count * ITEM_BITS[code.dtype] // 8
