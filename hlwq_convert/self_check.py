"""Before a file is published: every byte as it was written, and every quantized tensor decodes from the file to
the bits that its error was measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from hlwq_formats import metadata as md
from hlwq_formats.dtypes import BIT_PATTERNS, ITEM_BITS
from hlwq_formats.errors import SelfCheckFailed
from hlwq_formats.layout import BLOCK, count_blocks, numel
from hlwq_formats.reader import Reader

from .decode import Piece, pieces, stored_bytes
from .parallel import Helpers, call, ordered_map
from .quantize import CHUNK

_AHEAD = 1 << 12  # tensors that may wait: while one thread has the largest, the others are to find enough


def self_check(
    reader: Reader,
    checksums: dict[str, list[int]],
    pool: ThreadPoolExecutor,
    workers: int,
    piece: int,
    step: Callable[[int], None],
) -> None:
    """Verify a whole file, each tensor in a thread, `piece` weights at a time; `checksums` are those of the chunks of
    its quantized tensors.

    Raises what Reader.verify raises, or SelfCheckFailed (70).
    """
    reader.verify_shared()
    tensors = [tensor for tensor in reader.metadata.tensors if not isinstance(tensor, md.AliasTensor)]
    tensors.sort(key=stored_bytes, reverse=True)  # the last to end is then a small one
    helpers = Helpers(workers - 1)
    tasks: Iterator[Callable[[], int | None]]
    tasks = chain((partial(_check, reader, checksums, piece, helpers, tensor) for tensor in tensors), helpers.tasks())
    results = ordered_map(pool, _AHEAD, call, tasks)
    try:
        for done in islice(results, len(tensors)):
            step(done or 0)
    finally:
        helpers.stop()
    for _ in results:
        pass


def _check(
    reader: Reader, checksums: dict[str, list[int]], size: int, helpers: Helpers, tensor: md.StoredTensor
) -> int:
    """Verify a tensor, and return the bytes of its source. What is left of it when there is nothing else to do is
    checked by all threads."""
    if isinstance(tensor, md.RawTensor):
        reader.verify_tensor(tensor)
    else:
        for piece in pieces(reader, tensor, tensor.dtype, size):
            helpers.give(partial(_check_piece, reader.path, tensor, piece, checksums[tensor.name]))
    return numel(tensor.shape) * ITEM_BITS[tensor.dtype] // 8


def _check_piece(file: str, tensor: md.QuantizedTensor, piece: Piece, expected: list[int]) -> None:
    from .kernels.checksum import checksums, combine

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
