"""The catalogue, I: power cuts, signals, races and other machines."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from catalogue import CONVERT, case, child, left
from catalogue_files import write
from models import normal, write_model
from power_loss import Recorder, after_power_cuts

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from crash_harness import memory_folder

import hlwq_convert as h
from hlwq_convert import journal
from hlwq_formats.errors import HlwqError, Locked
from hlwq_formats.file_ops import OPS
from hlwq_formats.reader import Reader

TENSORS = {"a.weight": normal((64, 80), 1), "b.weight": normal((48, 96), 2), "norm": normal((80,), 3)}
SHARD = "model.safetensors"
DEAR = b"something dear"


def is_sound(path: Path) -> bool:
    try:
        with Reader(path) as reader:
            reader.verify()
    except HlwqError:
        return False
    return True


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m", TENSORS)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What `source` is converted to; also compiles the kernels."""
    folder = tmp_path_factory.mktemp("new")
    h.convert(write_model(folder / "m", TENSORS), folder / "o.hlwq")
    return (folder / "o.hlwq").read_bytes()


@pytest.mark.once
@pytest.mark.parametrize("old", [case(120, "new", None), case(120, "overwritten", DEAR)])
def test_a_power_cut(source: Path, new: bytes, monkeypatch: pytest.MonkeyPatch, old: bytes | None) -> None:
    monkeypatch.setattr(journal, "CHECKPOINT_SECONDS", 0)
    before = {} if old is None else {"o.hlwq": old}
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        out = Path(folder, "o.hlwq")

        def restore(names: dict[str, bytes]) -> None:
            for path in Path(folder).iterdir():
                path.unlink()
            for name, content in names.items():
                write(Path(folder, name), content)

        with monkeypatch.context() as patch:
            restore(before)
            recorder = Recorder(Path(folder), patch)
            h.convert(source, out, workers=1, overwrite=True)
        states, resumed = list(after_power_cuts(recorder.events, before)), 0
        assert len(states) > 150
        assert {state.get("o.hlwq") for state in states} == {old, new}
        for i, state in enumerate(states):
            assert set(state) <= {"o.hlwq", "o.hlwq.part", "o.hlwq.part.journal"}
            part = state.get("o.hlwq.part", b"")
            assert new[:8].startswith(part[:8].rstrip(b"\0"))  # nothing else is ever there, and it comes last:
            if part[:8] == new[:8]:
                assert part == new or not is_sound(write(Path(folder, "torn"), part))
            if i % 3 == 0:
                restore(state)
                h.convert(source, out, workers=1, overwrite=True)
                assert out.read_bytes() == new
                assert left(Path(folder)) == ["o.hlwq"]
                resumed += "o.hlwq.part.journal" in state
        assert resumed > 5


SIGNALS = """
import os, signal, sys
from hlwq_convert.cli import common
from hlwq_formats.file_ops import OPS
stage, number, twice = sys.argv.pop(), int(sys.argv.pop()), sys.argv.pop() == "twice"
def interrupt(name, *_):
    if name == stage:
        if twice:
            OPS.before = lambda name: os.kill(os.getpid(), number)  # the clean-up is interrupted too
        os.kill(os.getpid(), number)
common.ProgressLine.__call__ = lambda self, *values: interrupt(*values)
OPS.before = interrupt
"""


@pytest.mark.parametrize(
    ("stage", "number", "status", "times"),
    [
        case(121, "sigint-at-the-first-write", "write", signal.SIGINT, 130, "once"),
        case(121, "sigterm-while-converting", "converting", signal.SIGTERM, 143, "once"),
        case(121, "sighup-while-checking", "checking", signal.SIGHUP, 129, "once"),
        case(121, "sigint-after-the-last-write-of-data", "truncate", signal.SIGINT, 130, "once"),
        case(121, "sigterm-too-late", "rename", signal.SIGTERM, 0, "once"),
        case(121, "sigint-twice", "converting", signal.SIGINT, 130, "twice"),
    ],
)
def test_a_signal_at_each_stage(source: Path, stage: str, number: int, status: int, times: str) -> None:
    done = child(SIGNALS + CONVERT, source, source.parent / "o.hlwq", times, str(int(number)), stage)
    assert done.returncode == status
    if status == 0:
        assert left(source.parent) == ["m", "o.hlwq"]
    else:
        assert done.stdout == ""
        assert done.stderr in ("hlwq: interrupted\n", "hlwq: terminated\n")
        assert left(source.parent) == ["m"]


@pytest.mark.parametrize("racers", [case(126, "8-converters", 8)])
def test_one_of_many_wins(source: Path, new: bytes, racers: int) -> None:
    def race(_: int) -> int:
        try:
            h.convert(source, source.parent / "o.hlwq", workers=1)
        except HlwqError as error:
            return error.exit_status
        return 0

    with ThreadPoolExecutor(racers) as pool:
        statuses = sorted(pool.map(race, range(racers)))
    assert statuses[0] == 0
    assert set(statuses[1:]) <= {73, 75}  # 73 for one that came when the winner had published
    assert (source.parent / "o.hlwq").read_bytes() == new
    assert left(source.parent) == ["m", "o.hlwq"]


@pytest.mark.parametrize(
    ("moment", "resume"),
    [
        case(126, "no-lock-early", "write", False),
        case(126, "no-lock-early-resumed", "write", True),
        case(126, "no-lock-late", "rename", False),
        case(126, "no-lock-late-resumed", "rename", True),
    ],
)
def test_a_file_system_whose_locks_do_nothing(
    source: Path, new: bytes, monkeypatch: pytest.MonkeyPatch, moment: str, resume: bool
) -> None:
    """The one that made OUT.part wins; the others cannot know that it lives, and so let it."""
    out, refusals = source.parent / "o.hlwq", []

    def before(operation: str) -> None:
        if operation == moment and not refusals:
            refusals.append(None)
            with pytest.raises(Locked, match="another process may be writing it; remove it if none does") as caught:
                h.convert(source, out, resume=resume)  # a second one begins
            refusals[0] = caught.value.exit_status

    monkeypatch.setattr(OPS, "lock", lambda fd: None, raising=False)
    monkeypatch.setattr(OPS, "before", before, raising=False)
    monkeypatch.setattr(journal, "CHECKPOINT_SECONDS", 0)  # there is a journal, so that resuming could be tried
    h.convert(source, out)
    assert refusals == [75]
    assert out.read_bytes() == new
    assert left(source.parent) == ["m", "o.hlwq"]


CLOCK = """
import itertools, time
ticks = itertools.count(10**9, -1000)
time.time, time.time_ns = lambda: next(ticks), lambda: next(ticks) * 10**9
"""
ELSEWHERE = {"SOURCE_DATE_EPOCH": "0", "PYTHONHASHSEED": "99", "USER": "x", "LOGNAME": "x", "HOSTNAME": "y"}


@pytest.mark.parametrize("env", [case(129, "clock-user-and-host", ELSEWHERE)])
def test_nothing_of_the_machine_is_in_the_file(source: Path, new: bytes, env: dict[str, str]) -> None:
    arguments = ("-q", "m", "o.hlwq", "--workers", "3")
    done = child(CLOCK + CONVERT, *arguments, env={**os.environ, **env}, cwd=source.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert (source.parent / "o.hlwq").read_bytes() == new
