"""Whatever fails or kills a conversion, at whichever operation: the output is absent, old or new, and the same
command then succeeds with the same bytes."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import write_model

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from crash_harness import MODES, Died, Fault, check, finish, injected, memory_folder, run

import hlwq_convert as h
from hlwq_convert import assembly, entries, journal, store
from hlwq_formats.errors import HlwqError, IoFailure

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (64, 80), "b.weight": (32, 160), "m.norm.weight": (80,), "z.weight": (64, 64)}
    tensors = {
        name: ("F32", shape, rng.standard_normal(shape).astype(np.float32).tobytes()) for name, shape in shapes.items()
    }
    return write_model(tmp_path_factory.mktemp("source") / "m", tensors)


@pytest.fixture(scope="module")
def new(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("whole") / "o.hlwq"
    h.convert(source, out)
    return out.read_bytes()


@pytest.fixture
def out() -> Iterator[Path]:
    """In memory where that can be: every run here syncs, and thousands of syncs of a disk take minutes."""
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        yield Path(folder) / "o.hlwq"


def operations(source: Path, out: Path) -> int:
    fault = Fault()
    assert run(source, out, fault, overwrite=False) == "done"
    out.unlink()
    return fault.count


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_every_operation_may_fail(source: Path, new: bytes, out: Path, mode: str, overwrite: bool) -> None:
    results = set()
    count = operations(source, out)
    assert count > 40
    for i in range(count):
        old = b"dear" if overwrite else None
        if overwrite:
            out.write_bytes(b"dear")
        result = run(source, out, Fault(mode, i), overwrite=overwrite)
        results.add(result)
        check(out, old, new, result)
        if result not in ("done", "died"):
            left = {path.name for path in out.parent.iterdir()} - {out.name}
            assert mode == "fails from then on" or not left, (i, result, left)
        finish(source, out, new)
        out.unlink()
    assert ("died" in results) == (mode == "dies")
    assert mode == "dies" or "IoFailure" in results


@pytest.mark.once
def test_a_run_that_follows_a_death_may_fail_too(source: Path, new: bytes, out: Path) -> None:
    """Some of the pairs; scripts/torture does all of them."""
    count = operations(source, out)
    for i in range(3, count, 7):
        for j in range(1, count, 9):
            for mode in MODES:
                run(source, out, Fault("dies", i), overwrite=True)
                result = run(source, out, Fault(mode, j), overwrite=True)
                check(out, None if not out.exists() else new, new, result)
                finish(source, out, new)
                out.unlink()


@pytest.mark.once
def test_real_kills() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPTS / "torture.py", "--kills", "30", "--rows", "2000", "--no-pairs", "--signals", "0"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"3\d kills survived in \d+ s, [1-9]\d* conversions resumed", done.stdout), done.stdout


# --- resuming -------------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors of which a chunk was read to be stored, in this test, since it was last cleared."""
    names: list[str] = []
    honest = store._read_piece

    def read_piece(model: object, of: store.Taken, *place: int) -> store.Piece:
        names.append(of.tensor.name)
        return honest(model, of, *place)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "_read_piece", read_piece)
    return names


def die_after(source: Path, out: Path, tensors: int) -> None:
    """Die when the journal has this many tensors."""
    lines = tensors + 1
    path = Path(f"{out}.part.journal")

    class AfterCheckpoints(Fault):
        def before(self, operation: str) -> None:
            if path.exists() and path.read_bytes().count(b"\n") >= lines and operation != "sync":
                raise Died

    assert run(source, out, AfterCheckpoints(), overwrite=False) == "died"
    assert path.read_bytes().count(b"\n") == lines


@pytest.mark.parametrize("tensors", [1, 2, 3, 4])
def test_what_was_stored_is_not_encoded_again(
    source: Path, new: bytes, out: Path, encoded: list[str], tensors: int
) -> None:
    die_after(source, out, tensors)
    encoded.clear()
    h.convert(source, out)
    assert sorted(encoded) == ["a.weight", "b.weight", "m.norm.weight", "z.weight"][tensors:]
    assert out.read_bytes() == new
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_no_resume_begins_anew(source: Path, new: bytes, out: Path, encoded: list[str]) -> None:
    die_after(source, out, 3)
    encoded.clear()
    h.convert(source, out, resume=False)
    assert len(encoded) == 4
    assert out.read_bytes() == new


def test_other_options_begin_anew_and_say_so(source: Path, out: Path, encoded: list[str]) -> None:
    die_after(source, out, 3)
    encoded.clear()
    result = h.convert(source, out, bits=4)
    assert result.warnings == [f"{out}.part could not be resumed: the options changed"]
    assert len(encoded) == 4
    assert {t.bits for t in result.tensors} == {4, 32}


def test_another_version_begins_anew(
    source: Path, out: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    die_after(source, out, 3)
    encoded.clear()
    monkeypatch.setattr("hlwq_convert.resume.__version__", "99")
    assert h.convert(source, out).warnings == [f"{out}.part could not be resumed: the tool's version changed"]
    assert len(encoded) == 4


def test_a_tensor_whose_source_changed_is_encoded_again(
    source: Path, out: Path, encoded: list[str], tmp_path: Path
) -> None:
    mine = shutil.copytree(source, tmp_path / "copy")
    die_after(mine, out, 3)
    shard = mine / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-64 * 64 * 4 - 80 * 4 - 8] ^= 1  # in b.weight
    shard.write_bytes(content)
    encoded.clear()
    h.convert(mine, out)
    assert sorted(encoded) == ["b.weight", "m.norm.weight", "z.weight"]  # read by several threads
    resumed = out.read_bytes()
    h.convert(mine, out, overwrite=True)
    assert out.read_bytes() == resumed


def test_damage_to_the_part_is_found(source: Path, new: bytes, out: Path, encoded: list[str]) -> None:
    die_after(source, out, 4)
    whole = Path(f"{out}.part").read_bytes()
    journal_bytes = Path(f"{out}.part.journal").read_bytes()
    end = len(whole.rstrip(b"\0"))
    for at in range(130, end, max(1, end // 12)):
        Path(f"{out}.part").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        Path(f"{out}.part.journal").write_bytes(journal_bytes)
        h.convert(source, out)
        assert out.read_bytes() == new
        out.unlink()


def test_any_damage_to_the_journal_is_harmless(source: Path, new: bytes, out: Path) -> None:
    die_after(source, out, 4)
    part, whole = Path(f"{out}.part").read_bytes(), Path(f"{out}.part.journal").read_bytes()
    lines = whole.splitlines(keepends=True)
    rng = np.random.default_rng(0)
    damaged = [whole[:-1], whole[: len(whole) // 2], b"", b"\n", whole + whole, whole + lines[2], b"".join(lines[::-1])]
    damaged += [b"".join([*lines[:1], *lines[2:]]), bytes(1000), whole.replace(b'"bits":5', b'"bits":6')]
    for at in rng.integers(0, len(whole), 40):
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :])
    for text in damaged:
        Path(f"{out}.part").write_bytes(part)
        Path(f"{out}.part.journal").write_bytes(text)
        h.convert(source, out)
        assert out.read_bytes() == new
        assert [path.name for path in out.parent.iterdir()] == [out.name]
        out.unlink()


def test_a_part_that_has_another_name_is_not_touched(source: Path, new: bytes, out: Path) -> None:
    die_after(source, out, 3)
    dear = out.with_name("dear")
    os.link(f"{out}.part", dear)
    before = dear.read_bytes()
    h.convert(source, out)
    assert out.read_bytes() == new
    assert dear.read_bytes() == before


def test_an_interrupt_keeps_what_a_checkpoint_had_secured(
    source: Path, new: bytes, out: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "CHECKPOINT_SECONDS", 0)
    honest = assembly.write_tensors

    def interrupt_at_the_last(*arguments: Any) -> Iterator[store.Taken]:
        for of in honest(*arguments):
            if of.tensor.name == "z.weight":
                raise KeyboardInterrupt
            yield of

    monkeypatch.setattr(assembly, "write_tensors", interrupt_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        h.convert(source, out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["o.hlwq.part", "o.hlwq.part.journal"]
    monkeypatch.setattr(assembly, "write_tensors", honest)
    encoded.clear()
    h.convert(source, out)
    assert encoded == ["z.weight"]
    assert out.read_bytes() == new


def test_a_failure_leaves_nothing_to_resume(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "CHECKPOINT_SECONDS", 0)

    def fail(*sums: object) -> None:
        raise IoFailure("planted")

    monkeypatch.setattr(entries.ErrorSums, "add", fail)
    with pytest.raises(IoFailure, match="planted"):
        h.convert(source, out)
    assert list(out.parent.iterdir()) == []


# --- full disks, limits ---------------------------------------------------------------------------


def test_a_full_disk(source: Path, tmp_path: Path) -> None:
    """A real one, in a mount namespace of a child's own."""
    script = f"""
import os, sys
import hlwq_convert as h
from hlwq_formats.errors import IoFailure
from hlwq_formats.file_ops import OPS
os.chdir({str(tmp_path)!r})
for reserve in (True, False):
    if not reserve:  # as on a file system that cannot reserve: the writes have to notice
        def cannot(fd, size):
            raise OSError(95, "Operation not supported")
        OPS.reserve = cannot
    try:
        h.convert({str(source)!r}, "small/o.hlwq")
    except IoFailure as error:
        assert "No space left" in str(error), error
        assert os.listdir("small") == [], os.listdir("small")
        print("refused")
"""
    (tmp_path / "small").mkdir()
    (tmp_path / "t.py").write_text(script)
    command = f"mount -t tmpfs -o size=8k tmpfs {tmp_path}/small && exec {sys.executable} {tmp_path}/t.py"
    flags = ["-m"] if os.geteuid() == 0 else ["-r", "-m"]
    done = subprocess.run(["unshare", *flags, "sh", "-c", command], capture_output=True, text=True, timeout=120)
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert done.stdout == "refused\nrefused\n", done.stdout + done.stderr


def test_a_limit_on_the_size_of_files(source: Path, out: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(IoFailure) as caught:
            h.convert(source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_status == 74
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EIO, errno.EDQUOT, errno.ESTALE])
def test_a_failed_sync_is_final(source: Path, out: Path, code: int) -> None:
    calls = []

    class SyncFails(Fault):
        def before(self, operation: str) -> None:
            calls.append(operation)
            if operation == "sync":
                raise OSError(code, os.strerror(code))

    with injected(SyncFails()), pytest.raises(HlwqError) as caught:
        h.convert(source, out)
    assert caught.value.exit_status == 74
    assert calls.count("sync") == 1
    assert list(out.parent.iterdir()) == []


def test_a_folder_that_cannot_be_synced_is_said(source: Path, new: bytes, out: Path) -> None:
    class LastSyncFails(Fault):
        def before(self, operation: str) -> None:
            if operation == "sync" and out.exists():
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    with injected(LastSyncFails()), pytest.raises(IoFailure, match=r"published, but .* unconfirmed"):
        h.convert(source, out)
    assert out.read_bytes() == new


def test_the_operations_are_those_of_the_writer() -> None:
    """A change of the file system that went around FileOps could not be made to fail here."""
    root = Path(__file__).parents[1]
    for name in ("formats/hlwq_formats/atomic.py", "formats/hlwq_formats/writer.py", "hlwq_convert/journal.py"):
        text = (root / name).read_text()
        for call in ("os.open", "os.write", "os.pwrite", "os.unlink", "os.rename", "os.replace", "os.fsync", "open("):
            assert call not in text.replace("OPS.open(", "").replace("_open(", "").replace("reopen(", ""), (name, call)
