"""The GPU kernels give the bits of the CPU's: by Triton's interpreter here, on a GPU with scripts/test_gpu."""

from __future__ import annotations

import os

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton", reason="triton is not installed: pip install .[triton]")

from hlwq_convert.kernels import triton_block  # noqa: E402
from hlwq_convert.kernels.decode import decoder  # noqa: E402
from hlwq_convert.kernels.encode import encoder  # noqa: E402
from hlwq_convert.normal_levels import normal_levels  # noqa: E402
from hlwq_convert.quantize import ScalarCode, choose_exponent  # noqa: E402
from hlwq_convert.rotate import sign_vector  # noqa: E402
from hlwq_convert.runtime.launch import ROWS, DeviceCode, DeviceEncoder, find_cells  # noqa: E402
from hlwq_convert.scalar import nearest_level  # noqa: E402
from hlwq_formats.dtypes import BIT_PATTERNS, ITEM_BITS, WEIGHT_DTYPES, narrow  # noqa: E402

# the interpreter computes a value that is too large for float16 as NumPy does, with a warning
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SCALES = [0, 1, 0x3FF, 0x400, 0x3C00, 0x7BFF]
Floats = NDArray[np.float32]


def on_device(raw: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=dtype).to(DEVICE)


def odd_levels(bits: int, kind: str) -> Floats:
    rng = np.random.default_rng(bits)
    levels = np.sort(rng.standard_normal(1 << bits) * (1e-3 if kind == "bunched" else 1)).astype(np.float32)
    if kind == "bunched":  # most of them in one cell
        levels[-1] = 100
    return levels


def test_the_kernels_run_where_they_are_meant_to() -> None:
    assert triton_block.INTERPRETED.value is not ON_GPU


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_decoding_gives_the_bits_of_the_cpu(bits: int, dtype: str) -> None:
    """Every width and dtype; subnormal results, overflow, all scales that a file may hold, a last program that is
    not full, signs and none."""
    for exponent, signs in ((-126, True), (-24, False), (0, True), (112, True)):
        rng = np.random.default_rng(bits + abs(exponent))
        n_blocks = (200 * ROWS if ON_GPU else ROWS) + 7
        packed = rng.bytes(n_blocks * 16 * bits)
        scales = rng.choice([*SCALES, *rng.integers(0, 0x7C00, 40)], n_blocks).astype(np.uint16).view(np.float16)
        flips = sign_vector() if signs else np.ones(128, np.float32)
        code = ScalarCode(dtype, bits, exponent, normal_levels(bits), flips)
        expected = np.empty(n_blocks * 128, BIT_PATTERNS[dtype])
        decoder(code, dtype)(packed, scales, expected)
        found = torch.full((n_blocks * 128 + 8,), 7, dtype=TORCH[dtype], device=DEVICE)
        halves = on_device(scales.tobytes(), torch.float16)
        DeviceCode(code, DEVICE).decode(on_device(packed, torch.int32), halves, found[:-8])
        bits_found = found.view(torch.uint8).cpu().numpy().view(BIT_PATTERNS[dtype])
        assert bits_found[:-8].tobytes() == expected.tobytes(), exponent
        assert (found[-8:] == 7).all()


def weights_for(rng: np.random.Generator, n_blocks: int) -> Floats:
    """Blocks of noise of many sizes, heavy tails, spikes, constants, grids and zeros."""
    sizes = 2.0 ** rng.uniform(-30, 15, (n_blocks, 1))
    blocks = rng.standard_normal((n_blocks, 128)) * np.where(rng.random((n_blocks, 1)) < 0.5, 0.02, sizes)
    blocks[1::9] = rng.standard_t(2, blocks[1::9].shape)
    blocks[2::9] = 0
    blocks[3::9] = 0.5
    blocks[4::9] = rng.integers(-8, 8, blocks[4::9].shape)
    blocks[5::9] = np.where(rng.random(blocks[5::9].shape) < 0.01, 900.0, 1e-4)
    blocks[6::9] *= 2.0**-120
    return np.clip(blocks, -60000, 60000).astype(np.float32)


CASES = [(bits, WEIGHT_DTYPES[bits % 3], effort, "normal") for bits in range(2, 9) for effort in ("default", "fast")]
CASES += [(bits, "BF16", "best", "normal") for bits in ((2, 3, 5, 8) if ON_GPU else (3,))]  # minutes in the interpreter
CASES += [(5, dtype, "default", "normal") for dtype in WEIGHT_DTYPES]
CASES += [(3, "F32", "default", "uneven"), (5, "BF16", "default", "bunched"), (8, "F16", "fast", "bunched")]


@pytest.mark.parametrize(("bits", "dtype", "effort", "kind"), dict.fromkeys(CASES))
def test_encoding_gives_the_bits_of_the_cpu(bits: int, dtype: str, effort: str, kind: str) -> None:
    """Codes, scales, sums and checksums."""
    rng = np.random.default_rng(bits)
    n_blocks = (50 * ROWS if ON_GPU else 0) + 45
    weights = weights_for(rng, n_blocks)
    raw = narrow(weights.reshape(-1), dtype).tobytes()
    levels = normal_levels(bits) if kind == "normal" else odd_levels(bits, kind)
    exponent = choose_exponent(float(np.abs(weights).max()))
    code = ScalarCode(dtype, bits, exponent, levels, sign_vector(), effort)
    expected = encoder(code)(raw)
    made = DeviceEncoder(code, DEVICE)
    result = torch.zeros(made.result_bytes(n_blocks), dtype=torch.uint8, device=DEVICE)
    made.encode(on_device(raw, torch.int32), n_blocks, result)
    packed, scales, sums, checksums = made.split_result(n_blocks, result.cpu())
    assert scales == bytes(expected.scales)
    assert packed == bytes(expected.codes)
    assert checksums.tolist() == expected.checksums.tolist()
    assert sums.tobytes() == expected.sums.tobytes()
    assert len(raw) == n_blocks * 16 * ITEM_BITS[dtype]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["normal", "uneven"])
def test_cells_find_the_nearest_level(bits: int, kind: str) -> None:
    levels = normal_levels(bits) if kind == "normal" else odd_levels(bits, kind)
    cells = find_cells(levels)
    if cells is None:
        assert kind == "uneven" and bits > 3
        return
    midpoints = (levels[:-1] + levels[1:]) * np.float32(0.5)
    near = np.concatenate([midpoints, np.nextafter(midpoints, np.float32(-9)), np.nextafter(midpoints, np.float32(9))])
    edges = (np.arange(-12 * 64, 12 * 64 + 1) / 128).astype(np.float32)
    values = np.concatenate(
        [near, edges, 3 * np.random.default_rng(0).standard_normal(9999).astype(np.float32), [-12.9]]
    )
    values = values.astype(np.float32)
    midpoint, low, high, code = cells.table[np.rint(values * cells.per_cell).astype(int) + len(cells.table) // 2].T
    found = np.ascontiguousarray(code).view(np.int32) + (values > midpoint)
    assert found.tolist() == nearest_level(values, levels).tolist()
    assert np.where(values > midpoint, high, low).tolist() == levels[found].tolist()
