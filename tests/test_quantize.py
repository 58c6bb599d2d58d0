"""One tensor down and up again: exact where it must be, bounded where it may err, alike however it is cut."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hlwq_convert.kernels.checksum import PRIME, combine
from hlwq_convert.metrics import ErrorSums, sqnr_db
from hlwq_convert.normal_levels import normal_levels
from hlwq_convert.quantize import (
    CHUNK,
    EncodedChunk,
    ScalarCode,
    block_checksums,
    choose_exponent,
    dequantize,
    power_of_two,
    quantize,
)
from hlwq_convert.rotate import sign_vector
from hlwq_formats.dtypes import WEIGHT_DTYPES, narrow, widen
from hlwq_formats.layout import BLOCK

deterministic = settings(derandomize=True, database=None, deadline=None, max_examples=150)

LENGTHS = [1, 7, 64, 127, 129, 576, 1000]
WIDTHS = range(2, 9)
LARGEST = {"BF16": 3.3895313892515355e38, "F16": 65504.0, "F32": 3.4028234e38}
NORMAL_MSE = {2: 0.117482, 3: 0.034548, 4: 0.009501, 5: 0.0025047, 6: 0.00064424, 7: 0.00016348, 8: 0.0000412}

Floats = NDArray[np.float32]


def code_for(source: Floats, dtype: str, bits: int, effort: str = "default") -> ScalarCode:
    exponent = choose_exponent(float(np.abs(source).max()))
    return ScalarCode(dtype, bits, exponent, normal_levels(bits), sign_vector(), effort)


def stored(values: NDArray[np.float64] | Floats, dtype: str) -> tuple[bytes, Floats]:
    """Source bytes of `dtype`, and the weights that they hold."""
    raw = narrow(values.astype(np.float32), dtype).tobytes()
    return raw, widen(raw, dtype)


def decode(chunk: EncodedChunk, code: ScalarCode, count: int) -> Floats:
    """The weights as loaded: rounded to the tensor's dtype."""
    decoded = dequantize(chunk.codes, np.frombuffer(chunk.scales, "<f2"), code, count)
    return widen(narrow(decoded, code.dtype).tobytes(), code.dtype)


def round_trip(
    values: NDArray[np.float64] | Floats, dtype: str, bits: int, effort: str = "default"
) -> tuple[Floats, Floats, EncodedChunk]:
    """(weights, decoded weights, encoded chunk)."""
    raw, weights = stored(values, dtype)
    code = code_for(weights, dtype, bits, effort)
    chunk = quantize(raw, code)
    return weights, decode(chunk, code, len(weights)), chunk


def relative_error(weights: Floats, decoded: Floats) -> float:
    w, d = weights.astype(np.float64), decoded.astype(np.float64)
    return float(((w - d) ** 2).sum() / (w**2).sum())


def energies(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of squares of blocks of 128, the last one shorter."""
    return np.array([(values[i : i + 128] ** 2).sum() for i in range(0, len(values), 128)])


# --- round trips ----------------------------------------------------------------------------------


@deterministic
@given(
    st.sampled_from(LENGTHS),
    st.sampled_from(WEIGHT_DTYPES),
    st.integers(2, 8),
    st.integers(-12, 12),
    st.sampled_from(["default", "fast"]),
    st.integers(0, 2**32 - 1),
)
def test_no_block_is_worse_than_zeros(length: int, dtype: str, bits: int, size: int, effort: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = 2.0**size * rng.standard_normal(length) * 10.0 ** rng.uniform(-3, 0, length)
    weights, decoded, chunk = round_trip(values, dtype, bits, effort)
    assert decoded.shape == weights.shape
    assert np.isfinite(chunk.sums[1]).all()
    w = weights.astype(np.float64)
    # A least-squares scale captures energy or none; rounding to the dtype adds at most 2**-8 of a decoded weight.
    assert (energies(decoded - w) <= energies(w) * (1 + 2.0**-7)).all()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_sizes_follow_from_length_and_bits(length: int, bits: int) -> None:
    _, decoded, chunk = round_trip(np.linspace(-1, 1, length) + 0.1, "F32", bits)
    blocks = -(-length // 128)
    assert (len(chunk.codes), len(chunk.scales)) == (16 * bits * blocks, 2 * blocks)
    assert chunk.sums.shape == (4, blocks)
    assert len(decoded) == length


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_error_on_gaussian_weights_is_below_that_of_the_codebook(bits: int, dtype: str) -> None:
    values = 0.02 * np.random.default_rng(bits).standard_normal(128 * 512)
    weights, decoded, _ = round_trip(values, dtype, bits)
    rounding = {"F32": 0.0, "F16": 2.0**-22, "BF16": 2.0**-16}[dtype]  # squared half a step
    assert 0.5 * NORMAL_MSE[bits] < relative_error(weights, decoded) < 0.995 * NORMAL_MSE[bits] + rounding


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("length", [1, 127, 128, 129, 1000])
def test_a_tensor_of_zeros_decodes_to_exact_zeros(dtype: str, length: int) -> None:
    _, decoded, chunk = round_trip(np.zeros(length), dtype, 4)
    assert not any(chunk.codes)
    assert not any(chunk.scales)
    assert not decoded.any()


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_a_block_of_zeros_among_others_decodes_to_exact_zeros(dtype: str) -> None:
    values = np.random.default_rng(1).standard_normal(384)
    values[128:256] = 0
    _, decoded, chunk = round_trip(values, dtype, 3)
    assert not any(chunk.codes[48:96])
    assert not decoded[128:256].any()
    assert decoded[:128].all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("size", [1e-9, 1e6])
def test_a_tensor_of_any_size_has_the_same_relative_error(bits: int, size: float) -> None:
    values = np.random.default_rng(bits).standard_normal(128 * 512)
    weights, decoded, _ = round_trip(size * values, "F32", bits)
    assert relative_error(weights, decoded) < NORMAL_MSE[bits]


@pytest.mark.parametrize("bits", WIDTHS)
def test_tiny_blocks_beside_huge_ones_leave_them_alone_and_decode_small(bits: int) -> None:
    values = np.random.default_rng(bits).standard_normal(128 * 64)
    huge, tiny = 1e6 * values[: 128 * 32], 1e-9 * values[128 * 32 :]
    weights, decoded, chunk = round_trip(np.concatenate([huge, tiny]), "F32", bits)
    _, _, alone = round_trip(huge, "F32", bits)
    assert chunk.codes.startswith(alone.codes)
    assert chunk.scales.startswith(alone.scales)
    assert np.abs(decoded[128 * 32 :]).max() <= np.abs(weights[128 * 32 :]).max()


@pytest.mark.parametrize("shift", [-100, -30, -1, 1, 30, 80])
def test_a_power_of_two_on_the_tensor_moves_only_the_exponent(shift: int) -> None:
    values = np.random.default_rng(2).standard_normal(1000)
    _, decoded, chunk = round_trip(values, "F32", 4)
    _, moved, moved_chunk = round_trip(np.ldexp(values, shift), "F32", 4)
    assert (moved_chunk.codes, moved_chunk.scales) == (chunk.codes, chunk.scales)
    assert np.array_equal(moved, np.ldexp(decoded, shift))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_denormal_weights_keep_the_relative_error(bits: int, dtype: str) -> None:
    values = 2e-39 * np.random.default_rng(bits).standard_normal(128 * 512)
    weights, decoded, _ = round_trip(values, dtype, bits)
    smallest = {"F32": 2.0**-149, "BF16": 2.0**-133}[dtype]
    rounding = (smallest / 2e-39) ** 2 / 12  # of the decoded weights to multiples of the smallest number
    assert relative_error(weights, decoded) < NORMAL_MSE[bits] + 1.1 * rounding


@pytest.mark.parametrize(("dtype", "smallest"), [("F32", 2.0**-149), ("BF16", 2.0**-133), ("F16", 2.0**-24)])
def test_the_smallest_numbers_do_not_grow(dtype: str, smallest: float) -> None:
    weights, decoded, chunk = round_trip(np.full(300, smallest), dtype, 5)
    assert weights[0] == smallest
    assert np.isfinite(chunk.sums[1]).all()
    assert np.abs(decoded).max() <= 2 * smallest


# --- extremes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "largest"), LARGEST.items())
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_finite_flag_says_whether_every_decoded_weight_is(dtype: str, largest: float, bits: int) -> None:
    values = largest * np.random.default_rng(bits).choice([-1.0, 1.0], 1280)
    weights, decoded, chunk = round_trip(values, dtype, bits)
    assert np.isfinite(weights).all()
    assert not np.isfinite(chunk.sums[1]).all()  # half of the weights decode larger, which here is infinity
    assert not np.isfinite(decoded).all()


@pytest.mark.parametrize(("dtype", "largest"), LARGEST.items())
def test_large_weights_with_room_above_them_stay_finite(dtype: str, largest: float) -> None:
    values = largest / 4 * np.random.default_rng(1).uniform(-1, 1, 1280)
    weights, decoded, chunk = round_trip(values, dtype, 8)
    assert np.isfinite(chunk.sums[1]).all()
    assert relative_error(weights, decoded) < NORMAL_MSE[8] + 2.0**-16


def test_one_block_that_overflows_is_noticed_among_others() -> None:
    values = np.ones(3840)
    assert np.isfinite(round_trip(values, "BF16", 2)[2].sums[1]).all()
    values[2560:2688] = LARGEST["BF16"] * np.random.default_rng(3).choice([-1, 1], 128)
    assert not np.isfinite(round_trip(values, "BF16", 2)[2].sums[1]).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_block_that_one_coordinate_holds_is_encoded(bits: int) -> None:
    # all weights alike but for the signs, the largest that the exponent allows
    weights = sign_vector() * np.float32(1 - 2.0**-9)
    raw = weights.tobytes()
    with np.errstate(over="ignore"):  # the assertion says it better than the warning
        chunk = quantize(raw, code_for(weights, "F32", bits))
    assert np.isfinite(chunk.sums[1]).all()


# --- chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_chunks_of_whole_blocks_give_the_bytes_of_one_call(dtype: str, blocks: int) -> None:
    raw, weights = stored(np.random.default_rng(4).standard_normal(128 * 20 + 77), dtype)
    code = code_for(weights, dtype, 5)
    whole = quantize(raw, code)
    step = blocks * 128 * (len(raw) // len(weights))
    chunks = [quantize(raw[i : i + step], code) for i in range(0, len(raw), step)]
    assert b"".join(c.codes for c in chunks) == whole.codes
    assert b"".join(c.scales for c in chunks) == whole.scales
    assert np.concatenate([c.sums for c in chunks], axis=1).tobytes() == whole.sums.tobytes()


@pytest.mark.parametrize("cut", [128, CHUNK - 128, CHUNK, CHUNK + 128])
def test_cuts_beside_the_end_of_a_usual_chunk_change_no_byte(cut: int) -> None:
    raw, weights = stored(np.random.default_rng(5).standard_normal(CHUNK + 300), "BF16")
    code = code_for(weights, "BF16", 3, "fast")
    whole, first, rest = quantize(raw, code), quantize(raw[: 2 * cut], code), quantize(raw[2 * cut :], code)
    assert first.codes + rest.codes == whole.codes
    assert first.scales + rest.scales == whole.scales
    assert np.concatenate([first.sums, rest.sums], axis=1).tobytes() == whole.sums.tobytes()


def test_a_run_of_blocks_decodes_by_itself() -> None:
    raw, weights = stored(np.random.default_rng(6).standard_normal(1000), "F32")
    code = code_for(weights, "F32", 3)
    chunk = quantize(raw, code)
    scales = np.frombuffer(chunk.scales, "<f2")
    whole = dequantize(chunk.codes, scales, code, 1000)
    part = dequantize(chunk.codes[48 * 2 : 48 * 5], scales[2:5], code, 384)
    assert np.array_equal(part, whole[256:640])


# --- decoding -------------------------------------------------------------------------------------


def test_decoding_multiplies_in_the_order_of_the_specification() -> None:
    rng = np.random.default_rng(7)
    levels = np.sort(rng.standard_normal(16)).astype(np.float32)
    code = ScalarCode("F32", 4, -9, levels, sign_vector())
    indices = rng.integers(0, 16, 128)
    packed = bytes(int(a) | int(b) << 4 for a, b in zip(indices[::2], indices[1::2], strict=True))
    scale = np.array([0.1234], np.float16)
    values = [levels[i] for i in indices]
    for distance in (1, 2, 4, 8, 16, 32, 64):
        for i in range(128):
            if not i & distance:
                a, b = values[i], values[i + distance]
                values[i], values[i + distance] = a + b, a - b
    factor = np.float32(scale[0]) * np.float32(2.0**-9)
    expected = [sign * (factor * value) for sign, value in zip(sign_vector(), values, strict=True)]
    assert dequantize(packed, scale, code, 128).tobytes() == np.array(expected, np.float32).tobytes()


# --- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_sums_agree_with_float64(dtype: str, bits: int) -> None:
    values = 0.05 * np.random.default_rng(bits).standard_normal(128 * 30 + 50)
    weights, decoded, chunk = round_trip(values, dtype, bits)
    unit = 2.0 ** -choose_exponent(float(np.abs(weights).max()))
    w, d = weights.astype(np.float64) * unit, decoded.astype(np.float64) * unit
    padded = np.zeros((2, 31 * 128))
    padded[:, : len(w)] = w, d
    a, b = padded.reshape(2, 31, 128)
    expected = np.stack([(a * a).sum(1), (b * b).sum(1), (a * b).sum(1), ((a - b) ** 2).sum(1)])
    assert (np.abs(chunk.sums - expected) <= 1e-6 * expected).all()  # 8 float32 roundings, and cancellation of none


def test_closeness_does_not_depend_on_the_chunks() -> None:
    weights, decoded, chunk = round_trip(np.random.default_rng(8).standard_normal(128 * 50), "F32", 4)
    whole, parts = ErrorSums(), ErrorSums()
    whole.add(chunk.sums)
    for start in range(0, 50, 7):
        parts.add(chunk.sums[:, start : start + 7])
    closeness = whole.closeness()
    assert closeness is not None
    assert closeness == parts.closeness()
    assert math.isclose(closeness.rel_mse, relative_error(weights, decoded), rel_tol=1e-6)
    w, d = weights.astype(np.float64), decoded.astype(np.float64)
    assert math.isclose(closeness.cosine, w @ d / math.sqrt((w @ w) * (d @ d)), rel_tol=1e-6)


def test_a_tensor_of_zeros_has_no_closeness() -> None:
    sums = ErrorSums()
    sums.add(round_trip(np.zeros(200), "F32", 4)[2].sums)
    assert sums.closeness() is None


def test_sqnr_is_in_decibels_and_unknown_for_an_exact_tensor() -> None:
    assert sqnr_db(0.001) == pytest.approx(30, rel=1e-12)
    assert sqnr_db(0) is None


# --- exponent -------------------------------------------------------------------------------------


@deterministic
@given(st.floats(2.0**-111, 3.4028234663852886e38, width=32))
def test_the_exponent_puts_the_largest_magnitude_in_one_octave(largest: float) -> None:
    exponent = choose_exponent(largest)
    assert -126 <= exponent <= 112
    assert 2**15 <= math.ldexp(largest, -exponent) < 2**16


@deterministic
@given(st.floats(2.0**-149, 2.0**-111, width=32, exclude_max=True))
def test_the_exponent_of_very_small_tensors_stops_at_its_lower_limit(largest: float) -> None:
    assert choose_exponent(largest) == -126


def test_the_exponent_of_zeros_is_zero() -> None:
    assert choose_exponent(0.0) == 0


@pytest.mark.parametrize("exponent", [-126, -1, 0, 1, 112, 126])
def test_powers_of_two_are_exact(exponent: int) -> None:
    assert float(power_of_two(exponent)) == math.ldexp(1, exponent)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("length", [1, 127, 1000])
def test_the_checksum_is_that_of_the_decoded_weights(dtype: str, length: int) -> None:
    _, decoded, chunk = round_trip(np.random.default_rng(9).standard_normal(length), dtype, 4)
    bits = narrow(decoded, dtype).view("<u4" if dtype == "F32" else "<u2")
    expected = []
    for start in range(0, length, 128):
        block = [int(b) for b in bits[start : start + 128]]
        expected.append(sum(b * (2 * i + 1) * 0x9E3779B1 for i, b in enumerate(block)) % 2**32)
    assert chunk.checksums.tolist() == expected
    assert combine(chunk.checksums) == [combined(expected)]


def combined(blocks: list[int]) -> int:
    return reduce(lambda found, block: (found * PRIME + block) % 2**32, blocks, 0)


def test_any_changed_weight_changes_the_checksum() -> None:
    bits = np.random.default_rng(3).integers(0, 1 << 16, 256).astype(np.uint16)
    before = block_checksums(bits)
    for i in range(256):
        for flip in (1, 0x80, 0x8000):
            changed = bits.copy()
            changed[i] ^= flip
            after = block_checksums(changed)
            assert (after != before).tolist() == [i < 128, i >= 128]


def test_each_chunk_has_a_checksum() -> None:
    blocks = np.random.default_rng(3).integers(0, 1 << 32, 2 * CHUNK // BLOCK + 7).astype(np.uint32)
    parts = np.split(blocks, [CHUNK // BLOCK, 2 * CHUNK // BLOCK])
    assert combine(blocks) == [combined(part.tolist()) for part in parts]
