"""The vectors of the specification against the reader and the decoder; nothing here writes a vector."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hlwq_convert.decode import decode_quantized
from hlwq_convert.quantize import ScalarCode, dequantize, power_of_two
from hlwq_convert.rotate import SIGN_BYTES, fwht, to_blocks
from hlwq_convert.scalar import encode
from hlwq_formats import errors
from hlwq_formats import metadata as md
from hlwq_formats.bitpack import pack, unpack
from hlwq_formats.dtypes import narrow, widen
from hlwq_formats.file_set import open_set, part_name
from hlwq_formats.layout import numel
from hlwq_formats.reader import Reader

ROOT = Path(__file__).resolve().parent.parent
VECTORS = ROOT / "spec" / "vectors"
GOOD = sorted(path.stem for path in (VECTORS / "good").glob("*.hlwq"))
FAULTS = [
    (folder, name, entry)
    for folder in ("bad", "unsupported")
    for name, entry in json.loads((VECTORS / folder / "index.json").read_bytes()).items()
]
SETS = json.loads((VECTORS / "sets" / "index.json").read_bytes())
STAGES = json.loads((VECTORS / "stages.json").read_bytes())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def decode(reader: Reader, tensor: md.StoredTensor) -> bytes:
    if isinstance(tensor, md.RawTensor):
        return b"".join(reader.raw_chunks(tensor))
    if isinstance(tensor, md.TrellisTensor):
        return decode_quantized(reader, tensor).tobytes()  # by the kernels; the reference made the vectors
    code = ScalarCode(tensor.dtype, tensor.bits, tensor.exponent, reader.levels(tensor), reader.signs())
    codes = reader.read_section("tensor", tensor.name, "codes")
    scales = np.concatenate(list(reader.scale_chunks(tensor, 1 << 20)))
    values = dequantize(codes, scales, code, numel(tensor.shape))
    return narrow(values, tensor.dtype).tobytes()


@pytest.mark.parametrize("name", GOOD)
def test_good(name: str) -> None:
    expected = json.loads((VECTORS / "good" / f"{name}.json").read_bytes())
    with Reader(VECTORS / "good" / f"{name}.hlwq") as reader:
        check_content(reader, expected)


def check_content(reader: Reader, expected: dict[str, Any]) -> None:
    reader.verify()
    assert reader.file_id == expected["file_id"]
    assert reader.content_id == expected["content_id"]
    found = {
        t.name: {"dtype": t.dtype, "shape": t.shape, "sha256": sha256(decode(reader, reader.stored_tensor(t.name)))}
        for t in reader.metadata.tensors
    }
    assert found == expected["tensors"]
    assert {asset: sha256(reader.read_asset(asset)) for asset in reader.assets} == expected["assets"]


@pytest.mark.parametrize("part", [0, 1, 2])
def test_the_good_set_opens_by_any_part(part: int) -> None:
    with open_set(VECTORS / "sets" / "good" / part_name("m", part, 3)) as reader:
        check_content(reader, SETS["good"])


@pytest.mark.parametrize("name", sorted(SETS.keys() - {"good"}))
def test_a_faulty_set_is_refused(name: str) -> None:
    for path in sorted((VECTORS / "sets" / name).iterdir()):
        with Reader(path) as reader:  # each file is good by itself
            reader.verify()
            if reader.metadata.split is None:
                continue
        with pytest.raises(errors.BadSet) as caught:
            open_set(path)
        assert type(caught.value).__name__ == SETS[name]["error"]
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(("folder", "name", "entry"), FAULTS, ids=[f"{folder}/{name}" for folder, name, _ in FAULTS])
def test_fault_has_its_class(folder: str, name: str, entry: dict[str, str]) -> None:
    with pytest.raises(errors.HlwqError) as caught, Reader(VECTORS / folder / name) as reader:
        reader.verify()
    assert type(caught.value).__name__ == entry["error"], f"{entry['fault']} {caught.value}"
    assert caught.value.exit_status == {"bad": 65, "unsupported": 69}[folder]
    assert entry["fault"].endswith(".")


def test_every_file_is_listed_and_every_class_is_shown() -> None:
    listed = {f"{folder}/{name}" for folder, name, _ in FAULTS}
    assert listed == {str(path.relative_to(VECTORS)) for path in VECTORS.glob("*/*.hlwq") if path.parent.name != "good"}
    shown = {entry["error"] for _, _, entry in FAULTS} | {SETS[name]["error"] for name in SETS if name != "good"}
    assert {path.name for path in (VECTORS / "sets").iterdir() if path.is_dir()} == SETS.keys()
    in_table = {error.__name__ for error in vars(errors).values() if 101 <= getattr(error, "code", 0) <= 199}
    assert shown == in_table


@pytest.mark.once
def test_vectors_are_current() -> None:
    script = ROOT / "scripts" / "make_vectors.py"
    done = subprocess.run([sys.executable, "-B", script, "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- a second decoder, from the text of the specification: Python's own numbers, one at a time ----------


def rounded(value: float, code: str) -> float:
    """`value` as float32 (f) or float16 (e), ties to even, too large to infinity."""
    try:
        return float(struct.unpack(code, struct.pack(code, value))[0])
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def plain_decode(reader: Reader, tensor: md.ScalarTensor) -> Iterator[bytes]:
    sections = {s.kind: reader.read_section("tensor", tensor.name, s.kind) for s in tensor.sections}
    signs = bytes(16) if reader.metadata.signs is None else reader.read_section("signs", "", "signs")
    levels = struct.unpack(f"<{1 << tensor.bits}f", sections["levels"])
    stream = int.from_bytes(sections["codes"], "little")
    left = numel(tensor.shape)
    for k, (scale,) in enumerate(struct.iter_unpack("<e", sections["scales"])):
        start = k * 128 * tensor.bits
        x = [levels[stream >> start + i * tensor.bits & (1 << tensor.bits) - 1] for i in range(128)]
        for h in (1, 2, 4, 8, 16, 32, 64):
            for i in range(128):
                if i // h % 2 == 0:
                    x[i], x[i + h] = rounded(x[i] + x[i + h], "<f"), rounded(x[i] - x[i + h], "<f")
        s = rounded(scale * 2.0**tensor.exponent, "<f")
        for i in range(min(128, left)):
            sign = -1.0 if signs[i // 8] >> i % 8 & 1 else 1.0
            w = sign * rounded(s * x[i], "<f")
            if tensor.dtype == "BF16":
                (u,) = struct.unpack("<I", struct.pack("<f", w))
                yield struct.pack("<H", u + 0x7FFF + (u >> 16 & 1) >> 16)
            else:
                code = "<f" if tensor.dtype == "F32" else "<e"
                yield struct.pack(code, rounded(w, code))
        left -= 128


@pytest.mark.parametrize("name", GOOD)
def test_plain_decoder_agrees(name: str) -> None:
    expected = json.loads((VECTORS / "good" / f"{name}.json").read_bytes())["tensors"]
    with Reader(VECTORS / "good" / f"{name}.hlwq") as reader:
        for tensor in reader.metadata.tensors:
            if isinstance(tensor, md.ScalarTensor) and numel(tensor.shape) < 1 << 16:  # a million take half a minute
                assert sha256(b"".join(plain_decode(reader, tensor))) == expected[tensor.name]["sha256"], tensor.name


# --- what the good files must contain to be worth reading -----------------------------------------------


def decoded_floats(name: str, tensor: str) -> NDArray[np.float32]:
    with Reader(VECTORS / "good" / f"{name}.hlwq") as reader:
        entry = reader.stored_tensor(tensor)
        return widen(decode(reader, entry), entry.dtype)


def test_extremes_reach_what_they_are_for() -> None:
    top, bottom = decoded_floats("extremes", "F32.wide.112"), decoded_floats("extremes", "F32.000")
    assert np.isinf(top).any()
    assert not np.isnan(top).any()
    assert ((np.abs(bottom) > 0) & (np.abs(bottom) < 2.0**-126)).any()
    zeros = decoded_floats("extremes", "F32.126")[:128]
    assert (zeros == 0).all()
    assert 0 < np.signbit(zeros).sum() < 128
    assert np.isinf(decoded_floats("extremes", "F16.wide")).any()


@pytest.mark.parametrize(("tensor", "bits"), [("bf16", 8), ("f16", 11)])
def test_rounding_meets_ties(tensor: str, bits: int) -> None:
    with Reader(VECTORS / "good" / "rounding.hlwq") as reader:
        entry = reader.stored_tensor(tensor)
        assert isinstance(entry, md.ScalarTensor)
        code = ScalarCode("F32", entry.bits, entry.exponent, reader.levels(entry), reader.signs())
        codes = reader.read_section("tensor", tensor, "codes")
        scales = np.concatenate(list(reader.scale_chunks(entry, 1 << 20)))
        values = np.abs(dequantize(codes, scales, code, 1024).astype(np.int64))
    ties = values[(values >> bits == 1) & (values & 1 == 1)]
    assert {int(tie) & 3 for tie in ties} == {1, 3}  # ties to below and ties to above


# --- stages ---------------------------------------------------------------------------------------------


def floats(text: str) -> NDArray[np.float32]:
    return np.array([int(word, 16) for word in text.split()], "<u4").view("<f4")


def same(found: NDArray[Any], expected: NDArray[Any]) -> None:
    """Equal bits: -0 is not 0."""
    assert found.dtype.itemsize == expected.dtype.itemsize
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("stage", STAGES, ids=[stage["name"] for stage in STAGES])
def test_stages(stage: dict[str, Any]) -> None:
    dtype, bits, exponent, count = stage["dtype"], stage["bits"], stage["exponent"], stage["count"]
    rows = {key: np.stack([floats(row) for row in value]) for key, value in stage.items()
            if isinstance(value, list) and key != "codes"}  # fmt: skip
    signs, levels = floats(stage["signs"]), floats(stage["levels"])
    codes = np.array(stage["codes"], np.uint8)
    packed, item = bytes.fromhex(stage["packed"]), "<u4" if dtype == "F32" else "<u2"
    scales = np.array([int(word, 16) for word in stage["scales"].split()], "<u2").view("<f2")
    source = np.array([int(word, 16) for word in stage["source"].split()], item).tobytes()
    expected_signs = 1 - 2 * np.unpackbits(np.frombuffer(SIGN_BYTES, np.uint8), bitorder="little").astype(np.float32)
    assert "no signs" in stage["name"] or np.array_equal(signs, expected_signs)

    same(widen(source, dtype), floats(stage["source_float32"]))
    same(to_blocks(widen(source, dtype) * power_of_two(-exponent)), rows["block"])
    same(rows["block"] * signs, rows["signed"])
    same(fwht(rows["signed"]), rows["rotated"])
    found_codes, found_scales = encode(fwht(rows["signed"]), levels, "fast")
    assert np.array_equal(found_codes, codes)
    same(found_scales, scales)
    assert pack(codes.ravel(), bits) == packed

    assert np.array_equal(unpack(packed, bits, codes.size), codes.ravel())
    same(levels[codes], rows["levels_of_codes"])
    same(fwht(rows["levels_of_codes"]), rows["transformed"])
    same(scales.astype(np.float32) * power_of_two(exponent), floats(stage["scale_float32"]))
    same(floats(stage["scale_float32"])[:, None] * rows["transformed"], rows["scaled"])
    same((signs * rows["scaled"]).ravel()[:count], floats(stage["decoded_float32"]))
    decoded = dequantize(packed, scales, ScalarCode(dtype, bits, exponent, levels, signs), count)
    same(decoded, floats(stage["decoded_float32"]))
    same(narrow(decoded, dtype), np.array([int(word, 16) for word in stage["decoded"].split()], item))
