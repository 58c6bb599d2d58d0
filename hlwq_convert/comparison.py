"""Two files side by side: what differs in content, plan, size and error, from metadata and reports alone."""

from __future__ import annotations

from collections.abc import Container
from typing import Literal

import msgspec

from hlwq_formats import metadata as md
from hlwq_formats.reader import Reader

from .inspection import Inspection, TensorInfo

Status = Literal["equal", "different", "only_a", "only_b"]


class TensorPair(msgspec.Struct, frozen=True):
    """One tensor in both files. "equal" means that all which decides its decoding is, by the digests of its sections.

    `same_source` tells whether both were made from the same source bytes, null where one file lacks the tensor.
    """

    name: str
    status: Status
    same_source: bool | None
    a: TensorInfo | None
    b: TensorInfo | None


class FilePair(msgspec.Struct, frozen=True):
    """A file that travels with the models."""

    name: str
    status: Status


class Comparison(msgspec.Struct, frozen=True):
    """What `hlwq-inspect A B` shows. `a` and `b` are inspections without their tensors and assets, which stand in
    pairs; `same_content` is whether the files decode alike."""

    same_content: bool
    a: Inspection
    b: Inspection
    tensors: list[TensorPair]
    assets: list[FilePair]


def compare_files(a: Reader, b: Reader, in_a: Inspection, in_b: Inspection) -> Comparison:
    """Compare two open files, given their inspections."""
    ours, theirs = {t.name: t for t in in_a.tensors}, {t.name: t for t in in_b.tensors}
    pairs = []
    for name in sorted(ours.keys() | theirs.keys(), key=str.encode):
        status, same_source = _presence(name, ours, theirs), None
        if status == "different":
            if _content(a, name) == _content(b, name):
                status = "equal"
            same_source = _source_sha256(a, name) == _source_sha256(b, name)
        pairs.append(TensorPair(name, status, same_source, ours.get(name), theirs.get(name)))
    assets = []
    for name in sorted(a.assets.keys() | b.assets.keys(), key=str.encode):
        status = _presence(name, a.assets, b.assets)
        if status == "different" and _digests(*a.assets[name].sections) == _digests(*b.assets[name].sections):
            status = "equal"
        assets.append(FilePair(name, status))
    short_a, short_b = (msgspec.structs.replace(side, tensors=[], assets=[]) for side in (in_a, in_b))
    return Comparison(a.content_id == b.content_id, short_a, short_b, pairs, assets)


def _presence(name: str, a: Container[str], b: Container[str]) -> Status:
    if name not in b:
        return "only_a"
    return "different" if name in a else "only_b"


def _digests(*sections: md.Section | None) -> list[tuple[str, int, str]]:
    return [(s.kind, md.raw_length(s), md.raw_sha256(s)) for s in sections if s is not None]


def _content(reader: Reader, name: str) -> dict[str, object]:
    """All that decides what a tensor decodes to: its fields, and raw digests for its sections and for the signs."""
    stored = reader.stored_tensor(name)
    fields = msgspec.structs.asdict(stored) | {"sections": _digests(*stored.sections)}
    fields["kinds"] = type(reader.tensors[name]), type(stored)  # an alias is one, whatever the name of what it equals
    fields["signs"] = [] if isinstance(stored, md.RawTensor) else _digests(reader.metadata.signs)
    return {key: value for key, value in fields.items() if key not in ("name", "reason", "source_sha256")}


def _source_sha256(reader: Reader, name: str) -> str:
    """SHA-256 of the source bytes of a tensor; raw ones are stored as they are."""
    tensor = reader.stored_tensor(name)
    return md.raw_sha256(tensor.sections[0]) if isinstance(tensor, md.RawTensor) else tensor.source_sha256
