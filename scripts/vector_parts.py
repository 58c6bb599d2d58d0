"""Containers put together by hand, so that they can be wrong in exactly one way.

Nothing here uses the writer: a fault is an edit of the metadata as a dict, of a section, of the metadata's
text or of the header, and `build` repairs every length, digest and checksum that the fault is not about.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hlwq_convert.rotate import SIGN_BYTES

Object = dict[str, Any]
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
RLE_LIMIT = 128 << 10  # bytes of one zstd block
FIELDS = {
    "magic": ("8s", 0), "major": ("<H", 8), "minor": ("<H", 10), "header_len": ("<I", 12), "incompat": ("<Q", 16),
    "compat": ("<Q", 24), "meta_off": ("<Q", 32), "meta_len": ("<Q", 40), "data_off": ("<Q", 48),
    "data_len": ("<Q", 56), "file_len": ("<Q", 64), "meta_sha256": ("32s", 72), "reserved": ("20s", 104),
    "crc32": ("<I", 124),
}  # fmt: skip


def sha256(data: bytes) -> str:
    """Lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def align(offset: int) -> int:
    """The next multiple of 64."""
    return (offset + 63) // 64 * 64


def canonical(document: Any) -> bytes:
    """The one way to write a document (spec section 5.1)."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass
class Parts:
    """A file before it is laid out: its metadata, and the stored bytes of each section in file order."""

    document: Object
    blobs: list[bytes] = field(default_factory=list)

    def section(self, kind: str, data: bytes) -> Object:
        """Append a section's bytes; returns its entry."""
        self.blobs.append(data)
        return {"kind": kind, "length": len(data), "sha256": sha256(data)}

    def raw(self, name: str, dtype: str, shape: list[int], data: bytes) -> None:
        """Append a raw tensor."""
        self.tensors.append({
            "encoding": "raw", "name": name, "dtype": dtype, "shape": shape, "reason": "vector",
            "sections": [self.section("raw", data)],
        })  # fmt: skip

    def scalar(
        self, name: str, dtype: str, shape: list[int], exponent: int, codes: bytes, levels: bytes, scales: bytes
    ) -> None:
        """Append a scalar tensor; its width follows from its levels."""
        stored = [("codes", codes), ("levels", levels), ("scales", scales)]
        self.tensors.append({
            "encoding": "scalar", "name": name, "dtype": dtype, "shape": shape, "reason": "vector", "block": 128,
            "bits": (len(levels) // 4).bit_length() - 1, "exponent": exponent, "source_sha256": sha256(b"none"),
            "sections": [self.section(kind, data) for kind, data in stored],
        })  # fmt: skip

    def trellis(
        self, name: str, dtype: str, shape: list[int], row: int, states: int, exponent: int, scales: bytes,
        frequencies: bytes, chunks: list[bytes],
    ) -> None:  # fmt: skip
        """Append a trellis tensor, whose step is 3 * 2**22."""
        stored = [("scales", scales), ("frequencies", frequencies), ("symbols", b"".join(chunks))]
        sections = [self.section(kind, data) for kind, data in stored]
        sections[-1]["chunks"] = [len(chunk) for chunk in chunks]
        self.tensors.append({
            "encoding": "trellis", "name": name, "dtype": dtype, "shape": shape, "reason": "vector", "block": 128,
            "row": row, "states": states, "step": 3 << 22, "exponent": exponent, "source_sha256": sha256(b"none"),
            "sections": sections,
        })  # fmt: skip

    def compress_scales(self, frame: bytes, data: bytes) -> None:
        """Store the scales of the trellis tensor that was added last as a zstd frame of `data`."""
        self.blobs[-3] = frame
        zstd = {"frames": [len(frame)], "raw_length": len(data), "raw_sha256": sha256(data)}
        self.tensors[-1]["sections"][0].update(length=len(frame), sha256=sha256(frame), zstd=zstd)

    def compress_codes(self, frames: list[bytes]) -> None:
        """Store the codes of the scalar tensor that was added last as zstd frames of a byte for each."""
        entry = self.tensors[-1]["sections"][0]
        packed, self.blobs[-3] = self.blobs[-3], b"".join(frames)
        zstd = {"frames": [len(f) for f in frames], "raw_length": len(packed), "raw_sha256": sha256(packed)}
        entry.update(length=len(self.blobs[-3]), sha256=sha256(self.blobs[-3]), zstd_codes=zstd)

    def alias(self, name: str, dtype: str, shape: list[int], of: str) -> None:
        """Append an alias."""
        self.tensors.append({"encoding": "alias", "name": name, "dtype": dtype, "shape": shape, "of": of})

    def asset(self, name: str, data: bytes, frames: list[bytes] | None = None) -> None:
        """Append an asset; `frames` are zstd frames that decompress to `data`."""
        entry = self.section("asset", data if frames is None else b"".join(frames))
        if frames is not None:
            lengths = [len(frame) for frame in frames]
            entry["zstd"] = {"frames": lengths, "raw_length": len(data), "raw_sha256": sha256(data)}
        self.document["assets"].append({"name": name, "sections": [entry]})

    @property
    def tensors(self) -> list[Object]:
        """The entries of the tensors."""
        tensors: list[Object] = self.document["tensors"]
        return tensors

    def replace(self, index: int, data: bytes) -> None:
        """Exchange the bytes of section `index` of the file, repairing length and digest."""
        signs = [self.document["signs"]] if self.document["signs"] else []
        owners = [*self.tensors, *self.document["assets"]]
        entry = [*signs, *(section for owner in owners for section in owner.get("sections", []))][index]
        self.blobs[index] = data
        entry.update(length=len(data), sha256=sha256(data))

    def build(self, **header: Any) -> bytes:
        """The file; keyword arguments overwrite fields of the header."""
        trellis = any(tensor.get("encoding") == "trellis" for tensor in self.tensors)
        coded = any("zstd_codes" in section for tensor in self.tensors for section in tensor.get("sections", []))
        split = self.document.get("split") is not None
        minor = 2 if coded or split else int(trellis)
        header = {"minor": minor, "incompat": coded + 2 * trellis + 4 * split, **header}
        return layout(canonical(self.document), self.blobs, **header)


def empty(*, signs: bool = False) -> Parts:
    """A container of nothing."""
    parts = Parts({
        "assets": [], "recipe": {"bits": None, "effort": "default", "name": None, "rules": []}, "signs": None,
        "source": {"files": [], "repo": None, "revision": None}, "split": None, "tensors": [],
        "tool": {"name": "vectors", "version": "1", "zstd": "none"},
    })  # fmt: skip
    if signs:
        parts.document["signs"] = parts.section("signs", SIGN_BYTES)
    return parts


def layout(document: bytes, blobs: list[bytes], *, gap: bytes = b"", **header: Any) -> bytes:
    """Place sections and metadata behind a header; `gap` goes before the metadata."""
    data = bytes(128)
    for blob in blobs:
        data += bytes(align(len(data)) - len(data)) + blob
    meta_off = align(len(data)) + len(gap)
    body = data[128:] + bytes(align(len(data)) - len(data)) + gap + document
    fields = {
        "magic": b"HLWQ\r\n\x1a\n", "major": 1, "header_len": 128, "data_off": 128, "meta_off": meta_off,
        "meta_len": len(document), "data_len": len(data) - 128, "file_len": meta_off + len(document),
        "meta_sha256": hashlib.sha256(document).digest(),
    }  # fmt: skip
    return make_header(**{**fields, **header}) + body


def make_header(**fields: Any) -> bytes:
    """A header of these fields, with the right CRC-32 unless one is given."""
    head = bytearray(128)
    for name, value in fields.items():
        code, offset = FIELDS[name]
        struct.pack_into(code, head, offset, value)
    if "crc32" not in fields:
        struct.pack_into("<I", head, 124, zlib.crc32(head[:124]))
    return bytes(head)


def flip(data: bytes, offset: int) -> bytes:
    """Change the lowest bit of one byte."""
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


def zstd_frame(size: int, text: bytes = b"", header: bytes | None = None, letter: bytes = b"a") -> bytes:
    """A zstd frame of `size` bytes, `text` and then letters a, whose bytes no compressor's version decides."""
    blocks = [struct.pack("<I", len(text) << 3 | (len(text) == size))[:3] + text] if text else []
    for start in range(len(text), size, RLE_LIMIT):
        length = min(RLE_LIMIT, size - start)
        blocks.append(struct.pack("<I", length << 3 | 2 | (start + length == size))[:3] + letter)
    return (header or ZSTD_MAGIC + b"\xa0" + struct.pack("<I", size)) + b"".join(blocks)


class Fault(NamedTuple):
    """A wrong file: its name, the class a reader must report, what is wrong, its bytes."""

    name: str
    error: str
    fault: str
    data: bytes


SIGNS, CODES, LEVELS, SCALES, FLAGS, PLAIN, PACKED = range(7)  # sections of `base`
STARTS = (128, 192, 256, 320, 384, 448, 512)  # and where they are
SCALAR, ALIAS, RAW = range(3)  # its tensors
SIZE = 4096  # raw bytes of its compressed asset


def base() -> Parts:
    """One of each: signs, a scalar tensor, its alias, a raw tensor, a plain and a compressed asset."""
    parts = empty(signs=True)
    parts.scalar("a", "F32", [100], 0, bytes(range(32)), struct.pack("<4f", -1.5, -0.5, 0.5, 1.5), b"\x00\x2c")
    parts.alias("b", "F32", [100], "a")
    parts.raw("c", "BOOL", [3], b"\x01\x00\x01")
    parts.asset("c.json", b"{}\n")
    parts.asset("d.txt", b"a" * SIZE, [zstd_frame(SIZE)])
    return parts


def edited(name: str, error: str, fault: str, edit: Callable[[Parts], object], **header: Any) -> Fault:
    """A fault made by editing `base`."""
    parts = base()
    edit(parts)
    return Fault(name, error, fault, parts.build(**header))


def put(path: str, value: Any) -> Callable[[Parts], None]:
    """An edit of the metadata: set the value at a dotted path; ... removes the key."""

    def edit(parts: Parts) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        target: Any = parts.document
        for key in parents:
            target = target[key]
        if value is ...:
            del target[last]
        else:
            target[last] = value

    return edit


def text_edit(name: str, fault: str, old: bytes, new: bytes) -> Fault:
    """BadMetadata made by exchanging a piece of the document's text."""
    parts = base()
    document = canonical(parts.document)
    assert old in document, name
    return Fault(name, "BadMetadata", fault, layout(document.replace(old, new, 1), parts.blobs))
