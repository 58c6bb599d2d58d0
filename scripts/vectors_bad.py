"""Containers put together by hand, so that they can be wrong in exactly one way (spec/vectors/bad, unsupported).

Nothing here uses the writer: a fault is an edit of the metadata as a dict, of a section, of the metadata's
text or of the header, and `build` repairs every length, digest and checksum that the fault is not about.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from hlwq_convert.rotate import SIGN_BYTES
from hlwq_formats import rans
from hlwq_formats.bitpack import pack

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


# --- the faults -------------------------------------------------------------------------------------


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


def header_faults() -> Iterator[Fault]:
    """The header itself, and the size of the file."""
    good = empty().build()
    stale = zlib.crc32(good[:124])
    yield Fault("header-zero", "Incomplete", "The header is 128 zero bytes.", bytes(128) + good[128:])
    yield Fault("header-zero-only", "Incomplete", "The file is nothing but 128 zero bytes.", bytes(128))
    yield Fault("header-empty-file", "NotHlwq", "The file is empty.", b"")
    yield Fault("header-text-mode", "NotHlwq", "CR LF in the magic became LF.", good[:4] + good[5:])
    yield Fault("header-other-magic", "NotHlwq", "The magic is that of GGUF.", b"GGUF" + good[4:])
    yield Fault("header-short", "WrongSize", "The file ends after 100 bytes.", good[:100])
    yield Fault("header-damaged", "BadHeader", "A bit of data_len is flipped.", flip(good, 56))
    yield Fault("header-damaged-feature", "BadHeader", "A bit of incompat is flipped.", flip(good, 16))
    yield Fault("header-damaged-major", "BadHeader", "A bit of major is flipped.", flip(good, 8))
    big_endian = good[:124] + struct.pack(">I", stale)
    yield Fault("header-crc-big-endian", "BadHeader", "The CRC-32 is stored big-endian.", big_endian)
    for name, value, fault in (
        ("reserved", b"\1", "A reserved byte is 1."),
        ("reserved", bytes(19) + b"\1", "The last reserved byte is 1."),
        ("header_len", 256, "header_len is 256."),
        ("data_off", 192, "data_off is 192."),
        ("major", 0, "The major version is 0."),
    ):
        last = "-last" if value == bytes(19) + b"\1" else ""
        yield Fault(f"header-{name}{last}".replace("_", "-"), "BadHeader", fault, empty().build(**{name: value}))
    yield Fault("size-truncated", "WrongSize", "The last byte is missing.", good[:-1])
    yield Fault("size-appended", "WrongSize", "A byte follows the metadata.", good + b"\n")


def layout_faults() -> Iterator[Fault]:
    """Places, padding and digests."""
    parts = base()
    document, good = canonical(parts.document), parts.build()
    meta_off, meta_len = struct.unpack_from("<QQ", good, 32)
    data_len = struct.unpack_from("<Q", good, 56)[0]

    def wrong(name: str, fault: str, **fields: Any) -> Fault:
        return Fault(f"layout-{name}", "BadLayout", fault, layout(document, parts.blobs, **fields))

    yield wrong("data-len-long", "data_len is one more than the sections take.", data_len=data_len + 1)
    yield wrong("data-len-wraps", "data_len is 2**64 - 1: aligning the end of the data overflows.", data_len=2**64 - 1)
    yield wrong("gap", "64 zero bytes stand between data and metadata.", gap=bytes(64))
    yield wrong("gap-unaligned", "The metadata starts 8 bytes late.", gap=bytes(8))
    yield wrong("meta-off", "meta_off is 64 too small.", meta_off=meta_off - 64)
    yield wrong("meta-len-short", "meta_len leaves the last byte out.", meta_len=meta_len - 1)
    yield wrong("meta-len-wraps", "meta_off + meta_len is 2**64.", meta_len=2**64 - meta_off)
    yield Fault("layout-section-unlisted", "BadLayout", "The data holds a section that the metadata does not list.",
                layout(document, [*parts.blobs, b"more"]))  # fmt: skip
    yield Fault("padding-between", "BadLayout", "A byte of padding after the signs is 1.", flip(good, 150))
    yield Fault("padding-last", "BadLayout", "The byte before the metadata is 1.", flip(good, meta_off - 1))
    for name, index in (("signs", SIGNS), ("codes", CODES), ("levels", LEVELS), ("scales", SCALES), ("raw", FLAGS),
                        ("asset", PLAIN), ("frames", PACKED)):  # fmt: skip
        # The boolean 1 becomes 0, a level and a scale stay good ones: only the digest tells.
        fault = f"A bit of the section {name} is flipped."
        yield Fault(f"digest-{name}", "BadDigest", fault, flip(good, STARTS[index]))
    yield Fault("digest-metadata", "BadDigest", "A digit of the metadata is another one.",
                good[:meta_off] + document.replace(b'"version":"1"', b'"version":"2"'))  # fmt: skip
    raw_sha = put("assets.1.sections.0.zstd.raw_sha256", "0" * 64)
    yield edited("digest-decompressed", "BadDigest", "A compressed asset decompresses to other bytes.", raw_sha)


def json_faults() -> Iterator[Fault]:
    """Spellings of the metadata's text that are not the canonical one."""
    for name, fault, old, new in (
        ("cut", "The closing brace of the document is missing.", b'"none"}}', b'"none"}'),
        ("bom", "The document starts with a byte order mark.", b'{"assets"', b'\xef\xbb\xbf{"assets"'),
        ("newline", "A newline follows the document.", b'"none"}}', b'"none"}}\n'),
        ("trailing", "A second value follows the document.", b'"none"}}', b'"none"}}{}'),
        ("space", "A space follows a colon.", b'"split":null', b'"split": null'),
        ("duplicate-key", "A key appears twice.", b'"split":null', b'"split":null,"split":null'),
        ("key-order", "Two keys are out of order.", b'"repo":null,"revision":null', b'"revision":null,"repo":null'),
        ("float", "An integer is written 128.0.", b'"block":128', b'"block":128.0'),
        ("power", "An integer is written 128e0.", b'"block":128', b'"block":128e0'),
        ("leading-zero", "An integer is written 0128.", b'"block":128', b'"block":0128'),
        ("minus-zero", "An integer is written -0.", b'"exponent":0', b'"exponent":-0'),
        ("large-integer", "A length is 2**53.", b'"length":32', b'"length":9007199254740992'),
        ("bool-for-int", "An integer is true.", b'"block":128', b'"block":true'),
        ("string-for-int", "An integer is a string.", b'"block":128', b'"block":"128"'),
        ("null-for-int", "A required integer is null.", b'"block":128', b'"block":null'),
        ("invalid-utf8", "A name is not UTF-8.", b'"name":"a"', b'"name":"\xff"'),
        ("overlong-utf8", "A name has an overlong UTF-8 form.", b'"name":"a"', b'"name":"\xc1\xa1"'),
        ("surrogate", "A name is an encoded surrogate.", b'"name":"a"', b'"name":"\xed\xa0\x80"'),
        ("lone-surrogate", "A name is half of an escaped pair.", b'"name":"a"', b'"name":"\\ud800"'),
        ("needless-escape", "A letter is escaped.", b'"name":"a"', b'"name":"\\u0061"'),
        ("escaped-slash", "A slash is escaped.", b'"reason":"vector"', b'"reason":"vec\\/tor"'),
        ("nan", "An integer is NaN.", b'"exponent":0', b'"exponent":NaN'),
        ("deep", "Arrays are nested 3,000 deep.", b'"rules":[]', b'"rules":' + b"[" * 3000 + b"]" * 3000),
    ):
        yield text_edit(f"json-{name}", fault, old, new)


def schema_faults() -> Iterator[Fault]:
    """Keys, types and ranges of the metadata."""
    for name, fault, path, value in (
        ("unknown-key", "The document has a key of no version.", "notes", None),
        ("unknown-key-tensor", "A tensor has a key of no version.", "tensors.0.notes", None),
        ("missing-key", "A tensor has no reason.", "tensors.0.reason", ...),
        ("omitted-null", "The key split, which is null, is left out.", "split", ...),
        ("zstd-null", "The key zstd of a plain section is null and not left out.", "assets.0.sections.0.zstd", None),
        ("encoding", "A tensor has an encoding of no version.", "tensors.2.encoding", "other"),
        ("no-encoding", "A tensor has no encoding.", "tensors.2.encoding", ...),
        ("key-of-other-encoding", "A raw tensor has bits.", "tensors.2.bits", 2),
        ("kind", "A section has a kind of no version.", "tensors.2.sections.0.kind", "other"),
        ("bits-1", "A scalar tensor has 1 bit.", "tensors.0.bits", 1),
        ("bits-9", "A scalar tensor has 9 bits.", "tensors.0.bits", 9),
        ("exponent-low", "An exponent is -127.", "tensors.0.exponent", -127),
        ("exponent-high", "An exponent is 113.", "tensors.0.exponent", 113),
        ("digest-upper", "A digest has a capital letter.", "tensors.0.source_sha256", "A" * 64),
        ("digest-short", "A digest has 63 digits.", "tensors.0.source_sha256", "a" * 63),
        ("name-empty", "A tensor's name is empty.", "tensors.0.name", ""),
        ("name-control", "A tensor's name holds a line feed.", "tensors.2.name", "c\nd"),
        ("name-delete", "A tensor's name holds U+007F.", "tensors.2.name", "c\x7f"),
        ("name-long", "A tensor's name has 513 characters.", "tensors.2.name", "c" * 513),
        ("text-long", "A text has 4,097 characters.", "tensors.0.reason", "x" * 4097),
        ("dimension-negative", "A dimension is -1.", "tensors.2.shape", [-1]),
        ("rank-9", "A tensor has 9 dimensions.", "tensors.2.shape", [3, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("tensors-object", "The tensors are an object.", "tensors", {}),
        ("asset-no-section", "An asset has no section.", "assets.0.sections", []),
    ):
        yield edited(f"schema-{name}", "BadMetadata", fault, put(path, value))


def split_faults() -> Iterator[Fault]:
    """A part of a split set, by itself."""
    part: Object = {"count": 3, "index": 0, "set": "0" * 64, "size": 1000}
    for name, fault, value, header in (
        ("no-feature", "A split set is described without its feature bit.", part, {"incompat": 0}),
        ("null", "The feature bit of a split set is set in a whole file.", None, {"minor": 2, "incompat": 4}),
        ("count-1", "A set has one part.", part | {"count": 1}, {}),
        ("count-257", "A set has 257 parts.", part | {"count": 257}, {}),
        ("index", "A part comes after the last one.", part | {"index": 3}, {}),
        ("size-0", "Parts have at most 0 bytes.", part | {"size": 0}, {}),
        ("no-size", "The size of parts is left out.", {k: v for k, v in part.items() if k != "size"}, {}),
        ("assets", "The second part has assets.", part | {"index": 1}, {}),
    ):
        yield edited(f"split-{name}", "BadMetadata", fault, put("split", value), **header)


def tensor_faults() -> Iterator[Fault]:
    """Entries that contradict themselves or each other."""
    for name, fault, path, value in (
        ("order", "Tensors are not in the order of their names.", "tensors.0.name", "bb"),
        ("twice", "Two tensors have one name.", "tensors.1.name", "a"),
        ("name-bytes", "A name has 300 characters, 600 bytes.", "tensors.2.name", "é" * 300),
        ("shape-product", "A shape has 2**53 elements.", "tensors.2.shape", [1 << 27, 1 << 26]),
        ("shape-product-zero", "Dimensions beside a 0 multiply to 2**53.", "tensors.2.shape", [1 << 27, 0, 1 << 26]),
        ("shape-wraps", "A shape has 2**64 elements.", "tensors.2.shape", [1 << 32, 1 << 32]),
        ("alias-unknown", "An alias names no tensor.", "tensors.1.of", "x"),
        ("alias-forward", "An alias names a later tensor.", "tensors.1.of", "c"),
        ("alias-self", "An alias names itself.", "tensors.1.of", "b"),
        ("alias-dtype", "An alias has another dtype.", "tensors.1.dtype", "I32"),
        ("alias-shape", "An alias has another shape.", "tensors.1.shape", [10, 10]),
        ("scalar-dtype", "A scalar tensor is I32.", "tensors.0.dtype", "I32"),
        ("scalar-empty", "A scalar tensor has no element.", "tensors.0.shape", [0]),
        ("scalar-bits", "The width asks for longer codes and levels.", "tensors.0.bits", 3),
        ("scalar-blocks", "The shape asks for another block.", "tensors.0.shape", [129]),
        ("raw-length", "A raw tensor is one byte short of its shape.", "tensors.2.shape", [4]),
        ("raw-sub-byte", "5 elements of F4 do not fill whole bytes.", "tensors.2",
         {**base().tensors[RAW], "dtype": "F4", "shape": [5]}),
        ("raw-kind", "A raw tensor's section is of the kind codes.", "tensors.2.sections.0.kind", "codes"),
        ("raw-no-section", "A raw tensor has no section.", "tensors.2.sections", []),
        ("signs-kind", "The signs are a section of the kind raw.", "signs.kind", "raw"),
    ):  # fmt: skip
        yield edited(f"tensor-{name}", "BadTensor", fault, put(path, value))
    again = {**base().tensors[ALIAS], "name": "bb", "of": "b"}
    yield edited("tensor-alias-chain", "BadTensor", "An alias names an alias.", lambda p: p.tensors.insert(2, again))
    yield edited("tensor-signs-length", "BadTensor", "The signs have 17 bytes.", lambda p: p.replace(SIGNS, bytes(17)))
    yield edited("tensor-codes-length", "BadTensor", "The codes have a byte too many.",
                 lambda p: p.replace(CODES, bytes(33)))  # fmt: skip
    yield edited("tensor-scales-length", "BadTensor", "There is one scale too many.",
                 lambda p: p.replace(SCALES, bytes(4)))  # fmt: skip

    def swap(parts: Parts) -> None:
        parts.tensors[SCALAR]["sections"].reverse()
        parts.blobs[CODES], parts.blobs[SCALES] = parts.blobs[SCALES], parts.blobs[CODES]

    def drop(parts: Parts) -> None:
        del parts.tensors[SCALAR]["sections"][2], parts.blobs[SCALES]

    def compress(parts: Parts) -> None:
        frame = zstd_frame(3)
        parts.replace(FLAGS, frame)
        zstd = {"frames": [len(frame)], "raw_length": 3, "raw_sha256": sha256(b"aaa")}
        parts.tensors[RAW]["sections"][0]["zstd"] = zstd

    yield edited("tensor-kind-order", "BadTensor", "Scales stand before codes.", swap)
    yield edited("tensor-kind-missing", "BadTensor", "A scalar tensor has no scales.", drop)
    yield edited("tensor-compressed", "BadTensor", "A raw tensor's section is compressed.", compress)


def asset_faults() -> Iterator[Fault]:
    """Names and sizes of assets."""
    for name, fault, path in (
        ("absolute", "is an absolute path", "/c"),
        ("parent", "leads out of its folder", "b/../../c"),
        ("dot", "has a part '.'", "./c"),
        ("double-slash", "has an empty part", "b//c"),
        ("final-slash", "ends with a slash", "b/"),
        ("backslash", "holds a backslash", "b\\c"),
        ("drive", "holds a colon", "C:c"),
        ("device", "is a device on Windows", "b/nul.txt"),
        ("final-dot", "ends with a dot", "c."),
        ("final-space", "ends with a space", "c "),
        ("long-part", "has a part of 256 bytes", "b" * 256),
        ("long", "has 513 bytes in fewer characters", "b/" + "/".join(["é" * 100] * 2 + ["é" * 54 + "b"])),
        ("c1-control", "holds U+0085", "c\x85"),
    ):
        yield edited(f"asset-{name}", "BadMetadata", f"An asset's name {fault}.", put("assets.0.name", path))
    zstd = "assets.1.sections.0.zstd"
    for name, fault, path, value in (
        ("order", "Assets are not in the order of their names.", "assets.0.name", "e"),
        ("twice", "Two assets have one name.", "assets.0.name", "d.txt"),
        ("case", "The names of two assets differ only in case.", "assets.0.name", "D.TXT"),
        ("folder", "The name of an asset is the folder of another.", "assets.0.name", "D.txt/a"),
        ("report-first", "report.json is not the last asset.", "assets.0.name", "report.json"),
        ("kind", "An asset's section is of the kind raw.", "assets.0.sections.0.kind", "raw"),
        ("frames-count", "A raw length of 1 MiB and a byte takes two frames, one is listed.", zstd + ".raw_length",
         (1 << 20) + 1),
        ("frames-sum", "The frames are longer than the section.", zstd + ".frames", [100]),
    ):  # fmt: skip
        yield edited(f"asset-{name}", "BadMetadata", fault, put(path, value))

    def enlarge(parts: Parts) -> None:
        frames = [zstd_frame(1 << 20)] * 64 + [zstd_frame(1)]
        parts.replace(PACKED, b"".join(frames))
        zstd = {"frames": [len(f) for f in frames], "raw_length": (64 << 20) + 1, "raw_sha256": sha256(b"unread")}
        parts.document["assets"][1]["sections"][0]["zstd"] = zstd

    yield edited("asset-too-large", "BadMetadata", "An asset has over 64 MiB of raw bytes.", enlarge)


def frame_faults() -> Iterator[Fault]:
    """zstd frames."""
    good, tail = zstd_frame(SIZE), zstd_frame(SIZE)[9:]
    for name, fault, frame in (
        ("bomb", "states and holds 1 MiB, the section promises 4 KiB", zstd_frame(1 << 20)),
        ("bomb-stated", "states 1 GiB", ZSTD_MAGIC + b"\xa0" + struct.pack("<I", 1 << 30) + tail),
        ("more", "holds more than it states", zstd_frame(SIZE + 1, header=good[:9])),
        ("less", "holds less than it states", zstd_frame(SIZE - 1, header=good[:9])),
        ("wrong-size", "states and holds one byte less than the section promises", zstd_frame(SIZE - 1)),
        ("no-size", "does not state its size", ZSTD_MAGIC + b"\x00\x38" + tail),
        ("dictionary", "needs a dictionary", ZSTD_MAGIC + b"\xa1\x07" + struct.pack("<I", SIZE) + tail),
        ("window", "has a window of 16 MiB", ZSTD_MAGIC + b"\x80\x70" + struct.pack("<I", SIZE) + tail),
        ("reserved-bit", "sets the reserved bit", ZSTD_MAGIC + b"\xa8" + struct.pack("<I", SIZE) + tail),
        ("two", "is followed by an empty frame in its place", good + ZSTD_MAGIC + b"\x20\x00\x01\x00\x00"),
        ("trailing", "is followed by a byte in its place", good + b"\x00"),
        ("cut", "lacks its last byte", good[:-1]),
        ("skippable", "is preceded by a skippable one in its place", b"\x50\x2a\x4d\x18\x00\x00\x00\x00" + good),
        ("magic", "starts with another magic", b"\x27" + good[1:]),
    ):  # fmt: skip

        def edit(parts: Parts, frame: bytes = frame) -> None:
            parts.replace(PACKED, frame)
            parts.document["assets"][1]["sections"][0]["zstd"]["frames"] = [len(frame)]

        yield edited(f"frame-{name}", "BadFrames", f"A frame {fault}.", edit)


def value_faults() -> Iterator[Fault]:
    """Stored numbers that no writer may write."""
    nan, inf = float("nan"), float("inf")
    stored: list[tuple[str, str, int, bytes]] = [
        ("boolean", "A boolean is 2.", FLAGS, b"\x01\x02\x00"),
        ("scale-nan", "A scale is not a number.", SCALES, b"\x00\x7e"),
        ("scale-infinite", "A scale is infinite.", SCALES, b"\x00\x7c"),
        ("scale-negative", "A scale is negative.", SCALES, b"\x00\xac"),
        ("scale-minus-zero", "A scale is -0.", SCALES, b"\x00\x80"),
    ]
    for name, fault, levels in (
        ("nan", "A level is not a number.", (-1.5, nan, 0.5, 1.5)),
        ("infinite", "A level is infinite.", (-1.5, -0.5, 0.5, inf)),
        ("large", "A level is over 65504.", (-1.5, -0.5, 0.5, 65504.00390625)),
        ("low", "A level is under -65504.", (-65504.00390625, -0.5, 0.5, 1.5)),
        ("equal", "Two levels are equal.", (-1.5, 0.5, 0.5, 1.5)),
        ("zeros", "Two levels are -0 and 0.", (-1.5, -0.0, 0.0, 1.5)),
        ("decreasing", "Two levels decrease.", (-1.5, 0.5, -0.5, 1.5)),
    ):
        stored.append((f"level-{name}", fault, LEVELS, struct.pack("<4f", *levels)))
    for name, fault, index, data in stored:

        def edit(parts: Parts, index: int = index, data: bytes = data) -> None:
            parts.replace(index, data)

        yield edited(f"value-{name}", "BadValues", fault, edit)


def trellis_base() -> Parts:
    """One trellis tensor of two blocks and two rows, all of its indices 0: a chunk of a state and nothing else would
    need the frequency 2**14, so there are some words."""
    parts = empty()
    pairs = np.array([8000, 2000], "<u2")
    chunk = rans.encode(np.zeros(256, np.int32), rans.make_tables(pairs))
    parts.trellis("t", "F32", [2, 100], 100, 8, -30, b"\x40\x48", pairs.tobytes(), [chunk])
    return parts


ROW_SCALES, FREQUENCIES, SYMBOLS = range(3)  # sections of `trellis_base`


def trellis_faults() -> Iterator[Fault]:
    """Everything that is special to the encoding trellis."""

    def wrong(name: str, error: str, fault: str, edit: Callable[[Parts], object], **header: Any) -> Fault:
        parts = trellis_base()
        edit(parts)
        return Fault(f"trellis-{name}", error, fault, parts.build(**header))

    for name, fault, path, value in (
        ("states", "A trellis has 16 states.", "states", 16),
        ("step-low", "A step is below 2**23.", "step", (1 << 23) - 1),
        ("step-high", "A step is 2**24.", "step", 1 << 24),
        ("exponent-low", "An exponent is -150.", "exponent", -150),
        ("exponent-high", "An exponent is 89.", "exponent", 89),
        ("row-zero", "A row has no element.", "row", 0),
        ("bits", "A trellis tensor has bits.", "bits", 4),
        ("chunk-empty", "A chunk has no byte.", "sections.2.chunks", [0]),
    ):
        yield wrong(name, "BadMetadata", fault, put(f"tensors.0.{path}", value))
    yield wrong("no-feature", "BadMetadata", "The header lacks the feature bit of the trellis.", lambda p: None,
                incompat=0)  # fmt: skip
    yield Fault("trellis-unused", "BadMetadata", "The feature bit of the trellis is set without need.",
                empty().build(minor=1, incompat=2))  # fmt: skip
    length = len(trellis_base().blobs[SYMBOLS])
    listed: list[tuple[str, str, str, Any]] = [
        ("row", "Rows of 99 elements do not fill a tensor of 200.", "row", 99),
        ("dtype", "A trellis tensor is I32.", "dtype", "I32"),
        ("no-element", "A trellis tensor has no element.", "shape", [0, 100]),
        ("no-chunks", "The symbols do not say how long their chunks are.", "sections.2.chunks", ...),
        ("chunk-count", "One chunk is listed as two.", "sections.2.chunks", [2, length - 2]),
        ("chunk-sum", "The chunk is longer than the section.", "sections.2.chunks", [length + 2]),
        ("chunks-of-scales", "The scales are listed as a chunk.", "sections.0.chunks", [2]),
        ("kind", "The frequencies are of the kind levels.", "sections.1.kind", "levels"),
        ("symbols-zstd", "The symbols are compressed once more.", "sections.2.zstd",
         {"frames": [length], "raw_length": length, "raw_sha256": sha256(b"none")}),
        ("scales-frames", "Compressed scales list two frames for two bytes.", "sections.0.zstd",
         {"frames": [1, 1], "raw_length": 2, "raw_sha256": sha256(b"none")}),
        ("scales-raw-length", "Compressed scales have three raw bytes for two rows.", "sections.0.zstd",
         {"frames": [2], "raw_length": 3, "raw_sha256": sha256(b"none")}),
    ]  # fmt: skip
    for name, fault, path, value in listed:
        yield wrong(name, "BadTensor", fault, put(f"tensors.0.{path}", value))

    def replace(index: int, data: bytes) -> Callable[[Parts], None]:
        def edit(parts: Parts) -> None:
            parts.replace(index, data)
            if index == SYMBOLS:
                parts.tensors[0]["sections"][SYMBOLS]["chunks"] = [len(data)]

        return edit

    symbols = trellis_base().blobs[SYMBOLS]
    for name, error, fault, index, data in (
        ("scales-length", "BadTensor", "There is one scale too many.", ROW_SCALES, b"\x40\x48\x48"),
        ("frequencies-few", "BadTensor", "There is one frequency alone.", FREQUENCIES, b"\x40\x1f"),
        ("frequencies-odd", "BadTensor", "The frequencies have an odd number of bytes.", FREQUENCIES, bytes(5)),
        ("frequencies-many", "BadTensor", "There are 16,385 frequencies.", FREQUENCIES, bytes(32770)),
        ("chunk-odd", "BadTensor", "A chunk has an odd number of bytes.", SYMBOLS, symbols + b"\0"),
        ("scale", "BadValues", "A scale is that of infinity.", ROW_SCALES, b"\x40\xf8"),
        ("frequency-zero", "BadValues", "A frequency is 0.", FREQUENCIES, struct.pack("<3H", 8000, 2000, 0)),
        ("frequency-even", "BadValues", "The escape of even indices gets nothing.", FREQUENCIES,
         struct.pack("<3H", 2, 2000, 8191)),
        ("frequency-odd", "BadValues", "The escape of odd indices gets nothing.", FREQUENCIES,
         struct.pack("<2H", 8000, 8192)),
        ("cut", "BadFrames", "The last word of a chunk is missing.", SYMBOLS, symbols[:-2]),
        ("more", "BadFrames", "A chunk has a word too many.", SYMBOLS, symbols + b"\0\0"),
        ("short", "BadFrames", "A chunk has less than a state.", SYMBOLS, symbols[:2]),
        ("state-low", "BadFrames", "A state is below 2**16.", SYMBOLS, b"\0\0" + symbols[2:]),
        ("state-last", "BadFrames", "The state does not end at 2**16.", SYMBOLS, flip(symbols, 2)),
    ):  # fmt: skip
        yield wrong(name, error, fault, replace(index, data))


def coded_base() -> Parts:
    """One tensor of 3-bit codes, two blocks, that are compressed: 0 to 7 in turn."""
    parts, codes = empty(), bytes(range(8)) * 32
    levels = struct.pack("<8f", *range(-4, 4))
    parts.scalar("t", "F32", [2, 100], 0, pack(np.frombuffer(codes, np.uint8), 3), levels, struct.pack("<2e", 1, 2))
    parts.compress_codes([zstd_frame(256, codes)])
    return parts


def coded_faults() -> Iterator[Fault]:
    """Everything that is special to compressed codes."""

    def wrong(name: str, error: str, fault: str, edit: Callable[[Parts], object], **header: Any) -> Fault:
        parts = coded_base()
        edit(parts)
        return Fault(f"coded-{name}", error, fault, parts.build(**header))

    yield wrong("no-feature", "BadMetadata", "The header lacks the feature bit of compressed codes.", lambda p: None,
                incompat=0)  # fmt: skip
    yield Fault("coded-unused", "BadMetadata", "The feature bit of compressed codes is set without need.",
                empty().build(minor=2, incompat=1))  # fmt: skip
    entry = coded_base().tensors[0]["sections"][0]
    length, zstd = entry["length"], entry["zstd_codes"]
    for name, fault, path, value in (
        ("raw-length", "The packed codes are one byte short of the shape.", "0.zstd_codes.raw_length", 95),
        ("byte-length", "The raw length is that of a byte for each code.", "0.zstd_codes.raw_length", 256),
        ("frame-count", "One frame is listed as two.", "0.zstd_codes.frames", [2, length - 2]),
        ("frame-sum", "The frame is longer than the section.", "0.zstd_codes.frames", [length + 1]),
        ("no-frame", "No frame is listed.", "0.zstd_codes.frames", []),
        ("twice", "The codes are compressed both as bytes and as codes.", "0.zstd", zstd),
        ("as-bytes", "The codes are compressed as bytes are.", "0",
         {"kind": "codes", "length": length, "sha256": entry["sha256"], "zstd": zstd}),
        ("levels", "The levels are compressed as codes.", "1.zstd_codes", {**zstd, "raw_length": 32}),
        ("chunks", "The compressed codes are listed as a chunk.", "0.chunks", [length]),
        ("frame-large", "A frame has over 1,052,672 bytes.", "0",
         {**entry, "length": 1052673, "zstd_codes": {**zstd, "frames": [1052673]}}),
    ):  # fmt: skip
        yield wrong(name, "BadTensor", fault, put(f"tensors.0.sections.{path}", value))

    def replace(frame: bytes) -> Callable[[Parts], None]:
        def edit(parts: Parts) -> None:
            parts.replace(0, frame)
            parts.tensors[0]["sections"][0]["zstd_codes"]["frames"] = [len(frame)]

        return edit

    codes = bytes(range(8)) * 32
    for name, fault, frame in (
        ("code", "The last code is 8.", zstd_frame(256, codes[:-1] + b"\x08")),
        ("code-255", "A code is 255.", zstd_frame(256, b"\xff" + codes[1:])),
        ("packed", "A frame holds the packed codes.", zstd_frame(96, codes[:96])),
        ("more", "A frame holds a code more than it states.", zstd_frame(257, codes + b"\0", zstd_frame(256)[:9])),
        ("bomb", "A frame states and holds 1 MiB.", zstd_frame(1 << 20, codes, letter=b"\0")),
        ("cut", "A frame lacks its last byte.", zstd_frame(256, codes)[:-1]),
        ("trailing", "A frame is followed by a byte in its place.", zstd_frame(256, codes) + b"\0"),
    ):
        yield wrong(name, "BadFrames", fault, replace(frame))
    yield wrong("other", "BadDigest", "The codes are others than those of the digest.",
                replace(zstd_frame(256, codes[::-1])))  # fmt: skip


def bad() -> list[Fault]:
    """All of spec/vectors/bad."""
    groups = (header_faults, layout_faults, json_faults, schema_faults, tensor_faults, asset_faults, frame_faults,
              value_faults, trellis_faults, coded_faults, split_faults)  # fmt: skip
    return [fault for group in groups for fault in group()]


def unsupported() -> list[Fault]:
    """All of spec/vectors/unsupported."""
    feature = "UnsupportedFeature"
    changed: list[tuple[str, str, str, Any, int]] = [
        ("minor-3-key", "Minor version 3 with an unknown key.", "notes", None, 3),
        ("minor-3-encoding", "Minor version 3 with an unknown encoding.", "tensors.2.encoding", "other", 3),
        ("minor-3-kind", "Minor version 3 with an unknown kind of section.", "tensors.2.sections.0.kind", "other", 3),
        ("dtype", "An unknown dtype.", "tensors.2.dtype", "F128", 0),
        ("block-256", "Blocks of 256.", "tensors.0.block", 256, 0),
    ]
    return [
        Fault("major-2", "UnsupportedVersion", "Major version 2.", empty().build(major=2)),
        Fault("incompat-3", feature, "Incompatible feature 3.", empty().build(incompat=8)),
        Fault("incompat-63", feature, "Incompatible feature 63.", empty().build(incompat=1 << 63)),
        *(edited(name, feature, fault, put(path, value), minor=minor) for name, fault, path, value, minor in changed),
    ]
