"""Into torch: the same bits as the NumPy decoder, and nothing from a damaged file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import normal, write_model

import hlwq_convert as h
from hlwq_convert.decode import get_numpy
from hlwq_formats.errors import BadData, HlwqError, UnsupportedDtype
from hlwq_formats.reader import Reader

torch = pytest.importorskip("torch")
load: Any = pytest.importorskip("hlwq_convert.runtime.load")


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_the_state_dict_has_every_source_tensor(model: Path, converted: Path) -> None:
    from hlwq_convert.source import open_source

    state = h.load_state_dict(converted)
    source = open_source(model).tensors
    assert {name: tuple(t.shape) for name, t in state.items()} == {t.name: t.shape for t in source}
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    assert {name: bits_of(t) for name, t in h.iter_tensors(converted)} == {n: bits_of(t) for n, t in state.items()}


@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(2, 8),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    numel=st.sampled_from([4096, 4097, 4103, 4160, 4223, 4225, 4672, 140_001]),
    scale=st.sampled_from([1e-38, 1e-9, 0.02, 1.0, 1e3, 1e30]),
    seed=st.integers(0, 99),
)
def test_torch_and_numpy_decode_to_equal_bits(
    tmp_path_factory: pytest.TempPathFactory, bits: int, dtype: str, numel: int, scale: float, seed: int
) -> None:
    from hlwq_formats.dtypes import narrow

    tmp_path = tmp_path_factory.mktemp("bits")
    random = np.random.default_rng(seed)
    values = random.standard_normal(numel) * (min(scale, 1e3) if dtype == "F16" else scale)
    values[: numel // 3] *= random.random() * 1e-4
    values[200:300] = 0
    raw = narrow(values.astype(np.float32), dtype).tobytes()
    h.convert(write_model(tmp_path / "m", {"t": (dtype, (1, numel), raw)}), tmp_path / "o.hlwq", bits)
    with h.open(tmp_path / "o.hlwq") as file:
        expected, found = get_numpy(file.reader, "t"), file.get_tensor("t", framework="pt")
        assert file.reader.tensors["t"].bits == bits
    if dtype == "BF16":
        found = found.float()  # exact: the values of a BF16 tensor come as float32 in NumPy
    assert bits_of(found) == expected.tobytes()


def test_every_dtype_that_torch_has_comes_back(tmp_path: Path) -> None:
    tensors = {
        "bool": ("BOOL", (2,), b"\1\0"), "u8": ("U8", (2,), b"\1\2"), "i8": ("I8", (1,), b"\xff"),
        "i16": ("I16", (1,), b"\1\2"), "u16": ("U16", (1,), b"\xff\xff"), "i32": ("I32", (1,), b"\1\2\3\4"),
        "u32": ("U32", (1,), b"\xff" * 4), "i64": ("I64", (1,), b"\xfe" * 8), "u64": ("U64", (1,), b"\xff" * 8),
        "f64": ("F64", (1,), b"\1\2\3\4\5\6\7\x40"), "c64": ("C64", (1,), b"\0\0\x80?\0\0\0@"),
        "f8a": ("F8_E4M3", (2,), b"\x7f\1"), "f8b": ("F8_E5M2", (2,), b"\x7c\1"),
        "scalar": ("F32", (), b"\0\0\x80?"), "none": ("BF16", (0, 3), b""),
    }  # fmt: skip
    h.convert(write_model(tmp_path / "m", tensors), tmp_path / "o.hlwq")
    state = h.load_state_dict(tmp_path / "o.hlwq")
    assert {name: bits_of(t) for name, t in state.items()} == {name: raw for name, (_, _, raw) in tensors.items()}
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        name: shape for name, (_, shape, _) in tensors.items()
    }


def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path) -> None:
    h.convert(write_model(tmp_path / "m", {"four": ("F4", (2, 2), b"\1\2")}), tmp_path / "o.hlwq")
    with pytest.raises(UnsupportedDtype, match='tensor "four": torch has no type for F4'):
        h.load_state_dict(tmp_path / "o.hlwq")


def test_an_alias_shares_memory(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32).tobytes()
    tensors = dict.fromkeys(("a", "b"), ("F32", (64, 96), weights))
    h.convert(write_model(tmp_path / "m", tensors), tmp_path / "o.hlwq")
    state = h.load_state_dict(tmp_path / "o.hlwq")
    assert state["a"].data_ptr() == state["b"].data_ptr()


def test_dtype_rounds_once_and_leaves_integers(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float16)
    tensors = {"w": ("F16", (64, 96), values.tobytes()), "i": ("I64", (1,), bytes(8)), "n": ("F16", (2,), b"\0<\0@")}
    h.convert(write_model(tmp_path / "m", tensors), tmp_path / "o.hlwq")
    own, wide = h.load_state_dict(tmp_path / "o.hlwq"), h.load_state_dict(tmp_path / "o.hlwq", dtype=torch.float32)
    assert (wide["w"].dtype, wide["n"].dtype, wide["i"].dtype) == (torch.float32, torch.float32, torch.int64)
    assert torch.equal(wide["w"].half(), own["w"])
    assert not torch.equal(wide["w"], own["w"].float())


@pytest.fixture
def tiny(tmp_path: Path) -> bytes:
    """A file of a few kilobytes with every kind of section; the weights are random, so no byte is idle."""
    weights = np.random.default_rng(0).standard_normal((32, 128)).astype(np.float32).tobytes()
    tensors = {"a": ("F32", (32, 128), weights), "b": ("F32", (32, 128), weights), "n": ("F32", (3,), weights[:12])}
    h.convert(write_model(tmp_path / "m", tensors, assets={"merges.txt": b"ab " * 99}), tmp_path / "o.hlwq", bits=2)
    return (tmp_path / "o.hlwq").read_bytes()


def test_a_flipped_bit_in_every_byte_is_caught_by_the_loader(tiny: bytes, tmp_path: Path) -> None:
    """Every bit of the header and one of every other byte; the Reader below is tested with all."""
    path = tmp_path / "damaged.hlwq"
    undetected = []
    for bit in [*range(8 * 128), *(8 * at + at % 8 for at in range(128, len(tiny)))]:
        damaged = bytearray(tiny)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            h.load_state_dict(path)
        except HlwqError as error:
            assert error.exit_status in (65, 69)
        else:
            undetected.append(bit)
    assert undetected == []


def test_every_truncation_and_an_appended_byte_are_caught_by_the_loader(tiny: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.hlwq"
    for length in range(len(tiny)):
        path.write_bytes(tiny[:length])
        with pytest.raises(BadData):
            h.load_state_dict(path)
    path.write_bytes(tiny + b"\0")
    with pytest.raises(BadData, match="1 bytes too many"):
        h.load_state_dict(path)


def test_nothing_is_yielded_before_it_is_verified(tiny: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.hlwq"
    path.write_bytes(tiny)
    with Reader(path) as reader:
        offset = reader._offsets[reader._index["tensor", "a", "codes"]]
    damaged = bytearray(tiny)
    damaged[offset + 1000] ^= 4
    path.write_bytes(damaged)
    seen = []
    with pytest.raises(BadData, match='tensor "a": codes@'):
        seen.extend(name for name, _ in h.iter_tensors(path))
    assert seen == []


def test_another_dtype_waits_for_the_last_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is converted to a dtype of its own when all of it was decoded, however late a piece comes."""
    h.convert(write_model(tmp_path / "m", {"w.weight": normal((64, 128))}), tmp_path / "o.hlwq")
    expected = h.load_state_dict(tmp_path / "o.hlwq", dtype=torch.float32)["w.weight"].double()
    honest = load.decode_tasks

    def late(*arguments: Any) -> Iterator[Callable[[], None]]:
        for task in honest(*arguments):
            yield lambda task=task: (time.sleep(0.3), task())[1]  # type: ignore[misc]

    monkeypatch.setattr(load, "decode_tasks", late)
    assert torch.equal(h.load_state_dict(tmp_path / "o.hlwq", dtype=torch.float64, workers=4)["w.weight"], expected)
