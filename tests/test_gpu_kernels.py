"""The GPU kernels give the bits of the CPU's: by Triton's interpreter here, on a GPU with scripts/test_gpu."""

from __future__ import annotations

import copy
import dataclasses
import os
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton", reason="triton is not installed: pip install .[triton]")

from hlwq_convert import trellis  # noqa: E402
from hlwq_convert.kernels import triton_block  # noqa: E402
from hlwq_convert.kernels.decode import decoder  # noqa: E402
from hlwq_convert.kernels.encode import encoder  # noqa: E402
from hlwq_convert.kernels.rans import KernelTables  # noqa: E402
from hlwq_convert.kernels.trellis import decoder as trellis_decoder  # noqa: E402
from hlwq_convert.kernels.trellis import encoder as trellis_encoder  # noqa: E402
from hlwq_convert.kernels.trellis import load_steps  # noqa: E402
from hlwq_convert.normal_levels import normal_levels  # noqa: E402
from hlwq_convert.quantize import CHUNK, ScalarCode, choose_exponent, power_of_two  # noqa: E402
from hlwq_convert.rotate import sign_vector  # noqa: E402
from hlwq_convert.runtime import packed_gpu  # noqa: E402
from hlwq_convert.runtime.gpu import sign_words  # noqa: E402
from hlwq_convert.runtime.launch import ROWS, DeviceCode, DeviceEncoder, find_cells  # noqa: E402
from hlwq_convert.runtime.launch_trellis import (  # noqa: E402
    DeviceSearch,
    DeviceTrellis,
    search,
    spread_frequencies,
    trellis_in_place,
)
from hlwq_convert.runtime.modules import Rotation, pack  # noqa: E402
from hlwq_convert.runtime.packed import decode_blocks  # noqa: E402
from hlwq_convert.runtime.packed_trellis import PackedTrellis  # noqa: E402
from hlwq_convert.scalar import nearest_level  # noqa: E402
from hlwq_formats import rans  # noqa: E402
from hlwq_formats.dtypes import BIT_PATTERNS, ITEM_BITS, WEIGHT_DTYPES, narrow  # noqa: E402
from hlwq_formats.errors import BadFrames  # noqa: E402
from hlwq_formats.metadata import States  # noqa: E402

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


SOME = [(bits, WEIGHT_DTYPES[bits % 3]) for bits in range(2, 9)]


@pytest.mark.parametrize(("bits", "dtype"), [*product(range(2, 9), WEIGHT_DTYPES)] if ON_GPU else SOME)
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
    # one coordinate has it all, of either sign; in some blocks its square is subnormal
    blocks[7::9] = -0.25 * sign_vector()
    blocks[8::9] = rng.choice([-1, 1], (len(blocks[8::9]), 1)) * sign_vector()
    blocks[8::9] *= 2.0 ** rng.uniform(-80, -60, (len(blocks[8::9]), 1))
    return np.clip(blocks, -60000, 60000).astype(np.float32)


CASES = [(bits, WEIGHT_DTYPES[bits % 3], "fast", "normal") for bits in range(2, 9)]
CASES += [(bits, WEIGHT_DTYPES[bits % 3], "default", "normal") for bits in range(2, 9) if ON_GPU or bits == 5]
CASES += [(bits, "BF16", "best", "normal") for bits in ((2, 3, 5, 8) if ON_GPU else (3,))]  # minutes in the interpreter
CASES += [(5, dtype, "default", "normal") for dtype in WEIGHT_DTYPES]
CASES += [(3, "F32", "default", "uneven"), (5, "BF16", "default", "bunched"), (8, "F16", "fast", "bunched")]
CASES += [(5, "BF16", "fast", "large")]


@pytest.mark.parametrize(("bits", "dtype", "effort", "kind"), dict.fromkeys(CASES))
def test_encoding_gives_the_bits_of_the_cpu(bits: int, dtype: str, effort: str, kind: str) -> None:
    """Codes, scales, sums and checksums."""
    rng = np.random.default_rng(bits)
    n_blocks = 50 * ROWS + 45 if ON_GPU else 21  # each kind of block, and a program that is not full
    weights = weights_for(rng, n_blocks) * np.float32(2.0**30 if kind == "large" else 1)
    raw = narrow(weights.reshape(-1), dtype).tobytes()
    levels = odd_levels(bits, kind) if kind in ("uneven", "bunched") else normal_levels(bits)
    exponent = choose_exponent(float(np.abs(weights).max()))
    code = ScalarCode(dtype, bits, exponent, levels, sign_vector(), effort)
    expected = encoder(code)(raw)
    made = DeviceEncoder(code, DEVICE)
    result = torch.zeros(made.result_bytes(n_blocks), dtype=torch.uint8, device=DEVICE)
    made.encode(on_device(raw, torch.int32), made.parts(n_blocks, result))
    packed, scales, sums, checksums = made.split_result(n_blocks, result.cpu().numpy())
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
    edges = (np.arange(-18 * 64, 18 * 64 + 1) / 128).astype(np.float32)
    values = np.concatenate(
        [near, edges, 3 * np.random.default_rng(0).standard_normal(9999).astype(np.float32), [-18.3, 18.3]]
    )
    values = values.astype(np.float32)
    found = cells.table[np.maximum(np.rint(values * cells.per_cell).astype(int) + cells.first, 0)].astype(int)
    found += values > np.append(midpoints, np.float32(np.inf))[found]
    assert found.tolist() == nearest_level(values, levels).tolist()


# --- a trellis ---------------------------------------------------------------------------------


def code_for(weights: Floats, dtype: str, row: int, states: States, step: float) -> trellis.TrellisCode:
    exponent = choose_exponent(float(np.abs(weights).max()))
    scales = trellis.row_scales(trellis.row_energies(weights, row), row, exponent)
    plain = trellis.plain_code(dtype, row, states, exponent, step, scales, sign_vector())
    steps = trellis.to_steps(weights * power_of_two(-exponent), 0, plain)
    return trellis.fit(plain, steps, trellis.find_indices(steps, states))


def encoded(code: trellis.TrellisCode, weights: Floats) -> list[bytes]:
    raw, size = narrow(weights, code.dtype).tobytes(), CHUNK * ITEM_BITS[code.dtype] // 8
    encode = trellis_encoder(code)
    return [
        chunk
        for start in range(0, len(raw), size)
        for chunk in encode(raw[start : start + size], start * CHUNK // size).chunks
    ]


def decoded_on_device(
    code: trellis.TrellisCode, chunks: list[bytes], count: int, dtype: str
) -> tuple[list[int], NDArray[np.unsignedinteger]]:
    """Whether each chunk is good, and the weights; the stream begins at an odd word."""
    ends = 1 + np.cumsum([0] + [len(chunk) // 2 for chunk in chunks])
    data = bytes(2) + b"".join(chunks)
    words = on_device(data + bytes(-len(data) % 4), torch.int16)
    result = torch.full((count + 8,), 7, dtype=TORCH[dtype], device=DEVICE)
    last = torch.empty(128, dtype=TORCH[dtype], device=DEVICE)
    places = torch.from_numpy(ends).to(DEVICE)
    good = DeviceTrellis.of(code, DEVICE).decode(words, places, 0, result[:count], last)
    assert (result[count // 128 * 128 :] == 7).all()
    result[count - count % 128 : count] = last[: count % 128]
    return good.tolist(), result[:count].view(torch.uint8).cpu().numpy().view(BIT_PATTERNS[dtype])


ON_EITHER: list[tuple[str, int, int, States, float]] = [("BF16", 100, 10, 32, 0.5), ("F16", 1124, 1124, 8, 0.02)]
"""dtype, weights, row, states, step: what the interpreter has time for."""
ON_DEVICE: list[tuple[str, int, int, States, float]] = [
    ("BF16", 2 * CHUNK - 77 * 128, 128, 8, 0.4),
    ("F16", 33 * 1024 + 5, 33 * 1024 + 5, 64, 0.02),
    ("F32", 77 * 1031, 1031, 256, 1.2),
    ("BF16", 3072 * 30, 30, 32, 1.0),
    ("F32", (1 << 19) + 4096, 4096, 8, 0.0005),
]


@pytest.mark.parametrize(("dtype", "count", "row", "states", "step"), ON_EITHER + ON_DEVICE * ON_GPU)
def test_decoding_a_trellis_gives_the_bits_of_the_cpu(
    dtype: str, count: int, row: int, states: States, step: float
) -> None:
    """Escapes, rows of every kind, several chunks, groups and lanes that are not full."""
    rng = np.random.default_rng(count)
    weights = (rng.standard_t(2, count) * 0.02).clip(-50000, 50000).astype(np.float32)
    code = code_for(weights, dtype, row, states, step)
    chunks, expected = encoded(code, weights), np.empty(count, BIT_PATTERNS[dtype])
    decode = trellis_decoder(code, dtype)
    for number, chunk in enumerate(chunks):
        assert decode(chunk, number * rans.CHUNK, expected[number * rans.CHUNK :][: rans.CHUNK])
    good, found = decoded_on_device(code, chunks, count, dtype)
    assert good == [1] * len(chunks)
    assert found.tobytes() == expected.tobytes()
    if row == 128:  # and nothing behind a bad chunk is touched
        _check_bad_chunks(code, chunks, count, dtype)


def _check_bad_chunks(code: trellis.TrellisCode, chunks: list[bytes], count: int, dtype: str) -> None:
    """What the CPU refuses a GPU refuses: another word anywhere, too few, too many, a bad state, none."""
    rng, decode = np.random.default_rng(0), trellis_decoder(code, dtype)
    words = np.frombuffer(chunks[0], np.uint16)
    bad = [words[:-1], np.append(words, np.uint16(3)), words[:1], words[:100]]
    for place in (0, 2, 64, *rng.integers(65, len(words), 12)):
        changed = words.copy()
        changed[place] ^= np.uint16(1 << int(rng.integers(16))) if place else changed[place]
        bad.append(changed)
    bad.append(rng.integers(0, 1 << 16, len(words)).astype(np.uint16))
    for some in bad:
        here = np.empty(rans.CHUNK, BIT_PATTERNS[dtype])
        accepted = decode(some.tobytes(), 0, here)
        good, found = decoded_on_device(code, [some.tobytes(), *chunks[1:]], count, dtype)
        assert good == [int(accepted)] + [1] * (len(chunks) - 1)
        assert not accepted or found[: rans.CHUNK].tobytes() == here.tobytes()


@pytest.mark.parametrize("n", [2, 3, 40, 257, 258, 5000])
def test_tables_are_spread_as_on_the_cpu(n: int) -> None:
    pairs = np.random.default_rng(n).integers(1, max(2, 8000 // n), n).astype(np.uint16)
    pairs[-2:] = 1
    width, spans, symbols, escapes = KernelTables(pairs).decoding
    spread, listed, found = spread_frequencies(torch.from_numpy(pairs.view(np.int16)).to(DEVICE))
    assert found == tuple(escapes)
    assert spread.dtype is (torch.uint8 if width <= 256 else torch.int16)
    assert spread.cpu().numpy().astype(np.uint16).tolist() == symbols[: 2 << rans.PRECISION].tolist()
    for parity, escape in enumerate(escapes):
        place = slice(parity * width, parity * width + int(escape) + 1)
        assert listed.cpu().numpy().view(np.uint32)[place].tolist() == spans[place].tolist()


@pytest.mark.parametrize("states", rans.TRELLISES)
def test_the_search_finds_what_the_cpu_finds(states: States) -> None:
    """Coordinates of several sizes, ties, zeros; the last warp is not full."""
    rng = np.random.default_rng(states)
    length, n = (rans.SEGMENT, 67) if ON_GPU else (32, 5 if states == 8 else 2)
    steps = (rng.standard_normal((n, length)) * rng.choice([0.3, 2, 40, 60_000], (n, 1))).astype(np.float32)
    steps[0], steps[-1] = np.round(steps[0] * 2) / 2, 0
    tables = [table.to(DEVICE) for table in trellis_in_place(states, length)]
    found = search(torch.from_numpy(steps.clip(-trellis.LARGEST, trellis.LARGEST)).to(DEVICE), states, tables)
    assert (
        found.cpu().numpy().reshape(n, length).tolist()
        == trellis.search(steps.clip(np.float32(-trellis.LARGEST), np.float32(trellis.LARGEST)), states).tolist()
    )


ROWS_OF_WEIGHTS = [("F16", 100), ("BF16", 1280), ("BF16", 256), ("F32", 1 << 13), ("F32", 1300)]


@pytest.mark.parametrize(("dtype", "row"), ROWS_OF_WEIGHTS if ON_GPU else ROWS_OF_WEIGHTS[:2])
def test_coordinates_are_those_of_the_cpu(dtype: str, row: int) -> None:
    """Clipped ones too, and zeros up to the end of the last segment."""
    rng = np.random.default_rng(row)
    count = row * (1300 // row if row < 1300 else 1)
    weights = rng.standard_normal(count).astype(np.float32)
    weights[:3] = 500
    code = code_for(weights, dtype, row, 8, 0.5)
    code = dataclasses.replace(code, per_step=np.float32(code.per_step * 20_000))
    raw = narrow(weights, dtype).tobytes()
    n_blocks = -(-count // 128)
    padded = raw + bytes(n_blocks * 16 * ITEM_BITS[dtype] - len(raw))
    found = DeviceSearch(code, DEVICE).steps(on_device(padded, torch.int32), 0, n_blocks).cpu().numpy()
    expected = load_steps(raw, 0, code)
    assert (np.abs(expected) == trellis.LARGEST).any()
    assert found[: len(expected)].tobytes() == expected.tobytes()
    assert len(found) % rans.SEGMENT == 0 and not found[len(expected) :].any()


# --- a packed matrix ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "rows", "columns", "bits", "bias"), [(1, 140, 256, 5, True), (2, 70, 128, 4, False), (7, 33, 128, 8, True)]
)
def test_a_packed_matrix_multiplies_as_its_weights_do(n: int, rows: int, columns: int, bits: int, bias: bool) -> None:
    """As closely as the dtype of the activations allows, and the decoded weights are those of the loader."""
    generator = torch.Generator().manual_seed(bits)
    n_blocks = rows * columns // 128
    codes = torch.randint(256, (n_blocks, 16 * bits), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n_blocks, generator=generator) * 0.01).half().view(torch.int16)
    levels = torch.from_numpy(normal_levels(bits)).view(torch.int32)
    signs = torch.from_numpy(sign_vector().astype(np.int8))
    weights = decode_blocks(codes, scales, levels, signs, -2, torch.float32, False)
    # Triton's interpreter does not multiply matrices of bfloat16
    for dtype, least in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2))[: 1 + ON_GPU]:
        x = torch.randn((n, columns), generator=generator).to(dtype)
        added = torch.randn(rows, generator=generator).to(dtype) if bias else None
        exact = x.double() @ weights.reshape(rows, columns).double().T + (0 if added is None else added.double())
        packed = [tensor.to(DEVICE) for tensor in (codes, scales, levels)]
        rotated = packed_gpu.rotate(x.to(DEVICE), sign_words(sign_vector()))
        found = packed_gpu.multiply(rotated, *packed, -2, None if added is None else added.to(DEVICE), dtype)
        assert found.dtype is dtype
        error = (found.cpu().double() - exact).norm() / exact.norm()
        assert error < least / 4, error
        decoded = packed_gpu.decode(*packed, sign_words(sign_vector()), -2, torch.float32)
        assert torch.equal(decoded.cpu(), weights)


@pytest.fixture
def on_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what a packed trellis does on a GPU be done by the interpreter: its operator takes tensors of a GPU alone."""
    if ON_GPU:
        return

    def decode_chunks(self: PackedTrellis, *which: Any) -> tuple[torch.Tensor, torch.Tensor]:
        stored = self.symbols, self.offsets, self.scales, self.pairs, self.signs
        return packed_gpu.decode_trellis(*stored, self.settings, self.shape[0] * self.shape[1], *which)

    monkeypatch.setattr(PackedTrellis, "on_gpu", True)
    monkeypatch.setattr(PackedTrellis, "_decode_chunks", decode_chunks)


@pytest.mark.usefixtures("on_either")
@pytest.mark.parametrize("shape", [(4, 25), *[(700, 1000), (1025, 512), (30, 9000)] * ON_GPU])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES if ON_GPU else ["BF16"])
def test_a_packed_trellis_has_the_bits_of_the_loader(shape: tuple[int, int], dtype: str) -> None:
    """Some rows or all, an embedding and a layer; and a chunk that no encoder writes is found when it comes."""
    (rows, columns), wanted = shape, TORCH[dtype]
    values = (np.random.default_rng(rows).standard_t(3, rows * columns) * 0.02).astype(np.float32)
    code = code_for(values, "BF16", columns, 8, 0.5)
    chunks = encoded(code, values)
    stored = SimpleNamespace(
        name="w", row=columns, states=8, step=code.step, exponent=code.step_exponent,
        sections=[SimpleNamespace(chunks=[len(chunk) for chunk in chunks])],
    )  # fmt: skip
    here = PackedTrellis(shape, stored, code, wanted, "o.hlwq")  # type: ignore[arg-type]
    here.symbols[: sum(map(len, chunks))] = torch.frombuffer(bytearray(b"".join(chunks)), dtype=torch.uint8)
    bits = np.empty(values.size, BIT_PATTERNS[dtype])
    for number, chunk in enumerate(chunks):
        assert trellis_decoder(code, dtype)(chunk, number * rans.CHUNK, bits[number * rans.CHUNK :][: rans.CHUNK])
    weights = on_device(bits.tobytes(), wanted).view(shape)

    matrix = copy.deepcopy(here).to(DEVICE)
    for start, stop in [(rows // 3, rows // 2), (rows - 1, rows), (0, 0)]:
        assert torch.equal(matrix.rows(start, stop, wanted), weights[start:stop])
    index = torch.tensor([0, rows - 1, 1, 1], device=DEVICE)
    assert torch.equal(matrix.take(index), weights[index])
    layer = torch.nn.Linear(columns, rows, dtype=wanted, device=DEVICE)
    bias = layer.bias.detach()
    pack(layer, "weight", [[matrix]], Rotation())
    x = torch.randn((3, columns), device=DEVICE).to(wanted)
    with torch.no_grad():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, weights, bias))
    here.symbols[len(chunks[0]) // 2] ^= 1
    with pytest.raises(BadFrames, match=r'o\.hlwq: tensor "w": symbols: chunk 0 of the symbols is none that an enc'):
        here.to(DEVICE)
