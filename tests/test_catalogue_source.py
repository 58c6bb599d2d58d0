"""The catalogue, E to G: source files, model directories, and the weights in them."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from catalogue import case, check_line, check_measured, measure, refuse_to_convert, unprivileged, write_sparse
from catalogue_files import write
from conftest import Run
from models import Tensor, join_safetensors, tensor, write_index, write_model
from models import write_safetensors as write_shard

import hlwq_convert as h
from hlwq_formats.reader import Reader

W: dict[str, Tensor] = {"w": tensor(np.array([1.5, -2.0]), "F32")}
V: dict[str, Tensor] = {"v": tensor(np.array([0.25]), "F32")}
OTHER: dict[str, Tensor] = {"w": tensor(np.array([9.0, 9.0]), "F32")}
SHARD, INDEX = "model.safetensors", "model.safetensors.index.json"
Build = Callable[[Path], object]


def shard(content: bytes) -> Build:
    return lambda folder: write(folder / SHARD, content)


def index(content: bytes) -> Build:
    """An index of this content beside shards a and b."""

    def build(folder: Path) -> None:
        (folder / SHARD).unlink()
        write_shard(folder / "a.safetensors", W)
        write_shard(folder / "b.safetensors", V)
        write(folder / INDEX, content)

    return build


def shards(weight_map: object, **files: dict[str, Tensor]) -> Build:
    def build(folder: Path) -> None:
        (folder / SHARD).unlink()
        for name, tensors in files.items():
            write_shard(folder / f"{name}.safetensors", tensors)
        write_index(folder, weight_map)

    return build


def instead(make: Callable[[Path], object]) -> Build:
    """Something else in the place of the shard."""

    def build(folder: Path) -> None:
        (folder / SHARD).rename(folder.parent / "outside.safetensors")
        make(folder / SHARD)

    return build


def linked(target: str) -> Build:
    return instead(lambda path: path.symlink_to(target))


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root makes devices")


def beside(suffix: str) -> Build:
    return lambda folder: write(folder / (SHARD + suffix), b"")


class Explosive:
    """A pickle that leaves a trace when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def config(content: object) -> Build:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: write(folder / "config.json", text)


def foreign_blob(folder: Path) -> None:
    """A link to the blob of another repository of the cache."""
    blob = folder.parents[2] / "models--other" / "blobs" / "0"
    blob.parent.mkdir(parents=True)
    (folder / SHARD).rename(blob)
    (folder / SHARD).symlink_to(f"../../../{blob.relative_to(folder.parents[2])}")


def bad(row: int, name: str, build: Build, error: str, *parts: str, xfail: str | None = None) -> Any:
    return case(row, name, build, error, parts, xfail=xfail)


QUANTIZED = ("gptq", "awq", "bitsandbytes", "fp8", "mxfp4", "compressed-tensors")
PICKLE = pickle.dumps(Explosive())

BAD_FILES = [
    bad(64, "length-0", shard(bytes(16)), "BadSafetensors", SHARD, "does not start with {"),
    *(bad(64, f"{n}-bytes", shard(bytes(n)), "BadSafetensors", SHARD, f"too short, {n} of 8") for n in (0, 1, 7)),
    bad(64, "length-2-to-the-64", shard(b"\xff" * 8 + b"{}"), "BadSafetensors", SHARD, f"a header of {2**64 - 1} bytes",
        "has 10"),
    bad(64, "length-past-the-end", shard(struct.pack("<Q", 3) + b"{}"), "BadSafetensors", SHARD, "a header of 3 bytes"),
    bad(64, "100-mb-and-1", lambda folder: write_sparse(folder / SHARD, 120 << 20, (0, struct.pack("<Q", 100_000_001))),
        "BadSafetensors", SHARD, "a header of 100000001 bytes", "limit is 67108864"),
    bad(65, "git-lfs-pointer", shard(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        "BadSafetensors", SHARD, "a Git LFS pointer", "`git lfs pull`"),
    bad(65, "html-page", shard(b"<!DOCTYPE html><html><title>404</title></html>"), "BadSafetensors", SHARD,
        "an HTML page", "fetch"),
    bad(65, "aria2", beside(".aria2"), "BadModelDir", "model.safetensors.aria2", "unfinished", "finish"),
    bad(65, "incomplete", beside(".incomplete"), "BadModelDir", "unfinished", "finish"),
    bad(73, "renamed-pickle", shard(PICKLE), "BadSafetensors", SHARD, "a header of"),
    bad(73, "renamed-zip", shard(b"PK\x03\x04" + PICKLE), "BadSafetensors", SHARD, "a header of"),
    *(bad(73, f"only-{name}", instead(lambda path, name=name: write(path.with_name(name), PICKLE)), "MissingInput",
          f"only pickles ({name})", "not supported", "convert them to safetensors")
      for name in ("pytorch_model.bin", "model.pt", "model.pth")),
    bad(76, "out", linked("../outside.safetensors"), "UnsafePath", SHARD, "leads out of the model directory"),
    bad(76, "to-the-parent", linked(".."), "UnsafePath", SHARD, "leads out of the model directory"),
    bad(76, "to-another-repository", foreign_blob, "UnsafePath", SHARD, "leads out of the model directory"),
    bad(76, "to-itself", linked(SHARD), "UnsafePath", SHARD, "leads to itself"),
    bad(76, "dangling", linked("nowhere"), "MissingInput", SHARD, "cannot open: No such file"),
    bad(78, "fifo", instead(os.mkfifo), "BadModelDir", SHARD, "not a regular file"),
    bad(78, "folder", instead(Path.mkdir), "BadModelDir", SHARD, "not a regular file"),
    bad(78, "socket", instead(make_socket), "BadModelDir", SHARD, "not a regular file"),
    bad(78, "device", instead(make_device), "BadModelDir", SHARD, "not a regular file"),
    bad(80, "unlisted", shards({"w": "a.safetensors"}, a=W | V), "BadModelDir", "a.safetensors", "holds v",
        "--allow-extra"),
    bad(81, "equal", shards({"w": "a.safetensors", "v": "b.safetensors"}, a=W, b=V | W), "BadModelDir",
        "b.safetensors", "holds w"),
    bad(81, "different", shards({"w": "a.safetensors", "v": "b.safetensors"}, a=W, b=V | OTHER), "BadModelDir",
        "b.safetensors", "holds w"),
    bad(82, "no-json", index(b"{"), "BadModelDir", INDEX, "not valid JSON"),
    bad(82, "key-twice", index(b'{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}'), "BadModelDir", INDEX,
        'key "w" appears twice'),
    bad(82, "list", index(b'{"weight_map":["w"]}'), "BadModelDir", INDEX, "weight_map is not an object"),
    bad(82, "number", index(b'{"weight_map":{"w":1,"v":"b.safetensors"}}'), "BadModelDir", INDEX, "weight_map is not"),
    bad(82, "200-mb", instead(lambda path: write_sparse(path.with_name(INDEX), 200_000_000)), "BadModelDir",
        INDEX, "200000000 bytes, at most 67108864"),
    bad(86, "absent", lambda folder: (folder / "config.json").unlink(), "MissingInput", "config.json is missing"),
    *(bad(86, name, config(content), "BadModelDir", "config.json: ", problem) for name, content, problem in (
        ("cut", b'{"a": ', "not valid JSON"), ("list", b"[]", "not a JSON object"),
        ("deep", b'{"a":' * 100_000, "not valid JSON"), ("key-twice", b'{"a":1,"a":2}', 'key "a" appears twice'),
        ("not-utf-8", b'{"a":"\xff"}', "not valid JSON"))),
    *(bad(86, method, config({"quantization_config": {"quant_method": method}}), "AlreadyQuantized", "config.json: ",
          f"already quantized ({method})", "--passthrough") for method in QUANTIZED),
    bad(86, "text-config", config({"text_config": {"quantization_config": {"load_in_4bit": True}}}), "AlreadyQuantized",
        "config.json: ", "--passthrough"),
    bad(86, "hostile-method", config({"quantization_config": {"quant_method": "\x1b[2J\n::error::\u202e"}}),
        "AlreadyQuantized", r"(\x1b[2J\n::error::\u202e)"),
    bad(89, "empty", instead(lambda path: None), "MissingInput", "no .safetensors file in this directory"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "error", "parts"), BAD_FILES)
def test_a_bad_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Build, error: str, parts: tuple[str, ...]
) -> None:
    source = write_model(tmp_path / "models--org--name" / "snapshots" / "m", W)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    h.convert(source, tmp_path / "good.hlwq")
    build(source)
    refuse_to_convert(source, tmp_path / "out" / "o.hlwq", error, *parts)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("what", [case(89, "unreadable-shard", SHARD), case(89, "unreadable-folder", ".")])
def test_an_unreadable_model_is_missing(what: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        source = write_model(Path(folder, "m"), W)
        (source / what).chmod(0)
        with unprivileged(), pytest.raises(h.HlwqError) as caught:
            h.convert(source, Path(folder, "o.hlwq"))
        (source / what).chmod(0o755)
        assert caught.value.exit_status == 66
        assert "Permission denied" in str(caught.value)
        assert os.listdir(folder) == ["m"]


def header(count: int) -> bytes:
    """The header of `count` tensors of nothing."""
    entries = (b'"%07x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(count))
    return join_safetensors(b"{" + b",".join(entries) + b"}")


def flat(count: int, value: bytes) -> bytes:
    return b"{" + b",".join(b'"%07x":%b' % (i, value) for i in range(count)) + b"}"


@pytest.mark.once
@pytest.mark.parametrize(
    ("file", "make", "error", "part"),
    [
        case(74, "1000000-tensors", SHARD, lambda: header(1_000_000), "BadSafetensors", "more elements than any"),
        case(74, "1600000-tensors", SHARD, lambda: header(1_600_000), "BadSafetensors", "the limit is 67108864"),
        case(74, "1400000-keys", SHARD, lambda: join_safetensors(flat(1_400_000, b"0")), "BadSafetensors", SHARD),
        case(82, "1400000-tensors", INDEX, lambda: b'{"weight_map":' + flat(1_400_000, b'"a.safetensors"') + b"}",
             "BadModelDir", INDEX),
    ],
)  # fmt: skip
def test_large_documents(tmp_path: Path, file: str, make: Callable[[], bytes], error: str, part: str) -> None:
    source = write_model(tmp_path / "m", W)
    (source / SHARD).unlink()
    write(source / file, make())
    (result,) = measure("hlwq_convert.source.open_source(path)", source)
    (source / file).unlink()
    check_measured(result, error, part)


# --- what is accepted -------------------------------------------------------------------------------


def hard_linked(folder: Path) -> None:
    os.link(folder / SHARD, folder.parent / "another name")


def linked_within(folder: Path) -> None:
    (folder / SHARD).rename(folder / "weights")
    (folder / SHARD).symlink_to("weights")


def linked_blob(folder: Path) -> None:
    (folder.parents[1] / "blobs").mkdir()
    (folder / SHARD).rename(folder.parents[1] / "blobs" / "0")
    (folder / SHARD).symlink_to("../../blobs/0")


def many_files(folder: Path) -> None:
    for i in range(10_000):
        os.close(os.open(folder / f"{i:05d}.txt", os.O_CREAT))


def code_beside(folder: Path) -> None:
    config({"auto_map": {"AutoModel": "modeling_x.Model"}})(folder)
    write(folder / "modeling_x.py", b"import os; os.mkdir('exploded')")


@pytest.mark.parametrize(
    "build",
    [
        case(76, "link-within", linked_within),
        case(76, "link-to-a-blob", linked_blob),
        case(77, "hard-link", hard_linked),
        case(86, "auto-map", code_beside),
        case(89, "10000-files", many_files),
    ],
)
def test_an_unusual_model_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Build) -> None:
    source = write_model(tmp_path / "models--org--name" / "snapshots" / "m", W)
    monkeypatch.chdir(tmp_path)
    build(source)
    assert h.convert(source, tmp_path / "o.hlwq").warnings == []
    with h.open(tmp_path / "o.hlwq") as file:
        assert file.get_tensor("w").tolist() == [1.5, -2.0]
        assert list(file.reader.assets) == ["config.json", "report.json"]
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "name",
    [case(89, "spaces", " a b "), case(89, "newline", "a\n::error::b"), case(89, "not-unicode", os.fsdecode(b"\xff"))],
)
def test_a_model_may_lie_in_any_folder(tmp_path: Path, run_tool: Run, name: str) -> None:
    try:
        source = write_model(tmp_path / name, W)
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    h.convert(source, tmp_path / "o.hlwq")
    (source / SHARD).unlink()
    if name.isprintable():
        refuse_to_convert(source, tmp_path / "p.hlwq", "MissingInput", str(source), "no .safetensors file")
    else:
        check_line(run_tool("convert", source, tmp_path / "p.hlwq"), "MissingInput", "no .safetensors file")


@pytest.mark.parametrize(
    ("command", "files"),
    [
        case(80, "left-out-by-the-command", True, {"a": W, "b": V | {"x": W["w"]}}),
        case(80, "left-out", False, {"a": W, "b": V | {"x": W["w"]}}),
        case(81, "the-index-decides", False, {"a": W, "b": V | OTHER}),
    ],
)
def test_tensors_beyond_the_index_are_left_out_on_request(
    tmp_path: Path, run_tool: Run, command: bool, files: dict[str, dict[str, Tensor]]
) -> None:
    source, out = write_model(tmp_path / "m", W), tmp_path / "o.hlwq"
    shards({"w": "a.safetensors", "v": "b.safetensors"}, **files)(source)
    if command:
        result = run_tool("convert", source, out, "--allow-extra")
        assert result.returncode == 0
        warnings = [line for line in result.stderr.splitlines() if "warning" in line]
    else:
        warnings = h.convert(source, out, allow_extra=True).warnings
    assert len(warnings) == 1
    assert f"b.safetensors: the index disagrees with the shard, which holds {max(files['b'])}" in warnings[0]
    with h.open(out) as file:
        assert {name: file.get_tensor(name).tolist() for name in file.reader.tensors} == {"v": [0.25], "w": [1.5, -2.0]}


@pytest.mark.parametrize(
    ("total", "wrong"), [case(83, "wrong", 13, True), case(83, "text", "12", True), case(83, "right", 12, False)]
)
def test_a_wrong_total_size_is_only_mentioned(tmp_path: Path, total: object, wrong: bool) -> None:
    source = write_model(tmp_path / "m", W)
    shards({"w": "a.safetensors", "v": "b.safetensors"}, a=W, b=V)(source)
    write_index(source, {"w": "a.safetensors", "v": "b.safetensors"}, metadata={"total_size": total})
    warnings = h.convert(source, tmp_path / "o.hlwq").warnings
    assert len(warnings) == wrong
    assert all("total_size" in warning and "have 12" in warning for warning in warnings)


TRAVELS = {
    "chat_template.jinja": b"{{ ''.__class__.__mro__ }}{% for x in range(9**9) %}",
    "README.md": b"---\nlicense: !!python/object/apply:os.mkdir [exploded]\n---\n${HOME} $(id) {0}",
    "LICENSE": b"\xff\xfe\x00 {{7*7}}\r\n---",
    "config.json": json.dumps({"_name_or_path": "a\n---\n'''{{7*7}}", "transformers_version": "${x}"}).encode(),
}


@pytest.mark.parametrize("files", [case(88, "templates-and-front-matter", TRAVELS)])
def test_texts_travel_as_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_model(tmp_path / "m", W, assets=files)
    for name, content in files.items():
        write(source / name, content)
    result = h.convert(source, tmp_path / "o.hlwq")
    with Reader(tmp_path / "o.hlwq") as reader:
        assert {name: reader.read_asset(name) for name in files} == files
    assert result.metadata.source.repo is None
    assert sorted(os.listdir(tmp_path)) == ["m", "o.hlwq"]


STAYS = (
    ".env", ".git/config", ".huggingface/token", "a.py", "LICENSE.py", "vocab.bin", "tokenizer.model.pt", "x.pt",
    "training_args.bin", "optimizer.safetensors.0", "token", "id_rsa", "README.md.swp", "a/config.json",
)  # fmt: skip


@pytest.mark.parametrize("names", [case(87, "private-files", STAYS)])
def test_other_files_stay(tmp_path: Path, names: tuple[str, ...]) -> None:
    source = write_model(tmp_path / "m", W, assets=dict.fromkeys(names, b"hf_secret"))
    os.mkfifo(source / "NOTICE")
    (source / "LICENSE").mkdir()
    h.convert(source, tmp_path / "o.hlwq")
    assert b"hf_secret" not in (tmp_path / "o.hlwq").read_bytes()
    with Reader(tmp_path / "o.hlwq") as reader:
        assert list(reader.assets) == ["config.json", "report.json"]
        assert all(b"secret" not in reader.read_asset(name) for name in reader.assets)
