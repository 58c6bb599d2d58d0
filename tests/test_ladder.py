"""Several files of a model in one pass: each as if it were made alone, the source read once, published together."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from models import normal, small_model, tensor, write_model

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from crash_harness import MODES, Died, Fault, injected, memory_folder

import hlwq_convert as h
from hlwq_convert import assembly, conversion, journal, publishing, store
from hlwq_convert.job import prepare_all
from hlwq_convert.ladder import Rung, make_rungs, path_of
from hlwq_formats.errors import CannotCreate, IoFailure, NonFinite, Usage
from hlwq_formats.files import InputFile

RATES = (5.5, 6.75, 7.5)  # no file of these misses its size at first
BITS = (2, 5, 8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices in two shards, one of them twice."""
    tensors = {
        "a.weight": normal((96, 200), 1), "b.weight": normal((64, 128), 2, "F32"), "m.norm.weight": normal((80,), 3),
        "twin.weight": normal((96, 200), 1), "z.weight": normal((90, 70), 4, "F16"),
    }  # fmt: skip
    return write_model(tmp_path_factory.mktemp("source") / "m", tensors, 2, assets={"README.md": b"read me\n" * 99})


@pytest.fixture
def out() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        yield Path(folder) / "o.hlwq"


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files at BITS and at RATES, each made by a run of its own."""
    folder = tmp_path_factory.mktemp("alone")
    for bits in BITS:
        h.convert(source, folder / f"o-{bits}bit.hlwq", bits)
    for bpw in RATES:
        h.convert(source, folder / f"o-{bpw:g}bpw.hlwq", bpw=bpw)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def some(alone: dict[str, bytes], kind: str) -> dict[str, bytes]:
    return {name: content for name, content in alone.items() if kind in name}


@pytest.fixture
def reads(source: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int, int]]:
    """How often each (file, offset, length) of the source was read from disk."""
    counted: Counter[tuple[str, int, int]] = Counter()
    honest, honest_into = InputFile._pread, InputFile.read_into

    def count(file: InputFile, offset: int, length: int) -> None:
        if Path(file.path).parent == source:
            counted[Path(file.path).name, offset, length] += 1

    def pread(self: InputFile, length: int, offset: int) -> bytes:
        count(self, offset, length)
        return honest(self, length, offset)

    def read_into(self: InputFile, offset: int, buffer: memoryview) -> None:
        count(self, offset, len(buffer))
        honest_into(self, offset, buffer)

    monkeypatch.setattr(InputFile, "_pread", pread)
    monkeypatch.setattr(InputFile, "read_into", read_into)
    return counted


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(tensor, files that take it) for each tensor that is stored, in order."""
    found: list[tuple[str, int]] = []
    honest = assembly.write_tensors

    def write_tensors(*arguments: Any) -> Iterator[store.Taken]:
        for of in honest(*arguments):
            found.append((of.tensor.name, len(of.outputs)))
            yield of

    monkeypatch.setattr(assembly, "write_tensors", write_tensors)
    return found


# --- the same files, from one reading ---------------------------------------------------------------


def test_each_file_is_that_of_a_run_of_its_own(source: Path, alone: dict[str, bytes], out: Path) -> None:
    made = h.convert_ladder(source, out, bpw=RATES)
    assert contents(out.parent) == some(alone, "bpw")
    assert [Path(one.file).name for one in made] == ["o-5.5bpw.hlwq", "o-6.75bpw.hlwq", "o-7.5bpw.hlwq"]
    assert [one.metadata.recipe.target for one in made] == ["--bpw 5.5", "--bpw 6.75", "--bpw 7.5"]
    made = h.convert_ladder(source, out, bits=BITS, overwrite=True, workers=3)
    assert contents(out.parent) == alone
    assert [one.metadata.recipe.bits for one in made] == list(BITS)


def test_sizes_and_other_options(tmp_path: Path) -> None:
    model = small_model(tmp_path / "m")
    options: dict[str, Any] = {"sets": ["o_proj=5"], "min_bits": ["q_proj=5"], "effort": "fast"}
    h.convert_ladder(model, tmp_path / "o", size=["130 kB", 150_000], **options)
    for label, size in (("130kB", "130 kB"), ("150000B", 150_000)):
        h.convert(model, tmp_path / "alone.hlwq", size=size, overwrite=True, **options)
        assert (tmp_path / f"o-{label}").read_bytes() == (tmp_path / "alone.hlwq").read_bytes()
        assert not (tmp_path / f"o-{label}.hlwq").exists()


@pytest.mark.parametrize("options", [{"bits": BITS}, {"bpw": RATES}])
def test_the_source_is_read_once(
    source: Path, out: Path, reads: Counter[tuple[str, int, int]], options: dict[str, Any]
) -> None:
    (kind, values), *_ = options.items()
    h.convert(source, out, **{kind: values[0]})
    once = dict(reads)
    reads.clear()
    h.convert_ladder(source, out, **options)
    shards = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert sum(length * times for (_, _, length), times in once.items()) > 2 * shards  # decision 8
    assert reads == once


def test_files_that_are_split(source: Path, alone: dict[str, bytes], out: Path, tmp_path: Path) -> None:
    made = h.convert_ladder(source, out, bits=BITS, split_size=20_000)
    assert [len(one.split.parts) if one.split is not None else 1 for one in made] == [1, 2, 3]
    expected = {"o-2bit.hlwq": alone["o-2bit.hlwq"]}
    for bits in BITS[1:]:
        h.convert(source, tmp_path / f"o-{bits}bit.hlwq", bits, split_size=20_000)
    expected |= {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(expected) == 6
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == expected


def test_sets_are_cut_before_nothing_can_be_undone(source: Path, out: Path) -> None:
    stages: list[str] = []

    def look(stage: str, done: int, total: int) -> None:
        if stages[-1:] != [stage]:
            stages.append(stage)

    h.convert_ladder(source, out, bits=(5, 8), split_size=20_000, progress=look)
    assert stages == ["converting", "checking", "splitting", "publishing"]


def test_a_set_that_was_replaced_goes_also_when_another_fails(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = out.parent / "o-5bit.hlwq"
    old.write_bytes(b"old")
    honest = publishing._publish_set

    def fail(made: Any, *rest: Any) -> Any:
        if made.planning.path == path_of(out, Rung(bits=8)):
            raise IoFailure("cannot write", file="x")
        return honest(made, *rest)

    monkeypatch.setattr(publishing, "_publish_set", fail)
    with pytest.raises(IoFailure):
        h.convert_ladder(source, out, bits=(5, 8), split_size=20_000, overwrite=True)
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "o-5bit-00001-of-00002.hlwq", "o-5bit-00002-of-00002.hlwq",
    ]  # fmt: skip


def test_a_tensor_may_be_raw_in_one_file_alone(tmp_path: Path, out: Path) -> None:
    """Weights near the largest float16: two bits decode to infinity, eight do not."""
    weights = np.random.default_rng(5).choice(np.float32([-60000, 60000]), (64, 128))
    model = write_model(tmp_path / "m", {"a.weight": tensor(weights, "F16"), "b.weight": normal((64, 128), 6)})
    made = h.convert_ladder(model, out, bits=[2, 8])
    assert [one.tensors[0].encoding for one in made] == ["raw", "scalar"]
    assert "infinity" in made[0].tensors[0].reason
    for bits in (2, 8):
        h.convert(model, tmp_path / "alone.hlwq", bits, overwrite=True)
        assert path_bytes(out, f"{bits}bit") == (tmp_path / "alone.hlwq").read_bytes()


def path_bytes(out: Path, label: str) -> bytes:
    return out.with_name(f"{out.stem}-{label}.hlwq").read_bytes()


def test_infinite_weights_in_all_files(tmp_path: Path, out: Path) -> None:
    weights = np.full((64, 128), np.inf, np.float32)
    model = write_model(tmp_path / "m", {"a.weight": tensor(weights), "b.weight": normal((64, 128), 6)})
    with pytest.raises(NonFinite):
        h.convert_ladder(model, out, bits=[2, 8])
    assert list(out.parent.iterdir()) == []
    made = h.convert_ladder(model, out, bits=[2, 8], nonfinite="raw")
    assert [one.tensors[0].encoding for one in made] == ["raw", "raw"]


def test_progress_counts_the_bytes_of_all_files(source: Path, out: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    h.convert_ladder(source, out, bits=BITS, progress=lambda *step: steps.append(step))
    shards = sum(t.length for t in prepare_all(source, [Rung()])[0].source.tensors)
    stored = shards - 96 * 200 * 2  # without the alias
    for stage in ("converting", "checking"):
        done = [(done, total) for name, done, total in steps if name == stage]
        assert done[-1] == (3 * stored, 3 * shards)
    assert steps[-1] == ("publishing", 0, 0)


# --- a file that misses its size --------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Let the steps of one file first be chosen for too large a size."""
    honest = conversion._plan

    def plan(job: Any, out: str, aliases: dict[str, str]) -> conversion.Planning:
        planning = honest(job, out, aliases)
        return replace(planning, wanted=planning.wanted + 1500) if out == path else planning

    monkeypatch.setattr(conversion, "_plan", plan)


def test_a_file_that_misses_its_size_is_made_again_alone(
    source: Path, alone: dict[str, bytes], out: Path, encoded: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = path_of(out, Rung(bpw=6.75))
    spoil(monkeypatch, missed)
    h.convert(source, missed, bpw=6.75)
    again = Path(missed).read_bytes()
    os.unlink(missed)
    names = ["a.weight", "b.weight", "m.norm.weight", "z.weight"]
    assert encoded == [(name, 1) for name in names + names]
    encoded.clear()
    stages: list[str] = []

    def look(stage: str, done: int, total: int) -> None:
        if stage != "publishing":
            assert not list(out.parent.glob("*.hlwq"))  # the others wait for it
        if stages[-1:] != [stage]:
            stages.append(stage)

    made = h.convert_ladder(source, out, bpw=RATES, progress=look)
    assert encoded == [(name, 3) for name in names] + [(name, 1) for name in names]
    assert stages == [*(["choosing steps", "converting", "checking"] * 2), "publishing"]
    assert contents(out.parent) == {**some(alone, "bpw"), "o-6.75bpw.hlwq": again}
    assert all(one.warnings == [] for one in made)


# --- all or none --------------------------------------------------------------------------------------


def test_an_output_that_exists_stops_all(source: Path, out: Path) -> None:
    Path(path_of(out, Rung(8))).write_bytes(b"dear")
    with pytest.raises(CannotCreate, match="exists already"):
        h.convert_ladder(source, out, bits=BITS)
    assert contents(out.parent) == {"o-8bit.hlwq": b"dear"}


def test_an_output_that_appears_stops_all(source: Path, out: Path) -> None:
    def plant(stage: str, done: int, total: int) -> None:
        if stage == "publishing":
            Path(path_of(out, Rung(8))).write_bytes(b"dear")

    with pytest.raises(CannotCreate, match="appeared while"):
        h.convert_ladder(source, out, bits=BITS, progress=plant)
    assert contents(out.parent) == {"o-8bit.hlwq": b"dear"}


def test_a_failed_check_of_one_stops_all(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hlwq_convert import assembly

    honest, calls = assembly.self_check, 0

    def fail(*arguments: Any, **more: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise IoFailure("planted")
        honest(*arguments, **more)

    monkeypatch.setattr(assembly, "self_check", fail)
    with pytest.raises(IoFailure, match="planted"):
        h.convert_ladder(source, out, bits=BITS)
    assert contents(out.parent) == {}


def ladder(source: Path, out: Path, fault: Fault, *, overwrite: bool) -> str:
    """Make two files under a fault, on the way with as many checkpoints as possible."""
    with injected(fault):
        try:
            h.convert_ladder(source, out, bits=(2, 5), workers=1, overwrite=overwrite)
        except Died:
            return "died"
        except h.HlwqError as error:
            return type(error).__name__
    return "done"


@pytest.mark.once
@pytest.mark.parametrize("mode", MODES)
def test_every_operation_may_fail(source: Path, alone: dict[str, bytes], out: Path, mode: str) -> None:
    good = {name: alone[name] for name in ("o-2bit.hlwq", "o-5bit.hlwq")}
    fault = Fault()
    assert ladder(source, out, fault, overwrite=False) == "done"
    assert contents(out.parent) == good
    in_part = []
    for i in range(fault.count):
        for path in out.parent.iterdir():
            path.unlink()
        result = ladder(source, out, Fault(mode, i), overwrite=False)
        left = contents(out.parent)
        published = {name for name in left if name.endswith(".hlwq")}
        assert all(left[name] == good[name] for name in published), (i, result)
        in_part += [result] * (len(published) == 1)
        if result == "done":
            assert published == set(good)  # a journal that cannot be removed may stay
        elif result != "died":
            assert mode == "fails from then on" or set(left) == published, (i, result, set(left))
        assert ladder(source, out, Fault(), overwrite=True) == "done"
        assert contents(out.parent) == good
    # one alone is there only when the second rename failed, or the end came between the two
    assert len(in_part) <= (1 if mode == "fails once" else 4), in_part


# --- going on -----------------------------------------------------------------------------------------


def test_each_file_goes_on_where_it_was(
    source: Path, alone: dict[str, bytes], out: Path, encoded: list[tuple[str, int]], reads: Counter[Any]
) -> None:
    """One journal has two tensors, the others one: the second is encoded for those alone."""

    class AfterTwo(Fault):
        def before(self, operation: str) -> None:
            path = Path(path_of(out, Rung(2)) + ".part.journal")
            if path.exists() and path.read_bytes().count(b"\n") == 3 and operation != "sync":
                raise Died

    with injected(AfterTwo()), pytest.raises(Died):
        h.convert_ladder(source, out, bits=BITS, workers=1)
    lines = {name: content.count(b"\n") for name, content in contents(out.parent).items() if "journal" in name}
    assert sorted(lines.values()) == [2, 2, 3]
    encoded.clear()
    reads.clear()
    made = h.convert_ladder(source, out, bits=BITS)
    assert encoded == [("b.weight", 2), ("m.norm.weight", 3), ("z.weight", 3)]
    assert contents(out.parent) == some(alone, "bit")
    assert all(one.warnings == [] for one in made)
    first = {t.name: t for t in prepare_all(source, [Rung()])[0].source.tensors}["a.weight"]
    assert (
        reads[first.file, first.offset, first.length] == 2
    )  # for the twin and for the journals, whatever their number


def test_an_interrupt_keeps_what_is_secured(
    source: Path, alone: dict[str, bytes], out: Path, encoded: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "CHECKPOINT_BYTES", 1)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "checking":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        h.convert_ladder(source, out, bpw=RATES, progress=stop)
    assert len(contents(out.parent)) == 6  # a part and a journal for each
    encoded.clear()
    h.convert(source, path_of(out, Rung(bpw=5.5)), bpw=5.5)  # a file alone may go on, too
    h.convert_ladder(source, out, bpw=RATES[1:])
    assert encoded == []
    assert contents(out.parent) == some(alone, "bpw")


# --- what is asked for ----------------------------------------------------------------------------------


def test_names_of_files() -> None:
    assert path_of("a/out.hlwq", Rung(bpw=3.5)) == "a/out-3.5bpw.hlwq"
    assert path_of("SmolLM2-1.7B", Rung(4)) == "SmolLM2-1.7B-4bit"
    assert [rung.label for rung in make_rungs(size=["16.2 GB", "3GiB", 700])] == ["16.2GB", "3GiB", "700B"]
    assert make_rungs() == [Rung()]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "a ladder needs"), ({"bits": [4, 5, 4]}, "4bit is asked for twice"),
        ({"bpw": [4, 4.0000001]}, "4bpw is asked for twice"), ({"size": ["1MB", "1000kB"]}, "1000kB is asked"),
        ({"bits": [4, 9]}, "bits are 9"), ({"bpw": [4, 9]}, "bpw is 9"), ({"size": ["1MB", "../1"]}, "size is ../1"),
        ({"bits": [4], "bpw": [4, 5]}, "exclude --bits"), ({"bpw": [4], "size": ["1MB"]}, "exclude each other"),
        ({"bits": [4, 5], "recipe": "mixed"}, "--recipe exclude"), ({"bits": [4], "passthrough": True}, "passthrough"),
        ({"bpw": [6, 8], "sets": ["a.weight=2", "z.weight=2", "b.weight=2"]}, "with these options"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(source: Path, out: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(Usage) as caught:
        h.convert_ladder(source, out, **options)
    assert problem in str(caught.value)
    assert list(out.parent.iterdir()) == []


def test_the_command(source: Path, alone: dict[str, bytes], out: Path, run_tool: Run) -> None:
    planned = json.loads(run_tool("convert", source, out, "--bpw", "5.5,6.75, 7.5", "--dry-run", "--json").stdout)
    assert list(out.parent.iterdir()) == []
    done = run_tool("convert", source, out, "--bpw", "5.5,6.75, 7.5", "--json")
    made = json.loads(done.stdout)
    assert contents(out.parent) == some(alone, "bpw")
    assert [one["file"] for one in planned] == [one["file"] for one in made]
    assert [one["file"] for one in made] == [path_of(out, Rung(bpw=bpw)) for bpw in RATES]
    for guess, real in zip(planned, made, strict=True):
        assert abs(guess["file_bytes"] - real["file_bytes"]) < 40_000  # a dry run knows of no twin
        assert set(real) - set(guess) == {"seconds", "weights_per_second", "compile_seconds"}
    text = run_tool("convert", source, out, "--bits", "2,8", "--dry-run").stdout
    assert [line for line in text.splitlines() if line.endswith(".hlwq")] == [path_of(out, Rung(b)) for b in (2, 8)]
    text = run_tool("convert", source, out, "--bits", "2,8").stdout
    assert [line for line in text.splitlines() if line.endswith(".hlwq")] == [path_of(out, Rung(b)) for b in (2, 8)]
    assert contents(out.parent) == {n: c for n, c in alone.items() if n != "o-5bit.hlwq"}
    refused = run_tool("convert", source, out, "--bits", "2,9")
    assert refused.returncode == 2
    assert "9 is not in the range 2<=x<=8" in refused.stderr
    assert run_tool("convert", source, out, "--bpw", "6,").returncode == 2
