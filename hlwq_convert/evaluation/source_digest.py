"""Which model this is: a digest of all its weights and its config."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from hlwq_formats import metadata as md
from hlwq_formats.errors import escape
from hlwq_formats.reader import Reader

from ..source import Source

_PIECE = 4 << 20


@dataclass(frozen=True)
class SourceDigest:
    """`whole` changes with any weight and any byte of the config; `tensors` are the SHA-256 of their bytes."""

    whole: str
    tensors: dict[str, str]


def digest_source(source: Source, progress: Callable[[int, int], None]) -> SourceDigest:
    """Read and hash every weight; progress is called with (bytes done, bytes in all)."""
    tensors: dict[str, str] = {}
    done, total = 0, sum(tensor.length for tensor in source.tensors)
    for tensor in source.tensors:
        digest = hashlib.sha256()
        places = [(start, min(_PIECE, tensor.length - start)) for start in range(0, tensor.length, _PIECE)]
        for piece in source.model.read_pieces(tensor, places):
            digest.update(piece)
            progress(done := done + len(piece), total)
        tensors[tensor.name] = digest.hexdigest()
    config = hashlib.sha256(source.model.read_file("config.json", md.MAX_ASSET)).hexdigest()
    listed = [[tensor.name, tensor.dtype, tensor.shape, tensors[tensor.name]] for tensor in source.tensors]
    return SourceDigest(hashlib.sha256(msgspec.json.encode([config, listed])).hexdigest(), tensors)


def other_source(reader: Reader, digest: SourceDigest) -> list[str]:
    """A warning when quantized tensors of a file were made from other weights than these."""
    quantized = [t for t in reader.metadata.tensors if not isinstance(t, md.RawTensor | md.AliasTensor)]
    other = [t.name for t in quantized if digest.tensors.get(t.name) != t.source_sha256]
    if not other:
        return []
    first = escape(other[0], 100)
    return [f'{escape(reader.path)}: {len(other)} tensors were made from other weights, such as "{first}"']
