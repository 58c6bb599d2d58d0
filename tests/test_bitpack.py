"""Packed codes: one LSB-first bit stream, against a definition that moves one bit at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlwq_formats.bitpack import pack, packed_size, unpack

deterministic = settings(derandomize=True, database=None, deadline=None, max_examples=150)

Stream = tuple[int, list[int]]
streams: st.SearchStrategy[Stream] = st.integers(1, 8).flatmap(
    lambda width: st.tuples(st.just(width), st.lists(st.integers(0, 2**width - 1), max_size=300))
)


def slow_pack(codes: list[int], width: int) -> bytes:
    """Bit j of the stream is bit j % 8 of byte j // 8; code i starts at bit i * width, low bit first."""
    stream = bytearray(-(-len(codes) * width // 8))
    for i, code in enumerate(codes):
        for k in range(width):
            j = i * width + k
            stream[j // 8] |= (code >> k & 1) << j % 8
    return bytes(stream)


@deterministic
@given(streams)
def test_layout_is_the_bit_by_bit_definition(stream: Stream) -> None:
    width, codes = stream
    assert pack(np.array(codes, np.uint8), width) == slow_pack(codes, width)


@deterministic
@given(streams)
def test_unpack_reads_the_bit_by_bit_definition(stream: Stream) -> None:
    width, codes = stream
    assert unpack(slow_pack(codes, width), width, len(codes)).tolist() == codes


@pytest.mark.parametrize("width", range(1, 9))
def test_round_trip_of_every_count_up_to_three_octets(width: int) -> None:
    codes = np.random.default_rng(width).integers(0, 2**width, 24, dtype=np.uint8)
    for count in range(25):
        stream = pack(codes[:count], width)
        assert len(stream) == packed_size(count, width)
        assert unpack(stream, width, count).tolist() == codes[:count].tolist()


@pytest.mark.parametrize("width", range(1, 9))
def test_unused_bits_of_the_last_byte_are_zero(width: int) -> None:
    for count in range(1, 9):
        used = count * width
        stream = int.from_bytes(pack(np.full(count, 2**width - 1, np.uint8), width), "little")
        assert stream == (1 << used) - 1


@pytest.mark.parametrize("width", range(1, 9))
def test_a_block_of_128_fills_whole_bytes(width: int) -> None:
    codes = np.random.default_rng(width).integers(0, 2**width, 256, dtype=np.uint8)
    assert pack(codes, width) == pack(codes[:128], width) + pack(codes[128:], width)


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("difference", [-1, 1])
def test_a_stream_of_the_wrong_length_is_refused(width: int, difference: int) -> None:
    with pytest.raises(ValueError, match=f"100 codes of {width} bits take"):
        unpack(bytes(packed_size(100, width) + difference), width, 100)


@pytest.mark.parametrize("width", [-1, 0, 9, 16])
def test_widths_outside_1_to_8_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match=r"not in 1\.\.8"):
        pack(np.zeros(8, np.uint8), width)
    with pytest.raises(ValueError, match=r"not in 1\.\.8"):
        unpack(b"", width, 0)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_unpacked(kind: type[bytes]) -> None:
    assert unpack(kind(b"\x21\x43"), 4, 4).tolist() == [1, 2, 3, 4]
