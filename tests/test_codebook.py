"""The fit of a codebook: optimal for N(0, 1), better than that table elsewhere, harmless on strange data."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hlwq_convert.codebook import GROUP, fit_lloyd_max, normalise, sample_groups
from hlwq_convert.normal_levels import normal_levels
from hlwq_convert.rotate import fwht
from hlwq_convert.scalar import nearest_level

deterministic = settings(derandomize=True, database=None, deadline=None, max_examples=60)

PUBLISHED = {2: ".117482", 3: ".034548", 4: ".009501", 5: ".0025047", 6: ".00064424", 7: ".00016348", 8: ".0000412"}
WIDTHS = range(2, 9)


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0


def probability(a: float, b: float) -> float:
    """P(a < X < b) under N(0, 1), from the tail in which it does not cancel."""
    if b <= 0:
        a, b = -b, -a
    if a >= 0:
        return (math.erfc(a / math.sqrt(2)) - math.erfc(b / math.sqrt(2))) / 2
    return (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2))) / 2


def normal_cells(levels: NDArray[np.float32]) -> list[tuple[float, float, float]]:
    """(level, probability, first moment) of each cell under N(0, 1); cells meet halfway between levels."""
    exact = [float(level) for level in levels]
    edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(exact)), math.inf]
    return [
        (level, probability(a, b), density(a) - density(b))
        for level, (a, b) in zip(exact, pairwise(edges), strict=True)
    ]


def normal_mse(levels: NDArray[np.float32]) -> float:
    """Mean squared error of nearest-level quantization of N(0, 1), in closed form."""
    return 1 - math.fsum(2 * level * moment - level * level * p for level, p, moment in normal_cells(levels))


def sample_mse(coordinates: NDArray[np.float32], levels: NDArray[np.float32]) -> float:
    error = coordinates - levels[nearest_level(coordinates, levels)]
    return float(np.mean(error.astype(np.float64) ** 2))


def with_coordinates(rotated: NDArray[np.float64]) -> NDArray[np.float32]:
    """Blocks whose rotation is `rotated`."""
    return fwht(rotated.astype(np.float32)) / np.float32(128)


@pytest.mark.parametrize("bits", WIDTHS)
def test_each_normal_level_is_the_centroid_of_its_cell(bits: int) -> None:
    for level, p, moment in normal_cells(normal_levels(bits)):
        assert abs(level - moment / p) < 1e-6


@pytest.mark.parametrize("bits", WIDTHS)
def test_normal_levels_have_the_published_error(bits: int) -> None:
    printed = PUBLISHED[bits]
    assert f"{normal_mse(normal_levels(bits)):.{len(printed) - 1}f}" == "0" + printed


@pytest.mark.parametrize("bits", WIDTHS)
def test_normal_levels_are_increasing_and_symmetric(bits: int) -> None:
    levels = normal_levels(bits)
    assert levels.dtype == np.float32
    assert len(levels) == 2**bits
    assert (np.diff(levels) > 0).all()
    assert np.array_equal(levels, -levels[::-1])


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_fit_on_a_gaussian_sample_is_within_one_percent_of_the_optimum(bits: int) -> None:
    blocks = np.random.default_rng(bits).standard_normal((16384, 128)).astype(np.float32)
    levels = fit_lloyd_max(blocks, bits)
    assert not np.array_equal(levels, normal_levels(bits))
    assert normal_mse(levels) < 1.01 * float(PUBLISHED[bits])


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", ["laplace", "bimodal"])
def test_the_fit_beats_the_normal_table_on_other_shapes(bits: int, shape: str) -> None:
    rng = np.random.default_rng(bits)
    if shape == "laplace":
        rotated = rng.laplace(size=(4096, 128))
    else:
        rotated = rng.choice([-1.0, 1.0], (4096, 128)) + 0.2 * rng.standard_normal((4096, 128))
    blocks = with_coordinates(rotated)
    coordinates = normalise(fwht(blocks))
    assert sample_mse(coordinates, fit_lloyd_max(blocks, bits)) < sample_mse(coordinates, normal_levels(bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_one_block_too_few_gives_the_normal_table(bits: int) -> None:
    blocks = np.random.default_rng(bits).laplace(size=(8 << bits, 128)).astype(np.float32)
    assert not np.array_equal(fit_lloyd_max(blocks, bits), normal_levels(bits))
    assert np.array_equal(fit_lloyd_max(blocks[1:], bits), normal_levels(bits))


def test_blocks_of_zeros_do_not_count() -> None:
    blocks = np.random.default_rng(1).laplace(size=(32, 128)).astype(np.float32)
    mixed = np.zeros((320, 128), np.float32)
    mixed[::10] = blocks
    assert np.array_equal(fit_lloyd_max(mixed, 2), fit_lloyd_max(blocks, 2))
    assert np.array_equal(fit_lloyd_max(mixed[10:], 2), normal_levels(2))


@pytest.mark.parametrize("n", [0, 1, 5000])
@pytest.mark.parametrize("bits", WIDTHS)
def test_nothing_but_zeros_gives_the_normal_table(n: int, bits: int) -> None:
    assert np.array_equal(fit_lloyd_max(np.zeros((n, 128), np.float32), bits), normal_levels(bits))


@st.composite
def strange_blocks(draw: st.DrawFn) -> NDArray[np.float32]:
    """Up to 300 blocks made of few patterns: constant, alternating, single spikes, sparse, tiny, huge."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    value = st.sampled_from([0.0, 1.0, -1.0, 1e-30, 1e-20, 1e-9, 0.3, 7.0, 65504.0, 2.0**17])
    patterns = []
    for _ in range(draw(st.integers(1, 4))):
        block = np.full(128, draw(value))
        kind = draw(st.sampled_from(["constant", "alternating", "spike", "sparse", "noise"]))
        if kind == "alternating":
            block[:: draw(st.sampled_from([2, 3, 64]))] *= -1
        elif kind == "spike":
            block[1:] = draw(value)
        elif kind == "sparse":
            block *= rng.random(128) < 0.05
        elif kind == "noise":
            block *= rng.standard_normal(128)
        patterns.append(block)
    chosen = rng.integers(0, len(patterns), draw(st.integers(0, 300)))
    return np.array(patterns, np.float32)[chosen]


@deterministic
@given(strange_blocks(), st.integers(2, 5))
def test_levels_of_strange_data_are_finite_and_strictly_increasing(blocks: NDArray[np.float32], bits: int) -> None:
    levels = fit_lloyd_max(blocks, bits)
    assert levels.dtype == np.float32
    assert levels.shape == (2**bits,)
    assert np.isfinite(levels).all()
    assert (levels[1:] > levels[:-1]).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-3, 2.0**17])
def test_a_power_of_two_on_the_tensor_changes_no_level(bits: int, scale: float) -> None:
    blocks = np.random.default_rng(bits).laplace(size=(2048, 128)).astype(np.float32)
    assert np.array_equal(fit_lloyd_max(blocks * np.float32(scale), bits), fit_lloyd_max(blocks, bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_order_of_memory_and_of_blocks_changes_no_level(bits: int) -> None:
    blocks = np.random.default_rng(bits).laplace(size=(2048, 128)).astype(np.float32)
    levels = fit_lloyd_max(blocks, bits)
    assert fit_lloyd_max(blocks, bits).tobytes() == levels.tobytes()
    assert fit_lloyd_max(np.asfortranarray(blocks), bits).tobytes() == levels.tobytes()
    assert fit_lloyd_max(blocks[::-1], bits).tobytes() == levels.tobytes()


def test_normalised_blocks_have_unit_root_mean_square() -> None:
    rng = np.random.default_rng(3)
    blocks = (rng.standard_normal((50, 128)) * 10.0 ** rng.uniform(-9, 9, (50, 1))).astype(np.float32)
    energy = (normalise(blocks).astype(np.float64) ** 2).mean(axis=1)
    assert np.abs(energy - 1).max() < 16 * 2.0**-24


@deterministic
@given(st.integers(1, 1 << 33))
def test_the_sample_is_at_most_255_groups_at_one_stride(n_blocks: int) -> None:
    groups = sample_groups(n_blocks)
    assert groups[0] == 0
    assert groups.step % GROUP == 0
    assert groups[-1] < n_blocks <= groups[-1] + groups.step
    n_groups = -(-n_blocks // GROUP)
    assert min(n_groups, 128) <= len(groups) <= 255
