"""What fuzzing starts from: the vectors of the specification, and small files that are made here."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import zstandard
from vector_parts import ZSTD_MAGIC, zstd_frame

from hlwq_formats.dtypes import ITEM_BITS
from hlwq_formats.layout import numel
from hlwq_formats.metadata import FRAME

ROOT = Path(__file__).resolve().parent.parent


def vectors() -> list[bytes]:
    """Every container of the specification, the small ones first."""
    return sorted((path.read_bytes() for path in sorted((ROOT / "spec" / "vectors").glob("**/*.hlwq"))), key=len)


def metadata_seeds() -> list[bytes]:
    """The documents of the vectors."""
    found = {data[data.find(b'{"assets"') :] for data in vectors() if b'{"assets"' in data}
    return sorted(found, key=lambda document: (len(document), document))


def section_seeds() -> list[bytes]:
    """Frames of the vectors, frames by hand, and what libzstd makes of text."""
    one = [zstd_frame(1), zstd_frame(4096), zstd_frame(4096, b"text" * 9), b"\x28\xb5\x2f\xfd\x20\x00\x01\x00\x00"]
    text = (ROOT / "LICENSE").read_bytes()[:4000]
    noise = hashlib.shake_256(text).digest(2000)
    raw = [
        text,
        text[:300],
        noise[:32] * 70,
        noise,
        bytes(b & 7 for b in noise),
        noise[:100] + text[:900] + noise[:100],
    ]
    packed = [(len(data), zstandard.compress(data, level)) for data in raw for level in (1, 15, 19)]
    packed.append((300, zstandard.ZstdCompressor(write_checksum=True).compress(text[:300])))
    sizes = [(1, one[0]), (4096, one[1]), (4096, one[2]), (1, one[3]), *packed]
    seeds = [struct.pack("<I", size - 1) + frame for size, frame in sizes]
    for data in vectors():
        if (at := data.find(ZSTD_MAGIC)) >= 0:
            seeds.append(struct.pack("<I", 4095) + data[at : data.find(b"\x00" * 8, at)])
    first = zstd_frame(FRAME)
    seeds = sorted(set(seeds), key=lambda seed: (len(seed), seed))
    return [*seeds, struct.pack("<IH", FRAME + 99, len(first) - 1) + first + zstd_frame(100)]


def shard(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file of a header, as text or to be written as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], start: int) -> dict[str, Any]:
    """A tensor of a safetensors header that starts at byte `start`."""
    size = numel(shape) * ITEM_BITS[dtype] // 8
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}


def safetensors_seeds() -> list[bytes]:
    """Every dtype, odd shapes, notes, and a few that are wrong."""
    many = {f"t{i}": entry("U8", [2], 2 * i) for i in range(9)}
    seeds = [shard({dtype: entry(dtype, [2, 4], 0)}, bytes(bits)) for dtype, bits in ITEM_BITS.items()]
    return [
        *seeds,
        shard(many, bytes(18)),
        shard({"a": entry("F32", [], 0), "b": entry("BF16", [0], 4), "c": entry("I64", [1] * 8, 4)}, bytes(12)),
        shard({"__metadata__": {"format": "pt"}, "a": entry("U8", [3], 0)}, b"abc"),
        shard(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}    ', b"\x01"),
        shard({}),
        shard({"a": entry("U8", [1], 0), "b": entry("U8", [1], 0)}, b"\x01"),
        shard({"a": entry("U8", [1], 1)}, b"\x01\x02"),
        shard({"a": {"dtype": "U8", "shape": [1 << 63, 0, 1 << 63], "data_offsets": [0, 0]}}),
        b"version https://git-lfs.github.com/spec/v1\n",
    ]


GOOD_SHARDS = {
    "model-00001-of-00002.safetensors": shard({"a": entry("U8", [1], 0), "b": entry("F16", [1], 1)}, b"abc"),
    "model-00002-of-00002.safetensors": shard({"c": entry("BF16", [2], 0)}, b"abcd"),
    "x.safetensors": shard({"d": entry("U8", [], 0)}, b"d"),
    "y.safetensors": shard({}),
    "A-1-of-1.safetensors": shard({"a": entry("U8", [2], 0)}, b"aa"),
    "link.safetensors": shard({"l": entry("U8", [1], 0)}, b"l"),
}
ELSEWHERE = ("sub/link", "../outside", "CON", "CON ", "a:b", "a*b")  # good shards, but for their names
BROKEN = ("hole", "cut", "dir", "out", "up", "loop", "null", "fifo", "lost")
MODEL = "model"


def make_shards(folder: Path) -> None:
    """A model of the shards that an index may name, and of things that none may."""
    model, suffix = folder / MODEL, ".safetensors"
    (model / "sub").mkdir(parents=True)
    for name, data in GOOD_SHARDS.items():
        (model / name).write_bytes(data)
    for name in ELSEWHERE:
        (model / (name + suffix)).write_bytes(GOOD_SHARDS["x.safetensors"])
    (model / "link.safetensors").replace(model / "sub" / "link.safetensors")
    links = {"link": "sub/link", "out": "../outside", "up": f"sub/../../{MODEL}/../outside", "loop": "loop"}
    for name, to in links.items():
        (model / (name + suffix)).symlink_to(to + suffix)
    (model / "null.safetensors").symlink_to(os.devnull)
    (model / "lost.safetensors").symlink_to("nowhere")
    (model / "hole.safetensors").write_bytes(shard({"d": entry("U8", [1], 1)}, b"ab"))
    (model / "cut.safetensors").write_bytes(b"\x00")
    (model / "dir.safetensors").mkdir()
    os.mkfifo(model / "fifo.safetensors")


def index_seeds() -> list[bytes]:
    """One that is right, and each thing it may name."""
    first, second = list(GOOD_SHARDS)[:2]
    maps: list[dict[str, str]] = [
        {"a": first, "b": first, "c": second},
        {"a": first, "b": first},
        {"d": "x.safetensors", "l": "link.safetensors"},
        {"a": "A-1-of-1.safetensors"},
        {"d": "x.safetensors", "e": "y.safetensors"},
        *({"d": name + ".safetensors"} for name in (*ELSEWHERE, *BROKEN)),
        {"l": "sub/link.safetensors", "d": "./x.safetensors"},
    ]
    return [json.dumps({"metadata": {"total_size": 7}, "weight_map": m}, separators=(",", ":")).encode() for m in maps]
