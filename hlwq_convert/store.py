"""From surveyed tensors to the sections of one or several containers: chunks are read once, encoded in parallel for
each container, in one stream over all tensors, and written in file order."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from .journal import Journal
from .metrics import ErrorSums
from .parallel import call, ordered_map
from .plan import Choice
from .quantize import CHUNK, EncodedChunk, ScalarCode, all_finite, combine
from .scalar import Effort
from .survey import MakeEncoder, Surveyed, survey
from .trellis import EncodedIndices, TrellisCode

_RAW_PIECE = 4 << 20
_MOSTLY = 0.999


@dataclass(eq=False)
class Output:
    """One file in the making: what its tensors share. `tensors` are the entries of those that it has."""

    writer: Writer
    journal: Journal
    choices: dict[str, Choice]
    warnings: list[str]
    tensors: list[md.StoredTensor] = field(default_factory=list)
    report: list[TensorReport] = field(default_factory=list)
    checksums: dict[str, list[int]] = field(default_factory=dict)  # of the decoded chunks of each tensor


@dataclass
class Run:
    """What the files share that are made in one pass over a model."""

    model: ModelDir
    pool: ThreadPoolExecutor
    workers: int
    effort: Effort
    nonfinite: str
    make_encoder: MakeEncoder
    step: Callable[[int], None]
    stop: threading.Event = field(default_factory=threading.Event)  # set when no more is wanted


@dataclass(frozen=True, eq=False)
class Taken:
    """A tensor, the files that take it, and what each of them makes of it."""

    tensor: SourceTensor
    outputs: Sequence[Output]
    surveyed: list[Surveyed]


Content = EncodedChunk | EncodedIndices | bytes
"""An encoded chunk, or raw bytes as they are."""

Put = Callable[[Content], None]


@dataclass(frozen=True)
class Piece:
    """What one task made of a run of bytes of one tensor, for each of the files."""

    of: Taken
    source_bytes: int
    contents: list[Content]


class CannotDecode(Exception):
    """A tensor at an end of the float range: its decoding would overflow, or all of it vanish."""


def write_tensors(run: Run, tensors: Iterable[tuple[SourceTensor, Sequence[Output]]]) -> Iterator[Taken]:
    """Store tensors in the given order, each in the files given with it, and yield those that are stored."""

    def look(item: tuple[SourceTensor, Sequence[Output]]) -> Taken:
        tensor, outputs = item
        choices = [output.choices[tensor.name] for output in outputs]
        surveyed = survey(run.model, tensor, choices, run.effort, run.nonfinite, run.stop, run.make_encoder)
        return Taken(tensor, outputs, surveyed)

    taken = ordered_map(run.pool, 2 * run.workers + 2, look, tensors)
    tasks = (partial(_read_piece, run.model, of, *place) for of in taken for place in _places(of))
    pieces = ordered_map(run.pool, 2 * run.workers, call, tasks)
    for of, group in groupby(pieces, key=lambda piece: piece.of):
        _write_tensor(run, of, group)
        yield of


def _places(of: Taken) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of each piece of a tensor, at least one."""
    raw = all(one.code is None for one in of.surveyed)
    size = _RAW_PIECE if raw else CHUNK * ITEM_BITS[of.tensor.dtype] // 8
    for start in range(0, max(of.tensor.length, 1), size):
        yield start, min(size, of.tensor.length - start)


def _read_piece(model: ModelDir, of: Taken, start: int, length: int) -> Piece:
    raw = model.read(of.tensor, start, length)
    if of.tensor.dtype == "BOOL" and max(raw, default=0) > 1:
        raise BadSafetensors(f"a boolean is {max(raw)}, expected 0 or 1", file=of.tensor.file, tensor=of.tensor.name)
    first = start * 8 // ITEM_BITS[of.tensor.dtype]
    return Piece(of, length, [raw if one.encode is None else one.encode(raw, first) for one in of.surveyed])


def _write_tensor(run: Run, of: Taken, pieces: Iterable[Piece]) -> None:
    """Store one tensor in each file as chosen, or raw where it cannot be quantized."""
    positions = [output.writer.position for output in of.outputs]
    opened = [_open_tensor(output, one) for output, one in zip(of.outputs, of.surveyed, strict=True)]
    for piece in pieces:
        for (put, _), content in zip(opened, piece.contents, strict=True):
            put(content)
        run.step(piece.source_bytes * len(opened))
    for output, position, (_, finish) in zip(of.outputs, positions, opened, strict=True):
        try:
            output.tensors.append(finish())
        except CannotDecode as error:
            output.writer.rewind(position)
            run.step(-of.tensor.length)
            _write_raw(run, output, Surveyed(of.tensor, f"quantized it would decode to {error}"))


def _write_raw(run: Run, output: Output, of: Surveyed) -> None:
    """Read a tensor once more and store it raw in one file."""
    put, finish = _open_raw(output, of)
    taken = Taken(of.tensor, [output], [of])
    for piece in (_read_piece(run.model, taken, *place) for place in _places(taken)):
        put(piece.contents[0])
        run.step(piece.source_bytes)
    output.tensors.append(finish())


def _open_tensor(output: Output, of: Surveyed) -> tuple[Put, Callable[[], md.StoredTensor]]:
    """Begin a tensor in a file: what takes its pieces, and what makes its entry."""
    return _open_raw(output, of) if of.code is None else _open_quantized(output, of, of.code)


def _open_raw(output: Output, of: Surveyed) -> tuple[Put, Callable[[], md.RawTensor]]:
    tensor = of.tensor
    section = output.writer.open_section("raw", tensor.length)

    def put(content: Content) -> None:
        assert isinstance(content, bytes)
        section.write(content)

    def finish() -> md.RawTensor:
        return md.RawTensor(tensor.name, tensor.dtype, list(tensor.shape), of.reason, [section.done()])

    return put, finish


def _open_quantized(
    output: Output, of: Surveyed, code: ScalarCode | TrellisCode
) -> tuple[Put, Callable[[], md.QuantizedTensor]]:
    tensor = of.tensor
    store: Put
    make_entry: Callable[[], md.QuantizedTensor]
    store, make_entry = (
        _open_scalar(output.writer, of, code)
        if isinstance(code, ScalarCode)
        else _open_trellis(output.writer, of, code)
    )
    sums, checksums, finite = ErrorSums(), list[int](), True
    counts = np.zeros(2, np.int64)  # of the indices of a trellis

    def put(chunk: Content) -> None:
        nonlocal counts, finite
        assert not isinstance(chunk, bytes)
        store(chunk)
        sums.add(chunk.sums)
        checksums.append(combine(chunk.checksums))
        finite &= all_finite(chunk.sums)
        if isinstance(chunk, EncodedIndices):
            counts = add_counts(counts, chunk.counts)

    def finish() -> md.QuantizedTensor:
        if not finite:
            raise CannotDecode("infinity")
        closeness = sums.closeness()
        if closeness is not None and closeness.cosine == 0:
            raise CannotDecode("zeros")
        if of.zeros >= _MOSTLY * tensor.numel:
            share = f"{of.zeros} of {tensor.numel} weights are zero"
            output.warnings.append(f'tensor "{escape(tensor.name)}": {share}: was {escape(tensor.file)} fetched whole?')
        cosine, rel_mse = (None, None) if closeness is None else (closeness.cosine, closeness.rel_mse)
        entropy_bytes = math.ceil(cost(counts) / 8) if isinstance(code, TrellisCode) else None
        output.report.append(TensorReport(tensor.name, cosine, rel_mse, entropy_bytes))
        output.checksums[tensor.name] = checksums
        return make_entry()

    return put, finish


def _open_scalar(writer: Writer, of: Surveyed, code: ScalarCode) -> tuple[Put, Callable[[], md.ScalarTensor]]:
    """Begin a tensor of scalar codes: what takes its chunks, and what makes its entry."""
    tensor = of.tensor
    sections = {kind: writer.open_section(kind, n) for kind, n in scalar_lengths(tensor.numel, code.bits).items()}
    sections["levels"].write(code.levels.tobytes())

    def put(chunk: Content) -> None:
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

    def put(chunk: Content) -> None:
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
