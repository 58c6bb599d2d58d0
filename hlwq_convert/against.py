"""Prove that a file came from a model, and that it is as close to it as its report says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from hlwq_formats import metadata as md
from hlwq_formats.dtypes import BIT_PATTERNS, ITEM_BITS
from hlwq_formats.errors import escape
from hlwq_formats.layout import BLOCK, count_blocks
from hlwq_formats.reader import Reader
from hlwq_formats.safetensors_dir import ModelDir, SourceTensor

from .decode import Piece, pieces
from .inspection import TensorReport, inspect_reader
from .metrics import ErrorSums
from .parallel import call, default_workers, ordered_map
from .source import Source
from .source_digests import digest_tensor


def compare(reader: Reader, source: Source, progress: Callable[[int, int], None]) -> list[str]:
    """Read both and return what speaks against the claim, an empty list when nothing does.

    Compared are names, dtypes, shapes and the SHA-256 of every source tensor, the files that travel, and the error
    of every quantized tensor, computed again: it must equal the report's to the last bit.
    """
    problems = _compare_names(reader, source)
    found = set(source.model.tensors) & set(reader.tensors)
    tensors = [tensor for tensor in source.tensors if tensor.name in found]
    done, total = 0, 2 * sum(tensor.length for tensor in tensors)
    workers = default_workers()
    with ThreadPoolExecutor(workers, "hlwq") as pool:
        for tensor, problem in ordered_map(pool, workers + 1, partial(_compare_bytes, reader, source.model), tensors):
            done += tensor.length
            progress(done, total)
            problems += problem
        reported = {t.name: TensorReport(t.name, t.cosine, t.rel_mse) for t in inspect_reader(reader).tensors}
        for entry in reader.metadata.tensors:
            if isinstance(entry, md.ScalarTensor | md.TrellisTensor) and entry.name in found:
                measured = _measure(reader, source.model, entry, pool, 2 * workers)
                if measured != reported[entry.name]:
                    problems.append(f'tensor "{escape(entry.name)}": {_difference(measured, reported[entry.name])}')
            if entry.name in found:
                done += source.model.tensors[entry.name].length
                progress(done, total)
    return problems


def _compare_names(reader: Reader, source: Source) -> list[str]:
    ours, theirs = reader.tensors, source.model.tensors
    problems = [f'tensor "{escape(name)}": not in the file' for name in theirs if name not in ours]
    problems += [f'tensor "{escape(name)}": not in the model' for name in ours if name not in theirs]
    for name in theirs.keys() & ours.keys():
        a, b = ours[name], theirs[name]
        if (a.dtype, tuple(a.shape)) != (b.dtype, b.shape):
            problems.append(
                f'tensor "{escape(name)}": {a.dtype} {a.shape} in the file, {b.dtype} {list(b.shape)} there'
            )
    for name, _ in source.assets:
        if name not in reader.assets:
            problems.append(f'file "{escape(name)}": does not travel with the file')
        elif reader.read_asset(name) != source.read_asset(name):
            problems.append(f'file "{escape(name)}": differs')
    return sorted(problems)


def _compare_bytes(reader: Reader, model: ModelDir, tensor: SourceTensor) -> tuple[SourceTensor, list[str]]:
    entry = reader.stored_tensor(tensor.name)
    expected = entry.sections[0].sha256 if isinstance(entry, md.RawTensor) else entry.source_sha256
    found = digest_tensor(model, tensor)
    if found == expected:
        return tensor, []
    words = f"SHA-256 of the source is {found[:16]}..., the file was made from {expected[:16]}..."
    return tensor, [f'tensor "{escape(tensor.name)}": {words}']


def _measure(
    reader: Reader, model: ModelDir, entry: md.QuantizedTensor, pool: ThreadPoolExecutor, ahead: int
) -> TensorReport:
    """The error of a quantized tensor as a conversion measures it."""
    sums = ErrorSums()
    for chunk_sums in ordered_map(pool, ahead, call, _tasks(reader, model, entry)):
        sums.add(chunk_sums)
    closeness = sums.closeness()
    if closeness is None:
        return TensorReport(entry.name, None, None)
    return TensorReport(entry.name, closeness.cosine, closeness.rel_mse)


def _tasks(
    reader: Reader, model: ModelDir, entry: md.QuantizedTensor
) -> Iterator[Callable[[], np.ndarray[tuple[int, int], np.dtype[np.float32]]]]:
    from .kernels.measure import measure

    tensor, item_bytes = model.tensors[entry.name], ITEM_BITS[entry.dtype] // 8
    # sums are those of the conversion, or these times a power of two, which leaves every ratio as it is
    exponent = entry.exponent if isinstance(entry, md.ScalarTensor) else min(max(entry.exponent + 28, -126), 112)

    def work(piece: Piece) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        items = np.zeros((2, count_blocks(piece.count) * BLOCK), BIT_PATTERNS[entry.dtype])
        raw = model.read(tensor, piece.start * item_bytes, piece.count * item_bytes)
        items[0, : piece.count] = np.frombuffer(raw, items.dtype)
        piece.decode(items[1, : piece.count])
        return measure(items[0], items[1], entry.dtype, exponent)

    for piece in pieces(reader, entry, entry.dtype):
        yield partial(work, piece)


def _difference(measured: TensorReport, reported: TensorReport) -> str:
    return (
        f"cosine {measured.cosine} and relative squared error {measured.rel_mse} measured, "
        f"{reported.cosine} and {reported.rel_mse} reported"
    )
