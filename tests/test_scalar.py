"""Codes and scales of rotated blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hlwq_convert.normal_levels import normal_levels
from hlwq_convert.quantize import choose_exponent
from hlwq_convert.scalar import EFFORTS, GAINS, encode, nearest_level, penalty_of

deterministic = settings(derandomize=True, database=None, deadline=None, max_examples=60)

WIDTHS = range(2, 9)
LARGEST = 256 * 2.0 ** -choose_exponent(1.0)  # of a rotated block: 128 times the bound of scaled weights


def gaussian(n: int, seed: int, scale: float = 1000.0) -> NDArray[np.float32]:
    return (scale * np.random.default_rng(seed).standard_normal((n, 128))).astype(np.float32)


def squared_errors(rotated: NDArray[np.float32], levels: NDArray[np.float32], effort: str) -> NDArray[np.float64]:
    """(n,) squared error of each block in its rotated coordinates, in float64."""
    codes, scales = encode(rotated, levels, effort)
    approximation = 128 * scales.astype(np.float64)[:, None] * levels[codes].astype(np.float64)
    return np.asarray(((rotated - approximation) ** 2).sum(axis=1))


@st.composite
def weird_blocks(draw: st.DrawFn) -> NDArray[np.float32]:
    """A few rotated blocks: zeros, constants, spikes and noise of any size up to 2**16."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blocks = []
    for kind in draw(
        st.lists(st.sampled_from(["zero", "constant", "spike", "noise", "mixed"]), min_size=1, max_size=6)
    ):
        size = 2.0 ** draw(st.integers(-140, 16))
        block = np.zeros(128)
        if kind == "constant":
            block += size * draw(st.sampled_from([-1, 1]))
        elif kind == "spike":
            block[draw(st.integers(0, 127))] = size
        elif kind == "noise":
            block = size * rng.uniform(-1, 1, 128)
        elif kind == "mixed":
            block = size * rng.uniform(-1, 1, 128) * 10.0 ** rng.uniform(-20, 0, 128)
        blocks.append(block)
    return np.array(blocks, np.float32)


# --- nearest level --------------------------------------------------------------------------------


@deterministic
@given(
    st.lists(st.integers(-2000, 2000), min_size=4, max_size=4, unique=True),
    st.lists(st.integers(-2500, 2500), min_size=1, max_size=64),
)
def test_the_nearest_level_has_the_least_distance_and_ties_go_down(levels: list[int], values: list[int]) -> None:
    table = sorted(levels)
    expected = [min(range(4), key=lambda i: abs(value - table[i])) for value in values]  # min takes the first
    assert nearest_level(np.array(values, np.float32), np.array(table, np.float32)).tolist() == expected


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_value_passes_to_the_next_level_just_above_the_float32_midpoint(bits: int) -> None:
    levels = normal_levels(bits)
    middle = (levels[:-1] + levels[1:]) * np.float32(0.5)
    lower = np.arange(2**bits - 1)
    assert np.array_equal(nearest_level(middle, levels), lower)
    assert np.array_equal(nearest_level(np.nextafter(middle, np.float32(-np.inf)), levels), lower)
    assert np.array_equal(nearest_level(np.nextafter(middle, np.float32(np.inf)), levels), lower + 1)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_nearest_level_agrees_with_brute_force(bits: int) -> None:
    levels = np.unique(np.random.default_rng(bits).laplace(size=2**bits).astype(np.float32))
    values = gaussian(20, bits, 2.0)
    midpoints = (levels[:-1] + levels[1:]) * np.float32(0.5)
    distance = np.abs(values.astype(np.float64)[..., None] - levels.astype(np.float64))
    tied = (values[..., None] == midpoints).any(axis=-1)
    assert not tied.any()  # the seed avoids the only values where rounding of a midpoint could matter
    assert np.array_equal(nearest_level(values, levels), distance.argmin(axis=-1))


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_are_their_own_nearest_and_the_ends_are_open(bits: int) -> None:
    levels = normal_levels(bits)
    assert np.array_equal(nearest_level(levels, levels), np.arange(2**bits))
    assert nearest_level(np.array([-1e30, 1e30], np.float32), levels).tolist() == [0, 2**bits - 1]


# --- blocks ---------------------------------------------------------------------------------------


@deterministic
@given(weird_blocks(), st.integers(2, 8), st.sampled_from(EFFORTS))
def test_codes_and_scales_are_ones_that_a_reader_accepts(blocks: NDArray[np.float32], bits: int, effort: str) -> None:
    codes, scales = encode(blocks, normal_levels(bits), effort)
    assert codes.dtype == np.uint8
    assert codes.shape == blocks.shape
    assert codes.max() < 2**bits
    assert scales.dtype == np.float16
    assert (scales.view(np.uint16) < 0x7C00).all()  # neither negative, -0, infinite nor NaN
    assert not codes[scales == 0].any()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("effort", EFFORTS)
def test_the_largest_possible_block_has_a_finite_scale(bits: int, effort: str) -> None:
    # weights as large as the exponent allows, with the signs of one row of the transform: one coordinate takes all
    block = np.zeros((1, 128), np.float32)
    block[0, 5] = np.nextafter(np.float32(LARGEST), np.float32(0))
    with np.errstate(over="ignore"):  # the assertion says it better than the warning
        _, scales = encode(block, normal_levels(bits), effort)
    assert np.isfinite(scales).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("effort", EFFORTS)
def test_blocks_of_zeros_have_scale_zero_and_codes_zero(bits: int, effort: str) -> None:
    blocks = gaussian(3, 1)
    blocks[1] = 0
    codes, scales = encode(blocks, normal_levels(bits), effort)
    assert scales[1].tobytes() == b"\0\0"
    assert not codes[1].any()
    assert (scales[[0, 2]] > 0).all()


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_scale_that_rounds_to_zero_has_codes_zero(effort: str) -> None:
    codes, scales = encode(gaussian(4, 2, 1e-7), normal_levels(4), effort)
    assert not scales.view(np.uint16).any()
    assert not codes.any()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("seed", range(3))
def test_the_search_is_never_worse_than_the_fast_encoder(bits: int, seed: int) -> None:
    blocks = gaussian(300, seed)
    if seed == 2:
        blocks *= np.exp(np.random.default_rng(9).standard_normal(blocks.shape)).astype(np.float32)
    levels = normal_levels(bits)
    fast, searched = (squared_errors(blocks, levels, effort) for effort in ("fast", "default"))
    energy = (blocks.astype(np.float64) ** 2).sum(axis=1)
    # The fp16 scale is off by at most 2**-11, which costs 2**-22 of the energy; the float32 sums by which the
    # search ranks gains may be off by as much again. At 5 bits both are 1e-4 of the error.
    assert (searched <= fast + energy * 2.0**-21).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_search_gains_on_gaussian_blocks(bits: int) -> None:
    blocks, levels = gaussian(2000, bits), normal_levels(bits)
    fast, searched = (squared_errors(blocks, levels, effort).sum() for effort in ("fast", "default"))
    assert searched < 0.995 * fast


@pytest.mark.parametrize("bits", WIDTHS)
def test_more_search_has_less_error_and_fewer_bits(bits: int) -> None:
    """At widths that are compressed; at the others error is all that counts."""
    blocks, levels = gaussian(2000, bits), normal_levels(bits)
    default, best = (squared_errors(blocks, levels, effort).sum() for effort in ("default", "best"))
    assert best < default
    entropies = []
    for effort in ("default", "best"):
        shares = np.bincount(encode(blocks, levels, effort)[0].ravel(), minlength=1 << bits) / blocks.size
        entropies.append(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())
    assert (entropies[1] < entropies[0] - 0.025) == (2 < bits < 8)
    assert (penalty_of("best", bits) > 0) == (2 < bits < 8)
    assert penalty_of("default", bits) == penalty_of("fast", bits) == 0


def test_the_search_includes_the_gain_of_the_fast_encoder() -> None:
    assert len(GAINS) == 9
    assert np.float32(1) in GAINS
    assert np.allclose(GAINS, np.linspace(0.88, 1.12, 9), rtol=0, atol=2.0**-24)


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_block_made_of_levels_is_found_exactly(effort: str) -> None:
    levels = normal_levels(3)
    chosen = np.random.default_rng(4).permutation(np.repeat(np.arange(8), [5, 14, 20, 25, 25, 20, 14, 5]))
    block = (np.float32(128 * 0.75) * levels[chosen])[None]
    codes, scales = encode(block * np.float32(8), levels, effort)
    assert codes[0].tolist() == chosen.tolist()
    assert scales.tolist() == [6.0]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("effort", EFFORTS)
def test_each_block_is_encoded_by_itself(bits: int, effort: str) -> None:
    blocks = gaussian(20, bits) * np.logspace(-3, 3, 20, dtype=np.float32)[:, None]
    codes, scales = encode(np.asfortranarray(blocks), normal_levels(bits), effort)
    for i in range(20):
        one_codes, one_scales = encode(blocks[i : i + 1], normal_levels(bits), effort)
        assert np.array_equal(one_codes[0], codes[i])
        assert one_scales.tobytes() == scales[i : i + 1].tobytes()
