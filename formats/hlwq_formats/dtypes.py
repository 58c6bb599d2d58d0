"""Element types: the safetensors tag, its size, its NumPy type, and the exact way to float32 and back.

bfloat16 has no NumPy type, so its items travel as uint16 bit patterns. The sub-byte types and the
8-bit floats have none either; they are carried as bytes and never interpreted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ITEM_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Tag -> bits of one element; the tags are safetensors' own."""

NUMPY: dict[str, np.dtype[np.generic]] = {
    tag: np.dtype(code)
    for tag, code in {
        "BOOL": "?",
        "U8": "u1",
        "I8": "i1",
        "I16": "<i2",
        "U16": "<u2",
        "F16": "<f2",
        "I32": "<i4",
        "U32": "<u4",
        "F32": "<f4",
        "C64": "<c8",
        "F64": "<f8",
        "I64": "<i8",
        "U64": "<u8",
    }.items()
}
"""Tag -> NumPy dtype, for the tags that NumPy can hold."""

WEIGHT_DTYPES = ("BF16", "F16", "F32")
"""The tags that can be quantized: float32 holds each of their values exactly."""

BIT_PATTERNS: dict[str, np.dtype[np.unsignedinteger]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<u2"),
    "F32": np.dtype("<u4"),
}
"""Tag of a weight -> the NumPy dtype of its bit pattern."""


def nbytes(tag: str, numel: int) -> int | None:
    """Bytes of `numel` packed elements of a known tag, or None when they do not fill whole bytes."""
    bits = ITEM_BITS[tag] * numel
    return bits // 8 if bits % 8 == 0 else None


def widen(raw: bytes | bytearray | memoryview, tag: str) -> NDArray[np.float32]:
    """Read little-endian items of `tag` (one of WEIGHT_DTYPES) as float32; exact for every value."""
    if tag == "BF16":
        bits = np.frombuffer(raw, "<u2").astype(np.uint32)
        return np.left_shift(bits, 16, out=bits).view(np.float32)
    if tag == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    if tag == "F32":
        return np.frombuffer(raw, "<f4").astype(np.float32)
    raise ValueError(f"{tag} is not a weight dtype")


def narrow(values: NDArray[np.float32], tag: str) -> NDArray[np.generic]:
    """Round float32 to `tag`, ties to even, too large to infinity; BF16 comes as uint16 bit patterns.

    NaN must not come in (no decoder makes one): the integer rounding below would turn some into infinity.
    """
    if tag == "BF16":
        bits = values.view(np.uint32)
        rounding = np.right_shift(bits, 16)
        rounding &= 1
        rounding += 0x7FFF
        rounding += bits
        return np.right_shift(rounding, 16).astype("<u2")
    if tag == "F16":
        with np.errstate(over="ignore"):  # beyond 65504 is infinity, as for every other reader
            return values.astype("<f2")
    if tag == "F32":
        return values.astype("<f4", copy=False)
    raise ValueError(f"{tag} is not a weight dtype")
