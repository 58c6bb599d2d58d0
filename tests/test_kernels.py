"""The compiled kernels give the bits of the NumPy reference: every width, dtype and effort, any length, on any CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hlwq_convert.codebook import fit_lloyd_max
from hlwq_convert.kernels.block import half_to_scale, scale_to_half
from hlwq_convert.kernels.checksum import checksums
from hlwq_convert.kernels.compiled import CACHE_FOLDER, kernel
from hlwq_convert.kernels.decode import decoder
from hlwq_convert.kernels.encode import encoder
from hlwq_convert.kernels.fit import fit
from hlwq_convert.kernels.measure import measure
from hlwq_convert.kernels.survey import survey_weights
from hlwq_convert.kernels.tables import largest_step
from hlwq_convert.normal_levels import normal_levels
from hlwq_convert.quantize import (
    ScalarCode,
    block_checksums,
    choose_exponent,
    dequantize,
    power_of_two,
    quantize,
)
from hlwq_convert.rotate import sign_vector, to_blocks
from hlwq_convert.scalar import EFFORTS, gains_of, nearest_level
from hlwq_formats.dtypes import BIT_PATTERNS, WEIGHT_DTYPES, narrow, widen

deterministic = settings(derandomize=True, database=None, deadline=None, max_examples=80)
thorough = settings(derandomize=True, database=None, deadline=None, max_examples=300)

Floats = NDArray[np.float32]
LIMIT = {"BF16": 3.3895e38, "F16": 65504.0, "F32": 3.4028e38}


@st.composite
def weights(draw: st.DrawFn) -> Floats:
    """1 to 1,200 weights: noise of any size, heavy tails, constants, spikes, runs of zeros, ends of the range."""
    length = draw(st.sampled_from([1, 2, 127, 128, 129, 256, 640, 1200]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["noise", "tails", "constant", "spike", "grid", "sizes"]))
    size = 2.0 ** draw(st.sampled_from([-140, -24, -14, -5, 0, 5, 15, 126]))
    with np.errstate(over="ignore"):
        match kind:
            case "noise":
                values = rng.standard_normal(length) * size
            case "tails":
                values = rng.standard_t(2, length) * size
            case "constant":
                values = np.full(length, size)
            case "spike":
                values = np.where(rng.random(length) < 0.01, size, size * 2.0**-12)
            case "grid":
                values = rng.integers(-8, 8, length) * size
            case _:
                values = rng.standard_normal(length) * 2.0 ** rng.uniform(-30, 15, length)
        values = np.clip(values, -3.4e38, 3.4e38).astype(np.float32)
    values[: draw(st.sampled_from([0, 0, 130, 300]))] = 0
    return values


@st.composite
def codebooks(draw: st.DrawFn, bits: int) -> Floats:
    """The optimum for N(0, 1), or levels that no Gaussian has: bunched, one-sided, unevenly spread."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "uneven", "bunched", "positive", "negative"]))
    if kind == "normal":
        return normal_levels(bits)
    levels = np.sort(rng.standard_normal(1 << bits) * (1e-3 if kind == "bunched" else 1))
    if kind in ("positive", "negative"):
        levels = levels - levels[0] + 1e-3 if kind == "positive" else levels - levels[-1] - 1e-3
    levels = np.maximum.accumulate(levels.astype(np.float32))
    for i in range(1, len(levels)):
        levels[i] = max(levels[i], np.nextafter(levels[i - 1], np.float32(np.inf)))
    return levels


def code_for(draw: st.DrawFn, values: Floats, dtype: str) -> ScalarCode:
    bits = draw(st.integers(2, 8))
    signs = sign_vector() if draw(st.booleans()) else np.ones(128, np.float32)
    exponent = choose_exponent(float(np.abs(values).max()))
    return ScalarCode(dtype, bits, exponent, draw(codebooks(bits)), signs, draw(st.sampled_from(EFFORTS)))


@thorough
@given(st.data(), weights(), st.sampled_from(WEIGHT_DTYPES))
def test_encoding_gives_the_bits_of_the_reference(data: st.DataObject, values: Floats, dtype: str) -> None:
    raw = narrow(np.clip(values, -LIMIT[dtype], LIMIT[dtype]), dtype).tobytes()
    code = code_for(data.draw, widen(raw, dtype), dtype)
    found, expected = encoder(code)(raw), quantize(raw, code)
    assert bytes(found.scales) == expected.scales
    assert bytes(found.codes) == expected.codes
    assert found.checksums.tolist() == expected.checksums.tolist()
    assert np.isfinite(found.sums[1]).all() == np.isfinite(expected.sums[1]).all()
    if np.isfinite(expected.sums[1]).all():
        assert found.sums.tobytes() == expected.sums.tobytes()


@thorough
@given(st.data(), st.integers(1, 700), st.sampled_from(WEIGHT_DTYPES), st.sampled_from(WEIGHT_DTYPES))
def test_decoding_gives_the_bits_of_the_reference(data: st.DataObject, count: int, dtype: str, wanted: str) -> None:
    """Any codes and any scales that a file may hold, subnormal ones and overflow included, rounded to any dtype."""
    bits = data.draw(st.integers(2, 8))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    n_blocks = -(-count // 128)
    packed = rng.bytes(n_blocks * 16 * bits)
    scales = rng.choice([0, 1, 0x3FF, 0x400, 0x3C00, 0x7BFF, *rng.integers(0, 0x7C00, 4)], n_blocks).astype(np.uint16)
    exponent = data.draw(st.sampled_from([-126, -40, -24, -10, 0, 8, 100, 112]))
    code = ScalarCode(dtype, bits, exponent, data.draw(codebooks(bits)), sign_vector())
    expected = narrow(dequantize(packed, scales.view(np.float16), code, count), wanted)
    found = np.full(count + 1, 7, np.uint32 if wanted == "F32" else np.uint16)
    decoder(code, wanted)(packed, scales.view(np.float16), found[:count])
    assert found[:count].tobytes() == expected.tobytes()
    assert found[count] == 7


@deterministic
@given(st.data(), st.sampled_from(WEIGHT_DTYPES), st.integers(2, 5), st.integers(0, 90))
def test_the_fit_gives_the_bits_of_the_reference(data: st.DataObject, dtype: str, bits: int, repeat: int) -> None:
    values = np.tile(data.draw(weights()), repeat + 1)
    raw = narrow(np.clip(values, -LIMIT[dtype], LIMIT[dtype]), dtype).tobytes()
    source = widen(raw, dtype)
    exponent = choose_exponent(float(np.abs(source).max()))
    blocks = to_blocks(source * power_of_two(-exponent)) * sign_vector()
    assert fit(raw, dtype, exponent, sign_vector(), bits).tobytes() == fit_lloyd_max(blocks, bits).tobytes()


@pytest.mark.parametrize("bits", [6, 7, 8])
def test_a_large_fit_gives_the_bits_of_the_reference(bits: int) -> None:
    values = np.random.default_rng(bits).laplace(size=(8 << bits) * 128).astype(np.float32)
    expected = fit_lloyd_max(to_blocks(values) * sign_vector(), bits)
    assert not np.array_equal(expected, normal_levels(bits))
    assert fit(values.tobytes(), "F32", 0, sign_vector(), bits).tobytes() == expected.tobytes()


@deterministic
@given(weights(), st.sampled_from(WEIGHT_DTYPES), st.sampled_from([0.0, -0.0, np.inf, -np.inf, np.nan]))
def test_the_largest_magnitude(values: Floats, dtype: str, last: float) -> None:
    raw = narrow(np.clip(values, -LIMIT[dtype], LIMIT[dtype]), dtype).tobytes()
    exact = widen(raw, dtype)
    assert survey_weights(raw, dtype) == (np.abs(exact).max(), np.count_nonzero(exact == 0))
    special = {"BF16": np.array(last, np.float32).tobytes()[2:], "F16": np.float16(last).tobytes()}
    raw += special.get(dtype, np.float32(last).tobytes())
    assert np.isfinite(survey_weights(raw, dtype)[0]) == np.isfinite(last)


@deterministic
@given(st.data(), weights(), st.sampled_from(WEIGHT_DTYPES))
def test_measuring_gives_the_sums_of_the_encoder(data: st.DataObject, values: Floats, dtype: str) -> None:
    raw = narrow(np.clip(values, -LIMIT[dtype], LIMIT[dtype]), dtype).tobytes()
    code = code_for(data.draw, widen(raw, dtype), dtype)
    chunk = quantize(raw, code)
    assume(np.isfinite(chunk.sums[1]).all())
    pair = np.zeros((2, len(chunk.checksums) * 128), BIT_PATTERNS[dtype])
    pair[0, : len(values)] = np.frombuffer(raw, BIT_PATTERNS[dtype])
    decoder(code, dtype)(chunk.codes, np.frombuffer(chunk.scales, np.float16), pair[1, : len(values)])
    assert measure(*pair, dtype, code.exponent).tobytes() == chunk.sums.tobytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_checksums(dtype: type[np.unsignedinteger]) -> None:
    bits = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, 5 * 128, endpoint=True, dtype=dtype)
    assert checksums(bits).tobytes() == block_checksums(bits).tobytes()


@kernel
def _halves(scales: Floats, halves: NDArray[np.uint16], back: Floats) -> None:
    for i in range(len(scales)):
        halves[i] = scale_to_half(scales[i])
        back[i] = half_to_scale(halves[i])


def test_every_scale_is_rounded_and_read_as_numpy_does() -> None:
    exact = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (exact[1:] + exact[:-1]) / 2  # ties, and what lies just beside them
    rng = np.random.default_rng(0)
    scales = np.concatenate(
        [exact, between, np.nextafter(between, 0), np.nextafter(between, np.inf), rng.uniform(0, 65504, 10_000)]
    ).astype(np.float32)
    halves, back = np.empty(len(scales), np.uint16), np.empty(len(scales), np.float32)
    _halves(scales, halves, back)
    assert halves.tobytes() == scales.astype(np.float16).tobytes()
    assert back.tobytes() == scales.astype(np.float16).astype(np.float32).tobytes()


@deterministic
@given(st.data(), st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_no_coordinate_crosses_more_midpoints_than_allowed_for(data: st.DataObject, bits: int, seed: int) -> None:
    levels = data.draw(codebooks(bits))
    midpoints = (levels[:-1] + levels[1:]) * np.float32(0.5)
    gains = gains_of("default")
    near = np.concatenate([midpoints, np.nextafter(midpoints, np.inf), np.nextafter(midpoints, -np.inf)])
    x = np.concatenate([near, np.random.default_rng(seed).standard_normal(500).astype(np.float32)]).astype(np.float32)
    allowed = largest_step(midpoints, gains)
    for before, after in pairwise(gains):
        crossed = nearest_level(x / before, levels).astype(int) - nearest_level(x / after, levels)
        assert np.abs(crossed).max() <= allowed


# --- other CPUs, and where machine code is kept ---------------------------------------------------

SAMPLE = """
import hashlib, sys
import numpy as np
from hlwq_convert.kernels.compiled import CACHE_FOLDER
from hlwq_convert.kernels.decode import decoder
from hlwq_convert.kernels.encode import encoder
from hlwq_convert import trellis
from hlwq_convert.kernels import lookup, trellis as fast
from hlwq_convert.normal_levels import normal_levels
from hlwq_convert.quantize import ScalarCode
from hlwq_convert.rotate import sign_vector

digest = hashlib.sha256()
raw = np.random.default_rng(0).standard_normal(64 * 128).astype(np.float32).tobytes()
for bits in (5, 6):
    code = ScalarCode("F32", bits, -14, normal_levels(bits), sign_vector())
    chunk = encoder(code)(raw)
    decoded = np.empty(64 * 128, np.uint32)
    decoder(code, "F32")(bytes(chunk.codes), np.frombuffer(chunk.scales, np.float16), decoded)
    for part in (chunk.codes, chunk.scales, chunk.sums.tobytes(), decoded.tobytes()):
        digest.update(part)
# more
print(digest.hexdigest(), lookup.WIDE, CACHE_FOLDER)
"""

TRELLIS = """
raw = np.random.default_rng(1).standard_normal(40 * 1024).astype(np.float32).tobytes()
weights = np.frombuffer(raw, np.float32)
scales = trellis.row_scales(trellis.row_energies(weights, 1024), 1024, 2)
code = trellis.plain_code("F32", 1024, 32, 2, 0.3, scales, sign_vector())
steps = fast.load_steps(raw, 0, code)
code = trellis.fit(code, steps, fast.search_segments(steps.reshape(-1, 1024), np.float32(1), 32))
found = fast.encoder(code)(raw, 0)
decoded = np.empty(40 * 1024, np.uint32)
assert fast.decoder(code, "F32")(found.chunks[0], 0, decoded)
for part in (*found.chunks, found.sums.tobytes(), decoded.tobytes()):
    digest.update(part)
"""


def run_sample(more: str = "", sample: str = SAMPLE, **env: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", sample.replace("# more", more)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.once
def test_other_instruction_sets_give_the_same_bits_and_machine_code_is_kept(tmp_path: Path) -> None:
    other = {
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "XDG_CACHE_HOME": str(tmp_path),
        "NUMBA_CACHE_DIR": "",
    }
    here, plain = run_sample(TRELLIS), run_sample(TRELLIS, **other)
    assert plain[1] == "False"
    assert plain[0] == here[0]
    folder = Path(plain[2])
    assert folder.parent == tmp_path / "hlwq"
    assert CACHE_FOLDER is None or str(folder) != CACHE_FOLDER
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.nb*")}
    assert any(path.suffix == ".nbc" for path in kept)
    assert run_sample(TRELLIS, **other) == plain
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.nb*")} == kept


@pytest.mark.once
def test_without_a_folder_for_machine_code_kernels_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    few = SAMPLE.replace("(5, 6)", "(5,)")
    blocked = run_sample(sample=few, XDG_CACHE_HOME=str(tmp_path / "file"), NUMBA_CACHE_DIR="")
    assert blocked == [*run_sample(sample=few)[:2], "None"]
