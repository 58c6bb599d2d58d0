"""Files that are wrong in one way each (spec/vectors/bad, unsupported)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

from vector_parts import (
    ALIAS,
    CODES,
    FLAGS,
    LEVELS,
    PACKED,
    PLAIN,
    RAW,
    SCALAR,
    SCALES,
    SIGNS,
    SIZE,
    STARTS,
    ZSTD_MAGIC,
    Fault,
    Object,
    Parts,
    base,
    canonical,
    edited,
    empty,
    flip,
    layout,
    put,
    sha256,
    text_edit,
    zstd_frame,
)
from vectors_bad_codings import coded_faults, trellis_faults


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
