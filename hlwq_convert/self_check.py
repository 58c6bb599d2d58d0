"""Before a file is published: every byte as it was written, and every quantized tensor decodes from the file to
the bits that its error was measured on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from hlwq_formats import metadata as md
from hlwq_formats.dtypes import BIT_PATTERNS, ITEM_BITS
from hlwq_formats.errors import SelfCheckFailed
from hlwq_formats.layout import BLOCK, count_blocks, numel
from hlwq_formats.reader import Reader

from .decode import Piece, pieces, stored_bytes
from .parallel import ordered_map
from .quantize import CHUNK, combine

_PIECE = 4 * CHUNK  # weights that are decoded at once


def self_check(
    reader: Reader, checksums: dict[str, list[int]], pool: ThreadPoolExecutor, workers: int, step: Callable[[int], None]
) -> None:
    """Verify a whole file, each tensor in a thread; `checksums` are those of the chunks of its quantized tensors.

    Raises what Reader.verify raises, or SelfCheckFailed (70).
    """
    reader.verify_shared()
    tensors = [tensor for tensor in reader.metadata.tensors if not isinstance(tensor, md.AliasTensor)]
    tensors.sort(key=stored_bytes, reverse=True)  # the last to end is then a small one
    # while one thread has the largest, the others are to find enough
    for done in ordered_map(pool, 16 * workers, partial(_check, reader, checksums), tensors):
        step(done)


def _check(reader: Reader, checksums: dict[str, list[int]], tensor: md.StoredTensor) -> int:
    """Verify a tensor, and return the bytes of its source."""
    if isinstance(tensor, md.RawTensor):
        reader.verify_tensor(tensor)
    else:
        for piece in pieces(reader, tensor, tensor.dtype, _PIECE):
            _check_piece(reader.path, tensor, piece, checksums[tensor.name])
    return numel(tensor.shape) * ITEM_BITS[tensor.dtype] // 8


def _check_piece(file: str, tensor: md.QuantizedTensor, piece: Piece, expected: list[int]) -> None:
    from .kernels.checksum import checksums

    bits: NDArray[np.unsignedinteger] = np.empty(count_blocks(piece.count) * BLOCK, BIT_PATTERNS[tensor.dtype])
    bits[piece.count :] = 0
    piece.decode(bits[: piece.count])
    for number, found in enumerate(combine(checksums(bits)), piece.start // CHUNK):
        if found != expected[number]:
            raise SelfCheckFailed(
                f"weights from {number * CHUNK} decode to checksum {found:08x}, encoded were {expected[number]:08x}; "
                "nothing was published",
                file=file,
                tensor=tensor.name,
            )
