"""What is wrong with a trellis or with compressed codes, one way a file (spec/vectors/bad)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from vector_parts import Fault, Parts, empty, flip, put, sha256, zstd_frame

from hlwq_formats import rans
from hlwq_formats.bitpack import pack


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
