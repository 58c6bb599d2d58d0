"""Model directories: what is read from good ones, and how each kind of bad one is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import join_safetensors, make_header, normal, small_model, small_tensors, tensor, write_index, write_model
from models import write_safetensors as write

from hlwq_convert.source import Source, open_source
from hlwq_formats.dtypes import widen
from hlwq_formats.errors import (
    AlreadyQuantized,
    BadModelDir,
    BadSafetensors,
    HlwqError,
    MissingInput,
    SourceChanged,
    UnsafePath,
    UnsupportedDtype,
)
from hlwq_formats.files import InputFile
from hlwq_formats.safetensors_dir import MAX_HEADER, ModelDir
from hlwq_formats.strict_json import parse

ESC, BIDI = "\x1b", "\u202e"
STATUS = {
    AlreadyQuantized: 69,
    BadModelDir: 65,
    BadSafetensors: 65,
    MissingInput: 66,
    SourceChanged: 75,
    UnsafePath: 65,
    UnsupportedDtype: 69,
}
W = {"w": tensor(np.array([1.5, -2.0]), "F32")}


def read_all(model: ModelDir, name: str) -> bytes:
    found = model.tensors[name]
    return model.read(found, 0, found.length)


def refused(error: type[HlwqError], *parts: str, call: Callable[[], object]) -> str:
    """The one-line message of the error that `call` raises; `parts` must be in it, the first at its start."""
    with pytest.raises(HlwqError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert caught.value.exit_status == STATUS[error]
    assert message.startswith(parts[0])
    assert [part for part in parts if part not in message] == [], message
    assert message.isprintable()
    return message


def put(folder: Path, content: bytes) -> Path:
    """A model directory whose one weight file has this content."""
    write_model(folder, W)
    (folder / "model.safetensors").write_bytes(content)
    return folder


# --- good directories -------------------------------------------------------------------------------


def test_a_single_file(tmp_path: Path) -> None:
    model = ModelDir(write_model(tmp_path / "m", W))
    assert read_all(model, "w") == struct.pack("<2f", 1.5, -2.0)
    assert model.files == [("model.safetensors", (tmp_path / "m/model.safetensors").stat().st_size)]


def test_a_single_file_may_have_any_name(tmp_path: Path) -> None:
    folder = write_model(tmp_path, W)
    (folder / "model.safetensors").rename(folder / "weights.v2.safetensors")
    assert list(ModelDir(folder).tensors) == ["w"]


def test_a_single_file_may_be_called_the_only_part(tmp_path: Path) -> None:
    folder = write_model(tmp_path, W)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert list(ModelDir(folder).tensors) == ["w"]


def test_shards_hold_every_tensor_once(tmp_path: Path) -> None:
    model = ModelDir(small_model(tmp_path))
    expected = small_tensors()
    assert model.tensors.keys() == expected.keys()
    assert {name: read_all(model, name) for name in expected} == {name: data for name, (_, _, data) in expected.items()}
    assert [file for file, _ in model.files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_dtype_and_shape_come_from_the_header(tmp_path: Path) -> None:
    model = ModelDir(write_model(tmp_path, {"a": normal((3, 5), dtype="F16"), "b": tensor(np.zeros((2, 1)), "I64")}))
    assert [(t.dtype, t.shape, t.numel) for t in model.tensors.values()] == [("F16", (3, 5), 15), ("I64", (2, 1), 2)]


def test_tensors_come_in_the_byte_order_of_their_names(tmp_path: Path) -> None:
    names = ["é", "a", "Z", "a.10", "a.2", "\U0001f600", "\uffff"]
    source = open_source(write_model(tmp_path, dict.fromkeys(names, W["w"])))
    assert [t.name for t in source.tensors] == ["Z", "a", "a.10", "a.2", "é", "\uffff", "\U0001f600"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A snapshot of the Hugging Face cache: links to blobs beside it."""
    repo = tmp_path / "hub" / "models--some-org--tiny.model"
    snapshot = repo / "snapshots" / ("0123456789abcdef" * 3)[:40]
    small_model(snapshot)
    (repo / "blobs").mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        blob = repo / "blobs" / f"{i:064x}"
        file.rename(blob)
        file.symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_cache_links_to_its_blobs_are_followed(cache: Path) -> None:
    assert read_all(ModelDir(cache), "model.norm.weight") == small_tensors()["model.norm.weight"][2]


def test_cache_names_repository_and_revision(cache: Path) -> None:
    provenance = open_source(cache).provenance
    assert (provenance.repo, provenance.revision) == ("some-org/tiny.model", cache.name)


def test_cache_is_known_through_a_link_to_it(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(cache)
    assert open_source(tmp_path / "link").provenance.revision == cache.name


def test_other_folders_name_no_repository(tmp_path: Path) -> None:
    provenance = open_source(small_model(tmp_path / "some-org--tiny")).provenance
    assert (provenance.repo, provenance.revision) == (None, None)


def test_links_to_a_sibling_are_followed(tmp_path: Path) -> None:
    folder = write_model(tmp_path, W)
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert read_all(ModelDir(folder), "w") == W["w"][2]


def test_headers_may_end_in_spaces(tmp_path: Path) -> None:
    folder = put(tmp_path, join_safetensors(json.dumps(make_header(W)).encode() + b" " * 37, W["w"][2]))
    assert read_all(ModelDir(folder), "w") == W["w"][2]


@pytest.mark.parametrize("length", [60, 118, 128, 256 + 60, 256 + 118, 256 + 128])
def test_headers_may_have_any_length(tmp_path: Path, length: int) -> None:
    folder = put(tmp_path, join_safetensors(json.dumps(make_header(W), separators=(",", ":")).encode().ljust(length)))
    with (folder / "model.safetensors").open("ab") as file:
        file.write(W["w"][2])
    assert list(ModelDir(folder).tensors) == ["w"]


def test_headers_may_carry_notes(tmp_path: Path) -> None:
    folder = put(tmp_path, join_safetensors({"__metadata__": {"format": "pt"}, **make_header(W)}, W["w"][2]))
    assert list(ModelDir(folder).tensors) == ["w"]


def test_values_need_no_alignment(tmp_path: Path) -> None:
    floats = np.array([1.0, 2.5, -3.25], np.float32)
    model = ModelDir(write_model(tmp_path, {"a": tensor(np.ones(3), "U8"), "b": tensor(floats, "F32")}))
    assert model.tensors["b"].offset % 4 != model.tensors["a"].offset % 4
    assert widen(read_all(model, "b"), "F32").tolist() == floats.tolist()


def test_tensors_may_be_0_d(tmp_path: Path) -> None:
    model = ModelDir(write_model(tmp_path, {"scale": ("F32", (), struct.pack("<f", 7))}))
    assert (model.tensors["scale"].numel, read_all(model, "scale")) == (1, struct.pack("<f", 7))


def test_tensors_may_be_empty(tmp_path: Path) -> None:
    model = ModelDir(write_model(tmp_path, {"none": ("F32", (3, 0), b""), **W, "last": ("I8", (0,), b"")}))
    assert [(t.numel, t.length) for t in model.tensors.values()] == [(0, 0), (2, 8), (0, 0)]
    assert read_all(model, "none") == b""


def test_tensors_may_lie_in_another_order_than_the_header(tmp_path: Path) -> None:
    tensors = {"a": tensor(np.array([1, 2]), "U8"), "b": tensor(np.array([3]), "U8")}
    header = make_header(tensors)
    folder = put(tmp_path, join_safetensors({"b": header["b"], "a": header["a"]}, b"\1\2\3"))
    assert {name: read_all(ModelDir(folder), name) for name in "ab"} == {"a": b"\1\2", "b": b"\3"}


@pytest.mark.parametrize(("start", "length"), [(0, 0), (0, 1), (3, 5), (7, 1), (0, 8)])
def test_ranges_of_a_tensor(tmp_path: Path, start: int, length: int) -> None:
    model = ModelDir(write_model(tmp_path, {"before": tensor(np.ones(5), "U8"), **W, "z": tensor(np.ones(5), "U8")}))
    assert model.read(model.tensors["w"], start, length) == W["w"][2][start : start + length]


def test_packed_tensors_of_whole_bytes_are_carried(tmp_path: Path) -> None:
    model = ModelDir(write_model(tmp_path, {"p": ("F4", (2, 3), b"abc"), "q": ("F8_E4M3", (2,), b"de")}))
    assert (read_all(model, "p"), read_all(model, "q")) == (b"abc", b"de")


def test_agrees_with_the_reference_writer(tmp_path: Path) -> None:
    numpy_writer = pytest.importorskip("safetensors.numpy")
    arrays: dict[str, Any] = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.array([-1, 9], np.int64)}
    folder = put(tmp_path, numpy_writer.save(arrays, {"format": "np"}))
    model = ModelDir(folder)
    assert {name: read_all(model, name) for name in arrays} == {name: a.tobytes() for name, a in arrays.items()}


# --- bad safetensors files --------------------------------------------------------------------------


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def with_w(info: object, data: bytes = bytes(8)) -> bytes:
    return join_safetensors({"w": info}, data)


GOOD = json.dumps(entry()).encode()
BAD_FILES = {
    "empty file": (b"", "too short"),
    "seven bytes": (bytes(7), "too short, 7 of 8"),
    "length 0": (bytes(16), "does not start with {"),
    "length one past the end": (struct.pack("<Q", 3) + b"{}", "a header of 3 bytes; the file has 10"),
    "length 2**64-1": (b"\xff" * 8 + b"{}", "a header of 18446744073709551615 bytes"),
    "list": (join_safetensors(b"[]"), "does not start with {"),
    "leading space": (join_safetensors(b" {}"), "does not start with {"),
    "byte order mark": (join_safetensors(b"\xef\xbb\xbf{}"), "does not start with {"),
    "not JSON": (join_safetensors(b'{"w":'), "not valid JSON"),
    "NUL padding": (join_safetensors(b"{}\0\0"), "not valid JSON"),
    "two documents": (join_safetensors(b"{}{}"), "not valid JSON"),
    "not UTF-8": (join_safetensors(b'{"\xff":1}'), "not valid JSON"),
    "NaN": (join_safetensors(b'{"w":NaN}'), "NaN is not JSON"),
    "100,000 brackets": (join_safetensors(b'{"w":' + b"[" * 100_000), "not valid JSON"),
    "3,000,000 brackets": (join_safetensors(b'{"w":' + b"[" * 3_000_000), "more elements than any real one"),
    "number of 5,000 digits": (join_safetensors(b'{"w":' + b"1" * 5000 + b"}"), "not valid JSON"),
    "tensor twice": (join_safetensors(b'{"w":' + GOOD + b',"w":' + GOOD + b"}", bytes(8)), 'key "w" appears twice'),
    "field twice": (join_safetensors(b'{"w":{"dtype":"I8",' + GOOD[1:] + b"}", bytes(8)), 'key "dtype" appears twice'),
    "note twice": (join_safetensors(b'{"__metadata__":{"a":"1","a":"1"}}'), 'key "a" appears twice'),
    "note is a number": (join_safetensors({"__metadata__": {"a": 1}}), "__metadata__ is not an object of strings"),
    "notes are a list": (join_safetensors({"__metadata__": []}), "__metadata__ is not an object of strings"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "`git lfs pull`"),
    "web page": (b"<!DOCTYPE html><html><title>404</title></html>", "an HTML page"),
    "pickle": (pickle.dumps({"w": [0.0] * 9}), "a header of"),
    "zipped pickle": (b"PK\x03\x04" + bytes(100), "a header of"),
    "trailing byte": (with_w(entry(), bytes(9)), "1 bytes after the last tensor"),
    "data without tensors": (join_safetensors({}, bytes(4)), "4 bytes after the last tensor"),
}
BAD_TENSORS = {
    "no object": (with_w([1]), "expected an object of dtype, shape and data_offsets"),
    "unknown field": (with_w(entry(extra=1)), "expected an object of dtype, shape and data_offsets"),
    "missing field": (with_w({"dtype": "F32", "shape": [2]}), "expected an object of dtype, shape and data_offsets"),
    "shape: number": (with_w(entry(shape=2)), "shape 2 is not a list"),
    "shape: bool": (with_w(entry(shape=[True, 2])), "shape [True, 2] is not a list"),
    "shape: float": (with_w(entry(shape=[2.0])), "shape [2.0] is not a list"),
    "shape: text": (with_w(entry(shape=["2"])), "is not a list"),
    "shape: negative": (with_w(entry(shape=[-1, -2])), "shape [-1, -2] is not a list"),
    "shape: 2**53": (with_w(entry(shape=[2**53], offsets=[0, 0])), "under 2**53 elements"),
    "shape: 10**4000": (with_w(entry(shape=[10**4000])), "under 2**53 elements"),
    "shape: product over 2**53": (with_w(entry(shape=[2**30, 2**30])), "under 2**53 elements"),
    "shape: product wraps to 2 in 64 bits": (with_w(entry(shape=[2**32, 2**32, 2])), "under 2**53 elements"),
    "shape: huge but empty": (with_w(entry(shape=[0, 2**40, 2**40], offsets=[0, 0])), "under 2**53 elements"),
    "shape: nine dimensions": (with_w(entry(shape=[1] * 8 + [2])), "at most 8 dimensions"),
    "offsets: one": (with_w(entry(offsets=[8])), "not two increasing positions"),
    "offsets: three": (with_w(entry(offsets=[0, 8, 8])), "not two increasing positions"),
    "offsets: backwards": (with_w(entry(offsets=[8, 0])), "not two increasing positions"),
    "offsets: negative": (with_w(entry(offsets=[-8, 0])), "not two increasing positions"),
    "offsets: float": (with_w(entry(offsets=[0, 8.0])), "not two increasing positions"),
    "offsets: bool": (with_w(entry("BF16", [1], [False, True])), "not two increasing positions"),
    "offsets: 2**64": (with_w(entry(offsets=[2**64, 2**64 + 8])), "not two increasing positions"),
    "range under the shape": (with_w(entry(shape=[3])), "F32 [3] takes 12 bytes, data_offsets span 8"),
    "range over the shape": (with_w(entry("BF16")), "BF16 [2] takes 4 bytes, data_offsets span 8"),
    "half a byte": (with_w(entry("F4", [1], [0, 1]), bytes(1)), "data_offsets span 1"),
    "data cut by one byte": (with_w(entry(), bytes(7)), "the file has"),
    "data absent": (with_w(entry(), b""), "the file has"),
    "hole before the first": (with_w(entry(offsets=[4, 12]), bytes(12)), "follows a hole"),
    "hole between": (join_safetensors({"v": entry(), "w": entry(offsets=[9, 17])}, bytes(17)), "follows a hole"),
    "overlap": (join_safetensors({"v": entry(), "w": entry(offsets=[4, 12])}, bytes(12)), "overlaps"),
    "the same bytes": (join_safetensors({"v": entry(), "w": entry()}, bytes(8)), "overlaps"),
}
BAD_NAMES = {
    "empty": ("", '""'),
    "513 bytes": ("é" * 256 + "x", '"éé'),
    "line feed": ("a\nb", r'"a\nb"'),
    "escape": (f"a{ESC}[31m", r'"a\x1b[31m"'),
    "lone surrogate": ("bc\ud800", r'"bc\ud800"'),
}


@pytest.mark.parametrize(("content", "problem"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(tmp_path: Path, content: bytes, problem: str) -> None:
    refused(BadSafetensors, "model.safetensors: ", problem, call=lambda: ModelDir(put(tmp_path, content)))


@pytest.mark.parametrize(("content", "problem"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensor(tmp_path: Path, content: bytes, problem: str) -> None:
    parts = ('model.safetensors: tensor "w": ', problem)
    refused(BadSafetensors, *parts, call=lambda: ModelDir(put(tmp_path, content)))


@pytest.mark.parametrize(("name", "shown"), BAD_NAMES.values(), ids=BAD_NAMES)
def test_bad_tensor_name(tmp_path: Path, name: str, shown: str) -> None:
    content = join_safetensors({name: entry()}, bytes(8))
    parts = (f"model.safetensors: tensor {shown}", "the name is")
    refused(BadSafetensors, *parts, call=lambda: ModelDir(put(tmp_path, content)))


@pytest.mark.parametrize("dtype", ["F128", "f32", "bfloat16", "", "F4\n", 5, None])
def test_unknown_dtype(tmp_path: Path, dtype: object) -> None:
    parts = ('model.safetensors: tensor "w": ', "unknown dtype")
    refused(UnsupportedDtype, *parts, call=lambda: ModelDir(put(tmp_path, with_w(entry(dtype)))))


def test_header_over_the_limit(tmp_path: Path) -> None:
    folder = put(tmp_path, struct.pack("<Q", MAX_HEADER + 1) + b"{")
    os.truncate(folder / "model.safetensors", MAX_HEADER + 100)  # a hole: takes no disk
    refused(BadSafetensors, "model.safetensors: ", f"limit is {MAX_HEADER}", call=lambda: ModelDir(folder))


def test_more_tensors_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hlwq_formats.safetensors_dir.MAX_TENSORS", 2)
    folder = write_model(tmp_path, dict.fromkeys("abcd", ("U8", (1,), b"x")))
    refused(BadSafetensors, "model.safetensors: ", "at most 2 tensors", call=lambda: ModelDir(folder))


def test_the_shard_that_is_bad_is_named(tmp_path: Path) -> None:
    folder = small_model(tmp_path)
    with (folder / "model-00002-of-00003.safetensors").open("ab") as file:
        file.write(b"x")
    refused(BadSafetensors, "model-00002-of-00003.safetensors: ", "1 bytes after", call=lambda: ModelDir(folder))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_no_change_of_a_byte_escapes_the_checks(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    good = join_safetensors(make_header(W | {"x": tensor(np.ones(3), "U8")}), bytes(11))
    at = data.draw(st.integers(0, len(good) - 12))
    byte = data.draw(st.integers(0, 255))
    folder = put(tmp_path_factory.mktemp("m"), good[:at] + bytes([byte]) + good[at + 1 :])
    try:
        model = ModelDir(folder)
    except HlwqError as error:
        assert str(error).isprintable()
    else:
        assert sum(t.length for t in model.tensors.values()) == 11
    finally:
        shutil.rmtree(folder)


# --- bad indices and directories --------------------------------------------------------------------

INDEX = "model.safetensors.index.json"
UNSAFE = {
    "up": "../x.safetensors",
    "up from within": "a/../../x.safetensors",
    "absolute": "/etc/passwd",
    "absolute shard": "/etc/x.safetensors",
    "up on Windows": "..\\x.safetensors",
    "drive": "C:x.safetensors",
    "share": "\\\\server\\share.safetensors",
    "stream": "x.safetensors:y.safetensors",
    "empty": "",
    "here": ".",
    "here as a prefix": "./a.safetensors",
    "folder": "sub/a.safetensors",
    "NUL": "a\0.safetensors",
    "escape": f"a{ESC}.safetensors",
    "line feed": "a\n.safetensors",
    "300 characters": "a" * 288 + ".safetensors",
    "trailing space": "a.safetensors ",
    "trailing dot": "a.safetensors.",
    "device": "CON.safetensors",
    "device in small letters": "lpt1.x.safetensors",
    "pickle": "pytorch_model.bin",
    "lone surrogate": "a\ud800.safetensors",
}
BAD_INDICES = {
    "not JSON": (b"{", "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "no object": (b"[]", "weight_map is not an object"),
    "no weight_map": (b'{"metadata":{}}', "weight_map is not an object"),
    "list": (b'{"weight_map":["w"]}', "weight_map is not an object"),
    "number as file": (b'{"weight_map":{"w":1}}', "weight_map is not an object"),
    "no tensor": (b'{"weight_map":{}}', "weight_map has 0 tensors"),
    "tensor twice": (b'{"weight_map":{"w":"a.safetensors","w":"a.safetensors"}}', 'key "w" appears twice'),
    "weight_map twice": (b'{"weight_map":{},"weight_map":{}}', 'key "weight_map" appears twice'),
    "100,000 brackets": (b'{"weight_map":' + b"[" * 100_000, "not valid JSON"),
}


def indexed(folder: Path, weight_map: object, **files: dict[str, Any]) -> Path:
    """A directory with an index and shards a.safetensors, b.safetensors, ... of the given tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    for file, tensors in files.items():
        write(folder / f"{file}.safetensors", tensors)
    write_index(folder, weight_map)
    return folder


@pytest.mark.parametrize("name", UNSAFE.values(), ids=UNSAFE)
def test_shard_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    folder = indexed(tmp_path / "m", {"v": "a.safetensors", "w": name}, a={"v": W["w"]})
    write(tmp_path / "x.safetensors", W)
    refused(UnsafePath, f'{INDEX}: tensor "w": ', "no plain name", call=lambda: ModelDir(folder))


@pytest.mark.parametrize(("content", "problem"), BAD_INDICES.values(), ids=BAD_INDICES)
def test_bad_index(tmp_path: Path, content: bytes, problem: str) -> None:
    folder = indexed(tmp_path, {}, a=W)
    (folder / INDEX).write_bytes(content)
    refused(BadModelDir, f"{INDEX}: ", problem, call=lambda: ModelDir(folder))


def test_index_over_the_limit(tmp_path: Path) -> None:
    folder = indexed(tmp_path, {"w": "a.safetensors"}, a=W)
    os.truncate(folder / INDEX, MAX_HEADER + 1)
    refused(BadModelDir, f"{INDEX}: ", f"at most {MAX_HEADER}", call=lambda: ModelDir(folder))


def test_missing_shard(tmp_path: Path) -> None:
    folder = small_model(tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    parts = (f"{INDEX}: ", "1 of 3 shards are missing: model-00002-of-00003.safetensors")
    refused(MissingInput, *parts, call=lambda: ModelDir(folder))


def test_many_missing_shards_are_not_all_listed(tmp_path: Path) -> None:
    folder = indexed(tmp_path, {f"w{i}": f"s{i:02d}.safetensors" for i in range(30)})
    message = refused(MissingInput, f"{INDEX}: ", "30 of 30", "s19", "and 10 more", call=lambda: ModelDir(folder))
    assert "s20" not in message


def test_tensor_missing_in_its_shard(tmp_path: Path) -> None:
    folder = indexed(tmp_path, {"w": "a.safetensors", "v": "a.safetensors"}, a=W)
    refused(BadModelDir, "a.safetensors: ", "lacks v", call=lambda: ModelDir(folder))


def test_tensor_that_the_index_does_not_name(tmp_path: Path) -> None:
    folder = indexed(tmp_path, {"w": "a.safetensors"}, a=W | {"v": W["w"]})
    refused(BadModelDir, "a.safetensors: ", "holds v", call=lambda: ModelDir(folder))


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    weight_map = {"w": "a.safetensors", "v": "b.safetensors"}
    folder = indexed(tmp_path, weight_map, a=W, b=W | {"v": W["w"]})
    refused(BadModelDir, "b.safetensors: ", "holds w", call=lambda: ModelDir(folder))


def test_tensors_in_each_others_shards(tmp_path: Path) -> None:
    folder = indexed(tmp_path, {"w": "b.safetensors", "v": "a.safetensors"}, a=W, b={"v": W["w"]})
    refused(BadModelDir, "a.safetensors: ", "lacks v", call=lambda: ModelDir(folder))


@pytest.mark.parametrize(
    "names",
    [
        ("m-00001-of-00003.safetensors", "m-00002-of-00003.safetensors"),
        ("m-00001-of-00002.safetensors", "m-00002-of-00003.safetensors"),
        ("m-00001-of-00001.safetensors", "m-00002-of-00001.safetensors"),
    ],
)
def test_shards_that_count_themselves_wrong(tmp_path: Path, names: tuple[str, str]) -> None:
    folder = indexed(tmp_path, {"a": names[0], "b": names[1]})
    for name, file in zip("ab", names, strict=True):
        write(folder / file, {name: W["w"]})
    refused(BadModelDir, f"{INDEX}: ", "2 shards named as parts of", call=lambda: ModelDir(folder))


def test_shard_names_that_differ_in_case_only(tmp_path: Path) -> None:
    folder = indexed(tmp_path, {"w": "a.safetensors", "v": "A.safetensors"}, a=W)
    refused(BadModelDir, f"{INDEX}: ", "differ only in the case", call=lambda: ModelDir(folder))


def test_both_a_single_file_and_an_index(tmp_path: Path) -> None:
    folder = small_model(tmp_path)
    write(folder / "model.safetensors", W)
    refused(BadModelDir, str(folder), "ambiguous", INDEX, call=lambda: ModelDir(folder))


def test_two_indices(tmp_path: Path) -> None:
    folder = small_model(tmp_path)
    shutil.copy(folder / INDEX, folder / "other.safetensors.index.json")
    refused(BadModelDir, str(folder), INDEX, "other.safetensors.index.json", call=lambda: ModelDir(folder))


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = small_model(tmp_path)
    (folder / INDEX).unlink()
    refused(BadModelDir, str(folder), "3 shards and no ", "fetch the index", call=lambda: ModelDir(folder))


def test_one_shard_of_two_without_an_index(tmp_path: Path) -> None:
    folder = write_model(tmp_path, W)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    refused(BadModelDir, str(folder), "1 shards and no ", call=lambda: ModelDir(folder))


def test_single_file_whose_name_no_container_can_hold(tmp_path: Path) -> None:
    folder = write_model(tmp_path, W)
    (folder / "model.safetensors").rename(folder / f"a{ESC}[31m.safetensors")
    refused(UnsafePath, "", r"a\x1b[31m.safetensors", call=lambda: open_source(folder))


def test_single_file_whose_name_is_not_unicode(tmp_path: Path) -> None:
    folder = write_model(tmp_path, W)
    try:
        (folder / "model.safetensors").rename(folder / os.fsdecode(b"a\xff.safetensors"))
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    refused(UnsafePath, "", r"a\udcff.safetensors", call=lambda: open_source(folder))


def link(folder: Path, target: str | Path) -> Path:
    """Replace the one weight file of a new model by a link."""
    write_model(folder, W)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target)
    return folder


@pytest.mark.parametrize("absolute", [True, False])
def test_link_out_of_the_directory(tmp_path: Path, absolute: bool) -> None:
    write(tmp_path / "outside.safetensors", W)
    folder = link(tmp_path / "m", tmp_path / "outside.safetensors" if absolute else "../outside.safetensors")
    refused(UnsafePath, "model.safetensors: ", "leads out of the model directory", call=lambda: ModelDir(folder))


def test_link_to_the_folder_above(tmp_path: Path) -> None:
    refused(UnsafePath, "model.safetensors: ", "leads out", call=lambda: ModelDir(link(tmp_path / "m", "..")))


def test_cache_link_to_the_blobs_of_another_repository(cache: Path) -> None:
    blobs = cache.parents[2] / "models--other--secret" / "blobs"
    blobs.mkdir(parents=True)
    write(blobs / ("a" * 64), W)
    file = cache / "model-00001-of-00003.safetensors"
    file.unlink()
    file.symlink_to(blobs / ("a" * 64))
    refused(UnsafePath, f"{file.name}: ", "leads out", call=lambda: ModelDir(cache))


def test_cache_blob_that_is_a_link_itself(cache: Path, tmp_path: Path) -> None:
    write(tmp_path / "outside.safetensors", W)
    blob = Path(os.path.realpath(cache / "model-00001-of-00003.safetensors"))
    blob.unlink()
    blob.symlink_to(tmp_path / "outside.safetensors")
    refused(UnsafePath, "model-00001-of-00003.safetensors: ", "leads out", call=lambda: ModelDir(cache))


def share(cache: Path, name: str, store: Path) -> None:
    """Move the blob behind a file to the store of the whole cache, as huggingface_hub 2 does for Xet files."""
    blob = cache.parents[1] / "blobs" / os.path.basename(os.readlink(cache / name))
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(os.path.relpath(store, blob.parent))


def test_cache_blob_in_the_store_of_the_cache(cache: Path) -> None:
    share(cache, "model-00001-of-00003.safetensors", cache.parents[2] / "blobs" / "ab" / ("ab" * 32))
    assert read_all(ModelDir(cache), "model.norm.weight") == small_tensors()["model.norm.weight"][2]


@pytest.mark.parametrize("place", ["blobs/cd/" + "ab" * 32, "blobs/ab/short", "other/ab/" + "ab" * 32])
def test_cache_blob_that_leads_past_the_store(cache: Path, place: str) -> None:
    share(cache, "model-00001-of-00003.safetensors", cache.parents[2] / place)
    refused(UnsafePath, "model-00001-of-00003.safetensors: ", "leads out", call=lambda: ModelDir(cache))


def test_cache_link_straight_into_the_store(cache: Path) -> None:
    store = cache.parents[2] / "blobs" / "ab" / ("ab" * 32)
    share(cache, "model-00001-of-00003.safetensors", store)
    (cache / "model-00001-of-00003.safetensors").unlink()
    (cache / "model-00001-of-00003.safetensors").symlink_to(store)
    refused(UnsafePath, "model-00001-of-00003.safetensors: ", "leads out", call=lambda: ModelDir(cache))


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_other_files_may_not_be_links_out_either(tmp_path: Path, name: str) -> None:
    folder = small_model(tmp_path / "m")
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    refused(UnsafePath, f"{name}: ", "leads out", call=lambda: open_source(folder))


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    refused(MissingInput, "model.safetensors: ", "cannot open", call=lambda: ModelDir(link(tmp_path, "nowhere")))


def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    folder = link(tmp_path, "model.safetensors")
    refused(UnsafePath, "model.safetensors: ", "leads to itself", call=lambda: ModelDir(folder))


def test_tensors_beyond_the_index_may_be_left_out(tmp_path: Path) -> None:
    folder = indexed(tmp_path / "m", {"v": "a.safetensors"}, a={"v": W["w"], "x": W["w"]})
    refused(BadModelDir, "a.safetensors: ", "holds x", "--allow-extra", call=lambda: ModelDir(folder))
    model = ModelDir(folder, allow_extra=True)
    assert list(model.tensors) == ["v"]
    assert model.warnings == ["a.safetensors: the index disagrees with the shard, which holds x: left out"]


@pytest.mark.parametrize(("total", "warnings"), [(None, 0), ("right", 0), (1, 1), ("many", 1)])
def test_a_total_size_that_is_wrong_is_only_a_warning(tmp_path: Path, total: object, warnings: int) -> None:
    folder = indexed(tmp_path / "m", {"w": "a.safetensors"}, a=W)
    size = ModelDir(folder).tensors["w"].length
    notes = {} if total is None else {"total_size": size if total == "right" else total}
    (folder / INDEX).write_text(json.dumps({"metadata": notes, "weight_map": {"w": "a.safetensors"}}))
    assert len(ModelDir(folder).warnings) == warnings


def test_cache_link_whose_blob_is_gone(cache: Path) -> None:
    Path(os.path.realpath(cache / "model-00003-of-00003.safetensors")).unlink()
    refused(MissingInput, "model-00003-of-00003.safetensors: ", "cannot open", call=lambda: ModelDir(cache))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_shard_that_is_no_regular_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    folder = write_model(tmp_path, W)
    (folder / "model.safetensors").unlink()
    make(folder / "model.safetensors")
    refused(BadModelDir, "model.safetensors: ", "not a regular file", call=lambda: ModelDir(folder))


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ([], "no .safetensors file"),
        (["pytorch_model.bin"], "only pickles (pytorch_model.bin)"),
        (["model.safetensors.incomplete"], "an unfinished download: model.safetensors.incomplete"),
        (["model.safetensors.aria2"], "an unfinished download: model.safetensors.aria2"),
    ],
)
def test_directory_without_weights(tmp_path: Path, files: list[str], problem: str) -> None:
    for file in files:
        (tmp_path / file).write_bytes(b"")
    refused(MissingInput, str(tmp_path), problem, call=lambda: ModelDir(tmp_path))


def test_no_directory(tmp_path: Path) -> None:
    refused(MissingInput, str(tmp_path / "m"), "no such directory", call=lambda: ModelDir(tmp_path / "m"))


def test_file_instead_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"")
    refused(MissingInput, str(tmp_path / "m"), "not a directory", call=lambda: ModelDir(tmp_path / "m"))


# --- config.json and what else travels --------------------------------------------------------------

BAD_CONFIGS = {
    "empty": (b"", "not valid JSON"),
    "cut": (b'{"a": ', "not valid JSON"),
    "no object": (b"[]", "not a JSON object"),
    "key twice": (b'{"a": 1, "a": 2}', 'key "a" appears twice'),
    "not UTF-8": (b'{"a": "\xff"}', "not valid JSON"),
    "deep objects": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "not valid JSON"),
    "100,000 brackets": (b"[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize(("content", "problem"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_config(tmp_path: Path, content: bytes, problem: str) -> None:
    folder = write_model(tmp_path, W)
    (folder / "config.json").write_bytes(content)
    refused(BadModelDir, "config.json: ", problem, call=lambda: open_source(folder))


def test_no_config(tmp_path: Path) -> None:
    folder = write_model(tmp_path, W)
    (folder / "config.json").unlink()
    refused(MissingInput, str(folder), "config.json is missing", call=lambda: open_source(folder))


QUANTIZED = {"quant_method": "gptq"}


@pytest.mark.parametrize("config", [{"quantization_config": QUANTIZED}, {"text_config": {"quantization_config": {}}}])
def test_quantized_models(tmp_path: Path, config: dict[str, object]) -> None:
    folder = write_model(tmp_path, W, config=config)
    parts = ("config.json: ", "already quantized", "--passthrough")
    refused(AlreadyQuantized, *parts, call=lambda: open_source(folder))


def test_quantized_models_are_accepted_on_request(tmp_path: Path) -> None:
    folder = write_model(tmp_path, W, config={"quantization_config": QUANTIZED})
    assert open_source(folder, passthrough=True).config == {"quantization_config": QUANTIZED}


def test_models_that_say_they_are_not_quantized(tmp_path: Path) -> None:
    assert open_source(write_model(tmp_path, W, config={"quantization_config": None})).tensors[0].name == "w"


@pytest.mark.parametrize("name", ["q_proj.weight_scale", "q_proj.weight_scale_inv"])
def test_scales_of_quantized_weights(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path, {name: W["w"]})
    refused(AlreadyQuantized, "model.safetensors: ", f'"{name}"', call=lambda: open_source(folder))


def assets_of(source: Source) -> list[str]:
    return [name for name, _ in source.assets]


def test_only_files_that_describe_a_model_travel(tmp_path: Path) -> None:
    travel = ["LICENSE", "README.md", "merges.txt", "tokenizer.json", "1_Pooling/config.json", "vocab.txt"]
    stay = [".env", ".git/config", "modeling.py", "vocab.bin", "LICENSE.py", "pytorch_model.bin", "notes.txt"]
    folder = write_model(tmp_path, W, assets=dict.fromkeys(travel + stay, b"x"))
    assert assets_of(open_source(folder)) == sorted([*travel, "config.json"])


def test_assets_are_not_read_through_links_out(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    folder = write_model(tmp_path / "m", W)
    (folder / "tokenizer.json").symlink_to("../secret")
    parts = ("tokenizer.json: ", "leads out")
    refused(UnsafePath, *parts, call=lambda: open_source(folder).read_asset("tokenizer.json"))


def test_assets_over_the_limit(tmp_path: Path) -> None:
    folder = write_model(tmp_path, W, assets={"tokenizer.json": b""})
    os.truncate(folder / "tokenizer.json", (64 << 20) + 1)
    refused(BadModelDir, "tokenizer.json: ", "can travel with a model", call=lambda: open_source(folder))


def test_assets_whose_names_are_not_unicode(tmp_path: Path) -> None:
    folder = write_model(tmp_path, W)
    try:
        (folder / os.fsdecode(b"LICENSE-\xff")).write_text("x")
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    refused(BadModelDir, r"LICENSE-\udcff: ", call=lambda: open_source(folder))


# --- sources that change ----------------------------------------------------------------------------


def grow(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"x")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def touch(file: Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def replace(file: Path) -> None:
    copy = file.with_name("copy")
    shutil.copy2(file, copy)
    copy.rename(file)


@pytest.mark.parametrize("change", [grow, cut, touch, replace])
def test_a_changed_shard_is_noticed_when_read(tmp_path: Path, change: Callable[[Path], None]) -> None:
    model = ModelDir(write_model(tmp_path, W))
    change(tmp_path / "model.safetensors")
    refused(SourceChanged, "model.safetensors: ", "try again", call=lambda: read_all(model, "w"))


@pytest.mark.parametrize("change", [grow, cut, touch, replace])
def test_a_changed_shard_is_noticed_at_the_end(tmp_path: Path, change: Callable[[Path], None]) -> None:
    model = ModelDir(small_model(tmp_path))
    change(tmp_path / "model-00002-of-00003.safetensors")
    refused(SourceChanged, "model-00002-of-00003.safetensors: ", "try again", call=model.check_unchanged)


def test_an_unchanged_source_passes_the_check(tmp_path: Path) -> None:
    model = ModelDir(small_model(tmp_path))
    read_all(model, "model.norm.weight")
    assert model.check_unchanged() is None  # type: ignore[func-returns-value]


def test_a_file_cut_while_open_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(100))
    with InputFile(tmp_path / "f", "f") as file:
        os.truncate(tmp_path / "f", 60)
        refused(SourceChanged, "f: ", "40 bytes at 60 are gone", call=lambda: file.read(0, 100))


# --- what is printed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (f"{ESC}]0;title\x07", r"\x1b]0;title\x07"),
        (f"a{BIDI}b", r"a\u202eb"),
        ("\r::error::x", r"\r::error::x"),
        ("a\\x1b", r"a\\x1b"),
        ("\u2028", r"\u2028"),
    ],
)
def test_names_are_printed_on_one_line(tmp_path: Path, name: str, shown: str) -> None:
    folder = put(tmp_path, join_safetensors({name: [1]}))
    refused(BadSafetensors, f'model.safetensors: tensor "{shown}": ', call=lambda: ModelDir(folder))


@pytest.mark.parametrize("name", [f"a{ESC}[2J.safetensors", f"{BIDI}a.safetensors", "a\n::error::.safetensors"])
def test_file_names_are_printed_on_one_line(tmp_path: Path, name: str) -> None:
    folder = put(tmp_path, b"")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(HlwqError) as caught:
        ModelDir(folder)
    assert str(caught.value).isprintable()


def test_texts_of_a_config_are_printed_on_one_line(tmp_path: Path) -> None:
    folder = write_model(tmp_path, W, config={"quantization_config": {"quant_method": f"a\n::error::{ESC}"}})
    refused(AlreadyQuantized, "config.json: ", r"(a\n::error::\x1b)", call=lambda: open_source(folder))


def test_long_texts_are_cut(tmp_path: Path) -> None:
    folder = put(tmp_path, with_w(entry("x" * 100_000)))
    assert len(refused(UnsupportedDtype, "model.safetensors: ", "...", call=lambda: ModelDir(folder))) < 200


# --- JSON -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [b"[" * 2_000_001, b"," * 8_000_001], ids=["brackets", "commas"])
def test_json_is_bounded_before_it_is_parsed(document: bytes) -> None:
    refused(
        BadModelDir, "x: the JSON has more elements", call=lambda: parse(document, lambda p: BadModelDir("x: " + p))
    )


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (b"NaN", "NaN is not JSON"),
        (b"Infinity", "Infinity is not JSON"),
        (b"-Infinity", "-Infinity is not JSON"),
        (b"1" * 5000, "not valid JSON"),
    ],
)
def test_json_numbers_that_are_none(number: bytes, problem: str) -> None:
    refused(BadModelDir, problem, call=lambda: parse(number, BadModelDir))


def test_a_shard_that_vanishes_is_a_source_that_changed(tmp_path: Path) -> None:
    model = ModelDir(write_model(tmp_path, W))
    (tensor,) = model.tensors.values()
    (model.path / tensor.file).unlink()
    for call in (model.check_unchanged, lambda: model.read(tensor, 0, 1)):
        with pytest.raises(SourceChanged) as caught:
            call()
        assert caught.value.exit_status == 75
