"""Split sets: what is cut, how it is read, and that nothing but a whole set ever looks like one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from models import normal, real_model, small_model, write_model
from power_loss import Recorder, after_power_cuts
from web import serve

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from crash_harness import MODES, Died, Fault, injected, memory_folder, run

import hlwq_convert as h
from hlwq_convert import journal, store
from hlwq_convert.inspection import inspect
from hlwq_formats import file_set
from hlwq_formats import metadata as md
from hlwq_formats.errors import BadSet, CannotCreate, HlwqError, MissingInput, Usage
from hlwq_formats.file_ops import OPS
from hlwq_formats.file_set import open_set, part_name
from hlwq_formats.reader import Reader

LIMIT = 40_000
COUNT = 4


@pytest.fixture(scope="module")
def parts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The parts of the tiny model at 5 bits; tests must not change them."""
    folder = tmp_path_factory.mktemp("split")
    h.convert(model, folder / "m.hlwq", split_size=LIMIT)
    return sorted(folder.iterdir())


@pytest.fixture
def copy(parts: list[Path], tmp_path: Path) -> list[Path]:
    """The same parts, to be changed."""
    (tmp_path / "set").mkdir()
    return [Path(shutil.copy(part, tmp_path / "set")) for part in parts]


def names(count: int = COUNT, stem: str = "m") -> list[str]:
    return [f"{stem}-{i + 1:05}-of-{count:05}.hlwq" for i in range(count)]


# --- what is cut ------------------------------------------------------------------------------------


def test_parts_are_containers_in_the_order_of_the_file(parts: list[Path], converted: Path) -> None:
    assert [part.name for part in parts] == names()
    assert all(part.stat().st_size <= LIMIT for part in parts)
    listed: list[str] = []
    sets = set()
    for index, part in enumerate(parts):
        with Reader(part) as reader:
            reader.verify()
            split = reader.metadata.split
            assert split is not None
            assert (split.index, split.count, split.size) == (index, COUNT, LIMIT)
            assert (reader.header.minor, reader.header.incompat) == (2, 4)
            assert list(reader.assets) == (["config.json", "tokenizer.json", "report.json"] if index == 0 else [])
            listed += reader.tensors
            sets.add(split.set)
    with Reader(converted) as whole:
        assert listed == list(whole.tensors)
        assert (whole.header.minor, whole.header.incompat) == (0, 0)
    assert len(sets) == 1


def test_a_part_is_as_full_as_whole_tensors_allow(parts: list[Path]) -> None:
    """With the first tensor of the next part, each would be too long."""
    for part, after in pairwise(parts):
        with Reader(after) as reader:
            first = next(iter(reader.tensors.values()))
            assert not isinstance(first, md.AliasTensor)
            more = sum(-(-section.length // 64) * 64 for section in first.sections)
        assert part.stat().st_size + more + len(md.encode(first)) + 1 > LIMIT - 128


def test_the_same_command_gives_the_same_parts(parts: list[Path], model: Path, tmp_path: Path) -> None:
    h.convert(model, tmp_path / "m", split_size="40kB", workers=1)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in parts}


def test_what_fits_is_not_split(converted: Path, model: Path, tmp_path: Path) -> None:
    size = converted.stat().st_size
    h.convert(model, tmp_path / "m.hlwq", split_size=size)
    assert [p.name for p in tmp_path.iterdir()] == ["m.hlwq"]
    assert (tmp_path / "m.hlwq").read_bytes() == converted.read_bytes()
    h.convert(model, tmp_path / "n.hlwq", split_size=size - 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.hlwq", *names(2, "n")]


def test_an_alias_is_in_the_part_of_its_target(tmp_path: Path) -> None:
    tensors = {f"{name}.weight": normal((64, 64), seed) for name, seed in (("a", 1), ("b", 2), ("c", 3), ("z", 1))}
    h.convert(write_model(tmp_path / "m", tensors), tmp_path / "o.hlwq", split_size=6000)
    held = []
    for part in sorted(tmp_path.glob("o-*")):
        with Reader(part) as reader:
            held.append(list(reader.tensors))
    assert held == [["a.weight", "z.weight"], ["b.weight"], ["c.weight"]]
    with open_set(tmp_path / "o.hlwq") as reader:
        assert list(reader.tensors) == list(tensors)
        assert reader.stored_tensor("z.weight").name == "a.weight"


def test_a_tensor_that_is_too_long_has_a_part_of_its_own(tmp_path: Path) -> None:
    tensors = {"a.weight": normal((64, 64)), "b.weight": normal((64, 256)), "c.weight": normal((64, 64), 1)}
    found = h.convert(write_model(tmp_path / "m", tensors), tmp_path / "o.hlwq", split_size=6000)
    assert found.split is not None
    length = found.split.parts[1].bytes
    assert found.warnings == [f"--split-size is 6000: part 2 of 3 takes {length} bytes, and cannot be cut"]
    assert [part.bytes > 6000 for part in found.split.parts] == [False, True, False]


def test_assets_that_are_too_long_have_the_first_part(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(7000)
    tensors = {"a.weight": normal((64, 64)), "b.weight": normal((64, 64), 1)}
    source = write_model(tmp_path / "m", tensors, assets={"tokenizer.model": noise})
    found = h.convert(source, tmp_path / "o.hlwq", split_size=6000)
    assert found.split is not None
    assert [part.bytes > 6000 for part in found.split.parts] == [True, False, False]
    with open_set(tmp_path / "o.hlwq") as reader:
        assert reader.read_asset("tokenizer.model") == noise


def test_the_size_of_all_parts_is_the_one_asked_for(model: Path, tmp_path: Path) -> None:
    found = h.convert(model, tmp_path / "m.hlwq", size=120_000, split_size=LIMIT)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) > 2
    assert sum(sizes) == found.file_bytes == sum(found.summary.bytes_by_encoding.values())
    assert 120_000 - 512 <= sum(sizes) <= 120_000
    assert all(size <= LIMIT for size in sizes)
    assert found.bpw == 8 * sum(sizes) / found.weights


def test_the_plan_says_what_will_be(model: Path, parts: list[Path], tmp_path: Path, run_tool: Run) -> None:
    done = run_tool("convert", model, tmp_path / "m.hlwq", "--split-size", "40kB", "--dry-run", "--json")
    planned = json.loads(done.stdout)
    assert [part["name"] for part in planned["split"]["parts"]] == names()
    for part, path in zip(planned["split"]["parts"], parts, strict=True):  # all but digits of exponents and the report
        assert abs(part["bytes"] - path.stat().st_size) < (300 if path == parts[0] else 20)
    assert planned["file_bytes"] == sum(part["bytes"] for part in planned["split"]["parts"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["0", "20 apples", "-1", "GB"])
def test_sizes_that_are_none(model: Path, tmp_path: Path, size: str) -> None:
    with pytest.raises(Usage, match="--split-size is"):
        h.convert(model, tmp_path / "m.hlwq", split_size=size)


def test_too_many_parts(tmp_path: Path) -> None:
    tensors = {f"{i:03}.bias": normal((16,), i) for i in range(300)}
    source = write_model(tmp_path / "m", tensors)
    with pytest.raises(Usage, match=r"--split-size 1 makes 300 parts, a set has at most 256; take \d+ bytes") as caught:
        h.convert(source, tmp_path / "o.hlwq", split_size=1)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    enough = str(caught.value).split("take ")[1].split(" ")[0]
    assert h.convert(source, tmp_path / "o.hlwq", split_size=enough).split is not None


def test_the_disk_never_holds_all_of_it_twice(model: Path, parts: list[Path], tmp_path: Path) -> None:
    """At most the parts, the longest once more, and what is reserved for lengths that are not known before."""
    most = 0

    class Watch(Fault):
        def before(self, operation: str) -> None:
            nonlocal most
            most = max(most, sum(path.stat().st_size for path in tmp_path.iterdir()))

    assert run(model, tmp_path / "m.hlwq", Watch(), overwrite=False, split_size=LIMIT) == "done"
    whole = sum(part.stat().st_size for part in parts)
    unknown = (1 << 16) + 1024 * 20 + 7000  # of _upper_bound: fixed, for each tensor, and assets uncompressed
    assert whole + max(part.stat().st_size for part in parts) <= most <= whole + LIMIT + unknown


# --- how it is read ---------------------------------------------------------------------------------


def test_any_part_the_folder_and_the_name_stand_for_all(parts: list[Path], converted: Path) -> None:
    with h.open(converted) as whole:
        expected = {name: whole.get_tensor(name) for name in whole.keys()}  # noqa: SIM118
        for path in (*parts, parts[0].parent, parts[0].with_name("m.hlwq")):
            with h.open(path) as file:
                assert file.keys() == list(expected)
                for name, values in expected.items():
                    assert np.array_equal(file.get_tensor(name), values)
                assert file.reader.content_id == whole.reader.content_id
                assert {name: file.reader.read_asset(name) for name in file.reader.assets} == {
                    name: whole.reader.read_asset(name) for name in whole.reader.assets
                }
                file.reader.verify()


def test_torch_gets_the_same(parts: list[Path], converted: Path) -> None:
    torch = pytest.importorskip("torch")
    expected = h.load_state_dict(converted)
    for path in (parts[2], str(parts[0].parent)):
        found = h.load_state_dict(path)
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [name for name, _ in h.iter_tensors(parts[1])] == list(expected)


def test_an_inspection_sums_up(parts: list[Path], converted: Path) -> None:
    found, whole = inspect(parts[3]), inspect(converted)
    assert (found.tensors, found.assets, found.content_id) == (whole.tensors, whole.assets, whole.content_id)
    assert found.split is not None
    assert {part.name: part.bytes for part in found.split.parts} == {p.name: p.stat().st_size for p in parts}
    assert found.file_bytes == sum(p.stat().st_size for p in parts) == sum(found.summary.bytes_by_encoding.values())
    assert found.summary.bytes_by_encoding["header"] == COUNT * 128
    assert found.summary.bytes_by_encoding["shared"] == COUNT * 16
    with Reader(parts[0]) as reader:
        assert reader.metadata.split is not None
        assert found.file_id == reader.metadata.split.set
    assert whole.split is None


def test_hlwq_inspect(parts: list[Path], converted: Path, model: Path, tmp_path: Path, run_tool: Run) -> None:
    shown = run_tool("inspect", parts[1], "--verify")
    assert shown.returncode == 0, shown.stderr
    assert f"4 parts of at most 40.0 kB: {parts[0].name} to {parts[3].name}" in shown.stdout
    assert f"verified: all {sum(p.stat().st_size for p in parts):,} bytes are as they were written" in shown.stdout
    assert "come from" in run_tool("inspect", parts[0].parent, "--against", model).stdout
    assert "the tensors of both files are the same" in run_tool("inspect", parts[0], converted).stdout
    csv = run_tool("inspect", parts[2], "--csv").stdout
    assert csv == run_tool("inspect", converted, "--csv").stdout
    assert csv.count("\n") == 21
    page = run_tool("inspect", parts[2], "--html", tmp_path / "page.html", "--against", model)
    assert page.returncode == 0, page.stderr
    assert parts[3].name in (tmp_path / "page.html").read_text()


def test_damage_is_found_in_its_part(copy: list[Path], run_tool: Run) -> None:
    with Reader(copy[2]) as reader:
        name = next(iter(reader.tensors))
    for at in (130, 200):  # the signs, which only this part has twice, and the first tensor
        data = bytearray(copy[2].read_bytes())
        data[at] ^= 1
        copy[2].write_bytes(data)
    done = run_tool("inspect", copy[0], "--verify", "--json")
    assert done.returncode == 65
    damaged = json.loads(done.stdout)["verification"]["damaged"]
    assert [(one["kind"], one["name"]) for one in damaged] == [("signs", ""), ("tensor", name)]
    assert all(one["problem"].startswith(f"{copy[2].name}: ") for one in damaged)
    with pytest.raises(HlwqError, match=copy[2].name), h.open(copy[0]) as file:
        file.reader.verify()


def test_a_set_on_a_server_is_read_by_ranges(parts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve() as web:
        web.files = {f"/x/{part.name}": part.read_bytes() for part in parts}
        local, found = inspect(parts[0]), inspect(f"{web.url}/x/{parts[2].name}?sig=1")
        assert (found.tensors, found.split, found.file_id) == (local.tensors, local.split, local.file_id)
        del web.files[f"/x/{parts[1].name}"]
        with pytest.raises(MissingInput, match=rf"/x/{parts[1].name}: part 2 of 4 is missing: not there \(HTTP 404\)"):
            inspect(f"{web.url}/x/{parts[2].name}")


# --- what is no set ---------------------------------------------------------------------------------


def test_a_missing_part_is_named(copy: list[Path], run_tool: Run) -> None:
    copy[2].unlink()
    for path in (copy[0], copy[3], copy[0].parent):
        with pytest.raises(MissingInput, match=rf"{copy[2].name}: part 3 of 4 is missing: cannot open"):
            h.open(path)
    copy[0].unlink()
    done = run_tool("inspect", copy[3])
    assert done.returncode == 66
    assert f"{copy[0].name}: parts 1, 3 of 4 are missing" in done.stderr
    assert done.stderr.count("\n") == 1
    with pytest.raises(MissingInput, match="No such file"):
        h.open(copy[0])


def test_parts_that_are_no_set(copy: list[Path], model: Path, tmp_path: Path, run_tool: Run) -> None:
    first, second, third, _ = copy
    good = second.read_bytes()

    def refused(message: str, path: Path = first) -> None:
        with pytest.raises(BadSet, match=message):
            h.open(path)
        done = run_tool("inspect", path)
        assert (done.returncode, done.stderr.count("\n")) == (65, 1)

    h.convert(model, tmp_path / "m.hlwq", effort="fast", split_size=LIMIT)
    shutil.copy(tmp_path / second.name, second)
    refused(rf"{second.name}: part of set \w+\.\.\., {first.name} is of \w+\.\.\.; parts of two conversions are mixed")
    shutil.copy(third, second)
    refused(f"{second.name}: it is part 3 of 4, and its name says 2 of 4")
    refused(f"{second.name}: it is part 3 of 4 of a set, which its name does not say", second)
    second.write_bytes(good)
    renamed = third.rename(third.with_name("other.hlwq"))
    refused("other.hlwq: it is part 3 of 4 .* the name that ends in -00003-of-00004.hlwq", renamed)
    with pytest.raises(MissingInput, match="part 3 of 4 is missing"):
        h.open(first)
    h.convert(model, third)
    refused(f"{third.name}: a whole file, expected part 3 of a set of 4")


def test_limits_are_those_of_one_file(parts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with Reader(parts[0]) as reader:
        size, count = reader.header.meta_len, len(reader.tensors)
    monkeypatch.setattr(file_set, "MAX_METADATA", size)
    with pytest.raises(BadSet, match=f"{parts[1].name}: the metadata of all parts have over {size} bytes"):
        h.open(parts[1])
    monkeypatch.undo()
    monkeypatch.setattr(md, "MAX_TENSORS", 2 * count)
    with pytest.raises(BadSet, match=f"20 tensors, at most {2 * count} are allowed"):
        h.open(parts[1])


def test_what_is_refused_is_closed(copy: list[Path]) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    h.open(copy[1]).close()
    shutil.copy(copy[2], copy[3])
    with pytest.raises(BadSet):
        h.open(copy[0])
    copy[2].unlink()
    with pytest.raises(MissingInput):
        h.open(copy[0])
    with pytest.raises(BadSet):
        h.open(copy[3])
    assert opened() == before


def test_a_folder_must_hold_one_thing(copy: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="a folder without a"):
        h.open(tmp_path)
    shutil.copy(copy[0], copy[0].with_name("n-00001-of-00007.hlwq"))
    with pytest.raises(Usage, match=f"several files or sets are there: {copy[0].name}, n-00001-of-00007.hlwq"):
        h.open(copy[0].parent)
    h.open(copy[0].with_name("m.hlwq")).close()


# --- places that are taken --------------------------------------------------------------------------


def test_a_set_is_replaced_when_that_is_asked_for(model: Path, copy: list[Path], tmp_path: Path) -> None:
    out = copy[0].with_name("m.hlwq")
    other = small_model(tmp_path / "other", seed=1)
    for size in (LIMIT, 3 * LIMIT):
        with pytest.raises(CannotCreate, match="exists already"):
            h.convert(other, out, split_size=size)
    assert sorted(copy[0].parent.iterdir()) == copy
    for size, left in ((LIMIT, names()), (2 * LIMIT, names(2)), (9 * LIMIT, ["m.hlwq"]), (LIMIT, names())):
        found = h.convert(other, out, split_size=size, overwrite=True)
        assert sorted(p.name for p in copy[0].parent.iterdir()) == left
        assert inspect(out).file_id == found.file_id


@pytest.mark.parametrize("name", ["m.hlwq", "m-00001-of-00009.hlwq", names()[1]])
def test_what_appears_meanwhile_is_left_alone(model: Path, tmp_path: Path, name: str) -> None:
    dear = tmp_path / name

    class Appears(Fault):
        def before(self, operation: str) -> None:
            if operation == "reserve":
                dear.write_bytes(b"dear")

    assert run(model, tmp_path / "m.hlwq", Appears(), overwrite=False, split_size=LIMIT) == "CannotCreate"
    assert list(tmp_path.iterdir()) == [dear]
    assert dear.read_bytes() == b"dear"


def test_other_names_are_left_alone(model: Path, copy: list[Path]) -> None:
    near = ["mm-00001-of-00002.hlwq", "m-1-of-2.hlwq", "m-00001-of-00002.hlwq.bak", "m-00001-of-00004.hlwq.part"]
    for name in near:
        copy[0].with_name(name).write_bytes(b"dear")
    h.convert(model, copy[0].with_name("m.hlwq"), split_size=2 * LIMIT, overwrite=True)
    assert sorted(p.name for p in copy[0].parent.iterdir()) == sorted([*names(2), *near[:3]])  # a .part is ours


# --- whatever fails or kills it -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_matrices(tmp_path_factory.mktemp("source"), "abc")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_matrices(tmp_path_factory.mktemp("other"), "xyz")


def three_matrices(folder: Path, letters: str) -> Path:
    tensors = {f"{letter}.weight": normal((64, 80), i, "F32") for i, letter in enumerate(letters)}
    return write_model(folder / "m", tensors)


@pytest.fixture
def out() -> Iterator[Path]:
    """In memory where that can be."""
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        yield Path(folder) / "o.hlwq"


SMALL = 5500
SMALL_NAMES = names(3, "o")


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.parent.iterdir()}


def clear(out: Path) -> None:
    for path in out.parent.iterdir():
        path.unlink()


def read_ids(out: Path) -> set[str]:
    """The identifiers of all sets that any part here opens."""
    found = set()
    for path in out.parent.glob("*.hlwq"):
        try:
            with open_set(path) as reader:
                reader.verify()
                found.add(reader.file_id)
        except (BadSet, MissingInput):
            pass
    return found


@pytest.mark.once
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_every_operation_may_fail(source: Path, other: Path, out: Path, mode: str, overwrite: bool) -> None:
    """What is read afterwards is the old set or the new one, never a mixture, and the command then succeeds."""
    fault = Fault()
    assert run(other, out, fault, overwrite=False, split_size=SMALL) == "done"
    old, old_id = contents(out), inspect(out).file_id
    clear(out)
    fault = Fault()
    assert run(source, out, fault, overwrite=False, split_size=SMALL) == "done"
    new, new_id = contents(out), inspect(out).file_id
    assert sorted(new) == sorted(old) == SMALL_NAMES
    clear(out)
    results = set()
    for i in range(0, fault.count, 1 if mode == "dies" else 3):
        for name, data in old.items() if overwrite else ():
            (out.parent / name).write_bytes(data)
        result = run(source, out, Fault(mode, i), overwrite=overwrite, split_size=SMALL)
        results.add(result)
        ids = read_ids(out)
        assert ids <= ({old_id, new_id} if overwrite else {new_id}), (i, result)
        if result == "done":
            assert contents(out) == new
        elif result == "IoFailure" and mode == "fails once":
            left = contents(out).keys()
            assert left in ({*old}, {*new}, set()) if overwrite else left in (set(), {*new}), (i, left)
        assert run(source, out, Fault(), overwrite=True, split_size=SMALL) == "done"
        assert contents(out) == new, (i, result)
        clear(out)
    assert ("died" in results) == (mode == "dies")
    assert mode == "dies" or "IoFailure" in results


def test_a_death_between_two_names_is_seen(source: Path, other: Path, out: Path) -> None:
    """Some parts of the new set and some of the old one: refused by the identifier of the set, whichever is opened."""
    assert run(other, out, Fault(), overwrite=False, split_size=SMALL) == "done"

    class AtSecondName(Fault):
        def before(self, operation: str) -> None:
            self.count += operation == "replace"
            if self.count == 2:
                raise Died

    assert run(source, out, AtSecondName(), overwrite=True, split_size=SMALL) == "died"
    for name in SMALL_NAMES:
        with pytest.raises(BadSet, match="parts of two conversions are mixed"):
            open_set(out.parent / name)
    assert run(source, out, Fault(), overwrite=True, split_size=SMALL) == "done"
    assert sorted(contents(out)) == SMALL_NAMES


def test_a_death_while_cutting_resumes(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not cut off yet is not made again."""

    class AfterSecondCut(Fault):
        def before(self, operation: str) -> None:
            self.count += operation == "truncate"
            if self.count == 5:  # the file to its length; two parts to theirs, and both times the file after them
                raise Died

    assert run(source, out, AfterSecondCut(), overwrite=False, split_size=SMALL) == "died"
    left = contents(out)
    assert {"o.hlwq.part", "o.hlwq.part.journal"} < left.keys()
    read: list[str] = []
    honest = store._read_piece

    def read_piece(model: object, of: store.Surveyed, *place: int) -> store.Piece:
        read.append(of.tensor.name)
        return honest(model, of, *place)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "_read_piece", read_piece)
    with injected(Fault()):
        found = h.convert(source, out, workers=1, split_size=SMALL)
    assert read == ["c.weight"]
    assert found.split is not None
    assert sorted(contents(out)) == SMALL_NAMES


@pytest.mark.once
def test_a_power_cut(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names may survive of what is not there, and contents without names: nothing opens but the whole new set."""
    monkeypatch.setattr(journal, "CHECKPOINT_SECONDS", 0)
    with monkeypatch.context() as patch:
        recorder = Recorder(out.parent, patch)
        new_id = h.convert(source, out, workers=1, split_size=SMALL).file_id
    new = contents(out)
    whole = 0
    for i, state in enumerate(after_power_cuts(recorder.events, {})):
        clear(out)
        for name, data in state.items():
            (out.parent / name).write_bytes(data)
        found = read_ids(out)
        assert found <= {new_id}
        whole += bool(found)
        if i % 9 == 0:
            assert h.convert(source, out, workers=1, split_size=SMALL, overwrite=True).file_id == new_id
            assert contents(out) == new
    assert whole > 4


def test_an_interrupt_while_cutting_leaves_nothing(source: Path, out: Path) -> None:
    """Nor does one before; where handlers wait, between the names, none comes."""
    fault = Fault()
    assert run(source, out, fault, overwrite=False, split_size=SMALL) == "done"
    new = contents(out)
    interrupted = 0
    for i in range(fault.count):
        clear(out)

        class Interrupt(Fault):
            def before(self, operation: str) -> None:
                self.count += 1
                if self.count == self.at and operation in ("write", "truncate", "reserve", "sync"):
                    raise KeyboardInterrupt

        with injected(Interrupt(at=i)):
            journal.CHECKPOINT_SECONDS = 1000.0  # nothing is secured, so nothing is kept
            try:
                h.convert(source, out, workers=1, split_size=SMALL)
            except KeyboardInterrupt:
                interrupted += 1
                assert contents(out) in ({}, new), i
    assert interrupted > 50


@pytest.mark.parametrize(("stage", "number", "status"), [("splitting", "SIGINT", 130), ("rename", "SIGTERM", 0)])
def test_a_signal(source: Path, out: Path, stage: str, number: str, status: int) -> None:
    code = f"""
import os, signal, sys
from hlwq_convert.cli import common, convert
from hlwq_formats.file_ops import OPS
def interrupt(name, *_):
    if name == {stage!r}:
        os.kill(os.getpid(), signal.{number})
common.ProgressLine.__call__ = lambda self, *values: interrupt(*values)
OPS.before = interrupt
convert.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, source, out, "--split-size", str(SMALL)], capture_output=True, timeout=120
    )
    assert done.returncode == status, done.stderr
    assert sorted(contents(out)) == (SMALL_NAMES if status == 0 else [])


def test_a_full_disk_while_cutting_leaves_nothing(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, seen = OPS.reserve, []

    def reserve(fd: int, size: int) -> None:
        seen.append(size)
        if len(seen) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        honest(fd, size)

    monkeypatch.setattr(OPS, "reserve", reserve)
    with pytest.raises(HlwqError, match="No space left") as caught:
        h.convert(source, out, split_size=SMALL)
    assert caught.value.exit_status == 74
    assert contents(out) == {}


def test_names_of_parts() -> None:
    assert part_name("a/b.hlwq", 1, 3) == "a/b-00002-of-00003.hlwq"
    assert part_name("b", 0, 256) == "b-00001-of-00256.hlwq"


@pytest.mark.once
def test_smollm2(tmp_path: Path) -> None:
    """A real model in five parts: the same bits by any part as from one file, and the same model."""
    model = real_model("SmolLM2-135M-Instruct")
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    (tmp_path / "whole").mkdir()
    (tmp_path / "set").mkdir()
    whole = h.convert(model, tmp_path / "whole" / "m.hlwq")
    found = h.convert(model, tmp_path / "set" / "m.hlwq", split_size="20MB")
    assert (found.content_id, found.tensors) == (whole.content_id, whole.tensors)
    parts = sorted((tmp_path / "set").iterdir())
    assert len(parts) == 5 and all(part.stat().st_size <= 20_000_000 for part in parts)
    expected = h.load_state_dict(tmp_path / "whole")
    for name, tensor in h.iter_tensors(parts[3]):
        assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16)), name
    loaded, tokenizer = h.load_model(parts[1])
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(loaded.generate(**inputs, max_new_tokens=2, do_sample=False)[0])
