"""Changes to seeds that keep, or restore, what a reader checks first: checksums, lengths, and the canonical form.

Without them nearly every change ends at the CRC of the header or at a digest. Each mutator takes the bytes, a
source of random numbers, and `plain`, which changes bytes without knowing what they are.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import zstandard
from fuzz_json import NUMBERS, Plain, canonical, change_json, change_text, decoded, in_order, json_text, steps
from vector_parts import FIELDS, ZSTD_MAGIC, align, layout, make_header, sha256

from hlwq_formats.bitpack import pack
from hlwq_formats.dtypes import ITEM_BITS
from hlwq_formats.layout import scalar_lengths

Mutator = Callable[[bytes, Random, Plain], bytes]

MAX_FILLED = 4096  # bytes to which a section is stretched


# --- containers -----------------------------------------------------------------------------------------


def sections_of(document: Any) -> list[dict[str, Any]]:
    """The entries of all sections in the order of the file, as far as the document has its usual form."""
    if not isinstance(document, dict):
        return []
    owners = [{"sections": [document.get("signs")]}]
    owners += [e for key in ("tensors", "assets") if isinstance(part := document.get(key), list) for e in part]
    lists = [o["sections"] for o in owners if isinstance(o, dict) and isinstance(o.get("sections"), list)]
    return [section for sections in lists for section in sections if isinstance(section, dict)]


def elements(shape: list[Any]) -> int:
    """The product of integers, up to one too large to matter; TypeError when they are none."""
    product = 1
    for dimension in shape:
        if type(dimension) is not int:
            raise TypeError
        product = min(product * dimension, 1 << 64)
    return product


def length_of(section: dict[str, Any]) -> int:
    """The length that it states, where it is one that a small file can hold."""
    length = section.get("length")
    return length if isinstance(length, int) and 0 <= length < 1 << 20 else 0


def split(data: bytes) -> tuple[Any, list[bytes]]:
    """The metadata and the stored bytes of each section; (None, []) when there is no metadata to be found."""
    at = data.find(b'{"', 128)
    while at >= 0 and not isinstance(document := decoded(data[at:]), dict):
        at = data.find(b'{"assets"', at + 1)
    if at < 0:
        return None, []
    blobs = []
    end = 128
    for section in sections_of(document):
        start = align(end)
        end = start + length_of(section)
        blobs.append(data[start : min(end, at)])
    return document, blobs


def fill(document: dict[str, Any], blobs: list[bytes]) -> None:
    """Give each section of a tensor the bytes that its shape asks for, where they are few."""
    tensors = document.get("tensors")
    by_entry = {id(section): i for i, section in enumerate(sections_of(document))}
    for tensor in tensors if isinstance(tensors, list) else []:
        try:
            n = elements(tensor["shape"])
            if tensor["encoding"] == "raw":
                wanted: dict[str, int] = {"raw": n * ITEM_BITS[tensor["dtype"]] // 8}
            elif type(tensor["bits"]) is int and 0 <= tensor["bits"] < 17:
                wanted = {str(kind): size for kind, size in scalar_lengths(n, tensor["bits"]).items()}
            else:
                continue
            for section in tensor["sections"]:
                size, i = wanted[section["kind"]], by_entry[id(section)]
                if size <= MAX_FILLED and len(blobs[i]) != size and "zstd_codes" not in section:
                    blobs[i] = filled(section["kind"], blobs[i], size)
        except (KeyError, TypeError, ValueError, IndexError):
            continue  # not a tensor any more


def filled(kind: str, blob: bytes, size: int) -> bytes:
    """`blob` at another size, of values that a reader lets through."""
    if kind == "levels":
        return struct.pack(f"<{size // 4}f", *range(size // 4))
    return (blob + (b"\x01\x00" if kind == "raw" else b"\x00\x1c") * (size // 2 + 1))[:size]


def restate(document: dict[str, Any], blobs: list[bytes]) -> None:
    """Write lengths and digests of the stored bytes, and of what compressed ones hold, into the document."""
    for section, blob in zip(sections_of(document), blobs, strict=False):
        before = section.get("sha256")
        section["length"], section["sha256"] = len(blob), sha256(blob)
        packing = section.get("zstd", section.get("zstd_codes"))
        if isinstance(packing, dict) and blob[:4] == ZSTD_MAGIC and before != section["sha256"]:
            frames = packing.get("frames")
            if not isinstance(frames, list) or len(frames) < 2:
                frames = packing["frames"] = [len(blob)]
            try:
                raw = b"".join(inflated(blob, frames))
                if packing is section.get("zstd_codes"):
                    width = packing["raw_length"] * 8 // len(raw)
                    raw = pack(np.frombuffer(raw, np.uint8) & np.uint8((1 << width) - 1), width)
            except (zstandard.ZstdError, ValueError, TypeError, KeyError, ArithmeticError):
                continue
            packing["raw_length"], packing["raw_sha256"] = len(raw), sha256(raw)


def inflated(blob: bytes, frames: list[int]) -> list[bytes]:
    """What the frames hold, up to one MiB each."""
    parts, start = [], 0
    for length in frames:
        with zstandard.ZstdDecompressor().stream_reader(blob[start : start + length]) as stream:
            parts.append(stream.read(1 << 20))
        start += length
    return parts


def features_of(document: dict[str, Any]) -> int:
    """The feature bits of a file with this document."""
    tensors = document.get("tensors")
    tags = [t.get("encoding") for t in tensors if isinstance(t, dict)] if isinstance(tensors, list) else []
    return 2 * ("trellis" in tags) + 4 * (document.get("split") is not None)


def repair_header(data: bytes) -> bytes:
    """Make lengths, digest and CRC of a header fit to the metadata that it points to, or that can be found."""
    if len(data) < 128:
        return data
    (at,) = struct.unpack_from("<Q", data, 32)
    if not 128 <= at <= len(data):
        at = max(data.find(b'{"assets"'), 128)
        at = min(align(at), len(data))
    fields = {name: struct.unpack_from(code, data, offset)[0] for name, (code, offset) in FIELDS.items()}
    fields.update(meta_off=at, meta_len=len(data) - at, file_len=len(data))
    fields["meta_sha256"] = hashlib.sha256(data[at:]).digest()
    fields.pop("crc32")
    return make_header(**fields) + data[128:]


def container(data: bytes, rng: Random, plain: Plain) -> bytes:
    """A whole file: a change of its metadata, its sections, its header, or anywhere."""
    document, blobs = split(data)
    if not isinstance(document, dict) or rng.random() < 0.12:
        data = plain(data)
        return repair_header(data) if rng.random() < 0.7 else data
    for _ in steps(rng):
        if blobs and rng.random() < 0.4:
            i = rng.randrange(len(blobs))
            blobs[i] = plain(blobs[i]) if blobs[i] else b"\x00"
        else:
            change_json(document, rng)
    if rng.random() < 0.6:
        in_order(document)
    if rng.random() < 0.6:
        fill(document, blobs)
    if rng.random() < 0.9:
        restate(document, blobs)
    text = canonical(document)
    if rng.random() < 0.12:
        text = change_text(text, rng, plain)
    header: dict[str, Any] = {"incompat": features_of(document)} if rng.random() < 0.9 else {}
    if rng.random() < 0.1:
        name = rng.choice(list(FIELDS))
        size = struct.calcsize(FIELDS[name][0])
        value = rng.choice((rng.randrange(4), 1 << rng.randrange(64), rng.choice(NUMBERS))) % (1 << 8 * min(size, 8))
        header[name] = value if FIELDS[name][0][-1] != "s" else value.to_bytes(size, "little")
    elif rng.random() < 0.1:
        header["minor"] = rng.randrange(1, 3)
    return layout(text, blobs, gap=bytes(64) if rng.random() < 0.02 else b"", **header)


# --- the others -----------------------------------------------------------------------------------------


def section(data: bytes, rng: Random, plain: Plain) -> bytes:
    """A section as fuzz_targets.read_section takes it; its raw length is made that of its first frame."""
    data = plain(data)
    if rng.random() < 0.5 and len(data) > 8:
        at = data.find(ZSTD_MAGIC, 4)
        try:
            stated = zstandard.get_frame_parameters(data[at:]).content_size if at >= 4 else 0
        except zstandard.ZstdError:
            stated = 0
        if 0 < stated <= 1 << 20:
            data = struct.pack("<I", stated - 1) + data[at:]
    return data


def safetensors(data: bytes, rng: Random, plain: Plain) -> bytes:
    """A shard: a change of its header, whose length, offsets and data may then be made to fit."""
    length = int.from_bytes(data[:8], "little")
    tree = decoded(data[8 : 8 + length]) if length < 1 << 20 else None
    if not isinstance(tree, dict) or rng.random() < 0.2:
        data = plain(data)
        if rng.random() < 0.5 and (end := data.rfind(b"}") + 1) > 8:
            data = struct.pack("<Q", end - 8) + data[8:]
        return data
    body = data[8 + length :]
    for _ in steps(rng):
        change_json(tree, rng)
    if rng.random() < 0.7:
        body = fit_offsets(tree, body)
    text = canonical(tree)
    if rng.random() < 0.2:
        text = change_text(text, rng, plain)
    if rng.random() < 0.2:
        text += b" " * rng.randrange(9)
    return struct.pack("<Q", len(text) + (rng.choice((1, -1)) if rng.random() < 0.03 else 0)) + text + body


def fit_offsets(tree: dict[str, Any], body: bytes) -> bytes:
    """Write offsets that follow from dtypes and shapes; returns data of the size that they need."""
    end = 0
    for name, info in tree.items():
        try:
            if name != "__metadata__":
                size = elements(info["shape"]) * ITEM_BITS[info["dtype"]] // 8
                if 0 <= size <= MAX_FILLED:
                    info["data_offsets"] = [end, end + size]
                    end += size
        except (KeyError, TypeError):
            continue  # not a tensor any more
    return (body + bytes(max(0, end - len(body))))[:end]


MUTATORS: dict[str, Mutator] = {
    "container": container,
    "metadata": json_text,
    "section": section,
    "safetensors": safetensors,
    "index": json_text,
    "differential": safetensors,
    "readers": container,
}
