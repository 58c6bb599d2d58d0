"""A good container and the ways to break it, each in one place, for the tests of the catalogue."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard
from catalogue import case, refused, write_sparse

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from vector_parts import (
    ALIAS,
    CODES,
    FIELDS,
    PACKED,
    RAW,
    SCALAR,
    SCALES,
    SIZE,
    STARTS,
    ZSTD_MAGIC,
    Object,
    Parts,
    align,
    base,
    canonical,
    empty,
    layout,
    make_header,
    put,
)
from vector_parts import zstd_frame as frame
from vectors_bad_codings import coded_base

from hlwq_formats.reader import Reader

DOCUMENT, BLOBS, GOOD = canonical(base().document), base().blobs, base().build()
META_OFF, META_LEN = struct.unpack_from("<QQ", GOOD, 32)
LIMIT, TB = 64 << 20, 10**12

# --- ways to break the good file --------------------------------------------------------------------


def text(old: str, new: str, **header: Any) -> bytes:
    """A piece of the metadata's text exchanged."""
    assert old.encode() in DOCUMENT, old
    return layout(DOCUMENT.replace(old.encode(), new.encode("utf-8", "surrogatepass"), 1), BLOBS, **header)


def edited(*edits: Callable[[Parts], object], **header: Any) -> bytes:
    """Edited, with everything repaired that the edits do not mean to break."""
    parts = base()
    for edit in edits:
        edit(parts)
    return parts.build(**header)


def value(path: str, new: Any, **header: Any) -> bytes:
    return edited(put(path, new), **header)


def section(index: int, data: bytes) -> bytes:
    return edited(lambda parts: parts.replace(index, data))


def packed(data: bytes, size: int = SIZE) -> bytes:
    """The asset d.txt is this one frame, said to hold `size` bytes."""
    zstd = put("assets.1.sections.0.zstd", {"frames": [len(data)], "raw_length": size, "raw_sha256": "0" * 64})
    return edited(lambda parts: parts.replace(PACKED, data), zstd)


def coded(data: bytes) -> bytes:
    """The file of compressed codes, 256 of 3 bits, with this one frame."""
    parts = coded_base()
    parts.replace(0, data)
    parts.tensors[0]["sections"][0]["zstd_codes"]["frames"] = [len(data)]
    return parts.build()


def header_of(*fields: bytes) -> bytes:
    """A frame of SIZE letters with another header."""
    return ZSTD_MAGIC + b"".join(fields) + frame(SIZE)[9:]


def keys() -> Iterator[tuple[str, int, int]]:
    """Each key of the document with the begin and the end of its pair."""
    for match in re.finditer(r'"(\w+)":', DOCUMENT.decode()):
        yield match[1], match.start(), json.JSONDecoder().raw_decode(DOCUMENT.decode(), match.end())[1]


def without_key(start: int, end: int) -> bytes:
    before, after = DOCUMENT[:start], DOCUMENT[end:]
    document = before[:-1] + after if before.endswith(b",") else before + after.removeprefix(b",")
    json.loads(document)
    return layout(document, BLOBS)


def wrong_integers() -> Iterator[bytes]:
    values = ["1.5", "1.0", "1e3", "true", '"1"', "null", "-1", "-0", "01", str(2**53), str(2**64), "1" * 5000]
    for field in ('"block":128', '"bits":2', '"length":32', '"raw_length":4096', '"shape":[100', '"exponent":0'):
        for new in values:
            if (field, new) != ('"exponent":0', "-1"):
                yield text(field, field.rstrip("0123456789") + new)


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def big_endian() -> bytes:
    swapped = [struct.pack(code.replace("<", ">"), *struct.unpack_from(code, GOOD, at)) for code, at in FIELDS.values()]
    head = b"".join(swapped)[:124]
    return head + struct.pack(">I", zlib.crc32(head)) + GOOD[128:]


def archive() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("model.hlwq", "another one")
    return content.getvalue()


def paddings() -> list[int]:
    used = [range(128), range(META_OFF, len(GOOD)), *(range(s, s + len(b)) for s, b in zip(STARTS, BLOBS, strict=True))]
    return sorted(set(range(len(GOOD))).difference(*used))


def cut(kind: int) -> Callable[[Parts], None]:
    def edit(parts: Parts) -> None:
        del parts.tensors[SCALAR]["sections"][kind - CODES], parts.blobs[kind]

    return edit


def swap(parts: Parts) -> None:
    parts.tensors[SCALAR]["sections"].reverse()
    parts.blobs[CODES], parts.blobs[SCALES] = parts.blobs[SCALES], parts.blobs[CODES]


def third_raw(**changes: Any) -> Callable[[Parts], None]:
    """The raw tensor c changes, bytes it has not."""
    return lambda parts: parts.tensors[RAW].update(changes)


def also(at: int, **changes: Any) -> Callable[[Parts], None]:
    """One more entry: a copy of the alias b (at 1 or 2) or of the raw tensor c (at 3), changed."""
    return lambda parts: parts.tensors.insert(at, {**base().tensors[RAW if at == 3 else ALIAS], **changes})


def claimed(length: int) -> list[Object]:
    return [{"kind": "raw", "length": length, "sha256": "0" * 64}]


def levels(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


def tensor_named(name: str) -> bytes:
    return value("tensors.2.name", name)


NAN, INF = float("nan"), float("inf")
CHECKED = zstandard.ZstdCompressor(write_checksum=True).compress(b"a" * SIZE)
A, B, C = 'tensor "a": ', 'tensor "b": ', 'tensor "c": '


def bad(row: int, name: str, data: bytes | Iterable[bytes], error: str, *parts: str, xfail: str | None = None) -> Any:
    """Each of these files is refused with this error, whose message has these parts."""
    return case(row, name, [data] if isinstance(data, bytes) else list(data), error, parts, xfail=xfail)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def check_bad_files(folder: Path, files: list[bytes], error: str, parts: tuple[str, ...]) -> None:
    """Each file is refused when all of it is read, and reading leaves nothing in the folder."""
    with Reader(write(folder / "good.hlwq", GOOD)) as reader:
        reader.verify()
    assert files
    for data in files:
        path = write(folder / "bad.hlwq", data)
        with refused(error, str(path), *parts), Reader(path) as reader:
            reader.verify()
    assert sorted(p.name for p in folder.iterdir()) == ["bad.hlwq", "good.hlwq"]


def sparse_container(path: Path, length: int, bits: int | None = None) -> Path:
    """A tensor "a" of `length` zeros (U8 and raw, or F32 at `bits` bits) that take no disk, and after it a raw tensor
    "b" of four bytes."""
    parts, last, table = empty(), b"\1\2\3\4", levels(*range(1 << (bits or 1)))
    parts.raw("b", "U8", [4], last)
    if bits is None:
        parts.tensors.insert(0, {**parts.tensors[0], "name": "a", "shape": [length], "sections": claimed(length)})
    else:
        parts.scalar("a", "F32", [length], 0, b"", table, b"")
        parts.tensors.reverse()
        parts.tensors[0]["sections"][0]["length"] = length // 8 * bits
        parts.tensors[0]["sections"][2]["length"] = length // 64
    pieces, end = [], 128
    for entry in [section for tensor in parts.tensors for section in tensor["sections"]]:
        start = align(end)
        end = start + entry["length"]
        pieces.append((start, {16: table, 4: last}.get(entry["length"], b"")))
    text, meta_off = canonical(parts.document), align(end)
    head = make_header(
        magic=GOOD[:8], major=1, header_len=128, data_off=128, meta_off=meta_off, meta_len=len(text),
        data_len=end - 128, file_len=meta_off + len(text), meta_sha256=hashlib.sha256(text).digest(),
    )  # fmt: skip
    return write_sparse(path, meta_off + len(text), (0, head), *pieces, (meta_off, text))
