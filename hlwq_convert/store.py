"""From surveyed tensors to the sections of one or several containers: chunks are read once, encoded in parallel for
each container, in one stream over all tensors, and written in file order."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby

import msgspec
import numpy as np

from hlwq_formats import metadata as md
from hlwq_formats.bitpack import unpack
from hlwq_formats.dtypes import ITEM_BITS
from hlwq_formats.errors import BadSafetensors, escape
from hlwq_formats.layout import BLOCK, scalar_lengths
from hlwq_formats.safetensors_dir import ModelDir, SourceTensor
from hlwq_formats.sections import compress_codes, pays
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


class NotSmaller(Exception):
    """Compression does not save 3 % of the codes of a tensor, though it did of its first chunk."""


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
    return Piece(of, length, [_encode(one, raw, first) for one in of.surveyed])


def _encode(of: Surveyed, raw: bytes, first: int) -> Content:
    """Encode weights from flat index `first`; codes of the best effort a second time, compressed."""
    if of.encode is None:
        return raw
    chunk = of.encode(raw, first)
    if isinstance(of.code, ScalarCode) and of.code.effort == "best" and not of.packed:
        assert isinstance(chunk, EncodedChunk)
        codes = unpack(chunk.codes, of.code.bits, 8 * len(chunk.codes) // of.code.bits)
        return replace(chunk, frame=compress_codes(codes))
    return chunk


def _write_tensor(run: Run, of: Taken, pieces: Iterable[Piece]) -> None:
    """Store one tensor in each file as chosen, or raw where it cannot be quantized."""
    positions = [output.writer.position for output in of.outputs]
    pieces = iter(pieces)
    first = next(pieces)
    opened = [_open_tensor(*each) for each in zip(of.outputs, of.surveyed, first.contents, strict=True)]
    for piece in chain([first], pieces):
        for (put, _), content in zip(opened, piece.contents, strict=True):
            put(content)
        run.step(piece.source_bytes * len(opened))
    for output, one, position, (_, finish) in zip(of.outputs, of.surveyed, positions, opened, strict=True):
        try:
            output.tensors.append(finish())
        except (CannotDecode, NotSmaller) as error:
            output.writer.rewind(position)
            run.step(-of.tensor.length)
            plain = replace(one, packed=True)
            raw = Surveyed(of.tensor, f"quantized it would decode to {error}")
            taken = Taken(of.tensor, [output], [plain if isinstance(error, NotSmaller) else raw])
            _write_tensor(run, taken, (_read_piece(run.model, taken, *place) for place in _places(taken)))


def _open_tensor(output: Output, of: Surveyed, first: Content) -> tuple[Put, Callable[[], md.StoredTensor]]:
    """Begin a tensor in a file: what takes its pieces, of which this is the first, and what makes its entry."""
    return _open_raw(output, of) if of.code is None else _open_quantized(output, of, of.code, first)


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
    output: Output, of: Surveyed, code: ScalarCode | TrellisCode, first: Content
) -> tuple[Put, Callable[[], md.QuantizedTensor]]:
    tensor = of.tensor
    store: Put
    make_entry: Callable[[], md.QuantizedTensor]
    if isinstance(code, TrellisCode):
        store, make_entry = _open_trellis(output.writer, of, code)
    else:
        store, make_entry = (_open_coded if _is_smaller(first) else _open_scalar)(output.writer, of, code)
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
        entry = make_entry()
        if of.zeros >= _MOSTLY * tensor.numel:
            share = f"{of.zeros} of {tensor.numel} weights are zero"
            output.warnings.append(f'tensor "{escape(tensor.name)}": {share}: was {escape(tensor.file)} fetched whole?')
        cosine, rel_mse = (None, None) if closeness is None else (closeness.cosine, closeness.rel_mse)
        entropy_bytes = math.ceil(cost(counts) / 8) if isinstance(code, TrellisCode) else None
        output.report.append(TensorReport(tensor.name, cosine, rel_mse, entropy_bytes))
        output.checksums[tensor.name] = checksums
        return entry

    return put, finish


def _is_smaller(chunk: Content) -> bool:
    """Whether the codes of the first chunk of a tensor, and so most likely all, are to be compressed."""
    return isinstance(chunk, EncodedChunk) and chunk.frame != b"" and pays(len(chunk.frame), len(chunk.codes))


def _open_scalar(writer: Writer, of: Surveyed, code: ScalarCode) -> tuple[Put, Callable[[], md.ScalarTensor]]:
    lengths = scalar_lengths(of.tensor.numel, code.bits)
    sections = {kind: writer.open_section(kind, length) for kind, length in lengths.items()}
    sections["levels"].write(code.levels.tobytes())

    def put(chunk: Content) -> None:
        assert isinstance(chunk, EncodedChunk)
        sections["codes"].write(chunk.codes)
        sections["scales"].write(chunk.scales)

    return put, lambda: _scalar_entry(of, code, [section.done() for section in sections.values()])


def _open_coded(writer: Writer, of: Surveyed, code: ScalarCode) -> tuple[Put, Callable[[], md.ScalarTensor]]:
    """As `_open_scalar`, with compressed codes, in the place that packed ones would take until all are there: then
    levels and scales move up."""
    lengths = scalar_lengths(of.tensor.numel, code.bits)
    codes, levels, scales = (writer.open_section(kind, length) for kind, length in lengths.items())
    levels.write(code.levels.tobytes())
    packed_digest, frames, room = hashlib.sha256(), list[int](), lengths["codes"]

    def put(chunk: Content) -> None:
        assert isinstance(chunk, EncodedChunk)
        packed_digest.update(chunk.codes)
        frames.append(len(chunk.frame))
        if sum(frames) <= room:
            codes.write(chunk.frame)
        scales.write(chunk.scales)

    def finish() -> md.ScalarTensor:
        if not pays(sum(frames), room):
            raise NotSmaller
        codes.shrink([levels, scales])
        packing = md.Zstd(frames, room, packed_digest.hexdigest())
        section = msgspec.structs.replace(codes.done(), zstd_codes=packing)
        return _scalar_entry(of, code, [section, levels.done(), scales.done()])

    return put, finish


def _scalar_entry(of: Surveyed, code: ScalarCode, sections: list[md.Section]) -> md.ScalarTensor:
    tensor = of.tensor
    return md.ScalarTensor(
        tensor.name, tensor.dtype, list(tensor.shape), of.reason, code.bits, BLOCK, code.exponent, of.sha256, sections
    )


def _open_trellis(writer: Writer, of: Surveyed, code: TrellisCode) -> tuple[Put, Callable[[], md.TrellisTensor]]:
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
