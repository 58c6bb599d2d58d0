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
from hlwq_formats.layout import BLOCK, count_blocks
from hlwq_formats.reader import Reader

from .decode import Piece, pieces
from .parallel import call, ordered_map, take_turns
from .quantize import combine


def self_check(
    reader: Reader, checksums: dict[str, list[int]], pool: ThreadPoolExecutor, workers: int, step: Callable[[int], None]
) -> None:
    """Verify a whole file; `checksums` are those of the chunks of its quantized tensors.

    Raises what Reader.verify raises, or SelfCheckFailed (70).
    """
    reader.verify_shared()
    # several tensors at once: the digest of one takes a core all of the time
    tasks = take_turns((_tasks(reader, tensor, checksums) for tensor in reader.metadata.tensors), max(1, workers // 2))
    for done in ordered_map(pool, 2 * workers, call, tasks):
        step(done)


def _tasks(reader: Reader, tensor: md.Tensor, checksums: dict[str, list[int]]) -> Iterator[Callable[[], int]]:
    """Tasks that each look at some bytes of a tensor and return the number of source bytes that those stand for."""
    match tensor:
        case md.RawTensor():
            yield partial(_check_raw, reader, tensor)
        case md.ScalarTensor() | md.TrellisTensor():
            for piece, expected in zip(pieces(reader, tensor, tensor.dtype), checksums[tensor.name], strict=True):
                yield partial(_check_piece, reader.path, tensor, piece, expected)


def _check_raw(reader: Reader, tensor: md.RawTensor) -> int:
    reader.verify_tensor(tensor)
    return tensor.sections[0].length


def _check_piece(file: str, tensor: md.QuantizedTensor, piece: Piece, expected: int) -> int:
    from .kernels.checksum import checksums

    bits: NDArray[np.unsignedinteger] = np.empty(count_blocks(piece.count) * BLOCK, BIT_PATTERNS[tensor.dtype])
    bits[piece.count :] = 0
    piece.decode(bits[: piece.count])
    found = combine(checksums(bits))
    if found != expected:
        raise SelfCheckFailed(
            f"weights from {piece.start} decode to checksum {found:08x}, encoded were {expected:08x}; "
            "nothing was published",
            file=file,
            tensor=tensor.name,
        )
    return piece.count * ITEM_BITS[tensor.dtype] // 8
