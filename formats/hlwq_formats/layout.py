"""Where bytes are: the header and the one rule that places sections (spec sections 3 and 4).

This is the only offset arithmetic of the project. No offset is stored for a section: all follow from
the lengths, so there is none to get wrong.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .errors import BadHeader, BadLayout, Incomplete, NotHlwq, UnsupportedFeature, UnsupportedVersion, WrongSize
from .rans import CHUNK

MAGIC = b"HLWQ\r\n\x1a\n"
MAJOR, MINOR = 1, 2
HEADER_LEN = 128
ALIGNMENT = 64
DATA_OFFSET = HEADER_LEN
BLOCK = 128
MAX_METADATA = 64 << 20
CODES_BIT = 1 << 0
TRELLIS_BIT = 1 << 1
SPLIT_BIT = 1 << 2
KNOWN_INCOMPAT = CODES_BIT | TRELLIS_BIT | SPLIT_BIT
MAX_NUMEL = (1 << 53) - 1

_HEADER = struct.Struct("<8sHHIQQQQQQQ32s20sI")
INCOMPAT_NAMES = {0: "framed compression of codes or symbols", 1: "trellis", 2: "split set"}


def align(offset: int) -> int:
    """The next multiple of 64 at or after `offset`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def place_sections(lengths: Iterable[int]) -> tuple[list[int], int]:
    """Offsets of sections that follow one another from byte 128, and the byte after the last one."""
    offsets = []
    end = DATA_OFFSET
    for length in lengths:
        offsets.append(align(end))
        end = offsets[-1] + length
    return offsets, end


def count_blocks(numel: int) -> int:
    """Blocks of 128 that hold `numel` elements, the last one padded with zeros."""
    return -(-numel // BLOCK)


def numel(shape: Sequence[int]) -> int:
    """Elements of a tensor of this shape; a 0-d tensor has one."""
    return math.prod(shape)


def scalar_lengths(n_elements: int, bits: int) -> dict[Literal["codes", "levels", "scales"], int]:
    """Section kind -> bytes of a scalar tensor: packed codes, float32 levels, float16 scales."""
    blocks = count_blocks(n_elements)
    return {"codes": blocks * BLOCK * bits // 8, "levels": 4 << bits, "scales": 2 * blocks}


@dataclass(frozen=True)
class Header:
    """The 128 bytes at the start of a file. Integers are unsigned; lengths and offsets are in bytes."""

    meta_off: int
    meta_len: int
    data_len: int
    file_len: int
    meta_sha256: bytes
    minor: int = 0
    incompat: int = 0
    compat: int = 0

    def encode(self) -> bytes:
        """The 128 bytes, checksum included."""
        head = _HEADER.pack(
            MAGIC, MAJOR, self.minor, HEADER_LEN, self.incompat, self.compat, self.meta_off, self.meta_len,
            DATA_OFFSET, self.data_len, self.file_len, self.meta_sha256, bytes(20), 0,
        )  # fmt: skip
        return head[:-4] + struct.pack("<I", zlib.crc32(head[:-4]))


def trellis_lengths(n_elements: int, row: int) -> tuple[int, int]:
    """Bytes of the scales of a trellis tensor, one for each row, and the number of its chunks of symbols."""
    return n_elements // row, -(-count_blocks(n_elements) * BLOCK // CHUNK)


def minor_of(incompat: int) -> int:
    """The lowest minor version that has these features (spec section 10)."""
    if incompat & (CODES_BIT | SPLIT_BIT):
        return 2
    return 1 if incompat & TRELLIS_BIT else 0


def make_header(data_end: int, metadata: bytes, meta_sha256: bytes, incompat: int = 0) -> Header:
    """The header of a file whose last section ends at `data_end`, of the lowest version that has its features."""
    meta_off = align(data_end)
    return Header(
        meta_off=meta_off,
        meta_len=len(metadata),
        data_len=data_end - DATA_OFFSET,
        file_len=meta_off + len(metadata),
        meta_sha256=meta_sha256,
        minor=minor_of(incompat),
        incompat=incompat,
    )


def decode_header(head: bytes, file_size: int, file: str) -> Header:
    """Read and check a header against the size of its file.

    Raises NotHlwq, Incomplete, BadHeader, WrongSize or BadLayout (65), UnsupportedVersion or
    UnsupportedFeature (69). Damage is looked for before features, because a damaged feature bit must not
    pass for a new version.
    """
    if head[: len(MAGIC)] != MAGIC[: len(head)] or not head:
        raise NotHlwq(_recognise(head), file=file)
    if len(head) < HEADER_LEN:
        raise WrongSize(f"too short, {len(head)} of {HEADER_LEN} header bytes", file=file)
    (_, major, minor, header_len, incompat, compat, meta_off, meta_len, data_off, data_len, file_len,
     sha256, reserved, crc) = _HEADER.unpack(head)  # fmt: skip
    found = zlib.crc32(head[:-4])
    if found != crc:
        if int.from_bytes(head[-4:], "big") == found:
            raise BadHeader("endianness: the header was written big-endian", file=file)
        if head.isascii():  # of a good header, one in 2**36 is
            raise BadHeader(
                "text-mode transfer damage: no byte of the header has its top bit",
                file=file,
                hint="fetch the file again in binary mode",
            )
        raise BadHeader(
            f"header checksum is {crc:08x}, its bytes have {found:08x}: the header is damaged",
            file=file,
            hint="fetch the file again",
        )
    if major == 0:
        raise BadHeader("version 0 does not exist", file=file)
    if major != MAJOR:
        raise UnsupportedVersion(
            f"format {major}.{minor} needs a reader for {major}.x, this one reads {MAJOR}.x", file=file
        )
    if unknown := incompat & ~KNOWN_INCOMPAT:
        bits = [bit for bit in range(64) if unknown >> bit & 1]
        names = ", ".join(f"{bit} ({INCOMPAT_NAMES.get(bit, 'unknown')})" for bit in bits[:8])
        more = f" and {len(bits) - 8} more" if len(bits) > 8 else ""
        raise UnsupportedFeature(
            f"format {major}.{minor} uses incompatible features that this reader lacks: bit {names}{more}",
            file=file,
            hint="use a newer version of this tool",
        )
    if header_len != HEADER_LEN or any(reserved) or data_off != DATA_OFFSET:
        raise BadHeader(
            f"header length, reserved bytes or data offset are wrong: {header_len}, "
            f"{'zero' if not any(reserved) else 'not zero'}, {data_off}; expected 128, zero, 128",
            file=file,
        )
    if file_len != file_size:
        difference = file_size - file_len
        raise WrongSize(
            f"the header says {file_len} bytes, the file has {file_size}: "
            f"{abs(difference)} bytes {'missing' if difference < 0 else 'too many at the end'}",
            file=file,
            hint="fetch the file again",
        )
    if meta_off != align(data_off + data_len) or meta_off + meta_len != file_len:
        raise BadLayout(
            f"metadata at {meta_off} of {meta_len} bytes does not follow data of {data_len} bytes "
            f"to the end of the file at {file_len}",
            file=file,
        )
    if meta_len > MAX_METADATA:
        raise BadLayout(f"metadata of {meta_len} bytes, at most {MAX_METADATA} are allowed", file=file)
    return Header(meta_off, meta_len, data_len, file_len, sha256, minor, incompat, compat)


def check_not_incomplete(head: bytes, file: str) -> None:
    """Raise Incomplete for the zeros that a writer leaves in place of the header until all is written."""
    if head and not any(head):
        raise Incomplete(
            "incomplete: the conversion that wrote it did not finish", file=file, hint="convert the model again"
        )


def _recognise(head: bytes) -> str:
    """Say what a file that is not ours looks like."""
    if not head:
        return f"too short, 0 of {HEADER_LEN} header bytes"
    if head[:4] == b"HLWQ":
        return "text-mode transfer damage: line ends in the magic were changed; fetch the file again in binary mode"
    text = head.lstrip().lower()
    known = (
        (head.startswith(b"version https://git-lfs"), "a Git LFS pointer, not the file itself: run `git lfs pull`"),
        (text.startswith((b"<!doctype", b"<html")), "an HTML page, perhaps an error page of a download"),
        (head.startswith(b"GGUF"), "a GGUF file"),
        (head.startswith(b"PK\x03\x04"), "a zip archive or a PyTorch checkpoint"),
        (head.startswith(b"\x28\xb5\x2f\xfd"), "a zstd file"),
        (len(head) > 8 and head[8:10] == b'{"', "a safetensors file: hlwq-convert takes its directory"),
    )
    for matches, what in known:
        if matches:
            return f"not a .hlwq file but {what}"
    return f"not a .hlwq file: it starts with {head[:8].hex(' ')}, expected {MAGIC.hex(' ')}"
