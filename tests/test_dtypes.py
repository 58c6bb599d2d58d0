"""bfloat16 and float16 to float32 and back, against definitions of their own and against torch."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hlwq_formats.dtypes import ITEM_BITS, NUMPY, narrow, nbytes, widen

PATTERNS = np.arange(1 << 16, dtype="<u2")


def bits_of(values: NDArray[Any]) -> NDArray[np.uint32]:
    return values.astype(np.float32).view(np.uint32)


def half_value(pattern: int) -> float:
    """The finite value of a float16 pattern from its fields: sign, 5 bits of exponent, 10 of fraction."""
    exponent, fraction = pattern >> 10 & 31, pattern & 1023
    magnitude = math.ldexp(1024 + fraction, exponent - 25) if exponent else math.ldexp(fraction, -24)
    return -magnitude if pattern >> 15 else magnitude


def boundaries(finite: NDArray[np.float32]) -> NDArray[np.float32]:
    """For each two neighbours of an increasing table: the midpoint and the float32 on either side of it."""
    middle = ((finite[:-1].astype(np.float64) + finite[1:].astype(np.float64)) / 2).astype(np.float32)
    below = np.nextafter(middle, np.float32(-np.inf))
    above = np.nextafter(middle, np.float32(np.inf))
    return np.stack([below, middle, above])


def finite_patterns(tag: str) -> NDArray[np.uint16]:
    """Patterns of all finite values from 0 up, in increasing order."""
    return PATTERNS[: 0x7F80 if tag == "BF16" else 0x7C00]


def edge_inputs(tag: str) -> NDArray[np.float32]:
    """Every value of the narrow type, the surroundings of every midpoint and of the overflow, both signs."""
    table = widen(finite_patterns(tag).tobytes(), tag)
    limit = 0x7F7F8000 if tag == "BF16" else int(np.float32(65520).view(np.uint32))
    overflow = np.arange(limit - 3, limit + 4, dtype=np.uint32).view(np.float32)
    largest = np.finfo(np.float32).max
    tiny = np.array([2**-149, 2**-148, 2**-126, 2**-25, 2**-24, largest, np.inf], np.float32)
    positive = np.concatenate([table, boundaries(table).ravel(), overflow, tiny])
    return np.concatenate([positive, -positive])


def test_widen_bf16_is_the_upper_half_of_float32() -> None:
    for pattern, wide in zip(PATTERNS.tolist(), bits_of(widen(PATTERNS.tobytes(), "BF16")).tolist(), strict=True):
        assert struct.pack("<I", wide) == b"\0\0" + struct.pack("<H", pattern)


def test_widen_f16_has_the_value_of_its_fields() -> None:
    wide = widen(PATTERNS.tobytes(), "F16")
    finite = (PATTERNS & 0x7C00) != 0x7C00
    expected = np.array([half_value(p) for p in PATTERNS[finite].tolist()], np.float32)
    assert np.array_equal(bits_of(wide[finite]), bits_of(expected))  # as bits, so that -0 counts


def test_widen_f16_keeps_infinities_and_nan() -> None:
    special = PATTERNS[(PATTERNS & 0x7C00) == 0x7C00]
    wide = widen(special.tobytes(), "F16")
    assert np.array_equal(np.isnan(wide), (special & 0x3FF) != 0)
    assert wide[(special & 0x3FF) == 0].tolist() == [math.inf, -math.inf]


def test_widen_and_narrow_f32_change_no_bit() -> None:
    patterns = np.random.default_rng(1).integers(0, 1 << 32, 10_000, dtype=np.uint32)
    values = patterns.view(np.float32)
    assert np.array_equal(narrow(widen(patterns.tobytes(), "F32"), "F32").view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize("tag", ["BF16", "F16"])
def test_narrow_undoes_widen(tag: str) -> None:
    patterns = np.concatenate([finite_patterns(tag), finite_patterns(tag) | np.uint16(0x8000)])
    assert narrow(widen(patterns.tobytes(), tag), tag).tobytes() == patterns.tobytes()


@pytest.mark.parametrize("tag", ["BF16", "F16"])
def test_narrow_rounds_to_the_nearest_and_ties_to_even(tag: str) -> None:
    patterns = finite_patterns(tag)
    below, middle, above = (narrow(row, tag).view("<u2") for row in boundaries(widen(patterns.tobytes(), tag)))
    assert np.array_equal(below, patterns[:-1])
    assert np.array_equal(middle, patterns[:-1] + (patterns[:-1] & 1))
    assert np.array_equal(above, patterns[1:])


@pytest.mark.parametrize("tag", ["BF16", "F16"])
def test_narrow_is_odd_in_the_sign(tag: str) -> None:
    values = edge_inputs(tag)
    assert np.array_equal(narrow(-values, tag).view("<u2"), narrow(values, tag).view("<u2") ^ 0x8000)


@pytest.mark.parametrize(
    ("tag", "first_too_large", "infinity"), [("BF16", 0x7F7F8000, 0x7F80), ("F16", 0x477FF000, 0x7C00)]
)
def test_narrow_overflows_to_infinity_from_half_a_step_beyond_the_largest(
    tag: str, first_too_large: int, infinity: int
) -> None:
    values = np.array([first_too_large - 1, first_too_large, 0x7F7FFFFF, 0x7F800000], np.uint32).view(np.float32)
    assert narrow(values, tag).view("<u2").tolist() == [infinity - 1, infinity, infinity, infinity]


def test_narrow_f16_agrees_with_struct() -> None:
    values = edge_inputs("F16")
    values = values[np.abs(values) < 65520]  # struct refuses what rounds to infinity
    expected = struct.pack(f"<{len(values)}e", *values.tolist())
    assert narrow(values, "F16").tobytes() == expected


@pytest.mark.parametrize("tag", ["BF16", "F16"])
def test_narrow_keeps_the_sign_of_zero(tag: str) -> None:
    assert narrow(np.array([0.0, -0.0, -(2.0**-149)], np.float32), tag).view("<u2").tolist() == [0, 0x8000, 0x8000]


@pytest.mark.parametrize("tag", ["BF16", "F16"])
def test_narrow_leaves_its_argument_alone(tag: str) -> None:
    values = edge_inputs(tag)
    before = values.tobytes()
    narrow(values, tag)
    assert values.tobytes() == before


@pytest.mark.parametrize(("tag", "name"), [("BF16", "bfloat16"), ("F16", "float16")])
def test_narrow_agrees_with_torch(tag: str, name: str) -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(2).integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([edge_inputs(tag), random[~np.isnan(random)]])
    expected = torch.from_numpy(values).to(getattr(torch, name)).view(torch.int16).numpy()
    assert np.array_equal(narrow(values, tag).view(np.int16), expected)


@pytest.mark.parametrize(("tag", "name"), [("BF16", "bfloat16"), ("F16", "float16")])
def test_widen_agrees_with_torch(tag: str, name: str) -> None:
    torch = pytest.importorskip("torch")
    narrow_type = torch.from_numpy(PATTERNS.view(np.int16)).view(getattr(torch, name))
    expected = narrow_type.to(torch.float32).numpy()
    found = widen(PATTERNS.tobytes(), tag)
    number = ~np.isnan(expected)
    assert np.array_equal(np.isnan(found), ~number)
    assert np.array_equal(bits_of(found[number]), bits_of(expected[number]))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="I32 is not a weight dtype"):
        widen(bytes(4), "I32")
    with pytest.raises(ValueError, match="F64 is not a weight dtype"):
        narrow(np.zeros(1, np.float32), "F64")


def test_item_sizes_agree_with_numpy() -> None:
    assert {tag: 8 * dtype.itemsize for tag, dtype in NUMPY.items()} == {tag: ITEM_BITS[tag] for tag in NUMPY}


def test_sub_byte_types_must_fill_whole_bytes() -> None:
    assert [nbytes("F4", n) for n in (0, 1, 2, 3)] == [0, None, 1, None]
    assert [nbytes("F6_E2M3", n) for n in (3, 4, 8)] == [None, 3, 6]
