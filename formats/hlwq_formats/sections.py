"""Compressed sections: a list of independent zstd frames of 1 MiB each, of bytes or of codes (spec section 6.4).

A frame that a stranger made may state any size, so nothing is decompressed before its own header was
compared with the size we derived, and no frame can make more than 1 MiB.
"""

from __future__ import annotations

import hashlib

import numpy as np
import zstandard
from msgspec import UNSET
from numpy.typing import NDArray

from .errors import BadDigest, BadFrames
from .metadata import FRAME, Kind, Section, Zstd

LEVEL = 15
MAX_WINDOW = 8 << 20
MAX_CODES_FRAME = FRAME + (FRAME >> 8)
"""The most that libzstd makes of 1 MiB."""
_MAGIC = b"\x28\xb5\x2f\xfd"


def zstd_version() -> str:
    """Version of libzstd: equal versions compress to equal bytes."""
    return ".".join(str(part) for part in zstandard.ZSTD_VERSION)


def make_section(kind: Kind, data: bytes, *, compress: bool) -> tuple[Section, bytes]:
    """Return the section of `data` and the bytes to store; compressed only where it saves 3 %."""
    raw_sha = hashlib.sha256(data).hexdigest()
    if compress and data:
        compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True, write_checksum=False, threads=0)
        frames = [compressor.compress(data[i : i + FRAME]) for i in range(0, len(data), FRAME)]
        stored = b"".join(frames)
        if pays(len(stored), len(data)):
            packing = Zstd(frames=[len(f) for f in frames], raw_length=len(data), raw_sha256=raw_sha)
            return Section(kind, len(stored), hashlib.sha256(stored).hexdigest(), packing), stored
    return Section(kind, len(data), raw_sha), data


def pays(stored: int, raw: int) -> bool:
    """Whether compression saves enough: 3 %."""
    return stored * 100 <= raw * 97


def compress_codes(codes: NDArray[np.uint8]) -> bytes:
    """One frame of up to 2**20 codes, a byte each.

    The parameters are those of zstd level 1, but for a search that finds next to no matches: in codes all matches are
    false, and cost a sixth at 2 bits and 3 % at 3 (spec/decisions/0011).
    """
    parameters = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6, write_checksum=False)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(codes.data)


def decompress_codes(frame: bytes, count: int, bits: int) -> NDArray[np.uint8]:
    """The `count` codes of a frame; ValueError where it does not hold just that, below 2**bits."""
    try:
        codes = np.frombuffer(_decompress_frame(frame, count), np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    if (largest := int(codes.max())) >= 1 << bits:
        raise ValueError(f"it holds the code {largest}, expected less than {1 << bits}")
    return codes


def unpack_section(section: Section, stored: bytes, file: str, where: str) -> bytes:
    """Return the raw bytes of a section whose stored bytes were verified already.

    Raises BadFrames when a frame is not exactly what the section promises, BadDigest when the result is
    not the recorded one.
    """
    if section.zstd is UNSET:
        return stored
    parts = []
    start = 0
    left = section.zstd.raw_length
    for index, length in enumerate(section.zstd.frames):
        frame = stored[start : start + length]
        size = min(FRAME, left)
        try:
            parts.append(_decompress_frame(frame, size))
        except (zstandard.ZstdError, ValueError) as error:
            raise BadFrames(f"frame {index} of {length} bytes: {error}", file=file, section=where) from None
        start += length
        left -= size
    raw = b"".join(parts)
    if (found := hashlib.sha256(raw).hexdigest()) != section.zstd.raw_sha256:
        raise BadDigest(
            f"decompressed SHA-256 is {found[:16]}..., expected {section.zstd.raw_sha256[:16]}...",
            file=file,
            section=where,
        )
    return raw


def _decompress_frame(frame: bytes, size: int) -> bytes:
    if frame[:4] != _MAGIC:
        raise ValueError("it does not start with the zstd magic")
    stated = zstandard.get_frame_parameters(frame)
    if (stated.content_size, stated.dict_id) != (size, 0) or stated.window_size > MAX_WINDOW:
        raise ValueError(
            f"it states {stated.content_size} bytes, dictionary {stated.dict_id}, window {stated.window_size}; "
            f"expected {size} bytes, no dictionary, a window of at most {MAX_WINDOW}"
        )
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    data = decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    if len(data) != size:
        raise ValueError(f"it holds {len(data)} bytes, expected {size}")
    return data
