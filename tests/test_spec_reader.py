"""The second reader, written from the document alone, against the vectors and against files of the tool."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path

import pytest
from spec_reader import REFUSALS, read
from spec_sets import read_set

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from vector_parts import empty

import hlwq_convert as h
from hlwq_convert.decode import decode_quantized
from hlwq_formats import metadata as md
from hlwq_formats.errors import BadMetadata
from hlwq_formats.reader import Reader

VECTORS = Path(__file__).resolve().parent.parent / "spec" / "vectors"
SETS = json.loads((VECTORS / "sets" / "index.json").read_bytes())
FAULTY = sorted(path for folder in ("bad", "unsupported") for path in (VECTORS / folder).glob("*.hlwq"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("path", sorted((VECTORS / "good").glob("*.hlwq")), ids=lambda p: p.stem)
def test_every_good_vector_decodes_to_the_same_values(path: Path) -> None:
    expected, found = json.loads(path.with_suffix(".json").read_bytes()), read(path.read_bytes())
    assert (found["file_id"], found["content_id"]) == (expected["file_id"], expected["content_id"])
    assert {name: sha256(data) for name, data in found["assets"].items()} == expected["assets"]
    assert {
        name: {"dtype": dtype, "shape": shape, "sha256": sha256(data)}
        for name, (dtype, shape, data) in found["tensors"].items()
    } == expected["tensors"]


@pytest.mark.parametrize("path", FAULTY, ids=lambda p: p.stem)
def test_every_faulty_vector_is_refused(path: Path) -> None:
    with pytest.raises(REFUSALS):
        read(path.read_bytes())


@pytest.mark.parametrize("name", SETS)
def test_sets(name: str) -> None:
    files = [path.read_bytes() for path in sorted((VECTORS / "sets" / name).iterdir())]
    if name != "good":
        with pytest.raises(REFUSALS):
            read_set(files)
        return
    found = read_set(files)
    assert (found["file_id"], found["content_id"]) == (SETS[name]["file_id"], SETS[name]["content_id"])
    assert {name: sha256(data) for name, data in found["assets"].items()} == SETS[name]["assets"]
    assert {n: sha256(t[2]) for n, t in found["tensors"].items()} == {
        n: t["sha256"] for n, t in SETS[name]["tensors"].items()
    }


def test_a_converted_model_reads_alike(converted: Path) -> None:
    second = read(converted.read_bytes())
    with h.open(converted) as file:
        assert second["content_id"] == file.reader.content_id
        assert list(second["tensors"]) == file.keys()
        for name, (_, _, data) in second["tensors"].items():
            tensor = file.reader.stored_tensor(name)
            if isinstance(tensor, md.RawTensor):
                assert data == b"".join(file.reader.raw_chunks(tensor))
            else:
                assert data == decode_quantized(file.reader, tensor).tobytes()


def test_a_split_model_reads_alike(model: Path, converted: Path, tmp_path: Path) -> None:
    h.convert(model, tmp_path / "m.hlwq", split_size=60_000)
    found, whole = read_set([path.read_bytes() for path in sorted(tmp_path.iterdir())]), read(converted.read_bytes())
    assert (found["tensors"], found["content_id"]) == (whole["tensors"], whole["content_id"])
    assert found["assets"] == whole["assets"]
    assert found["file_id"] == h.inspect(tmp_path).file_id


def many(what: str, count: int) -> bytes:
    """A file that lists so many of something: too large to lie among the vectors."""
    parts = empty()
    if what == "rules":
        parts.document["recipe"]["rules"] = [{"bits": 4, "match": ""}] * count
    elif what == "source files":
        parts.document["source"]["files"] = [{"length": 0, "name": "s"}] * count
    else:
        for i in range(count):
            parts.asset(f"{i:05d}", b"")
    return parts.build()


@pytest.mark.parametrize("what", ["rules", "source files", "assets"])
def test_both_readers_count_what_is_listed(what: str, tmp_path: Path) -> None:
    path = tmp_path / "m.hlwq"
    path.write_bytes(many(what, 10_000))
    read(path.read_bytes())
    with Reader(path) as reader:
        reader.verify()
    path.write_bytes(many(what, 10_001))
    with pytest.raises(REFUSALS):
        read(path.read_bytes())
    with pytest.raises(BadMetadata, match="length <= 10000"):
        Reader(path)


def test_it_is_short_and_stands_alone() -> None:
    source, sets = ((Path(__file__).parent / name).read_text() for name in ("spec_reader.py", "spec_sets.py"))
    assert len(source.splitlines()) <= 250
    source += sets
    modules = {n.module for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import) for a in n.names}
    assert not any(str(module).startswith("hlwq") for module in modules)
