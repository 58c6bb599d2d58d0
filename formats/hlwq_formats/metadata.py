"""The metadata document: typed, canonical, validated (spec section 5).

One JSON document without floats, keys sorted, no white space. There is exactly one way to write a given
content: the reader serialises what it read and compares bytes, which rejects duplicate keys, escapes,
other number spellings and white space all at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from .errors import BadMetadata, UnsupportedFeature, escape
from .layout import BLOCK, CODES_BIT, MINOR, SPLIT_BIT, TRELLIS_BIT
from .strict_json import parse

FRAME = 1 << 20
MAX_ASSET = 64 << 20
MAX_ASSETS_TOTAL = 1 << 30
MAX_NAME_BYTES = 512
MAX_TENSORS = 200_000
_MAX_COMMAS = 6_000_000  # 200,000 tensors have 5 million
_MAX_SEARCHED = 1 << 20  # bytes of a document that is looked through for the reason why it is not canonical
MAX_LISTED = 10_000  # rules, source files and assets
MAX_PARTS = 256  # all are open at once
NO_SET = "0" * 64
SIGNS_LENGTH = BLOCK // 8
REPORT = "report.json"

Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
Positive = Annotated[int, Meta(ge=1, lt=1 << 53)]
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Text = Annotated[str, Meta(pattern=r"\A[^\x00-\x1f\x7f]*\Z", max_length=4096)]
Name = Annotated[str, Meta(pattern=r"\A[^\x00-\x1f\x7f]+\Z", max_length=MAX_NAME_BYTES)]
Shape = Annotated[list[Count], Meta(max_length=8)]
Kind = Literal["signs", "codes", "levels", "scales", "raw", "frequencies", "symbols", "asset"]
States = Literal[8, 32, 64, 256]
Bits = Annotated[int, Meta(ge=2, le=8)]


class Document(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """Base of every object in the metadata: an unknown key is an error. A document has no cycles to collect."""


class Zstd(Document):
    """How a section is compressed: stored lengths of its frames, and what they decompress to."""

    frames: list[Positive]
    raw_length: Positive
    raw_sha256: Digest


class Section(Document):
    """One run of stored bytes, its length in bytes and their SHA-256. `chunks` are the lengths of those of symbols;
    `zstd_codes` says that codes are compressed as one byte each, its raw length and digest are of the packed stream."""

    kind: Kind
    length: Count
    sha256: Digest
    zstd: Zstd | UnsetType = UNSET
    chunks: list[Positive] | UnsetType = UNSET
    zstd_codes: Zstd | UnsetType = UNSET


class RawTensor(Document, tag_field="encoding", tag="raw"):
    """A tensor stored as the bytes of its source."""

    name: Name
    dtype: Text
    shape: Shape
    reason: Text
    sections: list[Section]


class ScalarTensor(Document, tag_field="encoding", tag="scalar"):
    """A tensor stored as codes of `bits` bits, a codebook and a scale for each block."""

    name: Name
    dtype: Text
    shape: Shape
    reason: Text
    bits: Bits
    block: Positive
    exponent: Annotated[int, Meta(ge=-126, le=112)]
    source_sha256: Digest
    sections: list[Section]


class TrellisTensor(Document, tag_field="encoding", tag="trellis"):
    """A tensor stored as entropy-coded indices of a trellis and a scale for each `row` elements."""

    name: Name
    dtype: Text
    shape: Shape
    reason: Text
    block: Positive
    row: Positive
    states: States
    step: Annotated[int, Meta(ge=1 << 23, lt=1 << 24)]
    exponent: Annotated[int, Meta(ge=-149, le=88)]
    source_sha256: Digest
    sections: list[Section]


class AliasTensor(Document, tag_field="encoding", tag="alias"):
    """A tensor whose dtype, shape and bytes equal those of the earlier tensor `of`."""

    name: Name
    dtype: Text
    shape: Shape
    of: Name


QuantizedTensor = ScalarTensor | TrellisTensor
StoredTensor = RawTensor | QuantizedTensor
Tensor = StoredTensor | AliasTensor


class Asset(Document):
    """A file that travels with the model."""

    name: Name
    sections: Annotated[list[Section], Meta(min_length=1, max_length=1)]


class Rule(Document):
    """`bits` (null: raw) for every tensor whose name `match` finds."""

    match: Text
    bits: Bits | None


class Recipe(Document):
    """The options that chose the encodings; for people, no reader needs it. `target` is the size asked for."""

    name: Text | None
    bits: Bits | None
    effort: Text
    rules: Annotated[list[Rule], Meta(max_length=MAX_LISTED)]
    target: Text | UnsetType = UNSET


class SourceFile(Document):
    """A file of the source that tensors were read from."""

    name: Name
    length: Count


class Source(Document):
    """Where the weights came from; repository and revision only when they are known."""

    repo: Text | None
    revision: Text | None
    files: Annotated[list[SourceFile], Meta(max_length=MAX_LISTED)]


class Split(Document):
    """This file is part `index` (from 0) of `count`; all parts carry the same `set`, see `set_id`. `size` is the most
    bytes that a part was to have."""

    set: Digest
    index: Count
    count: Annotated[int, Meta(ge=2, le=MAX_PARTS)]
    size: Positive


class Tool(Document):
    """What wrote the file: bytes are promised to repeat only for equal versions."""

    name: Text
    version: Text
    zstd: Text


class Metadata(Document):
    """The whole document."""

    tensors: Annotated[list[Tensor], Meta(max_length=MAX_TENSORS)]
    assets: Annotated[list[Asset], Meta(max_length=MAX_LISTED)]
    signs: Section | None
    recipe: Recipe
    source: Source
    split: Split | None
    tool: Tool


def encode(document: msgspec.Struct) -> bytes:
    """The canonical bytes of a document."""
    return msgspec.json.encode(document, order="sorted")


T = TypeVar("T", bound=Document)


def decode_canonical(document: bytes, kind: type[T], minor: int, file: str) -> T:
    """Decode a document of `kind`, refusing every spelling but the canonical one.

    `minor` is the minor version of the file: what a newer one may have added is unsupported (69), the
    same in a version we know is bad data (65).
    """
    if document.count(b",") > _MAX_COMMAS:
        raise BadMetadata("metadata: it has more elements than any real one", file=file)
    # within a string these quotes would be escaped: this is a key, and only tensors have it
    if (count := document.count(b'"encoding":')) > MAX_TENSORS:
        raise BadMetadata(f"metadata: {count} tensors, at most {MAX_TENSORS} are allowed", file=file)
    try:
        value = msgspec.json.decode(document, type=kind)
        again = msgspec.json.encode(value, order="sorted")
    except msgspec.ValidationError as error:
        if minor > MINOR:
            raise UnsupportedFeature(
                f"format 1.{minor}, this reader knows 1.{MINOR}: metadata: {escape(str(error))}",
                file=file,
                hint="use a newer version of this tool",
            ) from None
        raise BadMetadata(f"metadata: {escape(str(error))}", file=file) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadMetadata(f"metadata: {escape(str(error))}", file=file) from None
    if again != document:
        if len(document) <= _MAX_SEARCHED:
            parse(document, lambda problem: BadMetadata(f"metadata: {problem}", file=file))
        at = _first_difference(again, document)
        raise BadMetadata(
            f"metadata is not canonical from byte {at}: expected {escape(repr(again[at : at + 24]))}, "
            f"found {escape(repr(document[at : at + 24]))}",
            file=file,
        )
    return value


def _first_difference(a: bytes, b: bytes) -> int:
    """Index of the first byte in which two documents differ, or the length of the shorter."""
    step = 4096  # compared as wholes, then one by one in the step that differs
    start = next((i for i in range(0, len(a), step) if a[i : i + step] != b[i : i + step]), 0)
    pairs = zip(a[start : start + step], b[start : start + step], strict=False)
    return next((start + i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def all_sections(metadata: Metadata) -> Iterator[tuple[str, str, Section]]:
    """(owner kind, owner name, section) in the order of the file; the owner kind is signs, tensor or asset."""
    if metadata.signs is not None:
        yield "signs", "", metadata.signs
    for tensor in metadata.tensors:
        if not isinstance(tensor, AliasTensor):
            for section in tensor.sections:
                yield "tensor", tensor.name, section
    for asset in metadata.assets:
        yield "asset", asset.name, asset.sections[0]


def incompat_of(metadata: Metadata) -> int:
    """The feature bits of a file with this document (spec section 10)."""
    coded = any(section.zstd_codes is not UNSET for _, _, section in all_sections(metadata))
    trellis = any(isinstance(tensor, TrellisTensor) for tensor in metadata.tensors)
    return CODES_BIT * coded | TRELLIS_BIT * trellis | SPLIT_BIT * (metadata.split is not None)


def packing_of(section: Section) -> Zstd | UnsetType:
    """How a section is compressed, whichever way."""
    return section.zstd if section.zstd_codes is UNSET else section.zstd_codes


def raw_length(section: Section) -> int:
    """Bytes of the section after decompression."""
    packing = packing_of(section)
    return section.length if packing is UNSET else packing.raw_length


def raw_sha256(section: Section) -> str:
    """SHA-256 of the section's bytes after decompression."""
    packing = packing_of(section)
    return section.sha256 if packing is UNSET else packing.raw_sha256


def set_id(parts: Sequence[Metadata]) -> str:
    """What all parts of a set carry: the SHA-256 of their documents, in order, with zeros where it stands itself."""
    digest = hashlib.sha256()
    for part in parts:
        split = part.split and msgspec.structs.replace(part.split, set=NO_SET)
        digest.update(encode(msgspec.structs.replace(part, split=split)))
    return digest.hexdigest()


def content_id(metadata: Metadata) -> str:
    """SHA-256 of what the tensors hold, whatever the assets, the tool or the compression (spec section 7)."""

    def described(sections: list[Section]) -> list[list[object]]:
        return [[s.kind, raw_length(s), raw_sha256(s)] for s in sections]

    entries: list[object] = [described([metadata.signs] if metadata.signs is not None else [])]
    for t in metadata.tensors:
        match t:
            case RawTensor():
                entries.append([t.name, t.dtype, t.shape, "raw", None, None, None, described(t.sections)])
            case ScalarTensor():
                entries.append([t.name, t.dtype, t.shape, "scalar", t.bits, t.block, t.exponent, described(t.sections)])
            case TrellisTensor():
                code = [t.states, t.row, t.step]
                entries.append([t.name, t.dtype, t.shape, "trellis", code, t.block, t.exponent, described(t.sections)])
            case AliasTensor():
                entries.append([t.name, t.dtype, t.shape, "alias", None, None, None, t.of])
    return hashlib.sha256(msgspec.json.encode(entries)).hexdigest()
