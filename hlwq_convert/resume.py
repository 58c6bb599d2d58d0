"""Go on where an interrupted conversion of the same model, by the same command, left off."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from hlwq_formats import metadata as md
from hlwq_formats.layout import align, scalar_lengths
from hlwq_formats.safetensors_dir import SourceTensor
from hlwq_formats.sections import zstd_version
from hlwq_formats.writer import Writer

from . import __version__
from .journal import Done, Fingerprint, Journal
from .parallel import ordered_map
from .plan import Choice
from .source import Source

Planned = Sequence[tuple[SourceTensor, Choice]]
Digest = Callable[[SourceTensor], str]
"""SHA-256 of a tensor's bytes, in hexadecimal."""


def fingerprint(source: Source, recipe: md.Recipe, planned: Planned, nonfinite: str) -> Fingerprint:
    """What decides the bytes of a file beside the weights themselves, whose digests are in the journal's lines."""

    def digest(*parts: object) -> str:
        return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()[:32]

    tensors = [(t.name, t.dtype, t.shape, t.file, t.offset, t.length) for t in source.tensors]
    choices = [(t.name, choice.bits, choice.step, choice.reason) for t, choice in planned]
    return Fingerprint(
        tool=digest(__version__, zstd_version()),
        options=digest(recipe, choices, nonfinite),
        source=digest(source.provenance, tensors),
    )


def load_earlier(writer: Writer, journal: Journal) -> tuple[list[Done], str | None]:
    """The tensors that the journal of an interrupted run lists, and why an earlier run is of no use, if so. When there
    are none, `writer` has begun anew."""
    if not writer.resumed:
        return [], None
    earlier, problem = journal.load()
    if not earlier:
        writer.restart()
    return earlier, problem


def still_good(
    writer: Writer, earlier: list[Done], digest: Digest, planned: Planned, pool: ThreadPoolExecutor, ahead: int
) -> list[Done]:
    """The beginning of `earlier` whose sections, behind the writer's position, and source (of which `digest` knows)
    both hash to what they did, and which is the beginning of what is planned."""

    def is_good(item: tuple[Done, SourceTensor, int]) -> bool:
        done, tensor, position = item
        return _is_stored(writer, done.tensor, position) and digest(tensor) == _source_digest(done.tensor)

    kept = 0
    for good in ordered_map(pool, ahead, is_good, _match(earlier, planned, writer.position)):
        if not good:
            break
        kept += 1
    return earlier[:kept]


def _match(earlier: list[Done], planned: Planned, position: int) -> Iterator[tuple[Done, SourceTensor, int]]:
    """Each journalled tensor with its source and where its sections begin, as long as they fit the plan: whether codes
    were worth compressing, and what else depends on weights, only the file tells."""
    for done, (tensor, choice) in zip(earlier, planned, strict=False):
        entry = done.tensor
        lengths = {("raw", tensor.length)}
        if isinstance(entry, md.ScalarTensor) and choice.bits is not None:
            lengths = set(scalar_lengths(tensor.numel, choice.bits).items())
        elif isinstance(entry, md.TrellisTensor) and choice.step is not None:
            lengths = {(section.kind, md.raw_length(section)) for section in entry.sections}
        if (entry.name, entry.dtype, tuple(entry.shape)) != (tensor.name, tensor.dtype, tensor.shape):
            return
        if {(section.kind, md.raw_length(section)) for section in entry.sections} != lengths:
            return
        yield done, tensor, position
        for section in entry.sections:
            position = align(position) + section.length


def _is_stored(writer: Writer, entry: md.StoredTensor, position: int) -> bool:
    for section in entry.sections:
        start = align(position)
        if not writer.holds(section, start):
            return False
        position = start + section.length
    return True


def _source_digest(entry: md.StoredTensor) -> str:
    return entry.sections[0].sha256 if isinstance(entry, md.RawTensor) else entry.source_sha256
