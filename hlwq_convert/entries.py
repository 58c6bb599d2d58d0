"""A tensor on its way into a file: its pieces become sections, and what was measured on them its entry."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from hlwq_formats import metadata as md
from hlwq_formats.dtypes import ITEM_BITS
from hlwq_formats.errors import Internal, escape
from hlwq_formats.layout import BLOCK, scalar_lengths
from hlwq_formats.sections import pays
from hlwq_formats.writer import Writer

from .frequencies import add_counts, cost
from .inspection import TensorReport
from .journal import Journal
from .metrics import ErrorSums
from .plan import Choice
from .quantize import EncodedChunk, ScalarCode
from .scalar import Effort
from .survey import Surveyed
from .trellis import EncodedIndices, TrellisCode

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


Content = EncodedChunk | EncodedIndices | bytes
"""An encoded chunk, or raw bytes as they are."""


@dataclass(frozen=True, eq=False)
class Opened:
    """A tensor in the making in one file.

    `place` writes a piece, given the byte of its tensor where it begins, `take` adds it to what the entry will say, and
    `finish` makes that, given the SHA-256 of the source of a quantized tensor. Pieces are taken in order; they are
    placed by any thread and in any order where the length of the tensor `is_known`, else one after the other, each
    before it is taken.
    """

    place: Callable[[int, Content], None]
    take: Callable[[Content], None]
    finish: Callable[[str], md.StoredTensor]


class CannotDecode(Exception):
    """A trellis at an end of the float range, or of very wide steps: it would decode to infinity, or to zeros."""


class NotSmaller(Exception):
    """Compression does not save 3 % of the codes of a tensor, though it did of its first chunk."""


def is_known(choice: Choice, effort: Effort) -> bool:
    """Whether the bytes that a tensor will take are known before it is encoded."""
    return choice.encoding == "raw" or (choice.encoding == "scalar" and effort != "best")


def open_tensor(output: Output, of: Surveyed, first: Content | None) -> Opened:
    """Begin a tensor in a file; `first` is its first piece, or None when its length is known."""
    writer, code = output.writer, of.code
    if code is None:
        return _open_raw(writer, of)
    if isinstance(code, TrellisCode):
        return _measure(output, of, _open_trellis(writer, of, code))
    if first is not None and _is_smaller(first):
        return _measure(output, of, _open_coded(writer, of, code))
    return _measure(output, of, _open_scalar(writer, of, code))


def _open_raw(writer: Writer, of: Surveyed) -> Opened:
    tensor = of.tensor
    section = writer.open_section("raw", tensor.length)

    def place(start: int, content: Content) -> None:
        assert isinstance(content, bytes)
        section.place(start, content)

    def take(content: Content) -> None:
        assert isinstance(content, bytes)
        section.count(content)

    def finish(source: str) -> md.RawTensor:
        return md.RawTensor(tensor.name, tensor.dtype, list(tensor.shape), of.reason, [section.done()])

    return Opened(place, take, finish)


def _measure(output: Output, of: Surveyed, opened: Opened) -> Opened:
    """The same with what is measured on a quantized tensor."""
    from .kernels.checksum import combine

    tensor = of.tensor
    sums, checksums = ErrorSums(), list[int]()
    counts = np.zeros(2, np.int64)  # of the indices of a trellis

    def take(chunk: Content) -> None:
        nonlocal counts
        assert not isinstance(chunk, bytes)
        opened.take(chunk)
        sums.add(chunk.sums)
        checksums.extend(combine(chunk.checksums))
        if isinstance(chunk, EncodedIndices):
            counts = add_counts(counts, chunk.counts)

    def finish(source: str) -> md.StoredTensor:
        closeness = sums.closeness()
        what = (
            "infinity" if not sums.is_finite() else "zeros" if closeness is not None and closeness.cosine == 0 else None
        )
        if what is not None and isinstance(of.code, TrellisCode):
            raise CannotDecode(what)
        if what is not None:  # the survey keeps such tensors raw
            raise Internal(f"it decodes to {what}", file=tensor.file, tensor=tensor.name)
        entry = opened.finish(source)
        if of.zeros >= _MOSTLY * tensor.numel:
            share = f"{of.zeros} of {tensor.numel} weights are zero"
            output.warnings.append(f'tensor "{escape(tensor.name)}": {share}: was {escape(tensor.file)} fetched whole?')
        cosine, rel_mse = (None, None) if closeness is None else (closeness.cosine, closeness.rel_mse)
        entropy_bytes = math.ceil(cost(counts) / 8) if isinstance(of.code, TrellisCode) else None
        output.report.append(TensorReport(tensor.name, cosine, rel_mse, entropy_bytes))
        output.checksums[tensor.name] = checksums
        return entry

    return Opened(opened.place, take, finish)


def _is_smaller(chunk: Content) -> bool:
    """Whether the codes of the first chunk of a tensor, and so most likely all, are to be compressed."""
    return isinstance(chunk, EncodedChunk) and chunk.frame != b"" and pays(len(chunk.frame), len(chunk.codes))


def _open_scalar(writer: Writer, of: Surveyed, code: ScalarCode) -> Opened:
    lengths = scalar_lengths(of.tensor.numel, code.bits)
    sections = {kind: writer.open_section(kind, length) for kind, length in lengths.items()}
    sections["levels"].write(code.levels.tobytes())

    def place(start: int, chunk: Content) -> None:
        assert isinstance(chunk, EncodedChunk)
        n_blocks = start * 8 // (ITEM_BITS[code.dtype] * BLOCK)
        sections["codes"].place(n_blocks * BLOCK * code.bits // 8, chunk.codes)
        sections["scales"].place(2 * n_blocks, chunk.scales)

    def take(chunk: Content) -> None:
        assert isinstance(chunk, EncodedChunk)
        sections["codes"].count(chunk.codes)
        sections["scales"].count(chunk.scales)

    def finish(source: str) -> md.ScalarTensor:
        return _scalar_entry(of, code, source, [section.done() for section in sections.values()])

    return Opened(place, take, finish)


def _open_coded(writer: Writer, of: Surveyed, code: ScalarCode) -> Opened:
    """As `_open_scalar`, with compressed codes, in the place that packed ones would take until all are there: then
    levels and scales move up."""
    lengths = scalar_lengths(of.tensor.numel, code.bits)
    codes, levels, scales = (writer.open_section(kind, length) for kind, length in lengths.items())
    levels.write(code.levels.tobytes())
    packed_digest, frames, room = hashlib.sha256(), list[int](), lengths["codes"]

    def place(start: int, chunk: Content) -> None:
        assert isinstance(chunk, EncodedChunk)
        frames.append(len(chunk.frame))
        if sum(frames) <= room:
            codes.write(chunk.frame)
        scales.write(chunk.scales)

    def take(chunk: Content) -> None:
        assert isinstance(chunk, EncodedChunk)
        packed_digest.update(chunk.codes)

    def finish(source: str) -> md.ScalarTensor:
        if not pays(sum(frames), room):
            raise NotSmaller
        codes.shrink([levels, scales])
        packing = md.Zstd(frames, room, packed_digest.hexdigest())
        section = msgspec.structs.replace(codes.done(), zstd_codes=packing)
        return _scalar_entry(of, code, source, [section, levels.done(), scales.done()])

    return Opened(place, take, finish)


def _scalar_entry(of: Surveyed, code: ScalarCode, source: str, sections: list[md.Section]) -> md.ScalarTensor:
    tensor = of.tensor
    return md.ScalarTensor(
        tensor.name, tensor.dtype, list(tensor.shape), of.reason, code.bits, BLOCK, code.exponent, source, sections
    )


def _open_trellis(writer: Writer, of: Surveyed, code: TrellisCode) -> Opened:
    tensor, lengths = of.tensor, list[int]()
    sections = [
        writer.write_section("scales", code.row_scales.tobytes(), compress=True),
        writer.write_section("frequencies", code.pairs.astype("<u2").tobytes(), compress=True),
    ]
    symbols = writer.open_section("symbols", None)

    def place(start: int, chunk: Content) -> None:
        assert isinstance(chunk, EncodedIndices)
        for data in chunk.chunks:
            symbols.write(data)

    def take(chunk: Content) -> None:
        assert isinstance(chunk, EncodedIndices)
        lengths.extend(map(len, chunk.chunks))

    def finish(source: str) -> md.TrellisTensor:
        return md.TrellisTensor(
            tensor.name, tensor.dtype, list(tensor.shape), of.reason, BLOCK, code.row, code.states, code.step,
            code.step_exponent, source, [*sections, msgspec.structs.replace(symbols.done(), chunks=lengths)],
        )  # fmt: skip

    return Opened(place, take, finish)
