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
from ..source_digests import digest_tensor


@dataclass(frozen=True)
class SourceDigest:
    """`whole` changes with any weight and any byte of the config; `tensors` are the SHA-256 of their bytes."""

    whole: str
    tensors: dict[str, str]


def digest_source(source: Source, progress: Callable[[int, int], None]) -> SourceDigest:
    """Read and hash every weight; progress is called with (bytes done, bytes in all)."""
    done, total = 0, sum(tensor.length for tensor in source.tensors)

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    tensors = {tensor.name: digest_tensor(source.model, tensor, step) for tensor in source.tensors}
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
