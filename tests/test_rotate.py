"""Blocks and their rotation: an explicit Hadamard matrix, and scalar loops for the order of additions."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from hlwq_convert.rotate import SIGN_BYTES, block_sums, from_blocks, fwht, sign_vector, to_blocks

LENGTHS = [1, 7, 64, 127, 128, 129, 576]


def random_blocks(n: int, seed: int) -> NDArray[np.float32]:
    """Normal values over many magnitudes, so that nearly every addition rounds."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, 128)) * 10.0 ** rng.uniform(-3, 3, (n, 128))).astype(np.float32)


def slow_fwht(row: NDArray[np.float32]) -> NDArray[np.float32]:
    """One row, one butterfly at a time, distances 1, 2, 4, ..., 64."""
    values = list(row)
    distance = 1
    while distance < 128:
        for i in range(128):
            if not i & distance:
                a, b = values[i], values[i + distance]
                values[i], values[i + distance] = a + b, a - b
        distance *= 2
    return np.array(values, np.float32)


def test_the_transform_is_the_sylvester_matrix() -> None:
    matrix = np.ones((1, 1), np.int64)
    for _ in range(7):
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    values = np.random.default_rng(1).integers(-1000, 1000, (50, 128))
    assert np.array_equal(fwht(values.astype(np.float32)), values @ matrix)


def test_the_transform_twice_is_128_times_the_identity() -> None:
    values = np.random.default_rng(2).integers(-500, 500, (50, 128)).astype(np.float32)
    assert np.array_equal(fwht(fwht(values)), 128 * values)


def test_the_order_of_additions_is_that_of_a_scalar_loop() -> None:
    blocks = random_blocks(40, 3)
    expected = np.stack([slow_fwht(row) for row in blocks])
    assert fwht(blocks).tobytes() == expected.tobytes()


def test_another_order_of_passes_would_show() -> None:
    blocks = random_blocks(40, 3)
    shuffled = [int(f"{i:07b}"[::-1], 2) for i in range(128)]
    backward = fwht(blocks[:, shuffled])[:, shuffled]  # distances 64, 32, ..., 1
    assert (backward != fwht(blocks)).mean() > 0.5


@pytest.mark.parametrize("n", [1, 2, 33])
def test_the_order_of_memory_changes_no_bit(n: int) -> None:
    blocks = random_blocks(n, 4)
    assert np.array_equal(fwht(np.asfortranarray(blocks)), fwht(np.ascontiguousarray(blocks)))
    assert np.array_equal(block_sums(np.asfortranarray(blocks)), block_sums(np.ascontiguousarray(blocks)))


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_transform_leaves_its_argument_alone(order: Literal["C", "F"]) -> None:
    blocks = random_blocks(5, 5).copy(order=order)
    before = blocks.copy()
    fwht(blocks)
    assert np.array_equal(blocks, before)


def test_the_transform_of_no_blocks_is_empty() -> None:
    assert fwht(np.zeros((0, 128), np.float32)).shape == (0, 128)


def test_block_sums_fold_the_upper_half_onto_the_lower() -> None:
    blocks = random_blocks(60, 6)
    expected = []
    for row in blocks:
        values = list(row)
        while len(values) > 1:
            half = len(values) // 2
            values = [values[i] + values[half + i] for i in range(half)]
        expected.append(values[0])
    assert block_sums(blocks).tobytes() == np.array(expected, np.float32).tobytes()


@pytest.mark.parametrize("length", LENGTHS)
def test_blocks_are_runs_of_128_padded_with_zeros(length: int) -> None:
    weights = np.arange(1, length + 1, dtype=np.float32)
    blocks = to_blocks(weights)
    flat = [float(blocks[i // 128, i % 128]) for i in range(blocks.size)]
    assert blocks.shape == ((length + 127) // 128, 128)
    assert flat == [*range(1, length + 1), *[0] * (blocks.size - length)]


@pytest.mark.parametrize("length", LENGTHS)
def test_from_blocks_undoes_to_blocks(length: int) -> None:
    weights = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    assert np.array_equal(from_blocks(to_blocks(weights), length), weights)


@pytest.mark.parametrize("length", LENGTHS)
def test_blocks_are_columns_in_memory(length: int) -> None:
    assert to_blocks(np.ones(length, np.float32)).flags.f_contiguous


def test_the_sign_bytes_are_those_of_the_specification() -> None:
    assert SIGN_BYTES.hex() == "05ccfa00e7eefb6964d32d0171442923"
    assert hashlib.sha256(b"hlwq signs v1").digest().startswith(SIGN_BYTES)


def test_bit_i_of_the_sign_bytes_negates_coordinate_i() -> None:
    expected = [-1.0 if SIGN_BYTES[i // 8] >> i % 8 & 1 else 1.0 for i in range(128)]
    assert sign_vector().tolist() == expected
