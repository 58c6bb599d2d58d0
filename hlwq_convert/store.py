"""From surveyed tensors to the sections of a container: chunks are encoded in parallel, in one stream over all
tensors, and written in file order."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import msgspec
import numpy as np

from hlwq_formats import metadata as md
from hlwq_formats.dtypes import ITEM_BITS
from hlwq_formats.errors import BadSafetensors, escape
from hlwq_formats.layout import BLOCK, scalar_lengths
from hlwq_formats.safetensors_dir import ModelDir, SourceTensor
from hlwq_formats.writer import Writer

from .frequencies import add_counts, cost
from .inspection import TensorReport
from .metrics import ErrorSums
from .parallel import call, ordered_map
from .plan import Choice
from .quantize import CHUNK, EncodedChunk, ScalarCode, all_finite, combine
from .scalar import Effort
from .survey import MakeEncoder, Surveyed, survey
from .trellis import EncodedIndices, TrellisCode

_RAW_PIECE = 4 << 20
_MOSTLY = 0.999


@dataclass
class Run:
    """The state that the tensors of one conversion share."""

    model: ModelDir
    writer: Writer
    pool: ThreadPoolExecutor
    workers: int
    effort: Effort
    nonfinite: str
    make_encoder: MakeEncoder
    step: Callable[[int], None]
    warnings: list[str]
    report: list[TensorReport] = field(default_factory=list)
    checksums: dict[str, list[int]] = field(default_factory=dict)  # of the decoded chunks of each tensor
    stop: threading.Event = field(default_factory=threading.Event)  # set when no more is wanted


@dataclass(frozen=True)
class Piece:
    """What one task made of a run of bytes of one tensor: an encoded chunk, or raw bytes as they are."""

    of: Surveyed
    source_bytes: int
    content: EncodedChunk | EncodedIndices | bytes


class CannotDecode(Exception):
    """A tensor at an end of the float range: its decoding would overflow, or all of it vanish."""


def write_tensors(run: Run, tensors: Iterable[tuple[SourceTensor, Choice]]) -> Iterator[md.StoredTensor]:
    """Store tensors in the given order and yield their entries."""

    def look(item: tuple[SourceTensor, Choice]) -> Surveyed:
        return survey(run.model, *item, run.effort, run.nonfinite, run.stop, run.make_encoder)

    surveyed = ordered_map(run.pool, 2 * run.workers + 2, look, tensors)
    tasks = (partial(_read_piece, run.model, of, *place) for of in surveyed for place in _places(of))
    pieces = ordered_map(run.pool, 2 * run.workers, call, tasks)
    for of, group in groupby(pieces, key=lambda piece: piece.of):
        yield _write_tensor(run, of, group)


def _places(of: Surveyed) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of each piece of a tensor, at least one."""
    size = _RAW_PIECE if of.code is None else CHUNK * ITEM_BITS[of.tensor.dtype] // 8
    for start in range(0, max(of.tensor.length, 1), size):
        yield start, min(size, of.tensor.length - start)


def _read_piece(model: ModelDir, of: Surveyed, start: int, length: int) -> Piece:
    raw = model.read(of.tensor, start, length)
    if of.encode is not None:
        return Piece(of, length, of.encode(raw, start * 8 // ITEM_BITS[of.tensor.dtype]))
    if of.tensor.dtype == "BOOL" and max(raw, default=0) > 1:
        raise BadSafetensors(f"a boolean is {max(raw)}, expected 0 or 1", file=of.tensor.file, tensor=of.tensor.name)
    return Piece(of, length, raw)


def _write_tensor(run: Run, of: Surveyed, pieces: Iterable[Piece]) -> md.StoredTensor:
    """Store one tensor as chosen, or raw where it cannot be quantized."""
    if of.code is None:
        return _write_raw(run, of, pieces)
    position = run.writer.position
    try:
        return _write_quantized(run, of, of.code, pieces)
    except CannotDecode as error:
        run.writer.rewind(position)
        run.step(-of.tensor.length)
        raw = Surveyed(of.tensor, f"quantized it would decode to {error}")
        return _write_raw(run, raw, (_read_piece(run.model, raw, *place) for place in _places(raw)))


def _write_raw(run: Run, of: Surveyed, pieces: Iterable[Piece]) -> md.RawTensor:
    tensor = of.tensor
    section = run.writer.open_section("raw", tensor.length)
    for piece in pieces:
        assert isinstance(piece.content, bytes)
        section.write(piece.content)
        run.step(piece.source_bytes)
    return md.RawTensor(tensor.name, tensor.dtype, list(tensor.shape), of.reason, [section.done()])


def _write_quantized(
    run: Run, of: Surveyed, code: ScalarCode | TrellisCode, pieces: Iterable[Piece]
) -> md.QuantizedTensor:
    tensor = of.tensor
    put: Put
    finish: Callable[[], md.QuantizedTensor]
    put, finish = (
        _open_scalar(run.writer, of, code) if isinstance(code, ScalarCode) else _open_trellis(run.writer, of, code)
    )
    sums, checksums, finite = ErrorSums(), [], True
    counts = np.zeros(2, np.int64)  # of the indices of a trellis
    for piece in pieces:
        chunk = piece.content
        assert not isinstance(chunk, bytes)
        put(chunk)
        sums.add(chunk.sums)
        checksums.append(combine(chunk.checksums))
        finite &= all_finite(chunk.sums)
        if isinstance(chunk, EncodedIndices):
            counts = add_counts(counts, chunk.counts)
        run.step(piece.source_bytes)
    if not finite:
        raise CannotDecode("infinity")
    closeness = sums.closeness()
    if closeness is not None and closeness.cosine == 0:
        raise CannotDecode("zeros")
    if of.zeros >= _MOSTLY * tensor.numel:
        share = f"{of.zeros} of {tensor.numel} weights are zero"
        run.warnings.append(f'tensor "{escape(tensor.name)}": {share}: was {escape(tensor.file)} fetched whole?')
    cosine, rel_mse = (None, None) if closeness is None else (closeness.cosine, closeness.rel_mse)
    entropy_bytes = math.ceil(cost(counts) / 8) if isinstance(code, TrellisCode) else None
    run.report.append(TensorReport(tensor.name, cosine, rel_mse, entropy_bytes))
    run.checksums[tensor.name] = checksums
    return finish()


Put = Callable[[EncodedChunk | EncodedIndices], None]


def _open_scalar(writer: Writer, of: Surveyed, code: ScalarCode) -> tuple[Put, Callable[[], md.ScalarTensor]]:
    """Begin a tensor of scalar codes: what takes its chunks, and what makes its entry."""
    tensor = of.tensor
    sections = {kind: writer.open_section(kind, n) for kind, n in scalar_lengths(tensor.numel, code.bits).items()}
    sections["levels"].write(code.levels.tobytes())

    def put(chunk: EncodedChunk | EncodedIndices) -> None:
        assert isinstance(chunk, EncodedChunk)
        sections["codes"].write(chunk.codes)
        sections["scales"].write(chunk.scales)

    def finish() -> md.ScalarTensor:
        return md.ScalarTensor(
            tensor.name, tensor.dtype, list(tensor.shape), of.reason, code.bits, BLOCK, code.exponent, of.sha256,
            [section.done() for section in sections.values()],
        )  # fmt: skip

    return put, finish


def _open_trellis(writer: Writer, of: Surveyed, code: TrellisCode) -> tuple[Put, Callable[[], md.TrellisTensor]]:
    """Begin a tensor of a trellis: what takes its chunks, and what makes its entry."""
    tensor, lengths = of.tensor, list[int]()
    sections = [
        writer.write_section("scales", code.row_scales.tobytes(), compress=True),
        writer.write_section("frequencies", code.pairs.astype("<u2").tobytes(), compress=True),
    ]
    symbols = writer.open_section("symbols", None)

    def put(chunk: EncodedChunk | EncodedIndices) -> None:
        assert isinstance(chunk, EncodedIndices)
        for data in chunk.chunks:
            symbols.write(data)
            lengths.append(len(data))

    def finish() -> md.TrellisTensor:
        return md.TrellisTensor(
            tensor.name, tensor.dtype, list(tensor.shape), of.reason, BLOCK, code.row, code.states, code.step,
            code.step_exponent, of.sha256, [*sections, msgspec.structs.replace(symbols.done(), chunks=lengths)],
        )  # fmt: skip

    return put, finish
