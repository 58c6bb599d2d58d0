"""What is fuzzed: for each thing that reads bytes of strangers a function that takes any bytes, and seeds for it.

A function returns when the bytes were accepted and raises HlwqError when they were refused. Whatever else it
raises is a bug: Violation says that a promise was broken. Nothing here needs a fuzzer, so tests replay inputs.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import json
import os
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from fuzz_seeds import (
    GOOD_SHARDS,
    MODEL,
    ROOT,
    index_seeds,
    make_shards,
    metadata_seeds,
    safetensors_seeds,
    section_seeds,
    vectors,
)

from hlwq_convert.decode import decode_quantized, get_numpy
from hlwq_formats import metadata as md
from hlwq_formats.dtypes import ITEM_BITS, NUMPY
from hlwq_formats.errors import MAX_MESSAGE, BadData, BadDigest, BadFrames, HlwqError, UnsupportedDtype
from hlwq_formats.layout import MINOR, numel
from hlwq_formats.reader import Reader
from hlwq_formats.safetensors_dir import ModelDir
from hlwq_formats.sections import unpack_section
from hlwq_formats.validate import validate

INDEX = "model.safetensors.index.json"
SMALL = 1 << 14  # elements of a tensor that is decoded
DECODED = 2  # tensors of a container that are decoded
REFUSED = (65, 66, 69)  # 74 or 75, for one, would blame a disk or a race for what is in the file


class Violation(AssertionError):
    """A promise to the caller was broken without an exception of its own."""


def require(kept: bool, promise: str) -> None:
    """An assertion that stays when Python runs with -O."""
    if not kept:
        raise Violation(promise)


class Scratch:
    """A folder in memory where the system has one; its files stay open and are rewritten in place."""

    def __init__(self) -> None:
        memory = "/dev/shm"
        self.path = Path(tempfile.mkdtemp(prefix="hlwq-fuzz-", dir=memory if os.access(memory, os.W_OK) else None))
        self._open: dict[str, int] = {}
        atexit.register(self.remove)

    def write(self, name: str, data: bytes) -> str:
        """Make `data` the whole content of a file; returns its path."""
        path = f"{self.path}/{name}"
        fd = self._open.get(name)
        if fd is None:
            fd = self._open[name] = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0))
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, data)
        return path

    def remove(self) -> None:
        """Delete it."""
        shutil.rmtree(self.path, ignore_errors=True)


folders: dict[str, Scratch] = {}


def scratch(name: str) -> Scratch:
    """The folder of a target, made when it is first needed."""
    if name not in folders:
        folders[name] = Scratch()
    return folders[name]


# --- the targets ----------------------------------------------------------------------------------------


def read_container(data: bytes) -> None:
    """Open, decode a few small tensors, verify; what verifies must have decoded."""
    with Reader(scratch("container").write("a.hlwq", data)) as reader:
        require(len(reader.content_id) == 64, "content_id")
        failed: HlwqError | None = None
        tensors = reader.metadata.tensors
        first = zlib.crc32(data) % len(tensors) if tensors else 0  # others for other inputs
        for tensor in (tensors[first:] + tensors[:first])[:DECODED]:
            if numel(tensor.shape) <= SMALL:
                try:
                    values = get_numpy(reader, tensor.name)
                    require(values.shape == tuple(tensor.shape), "get_numpy returns the shape")
                except UnsupportedDtype:
                    require(tensor.dtype not in NUMPY and tensor.dtype != "BF16", "NumPy has this dtype")
                except BadData as error:
                    failed = error
        reader.verify()
        require(failed is None, f"verified, and did not decode: {failed}")


def read_metadata(data: bytes) -> None:
    """Decode and check a metadata document, as that of this minor version or of the next one."""
    document = md.decode_canonical(data, md.Metadata, MINOR + (zlib.crc32(data) & 1), "metadata")
    validate(document, md.incompat_of(document), "metadata")
    require(md.encode(document) == data, "there is one way to write a document")
    md.content_id(document)
    require(all(s.length < 1 << 53 for _, _, s in md.all_sections(document)), "lengths are bounded")


def read_section(data: bytes) -> None:
    """Unpack a section: u32 raw length (up to 4 MiB), u16 stored length of each frame but the last, the frames."""
    raw_length = int.from_bytes(data[:4], "little") % (4 * md.FRAME) + 1
    count = -(-raw_length // md.FRAME)
    lengths, stored = data[4 : 2 + 2 * count], data[2 + 2 * count :]
    frames = [1 + length for (length,) in struct.iter_unpack("<H", lengths[: len(lengths) & ~1])]
    frames.append(len(stored) - sum(frames))
    if len(frames) != count or frames[-1] < 1:
        raise BadFrames("the metadata would have been refused before")

    def unpack(raw_sha256: str) -> bytes:
        packing = md.Zstd(frames, raw_length, raw_sha256)
        section = md.Section("asset", len(stored), hashlib.sha256(stored).hexdigest(), packing)
        return unpack_section(section, stored, "section", "asset")

    try:
        unpack("0" * 64)
    except BadDigest:  # all frames are good: another way to decompress them gives the digest
        raw, start = b"", 0
        for length in frames:
            stream = zstandard.ZstdDecompressor(max_window_size=8 << 20).decompressobj()
            raw += stream.decompress(stored[start : start + length])
            require(stream.eof and not stream.unused_data, "a frame is all there is in its place")
            start += length
        require(len(raw) == raw_length, "frames have the size that was derived")
        require(unpack(hashlib.sha256(raw).hexdigest()) == raw, "two ways to decompress agree")


def read_safetensors(data: bytes) -> None:
    """Read a directory of one shard; tensors must lie in it, and are all there is behind the header."""
    folder = scratch("safetensors")
    folder.write("model.safetensors", data)
    directory = ModelDir(folder.path)
    end = 8 + int.from_bytes(data[:8], "little")
    header = parsed(data[8:end])
    require(header.keys() - {"__metadata__"} == directory.tensors.keys(), "the tensors are those of the header")
    for tensor in sorted(directory.tensors.values(), key=lambda t: (t.offset, t.length)):
        numbers = (*tensor.shape, tensor.offset, tensor.length)
        require(all(type(number) is int and number >= 0 for number in numbers), "sizes are whole numbers")
        require(tensor.offset == end and tensor.length * 8 == numel(tensor.shape) * ITEM_BITS[tensor.dtype], "extent")
        end += tensor.length
        tail = min(tensor.length, 16)
        require(directory.read(tensor, tensor.length - tail, tail) == data[end - tail : end], "bytes")
    require(end == len(data), "tensors fill the file")
    directory.check_unchanged()


def parsed(document: bytes) -> Any:
    """JSON that was accepted: with one meaning only."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        require(len(dict(pairs)) == len(pairs), "no key appears twice")
        return dict(pairs)

    return json.loads(document.decode(), object_pairs_hook=unique)


def read_index(data: bytes) -> None:
    """Read a directory of shards, good and bad ones, by an index; nothing outside it may be read."""
    if "index" not in folders:
        make_shards(scratch("index").path)
    scratch("index").write(f"{MODEL}/{INDEX}", data)
    directory = ModelDir(scratch("index").path / MODEL)
    weight_map = parsed(data)["weight_map"]
    require({t.name: t.file for t in directory.tensors.values()} == weight_map, "the tensors are those of the index")
    require({file for file, _ in directory.files} <= GOOD_SHARDS.keys(), "these shards are good")


def compare_safetensors(data: bytes) -> None:
    """What the package safetensors refuses we refuse; what we accept has the same tensors for both."""
    read_safetensors(data)
    safetensors: Any = importlib.import_module("safetensors")  # here: the other targets do without
    try:
        theirs = dict(safetensors.deserialize(data))
    except Exception as error:
        raise Violation(f"safetensors refuses what we accept: {error}") from None
    folder = scratch("safetensors")
    for tensor in ModelDir(folder.path).tensors.values():
        other = theirs.pop(tensor.name)
        require((other["dtype"], other["shape"]) == (tensor.dtype, list(tensor.shape)), "dtype and shape agree")
        require(bytes(other["data"]) == data[tensor.offset : tensor.offset + tensor.length], "bytes agree")
    require(not theirs, "we found all tensors")


def compare_readers(data: bytes) -> None:
    """The reader and the one that was written from the specification alone accept the same files, alike."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    second: Any = importlib.import_module("spec_reader")
    other: dict[str, Any] | None
    try:
        other = second.read(data)
    except second.REFUSALS:
        other = None
    try:
        with Reader(scratch("readers").write("a.hlwq", data)) as reader:
            reader.verify()
            if other is None:
                raise Violation("the second reader refuses what we accept")
            require((other["file_id"], other["content_id"]) == (reader.file_id, reader.content_id), "ids")
            require(list(other["tensors"]) == list(reader.tensors) and [*other["assets"]] == [*reader.assets], "names")
            for name, (_, _, expected) in list(other["tensors"].items())[: 3 * DECODED]:
                tensor = reader.stored_tensor(name)
                if isinstance(tensor, md.RawTensor):
                    require(b"".join(reader.raw_chunks(tensor)) == expected, "raw bytes")
                elif numel(tensor.shape) <= SMALL:
                    require(decode_quantized(reader, tensor).tobytes() == expected, "weights")
    except HlwqError as error:
        if other is not None:
            raise Violation(f"the second reader accepts what we refuse: {error}") from None
        raise


# --- all of them ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A function to fuzz, what to start from, and the length of the longest input."""

    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    max_length: int


TARGETS = {
    "container": Target(read_container, vectors, 1 << 15),
    "metadata": Target(read_metadata, metadata_seeds, 1 << 14),
    "section": Target(read_section, section_seeds, 1 << 13),
    "safetensors": Target(read_safetensors, safetensors_seeds, 1 << 12),
    "index": Target(read_index, index_seeds, 1 << 12),
    "differential": Target(compare_safetensors, safetensors_seeds, 1 << 12),
    "readers": Target(compare_readers, vectors, 1 << 15),
}


def check(name: str, data: bytes) -> str:
    """Run a target: `accepted` or the class of the error; raises whatever is a bug."""
    try:
        with np.errstate(divide="raise", over="raise", invalid="raise"):  # NumPy would warn, on stderr
            TARGETS[name].read(data)
    except HlwqError as error:
        line = str(error)
        require(len(line) <= MAX_MESSAGE and line.isprintable(), f"an error is one printable line, not {line!a}")
        require(error.exit_status in REFUSED, f"exit status {error.exit_status} for a bad file: {line}")
        return type(error).__name__
    return "accepted"
