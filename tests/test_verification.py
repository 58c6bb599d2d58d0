"""What is damaged, what is still good, and whether a file is what it says it is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from models import write_model

import hlwq_convert as h
from hlwq_convert.against import compare
from hlwq_convert.source import open_source
from hlwq_convert.verification import Damage, verify
from hlwq_formats import metadata as md
from hlwq_formats.layout import place_sections
from hlwq_formats.reader import Reader


def places(path: Path) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(kind, owner, section kind) -> (offset, length)."""
    with Reader(path) as reader:
        listed = list(md.all_sections(reader.metadata))
    offsets, _ = place_sections(section.length for _, _, section in listed)
    return {(kind, owner, s.kind): (at, s.length) for (kind, owner, s), at in zip(listed, offsets, strict=True)}


def damage(path: Path, *at: int) -> Path:
    content = bytearray(path.read_bytes())
    for i in at:
        content[i] ^= 0x10
    path.write_bytes(content)
    return path


def found(path: Path) -> tuple[list[tuple[str, str]], int]:
    with Reader(path) as reader:
        result = verify(reader, lambda done, total: None)
    return [(d.kind, d.name) for d in result.damaged], result.good_tensors


def test_a_good_file(converted: Path) -> None:
    steps: list[tuple[int, int]] = []
    with Reader(converted) as reader:
        result = verify(reader, lambda done, total: steps.append((done, total)))
        assert (result.damaged, result.good_tensors) == ([], len(reader.tensors))
    assert 0 < steps[-1][0] <= steps[-1][1]


def test_each_damaged_section_is_named_and_the_rest_is_good(converted: Path, tmp_path: Path) -> None:
    with Reader(converted) as reader:
        n_tensors = len(reader.tensors)
        aliases = {t.name: t.of for t in reader.metadata.tensors if isinstance(t, md.AliasTensor)}
    assert len(places(converted)) > 20
    for (kind, owner, section), (at, length) in places(converted).items():
        path = damage(Path(shutil.copy(converted, tmp_path / "c.hlwq")), at + length // 2)
        expected = [(kind, owner)] + [("tensor", name) for name, of in aliases.items() if of == owner]
        damaged, good = found(path)
        assert damaged == expected, (kind, owner, section)
        assert good == n_tensors - sum(k == "tensor" for k, _ in expected)


def test_several_damages_are_all_named(converted: Path, tmp_path: Path, run_tool: Run) -> None:
    sections = [
        (key, at) for key, (at, length) in places(converted).items() if key[0] == "tensor" and key[2] == "codes"
    ]
    (_, a), (_, b) = sections[1], sections[3]
    path = damage(Path(shutil.copy(converted, tmp_path / "c.hlwq")), a, b)
    names = [sections[1][0][1], sections[3][0][1]]
    done = run_tool("inspect", path, "--verify")
    assert done.returncode == 65
    assert [line.split('"')[1] for line in done.stdout.splitlines() if line.startswith("! ")] == names
    assert done.stderr.count("\n") == 1
    assert "error[HLWQ-108]" in done.stderr and "2 parts are damaged" in done.stderr
    assert all(name in done.stderr for name in names)
    done = run_tool("inspect", path, "--verify", "--json")
    document = json.loads(done.stdout)["verification"]
    assert [d["name"] for d in document["damaged"]] == names
    assert document["damaged"][0]["kind"] == "tensor" and document["damaged"][0]["problem"].startswith("codes@0x")


def test_a_damaged_report_still_shows_the_table(converted: Path, tmp_path: Path, run_tool: Run) -> None:
    at, length = places(converted)["asset", "report.json", "asset"]
    path = damage(Path(shutil.copy(converted, tmp_path / "c.hlwq")), at + length // 2)
    done = run_tool("inspect", path, "--verify")
    assert done.returncode == 65
    assert "the report cannot be read" in done.stderr
    assert "model.norm.weight" in done.stdout


def test_a_damage_is_printed_on_one_line() -> None:
    assert str(Damage("tensor", "a\nb", "codes: bad")) == 'tensor "a\\nb": codes: bad'
    assert str(Damage("signs", "", "bad")) == "signs: bad"


# --- against the source ---------------------------------------------------------------------------


def against(path: Path, model: Path) -> list[str]:
    with Reader(path) as reader:
        return compare(reader, open_source(model, passthrough=True), lambda done, total: None)


def test_a_file_against_its_source(converted: Path, model: Path, run_tool: Run) -> None:
    assert against(converted, model) == []
    done = run_tool("inspect", converted, "--against", model)
    assert done.returncode == 0
    assert "come from" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("bits", [2, 8])
def test_errors_are_recomputed_to_the_last_bit(model: Path, tmp_path: Path, bits: int) -> None:
    h.convert(model, tmp_path / "o.hlwq", bits=bits, effort="fast")
    assert against(tmp_path / "o.hlwq", model) == []


def test_one_changed_weight_of_the_source_is_found(converted: Path, model: Path, tmp_path: Path, run_tool: Run) -> None:
    copy = shutil.copytree(model, tmp_path / "m")
    source = open_source(copy)
    tensor = next(t for t in source.tensors if t.name.endswith("q_proj.weight"))
    damage(copy / tensor.file, tensor.offset + 101)
    problems = against(converted, copy)
    assert any(tensor.name in p and "SHA-256 of the source" in p for p in problems)
    assert any(tensor.name in p and "measured" in p for p in problems)
    assert all(tensor.name in p for p in problems)
    done = run_tool("inspect", converted, "--against", copy)
    assert done.returncode == 65
    assert "error[HLWQ-305]" in done.stderr and done.stderr.count("\n") == 1


def test_a_report_that_lies_is_found(converted: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hlwq_convert import against as module

    honest = module.inspect_reader

    def flattering(reader: Reader) -> h.Inspection:
        inspection = honest(reader)
        for i, tensor in enumerate(inspection.tensors):
            if tensor.cosine is not None:
                inspection.tensors[i] = type(tensor)(
                    **{f: getattr(tensor, f) for f in tensor.__struct_fields__}
                    | {"cosine": np.nextafter(tensor.cosine, 2)}
                )
                break
        return inspection

    monkeypatch.setattr(module, "inspect_reader", flattering)
    (problem,) = against(converted, model)
    assert "measured" in problem and "reported" in problem


def test_other_names_shapes_and_files_are_found(converted: Path, model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "m")
    (copy / "config.json").write_text('{"changed": 1}')
    (copy / "merges.txt").write_text("new")
    assert against(converted, copy) == [
        'file "config.json": differs',
        'file "merges.txt": does not travel with the file',
    ]
    other = write_model(tmp_path / "other", {"x": ("F32", (64, 64), bytes(64 * 64 * 4))})
    problems = against(converted, other)
    assert 'tensor "x": not in the file' in problems
    assert any("not in the model" in p for p in problems)


# --- the digests of the Hugging Face cache --------------------------------------------------------


def in_cache(model: Path, root: Path, *, lie: bool = False) -> Path:
    """A copy of a model as the cache keeps it: links to blobs named by their SHA-256."""
    repo = root / "models--org--name"
    snapshot = repo / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for file in model.iterdir():
        content = file.read_bytes()
        name = hashlib.sha256(content + b"x" * (lie and file.suffix == ".safetensors")).hexdigest()
        (repo / "blobs" / name).write_bytes(content)
        (snapshot / file.name).symlink_to(Path("../../blobs") / name)
    return snapshot


def test_verify_source(model: Path, tmp_path: Path, run_tool: Run) -> None:
    out = tmp_path / "o.hlwq"
    good = in_cache(model, tmp_path / "good")
    assert run_tool("convert", good, out, "--verify-source").returncode == 0
    out.unlink()
    store = tmp_path / "good" / "blobs" / "ab" / ("ab" * 32)  # which huggingface_hub 2 names by another hash
    store.parent.mkdir(parents=True)
    blob = Path(os.path.realpath(good / "model-00001-of-00003.safetensors"))
    blob.rename(store)
    blob.symlink_to(store)
    assert run_tool("convert", good, out, "--verify-source").returncode == 0
    out.unlink()
    done = run_tool("convert", in_cache(model, tmp_path / "bad", lie=True), out, "--verify-source")
    assert done.returncode == 65
    assert "the cache says" in done.stderr and "fetch it again" in done.stderr
    done = run_tool("convert", model, out, "--verify-source")
    assert done.returncode == 2
    assert "no digest" in done.stderr
    assert not out.exists()


def test_tensors_of_zeros_are_mentioned(tmp_path: Path) -> None:
    values = np.zeros((64, 128), np.float32)
    values[0, :8] = 1
    source = write_model(tmp_path / "m", {"a": ("F32", (64, 128), values.tobytes())})
    (warning,) = h.convert(source, tmp_path / "o.hlwq").warnings
    assert warning == 'tensor "a": 8184 of 8192 weights are zero: was model.safetensors fetched whole?'
    values[0, :9] = 1
    source = write_model(tmp_path / "n", {"a": ("F32", (64, 128), values.tobytes())})
    assert h.convert(source, tmp_path / "p.hlwq").warnings == []
