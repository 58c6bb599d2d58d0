"""The catalogue, G: values, shapes and dtypes of weights."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest
from catalogue import MEMORY, case, measure, refuse_to_convert, write_sparse
from catalogue_files import sparse_container
from models import Tensor, join_safetensors, normal, tensor, write_model
from numpy.typing import NDArray

import hlwq_convert as h
from hlwq_convert.dry_run import dry_run
from hlwq_convert.job import prepare
from hlwq_convert.source import open_source
from hlwq_formats import metadata as md
from hlwq_formats.dtypes import widen
from hlwq_formats.reader import Reader

Floats = NDArray[np.float64]
SHAPE = (64, 96)
UNIFORM = np.random.default_rng(0).uniform(-1, 1, SHAPE)
NORMAL = 0.02 * np.random.default_rng(1).standard_normal(SHAPE)


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compile the kernels that the tests need, so that a child loads them."""
    folder = tmp_path_factory.mktemp("compiled")
    h.convert(write_model(folder / "m", {"w": normal(SHAPE)}), folder / "o.hlwq", bits=2, effort="fast")


def converted(folder: Path, stored: Tensor, bits: int | None = None) -> tuple[md.Tensor, NDArray[np.generic]]:
    """One tensor through a file: its entry, and what loads."""
    h.convert(write_model(folder / "m", {"w": stored}), folder / "o.hlwq", bits=bits)
    with h.open(folder / "o.hlwq") as file:
        file.reader.verify()
        return file.reader.tensors["w"], file.get_tensor("w")


def spike(values: Floats) -> Floats:
    """One huge weight in each block of 128."""
    values = values.copy()
    values.reshape(-1)[::128] = 1e4
    return values


FINITE = [
    (92, "minus-zero", np.full(SHAPE, -0.0)),
    (92, "minus-zero-among-others", np.where(UNIFORM < 0, -0.0, NORMAL)),
    (92, "constant", np.full(SHAPE, 0.37)),
    (92, "spike", spike(NORMAL)),
    (92, "alternating", np.resize([1.0, -1.0], SHAPE)),
    *((93, f"size-{size}", size * UNIFORM) for size in (1e-40, 2.6e-9)),
    *((94, f"size-{size}", size * UNIFORM) for size in (1e-8, 1e-7, 5.4e-6)),
    *((95, f"size-{size}", size * UNIFORM) for size in (5793, 6e4, 1e19, 1e30, 3.39e38)),
]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        case(row, f"{name}-{dtype.lower()}", values, dtype)
        for row, name, values in FINITE
        for dtype in ("F32", "BF16", "F16")
        if dtype != "F16" or np.abs(values).max() < 65504
    ],
)
def test_any_finite_weights_come_back(tmp_path: Path, values: Floats, dtype: str) -> None:
    stored = tensor(values.astype(np.float32), dtype)
    weights = widen(stored[2], dtype).astype(np.float64).reshape(SHAPE)
    entry, found = converted(tmp_path, stored)
    decoded = found.astype(np.float64)
    assert np.isfinite(decoded).all()
    if isinstance(entry, md.RawTensor):  # only what would decode to infinity
        assert np.abs(weights).max() > 3e38
        assert "decode to infinity" in entry.reason
        assert np.array_equal(decoded, weights)
        return
    # 5 bits lose .0025, and there is one rounding to a dtype whose least step is that of its subnormals
    step = {"F32": 2.0**-149, "BF16": 2.0**-133, "F16": 2.0**-24}[dtype]
    assert ((decoded - weights) ** 2).sum() <= 0.0025 * (weights**2).sum() + weights.size * step**2 / 4


@pytest.mark.parametrize("counts", [case(71, "after-some-bytes", (1, 2, 3))])
def test_weights_need_no_alignment(tmp_path: Path, counts: tuple[int, ...]) -> None:
    floats, places = UNIFORM.astype(np.float32), set()
    for count in counts:
        tensors = {"a": tensor(np.arange(count), "U8"), "b": tensor(floats, "F32"), "c": tensor(floats[0], "F32")}
        source = write_model(tmp_path / "m", tensors)
        places.add(open_source(source).model.tensors["b"].offset % 4)
        h.convert(source, tmp_path / "o.hlwq", bits=8, overwrite=True)
        with h.open(tmp_path / "o.hlwq") as file:
            assert file.get_tensor("a").tolist() == list(range(count))
            np.testing.assert_allclose(file.get_tensor("b"), floats, atol=0.05)
            assert np.array_equal(file.get_tensor("c"), floats[0])
    assert len(places) == 3


WIDE = np.array([1e300, -1e-300, 1 / 3, 2.0**53 + 2, math.pi] * 1024).reshape(64, 80)
EVERY_BYTE = bytes(range(256)) * 24


@pytest.mark.parametrize(
    "stored",
    [
        case(96, "f64", ("F64", (64, 80), WIDE.tobytes())),
        case(96, "f64-of-small-integers", ("F64", (64, 80), np.arange(5120.0).tobytes())),
        *(case(97, dtype.lower(), (dtype, SHAPE, EVERY_BYTE)) for dtype in
          ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")),
    ],
)  # fmt: skip
def test_other_floats_are_kept_to_the_bit(tmp_path: Path, stored: Tensor) -> None:
    result = h.convert(write_model(tmp_path / "m", {"w": stored}), tmp_path / "o.hlwq")
    assert [(t.encoding, t.dtype, t.shape) for t in result.tensors] == [("raw", stored[0], list(stored[1]))]
    with Reader(tmp_path / "o.hlwq") as reader:
        assert reader.read_section("tensor", "w", "raw") == stored[2]


@pytest.mark.parametrize("name", [case(97, name, name) for name in ("w.weight_scale_inv", "w.weight_scale")])
def test_scaled_floats_are_refused(tmp_path: Path, name: str) -> None:
    tensors = {"w.weight": ("F8_E4M3", SHAPE, EVERY_BYTE), name: tensor(np.ones(1), "F32")}
    source, out = write_model(tmp_path / "m", tensors), tmp_path / "o.hlwq"
    refuse_to_convert(source, out, "AlreadyQuantized", "model.safetensors", f'tensor "{name}"', "--passthrough")
    assert {t.encoding for t in h.convert(source, out, passthrough=True).tensors} == {"raw"}


@pytest.mark.parametrize(
    ("shape", "encoding"),
    [
        *(case(99, f"width-{width}", (-(-4096 // width), width), "scalar") for width in
          (1, 7, 64, 127, 129, 4095, 11007, 11009)),
        case(101, "no-experts", (0, 8, 128), "raw"),
        case(101, "1-expert", (1, 64, 128), "scalar"),
        case(101, "256-experts", (256, 4, 64), "scalar"),
        case(101, "narrow-experts", (8, 32, 63), "raw"),
        case(101, "4-d", (16, 8, 8, 8), "raw"),
        case(101, "5-d", (16, 8, 4, 4, 4), "raw"),
    ],
)  # fmt: skip
def test_any_shape_comes_back(tmp_path: Path, shape: tuple[int, ...], encoding: str) -> None:
    # the size of a weight tells its place: rows and columns that were exchanged would show
    values = np.linspace(-1, 1, math.prod(shape)).reshape(shape) ** 3
    entry, found = converted(tmp_path, tensor(values.astype(np.float32), "F32"), 8)
    assert isinstance(entry, md.RawTensor) == (encoding == "raw")
    assert found.shape == shape
    np.testing.assert_allclose(found, values, atol=1e-6 if encoding == "raw" else 0.03)


# --- large ones, which take no disk -----------------------------------------------------------------


def sparse_model(folder: Path, dtype: str, shape: tuple[int, ...], length: int, end: bytes = b"") -> Path:
    """One tensor of zeros that ends in `end`."""
    write_model(folder, {})
    head = join_safetensors({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, length]}})
    size = len(head) + length
    write_sparse(folder / "model.safetensors", size, (0, head), (size - len(end), end))
    return folder


@pytest.mark.parametrize(
    "shape", [case(103, "over-2-to-the-31", (2**24 + 1, 129)), case(103, "one-row", (1, 2**32 + 9))]
)
def test_a_plan_for_a_huge_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    n = math.prod(shape)
    folder = sparse_model(tmp_path / "m", "BF16", shape, 2 * n, b"\1\2\3\4")
    (info,) = dry_run(prepare(folder), str(tmp_path / "o.hlwq")).tensors
    assert (info.shape, info.bytes) == (list(shape), -(-n // 128) * (16 * 5 + 2) + 4 * 32)
    source = open_source(folder)
    assert source.model.read(source.tensors[0], 2 * n - 4, 4) == b"\1\2\3\4"


@pytest.mark.parametrize("length", [case(103, "section-of-5-gib", 5 << 30), case(103, "section-of-1-tb", 10**12 + 1)])
def test_a_tensor_behind_a_huge_section(tmp_path: Path, length: int) -> None:
    with h.open(sparse_container(tmp_path / "m.hlwq", length)) as file:
        assert file.get_tensor("b").tolist() == [1, 2, 3, 4]


@pytest.mark.once
@pytest.mark.parametrize("shape", [case(104, "one-row", (1, 5 * 10**7)), case(104, "one-column", (5 * 10**7, 1))])
def test_a_long_tensor_takes_little_memory(tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = sparse_model(tmp_path / "m", "BF16", shape, 10**8, struct.pack("<H", 0x3F80))
    (result,) = measure("h.convert(path, path + '.hlwq', bits=2, effort='fast')", folder)
    assert result.error is None
    assert result.memory <= MEMORY


@pytest.mark.once
@pytest.mark.parametrize("count", [case(104, "20000-tiny-tensors", 20_000)])
def test_many_tensors_take_little_memory(tmp_path: Path, count: int) -> None:
    tensors = {f"{i:06d}": ("F32", (2,), struct.pack("<2f", i, 1)) for i in range(count)}
    (result,) = measure("h.convert(path, path + '.hlwq')", write_model(tmp_path / "m", tensors))
    assert result.error is None
    assert result.memory <= MEMORY * count // 100_000
