"""The trellis: the reference against what it promises, and the kernels against the reference."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hlwq_convert import trellis
from hlwq_convert.frequencies import cost, count_magnitudes, fit_pairs, log2_fixed
from hlwq_convert.kernels import rans as fast_rans
from hlwq_convert.kernels import trellis as fast
from hlwq_convert.kernels.survey import RowEnergies
from hlwq_convert.metrics import ErrorSums
from hlwq_convert.quantize import choose_exponent, power_of_two
from hlwq_convert.rotate import sign_vector
from hlwq_formats import rans
from hlwq_formats.dtypes import BIT_PATTERNS, WEIGHT_DTYPES, narrow, widen

deterministic = settings(derandomize=True, database=None, deadline=None, max_examples=25)

Floats = NDArray[np.float32]


def noise(count: int, seed: int = 0, *, tails: bool = False) -> Floats:
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, count) if tails else rng.standard_normal(count)
    return (values * 0.02).astype(np.float32)


def code_for(weights: Floats, dtype: str, row: int, states: int, step: float) -> trellis.TrellisCode:
    """The code that a conversion would choose for all of a tensor."""
    exponent = choose_exponent(float(np.abs(weights).max()))
    scales = trellis.row_scales(trellis.row_energies(weights, row), row, exponent)
    plain = trellis.plain_code(dtype, row, states, exponent, step, scales, sign_vector())  # type: ignore[arg-type]
    steps = trellis.to_steps(weights * power_of_two(-exponent), 0, plain)
    return trellis.fit(plain, steps, trellis.find_indices(steps, states))


# --- the reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("states", rans.TRELLISES)
def test_search_finds_the_least_error_that_the_trellis_allows(states: int) -> None:
    """Against every sequence of six turns, the nearest index of each subset a turn."""
    rng = np.random.default_rng(states)
    steps = np.zeros((3, rans.SEGMENT), np.float32)
    steps[:, -6:] = rng.standard_normal((3, 6)) * 3  # zeros before: the state is 0 there, and an index of 0 is free
    found = trellis.search(steps, states)
    for row, indices in zip(steps[:, -6:].astype(np.float64), found[:, -6:], strict=True):
        best = np.inf
        for choices in itertools.product((0, 1, 2, 3), repeat=6):
            state, error = np.zeros(1, np.uint32), 0.0
            for x, subset in zip(row, choices, strict=True):
                if subset % 2 != int(state[0]) % 2:
                    break
                m = subset + 4 * round((x - subset) / 4)
                error += (x - m) ** 2
                state = rans.next_state(state, np.array([(m - subset % 2) // 2], np.int64).astype(np.uint32), states)
            else:
                best = min(best, error)
        assert ((row - indices) ** 2).sum() == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("states", rans.TRELLISES)
def test_indices_have_the_parity_that_the_trellis_asks_for(states: int) -> None:
    steps = np.random.default_rng(1).standard_normal((2, rans.SEGMENT)).astype(np.float32) * 5
    indices, state = trellis.search(steps, states), np.zeros(2, np.uint32)
    for t in range(rans.SEGMENT):
        assert (indices[:, t] & 1).tolist() == (state & 1).tolist()
        state = rans.next_state(state, (indices[:, t] >> 1).astype(np.uint32), states)


def test_eight_states_are_those_of_the_design() -> None:
    following = {
        0: {0: 0, 2: 1}, 1: {1: 2, 3: 3}, 2: {2: 4, 0: 5}, 3: {3: 6, 1: 7},
        4: {2: 0, 0: 1}, 5: {3: 2, 1: 3}, 6: {0: 4, 2: 5}, 7: {1: 6, 3: 7},
    }  # fmt: skip
    # the same code with other names for its states: the parities of all sequences are equal
    for bits in itertools.product((0, 1), repeat=9):
        named, state = 0, np.zeros(1, np.uint32)
        for b in bits:
            assert named % 2 == int(state[0]) % 2
            named = following[named][2 * b + named % 2]
            state = rans.next_state(state, np.array([b], np.uint32), 8)


@pytest.mark.parametrize(("states", "most"), [(8, 0.52), (32, 0.40), (64, 0.36), (256, 0.30)])
def test_loss_on_gaussian_weights(states: int, most: float) -> None:
    """Decibels above the Shannon bound at about 3.5 bits, everything counted."""
    weights = noise(1 << 19, 5)
    raw = narrow(weights, "F32").tobytes()
    code = fast_code(raw, 4096, states, 0.18)
    encoded = fast.encoder(code)(raw, 0)
    sums = ErrorSums()
    sums.add(encoded.sums)
    closeness = sums.closeness()
    assert closeness is not None
    stored = sum(map(len, encoded.chunks)) + len(code.row_scales) + 2 * len(code.pairs)
    bits = 8 * stored / len(weights)
    assert 3.4 < bits < 3.7
    assert 0.15 < 10 * np.log10(closeness.rel_mse) + 20 * np.log10(2) * bits < most


def fast_code(raw: bytes, row: int, states: int, step: float) -> trellis.TrellisCode:
    """code_for, by the kernels."""
    weights = widen(raw, "F32")
    exponent = choose_exponent(float(np.abs(weights).max()))
    scales = trellis.row_scales(trellis.row_energies(weights, row), row, exponent)
    plain = trellis.plain_code("F32", row, states, exponent, step, scales, sign_vector())  # type: ignore[arg-type]
    steps = fast.load_steps(raw, 0, plain)
    indices = fast.search_segments(steps.reshape(-1, rans.SEGMENT), np.float32(1), states)
    return trellis.fit(plain, steps, indices)


def test_rows_of_zeros_and_single_spikes() -> None:
    weights = np.zeros(8 * 640, np.float32)
    weights[640] = 3.0  # a row that holds nothing else
    weights[1280:1920] = noise(640) * 2.0**-40
    code = code_for(weights, "F32", 640, 8, 0.2)
    raw = weights.tobytes()
    encoded = fast.encoder(code)(raw, 0)
    decoded = np.empty(len(weights), np.uint32)
    assert fast.decoder(code, "F32")(encoded.chunks[0], 0, decoded)
    values = decoded.view(np.float32)
    assert (values[:640] == 0).all()
    assert values[640] == pytest.approx(3.0, rel=0.05)
    assert (values[1280:] == 0).all()  # less than 2**-33 of the largest row: nothing is left of it


@pytest.mark.parametrize("size", [2.0**-126, 2.0**100, 2.0**126])
def test_ends_of_the_range_of_floats(size: float) -> None:
    weights = np.clip(noise(4096) * 50 * size, -3.4e38, 3.4e38).astype(np.float32)
    code = code_for(weights, "F32", 1024, 8, 0.2)
    if not trellis.is_storable(code):
        assert size < 1e-30
        return
    encoded = trellis.quantize(weights.tobytes(), 0, code)
    assert np.isfinite(encoded.sums).all()
    assert encoded.sums[3].sum() < 0.02 * encoded.sums[0].sum()


# --- frequencies --------------------------------------------------------------------------------------


def test_logarithms() -> None:
    values = np.array([1, 2, 3, 5, 1000, 12_345_678, 2**51 + 7])
    assert np.abs(log2_fixed(values) / 65536 - np.log2(values)).max() < 2.0**-15
    assert log2_fixed(np.array([1, 8, 1 << 40])).tolist() == [0, 3 << 16, 40 << 16]


@deterministic
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=300))
def test_every_count_gives_good_tables(counts: list[int]) -> None:
    pairs = fit_pairs(np.array(counts))
    for table in rans.make_tables(pairs):
        assert table.frequencies.sum() == 1 << rans.PRECISION
    assert len(pairs) <= max(len(counts), 2)


@pytest.mark.parametrize(
    ("spread", "most"), [(0.3, 0.001), (1, 0.002), (4, 0.003), (16, 0.006), (30, 0.01), (200, 0.04)]
)
def test_tables_cost_little_more_than_the_entropy(spread: float, most: float) -> None:
    indices = np.rint(np.random.default_rng(0).standard_normal(1 << 18) * spread).astype(np.int32)
    pairs, bits = fit_pairs(count_magnitudes(indices)), 0.0
    for parity, table in enumerate(rans.make_tables(pairs)):
        magnitudes = np.abs(indices[(indices & 1) == parity])
        inside = magnitudes[magnitudes < len(pairs)]
        bits -= np.log2(pairs[inside] / 16384).sum()
        bits += (len(magnitudes) - len(inside)) * (16 - np.log2(table.frequencies[-1] / 16384))
    entropy = cost(count_magnitudes(indices))
    assert entropy <= bits + 1
    assert bits - entropy < most * len(indices)


# --- the kernels --------------------------------------------------------------------------------------


@deterministic
@given(
    st.integers(1, 5000), st.sampled_from([1, 50, 128, 300, 1024, 5000]), st.sampled_from(WEIGHT_DTYPES),
    st.sampled_from([8, 32, 256]), st.sampled_from([0.03, 0.2, 1.0]), st.booleans(),
)  # fmt: skip
def test_kernels_give_the_bits_of_the_reference(
    count: int, row: int, dtype: str, states: int, step: float, tails: bool
) -> None:
    count = max(1, count // row) * row
    raw = narrow(noise(count, count, tails=tails), dtype).tobytes()
    weights = widen(raw, dtype)
    code = code_for(weights, dtype, row, states, step)
    found, expected = fast.encoder(code)(raw, 0), trellis.quantize(raw, 0, code)
    assert found.chunks == expected.chunks
    assert found.checksums.tolist() == expected.checksums.tolist()
    assert found.sums.tobytes() == expected.sums.tobytes()
    assert found.counts.tolist() == expected.counts.tolist()
    padded = -(-count // 128) * 128
    indices = rans.decode(expected.chunks[0], padded, rans.make_tables(code.pairs), states)
    for wanted in WEIGHT_DTYPES:
        result = np.full(count + 1, 7, BIT_PATTERNS[wanted])
        assert fast.decoder(code, wanted)(expected.chunks[0], 0, result[:count])
        assert result[:count].tobytes() == narrow(trellis.dequantize(indices, 0, code, count), wanted).tobytes()
        assert result[count] == 7


def test_several_chunks_and_a_start_in_the_middle() -> None:
    count, row = rans.CHUNK + 40 * 1024 + 384, 1408
    count = count // row * row
    raw = narrow(noise(count), "BF16").tobytes()
    code = dataclasses.replace(code_for(widen(raw[: 2 * row * 8], "BF16"), "BF16", row, 8, 0.3), row_scales=np.full(
        count // row, 90, np.uint8))  # fmt: skip
    encoded = fast.encoder(code)(raw, 0)
    assert [*encoded.chunks] == trellis.quantize(raw, 0, code).chunks
    second = fast.encoder(code)(raw[2 * rans.CHUNK :], rans.CHUNK)
    assert second.chunks == encoded.chunks[1:]
    whole, part = np.empty(count, np.uint16), np.empty(count - rans.CHUNK, np.uint16)
    decode = fast.decoder(code, "BF16")
    assert decode(encoded.chunks[0], 0, whole[: rans.CHUNK])
    assert decode(encoded.chunks[1], rans.CHUNK, part)
    measured = ErrorSums()
    measured.add(encoded.sums)
    error = widen(np.concatenate([whole[: rans.CHUNK], part]).tobytes(), "BF16") - widen(raw, "BF16")
    closeness = measured.closeness()
    assert closeness is not None
    assert closeness.rel_mse == pytest.approx(float((error**2).sum() / (widen(raw, "BF16") ** 2).sum()), rel=1e-4)


@deterministic
@given(st.integers(1, 3000), st.sampled_from([1, 7, 64, 300]), st.sampled_from([1, 128, 1000]))
def test_row_energies_do_not_depend_on_the_pieces(rows: int, row: int, piece: int) -> None:
    rows = max(1, rows // row)
    weights = noise(rows * row, rows)
    energies = RowEnergies("F32", row, rows)
    for start in range(0, len(weights), 128 * piece):
        energies.add(weights[start : start + 128 * piece].tobytes())
    assert energies.energies.tobytes() == trellis.row_energies(weights, row).tobytes()


@pytest.mark.parametrize("states", [8, 256])
def test_every_damage_is_noticed_by_both_decoders_alike(states: int) -> None:
    raw = noise(40 * 1024).tobytes()
    code = fast_code(raw, 1024, states, 0.3)
    (chunk,) = fast.encoder(code)(raw, 0).chunks
    tables, decode = rans.make_tables(code.pairs), fast.decoder(code, "F32")
    rng, refused = np.random.default_rng(0), 0
    for at in rng.integers(0, len(chunk), 12):
        damaged = bytearray(chunk)
        damaged[at] ^= 1 << int(rng.integers(8))
        good = decode(bytes(damaged), 0, np.empty(40 * 1024, np.uint32))
        try:
            rans.decode(bytes(damaged), 40 * 1024, tables, states)
        except rans.BadStream:
            assert not good
            refused += 1
        else:
            assert good
    assert refused == 12
    for cut in (b"", chunk[:2], chunk[:126], chunk[:-2], chunk + b"\0\0"):
        assert not decode(cut, 0, np.empty(40 * 1024, np.uint32))
        with pytest.raises(rans.BadStream):
            rans.decode(cut, 40 * 1024, tables, states)


def test_words_are_coded_alike() -> None:
    rng = np.random.default_rng(3)
    for spread, count in ((1, 128), (5, 1024), (300, 33 * 1024 + 128)):  # more than 32 segments: two groups
        steps = rng.standard_normal((-(-count // rans.SEGMENT), rans.SEGMENT)).astype(np.float32)
        indices = fast.search_segments(steps, np.float32(spread), 8).ravel()[:count]
        indices[:: max(2, count // 700)] += 4 * 9000  # same parity, same next state
        pairs = fit_pairs(count_magnitudes(indices[1:]))
        expected = rans.encode(indices, rans.make_tables(pairs))
        assert fast_rans.encode(indices, fast_rans.KernelTables(pairs)) == expected
        assert rans.decode(expected, count, rans.make_tables(pairs), 8).tolist() == indices.tolist()
