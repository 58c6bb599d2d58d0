"""Two files side by side."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from conftest import Run
from models import normal, small_tensors, write_model

from hlwq_convert import convert
from hlwq_convert.comparison import Comparison, compare_files
from hlwq_convert.comparison_table import choose_pairs
from hlwq_convert.inspection import inspect, inspect_reader
from hlwq_formats import metadata as md
from hlwq_formats.reader import Reader
from hlwq_formats.writer import Writer


def compare(a: Path, b: Path) -> Comparison:
    with Reader(a) as first, Reader(b) as second:
        return compare_files(first, second, inspect_reader(first), inspect_reader(second))


def statuses(comparison: Comparison) -> dict[str, str]:
    return {pair.name: pair.status for pair in comparison.tensors}


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other bits for one module."""
    out = tmp_path_factory.mktemp("other") / "other.hlwq"
    convert(model, out, sets=["up_proj=4"])
    return out


def test_a_file_equals_itself(converted: Path) -> None:
    comparison = compare(converted, converted)
    assert comparison.same_content
    assert set(statuses(comparison).values()) == {"equal"}
    assert {asset.status for asset in comparison.assets} == {"equal"}
    assert [pair.same_source for pair in comparison.tensors] == [True] * 20


def test_what_has_other_bits_differs_and_has_the_same_source(converted: Path, other: Path) -> None:
    comparison = compare(converted, other)
    assert not comparison.same_content
    different = [pair for pair in comparison.tensors if pair.status == "different"]
    assert [pair.name for pair in different] == [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    assert all(pair.same_source for pair in comparison.tensors)
    assert [(pair.a.bits, pair.b.bits) for pair in different if pair.a and pair.b] == [(5, 4)] * 2
    assert {asset.name: asset.status for asset in comparison.assets} == {
        "config.json": "equal", "tokenizer.json": "equal", "report.json": "different",
    }  # fmt: skip


def test_another_source_shows_in_every_tensor_that_it_changed(converted: Path, tmp_path: Path) -> None:
    tensors = small_tensors()
    tensors["model.norm.weight"] = small_tensors(1)["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = small_tensors(1)["model.layers.1.mlp.up_proj.weight"]
    convert(write_model(tmp_path / "m", tensors), tmp_path / "b.hlwq")
    comparison = compare(converted, tmp_path / "b.hlwq")
    changed = [pair.name for pair in comparison.tensors if pair.same_source is False]
    assert changed == ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    assert [name for name, status in statuses(comparison).items() if status == "different"] == changed


def test_effort_alone_makes_other_values_of_the_same_source(model: Path, converted: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "fast.hlwq", effort="fast")
    comparison = compare(converted, tmp_path / "fast.hlwq")
    different = [pair for pair in comparison.tensors if pair.status == "different"]
    assert len(different) == 15
    assert all(pair.same_source for pair in different)


def test_tensors_and_files_of_one_side(tmp_path: Path) -> None:
    one, two, same = normal((64, 128), 1), normal((64, 128), 2), normal((64, 128), 3)
    convert(write_model(tmp_path / "a", {"one": one, "same": same}, assets={"LICENSE": b"x"}), tmp_path / "a.hlwq")
    convert(write_model(tmp_path / "b", {"same": same, "two": two}), tmp_path / "b.hlwq")
    comparison = compare(tmp_path / "a.hlwq", tmp_path / "b.hlwq")
    assert statuses(comparison) == {"one": "only_a", "same": "equal", "two": "only_b"}
    assert [(pair.a is None, pair.b is None, pair.same_source) for pair in comparison.tensors] == [
        (False, True, None), (False, False, True), (True, False, None),
    ]  # fmt: skip
    assert {asset.name: asset.status for asset in comparison.assets}["LICENSE"] == "only_a"


def test_an_alias_is_not_what_it_equals(tmp_path: Path) -> None:
    same, new = normal((64, 128), 3), normal((64, 128), 4)
    convert(write_model(tmp_path / "a", {"one": same, "two": same}), tmp_path / "a.hlwq")
    convert(write_model(tmp_path / "b", {"one": new, "two": same}), tmp_path / "b.hlwq")
    comparison = compare(tmp_path / "a.hlwq", tmp_path / "b.hlwq")
    assert statuses(comparison) == {"one": "different", "two": "different"}
    assert [pair.same_source for pair in comparison.tensors] == [False, True]
    # tied to each other in both, by another name: nothing that decides a value differs
    convert(write_model(tmp_path / "c", {"one": same, "two": same, "zero": new}), tmp_path / "c.hlwq")
    assert statuses(compare(tmp_path / "a.hlwq", tmp_path / "c.hlwq"))["two"] == "equal"


def rewrite(source: Path, target: Path, **changes: object) -> Path:
    """A copy of a file with other metadata; a section that the change leaves out is left out."""
    with Reader(source) as reader, Writer(target) as writer:
        metadata = msgspec.structs.replace(reader.metadata, **changes)
        for owner, name, section in md.all_sections(metadata):
            stored = b"".join(reader.iter_section(owner, name, section.kind))
            writer.open_section(section.kind, len(stored)).write(stored)
        writer.finish(metadata)
    return target


def test_other_signs_change_what_is_quantized_alone(converted: Path, tmp_path: Path) -> None:
    comparison = compare(converted, rewrite(converted, tmp_path / "b.hlwq", signs=None))
    expected = {t.name: "equal" if t.encoding == "raw" else "different" for t in inspect(converted).tensors}
    assert statuses(comparison) == expected
    assert set(expected.values()) == {"equal", "different"}


def test_reason_and_source_do_not_decide_what_is_decoded(converted: Path, tmp_path: Path) -> None:
    with Reader(converted) as reader:
        tensors = [msgspec.structs.replace(t, reason="other") for t in reader.metadata.tensors]
    tensors[0] = msgspec.structs.replace(tensors[0], source_sha256="0" * 64)
    comparison = compare(converted, rewrite(converted, tmp_path / "b.hlwq", tensors=tensors))
    assert set(statuses(comparison).values()) == {"equal"}
    assert [pair.same_source for pair in comparison.tensors] == [False] + [True] * 19


def test_pairs_are_ordered_by_the_size_of_their_change(converted: Path, model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "b.hlwq", sets=["up_proj=4", "down_proj=2", r"layers\.1\.self_attn.o_proj=6"])
    pairs = compare(converted, tmp_path / "b.hlwq").tensors
    by_bits = [pair.name.split(".", 3)[3] for pair in choose_pairs(pairs, "bits")]
    assert by_bits[:2] == ["mlp.down_proj.weight"] * 2
    assert sorted(by_bits[2:]) == ["mlp.up_proj.weight"] * 2 + ["self_attn.o_proj.weight"]
    assert [pair.name for pair in choose_pairs(pairs, "name", "layers.1")] == [
        f"model.layers.1.{name}.weight" for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.o_proj")
    ]


def test_the_command_compares(converted: Path, other: Path, run_tool: Run) -> None:
    result = run_tool("inspect", converted, other)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "tensors: 18 equal, 2 different" in lines
    assert "2 x scalar 5 -> scalar 4" in lines
    assert f"bits a weight {inspect(converted).bpw:.3f} {inspect(other).bpw:.3f}" in lines
    assert sum("up_proj" in line and "5 -> 4" in line for line in lines) == 2
    assert not any("q_proj" in line for line in lines)
    assert "the tensors of both files are the same" in run_tool("inspect", converted, converted).stdout


def test_the_json_of_a_comparison(converted: Path, other: Path, run_tool: Run) -> None:
    document = json.loads(run_tool("inspect", converted, other, "--json").stdout)
    assert list(document) == ["same_content", "a", "b", "tensors", "assets"]
    assert list(document["tensors"][0]) == ["name", "status", "same_source", "a", "b"]
    assert len(document["tensors"]) == 20
    assert document["a"]["content_id"] != document["b"]["content_id"]
    document = json.loads(run_tool("inspect", converted, other, "--json", "--filter", "layers.0").stdout)
    assert [pair["name"] for pair in document["tensors"]] == ["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize("option", ["--verify", "--chart", "--csv", "--fail-under=0", "--html=x", "--against=m"])
def test_options_for_one_file_are_refused_for_two(converted: Path, run_tool: Run, option: str) -> None:
    result = run_tool("inspect", converted, converted, option)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "two files are compared" in result.stderr


def test_names_are_shown_escaped(tmp_path: Path, run_tool: Run) -> None:
    name = "w\u202e[bold]\x9b31m"
    for letter, seed in (("a", 1), ("b", 2)):
        model = write_model(tmp_path / letter, {name: normal((64, 128), seed)})
        convert(model, tmp_path / f"{letter}[red].hlwq")
    result = run_tool("inspect", tmp_path / "a[red].hlwq", tmp_path / "b[red].hlwq")
    assert result.stdout.isascii()
    assert r"w\u202e[bold]\x9b31m" in result.stdout
    assert "a[red].hlwq" in result.stdout
    assert "1 tensors were made from other source weights" in result.stdout
