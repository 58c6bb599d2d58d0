"""From surveyed tensors to the sections of a container: chunks are encoded in parallel, in one stream over all
tensors, and written in file order."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby

import msgspec

from hlwq_formats import metadata as md
from hlwq_formats.bitpack import unpack
from hlwq_formats.dtypes import ITEM_BITS
from hlwq_formats.errors import BadSafetensors, escape
from hlwq_formats.layout import BLOCK, scalar_lengths
from hlwq_formats.safetensors_dir import ModelDir, SourceTensor
from hlwq_formats.sections import compress_codes, pays
from hlwq_formats.writer import Writer

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
    """What one task made of a run of bytes of one tensor: an encoded chunk, or raw bytes as they are; `frame` is the
    codes of the chunk once more, compressed, where that may pay."""

    of: Surveyed
    source_bytes: int
    content: EncodedChunk | EncodedIndices | bytes
    frame: bytes = b""


class CannotDecode(Exception):
    """A tensor at an end of the float range: its decoding would overflow, or all of it vanish."""


class NotSmaller(Exception):
    """Compression does not save 3 % of the codes of a tensor, though it did of its first chunk."""


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


def _read_piece(model: ModelDir, of: Surveyed, start: int, length: int, compress: bool = True) -> Piece:
    raw = model.read(of.tensor, start, length)
    if of.encode is not None:
        content = of.encode(raw, start * 8 // ITEM_BITS[of.tensor.dtype])
        if not compress or not isinstance(of.code, ScalarCode) or of.code.effort != "best":
            return Piece(of, length, content)
        assert isinstance(content, EncodedChunk)
        codes = unpack(content.codes, of.code.bits, 8 * len(content.codes) // of.code.bits)
        return Piece(of, length, content, compress_codes(codes))
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
    except (CannotDecode, NotSmaller) as error:
        run.writer.rewind(position)
        run.step(-of.tensor.length)
        if isinstance(error, NotSmaller):
            plain = (_read_piece(run.model, of, *place, compress=False) for place in _places(of))
            return _write_quantized(run, of, of.code, plain)
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
    pieces = iter(pieces)
    first = next(pieces)
    put, finish = _open(run.writer, of, code, first)
    sums, checksums, finite = ErrorSums(), [], True
    for piece in chain([first], pieces):
        chunk = piece.content
        assert not isinstance(chunk, bytes)
        put(piece)
        sums.add(chunk.sums)
        checksums.append(combine(chunk.checksums))
        finite &= all_finite(chunk.sums)
        run.step(piece.source_bytes)
    if not finite:
        raise CannotDecode("infinity")
    closeness = sums.closeness()
    if closeness is not None and closeness.cosine == 0:
        raise CannotDecode("zeros")
    entry = finish()
    if of.zeros >= _MOSTLY * tensor.numel:
        share = f"{of.zeros} of {tensor.numel} weights are zero"
        run.warnings.append(f'tensor "{escape(tensor.name)}": {share}: was {escape(tensor.file)} fetched whole?')
    cosine, rel_mse = (None, None) if closeness is None else (closeness.cosine, closeness.rel_mse)
    run.report.append(TensorReport(tensor.name, cosine, rel_mse))
    run.checksums[tensor.name] = checksums
    return entry


Put = Callable[[Piece], None]


def _open(
    writer: Writer, of: Surveyed, code: ScalarCode | TrellisCode, first: Piece
) -> tuple[Put, Callable[[], md.QuantizedTensor]]:
    """Begin a tensor: what takes its pieces, and what makes its entry. The first piece tells how codes are stored."""
    if isinstance(code, TrellisCode):
        return _open_trellis(writer, of, code)
    assert isinstance(first.content, EncodedChunk)
    coded = first.frame != b"" and pays(len(first.frame), len(first.content.codes))
    return _open_coded(writer, of, code) if coded else _open_scalar(writer, of, code)


def _open_scalar(writer: Writer, of: Surveyed, code: ScalarCode) -> tuple[Put, Callable[[], md.ScalarTensor]]:
    lengths = scalar_lengths(of.tensor.numel, code.bits)
    sections = {kind: writer.open_section(kind, length) for kind, length in lengths.items()}
    sections["levels"].write(code.levels.tobytes())

    def put(piece: Piece) -> None:
        assert isinstance(piece.content, EncodedChunk)
        sections["codes"].write(piece.content.codes)
        sections["scales"].write(piece.content.scales)

    return put, lambda: _scalar_entry(of, code, [section.done() for section in sections.values()])


def _open_coded(writer: Writer, of: Surveyed, code: ScalarCode) -> tuple[Put, Callable[[], md.ScalarTensor]]:
    """As `_open_scalar`, with compressed codes, in the place that packed ones would take until all are there: then
    levels and scales move up."""
    lengths = scalar_lengths(of.tensor.numel, code.bits)
    codes, levels, scales = (writer.open_section(kind, length) for kind, length in lengths.items())
    levels.write(code.levels.tobytes())
    packed_digest, frames, room = hashlib.sha256(), list[int](), lengths["codes"]

    def put(piece: Piece) -> None:
        assert isinstance(piece.content, EncodedChunk)
        packed_digest.update(piece.content.codes)
        frames.append(len(piece.frame))
        if sum(frames) <= room:
            codes.write(piece.frame)
        scales.write(piece.content.scales)

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

    def put(piece: Piece) -> None:
        assert isinstance(piece.content, EncodedIndices)
        for data in piece.content.chunks:
            symbols.write(data)
            lengths.append(len(data))

    def finish() -> md.TrellisTensor:
        return md.TrellisTensor(
            tensor.name, tensor.dtype, list(tensor.shape), of.reason, BLOCK, code.row, code.states, code.step,
            code.step_exponent, of.sha256, [*sections, msgspec.structs.replace(symbols.done(), chunks=lengths)],
        )  # fmt: skip

    return put, finish
