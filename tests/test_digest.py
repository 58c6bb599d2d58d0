"""Bytes that are hashed one piece behind, and read to memory of the caller."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from hlwq_formats.digest import PipelinedDigest
from hlwq_formats.errors import BadDigest, SourceChanged
from hlwq_formats.files import InputFile
from hlwq_formats.reader import Reader

VECTOR = Path(__file__).parents[1] / "spec" / "vectors" / "good" / "bits-5.hlwq"


@pytest.mark.parametrize("length", [0, 1000, 9 << 20])
def test_the_digest_is_that_of_all_pieces_with_two_buffers_in_turn(length: int) -> None:
    data = np.random.default_rng(0).bytes(length)
    digest, buffers = PipelinedDigest(), (bytearray(1 << 20), bytearray(1 << 20))
    for turn, start in enumerate(range(0, len(data), 1 << 20)):
        piece = data[start : start + (1 << 20)]
        buffers[turn % 2][: len(piece)] = piece
        digest.update(memoryview(buffers[turn % 2])[: len(piece)])
    assert digest.hexdigest() == hashlib.sha256(data).hexdigest()


class Bytes:
    """A container in memory."""

    name, size = "in memory", VECTOR.stat().st_size

    def read(self, offset: int, length: int, /) -> bytes:
        return VECTOR.read_bytes()[offset : offset + length]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("source", [VECTOR, Bytes()], ids=["a file", "something else"])
def test_a_section_is_read_to_memory_of_the_caller(source: Path | Bytes, tmp_path: Path) -> None:
    with Reader(source) as reader:
        name = next(iter(reader.tensors))
        asked: list[bytearray] = []

        def memory(size: int) -> memoryview:
            asked.append(bytearray(size))
            return memoryview(asked[-1])

        pieces = list(reader.iter_section_into("tensor", name, "codes", 100, memory))
        assert b"".join(asked) == b"".join(pieces) == b"".join(reader.iter_section("tensor", name, "codes"))
        place = reader._offsets[reader._index["tensor", name, "codes"]]
    damaged = bytearray(VECTOR.read_bytes())
    damaged[place + 7] ^= 1
    (tmp_path / "damaged.hlwq").write_bytes(damaged)
    with Reader(tmp_path / "damaged.hlwq") as reader, pytest.raises(BadDigest, match="codes"):
        list(reader.iter_section_into("tensor", name, "codes", 100, memory))


def test_a_file_that_ends_too_early_is_said_to_have_changed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    with InputFile(tmp_path / "file") as file:
        whole = memoryview(bytearray(10))
        file.read_into(0, whole)
        with pytest.raises(SourceChanged, match="3 bytes at 10 are gone"):
            file.read_into(3, whole)
