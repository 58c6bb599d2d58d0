"""A signal at any place where Python handles signals: what is left is nothing, or can be resumed, or is whole."""

from __future__ import annotations

import dis
import inspect
import os
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NoReturn

import pytest
from models import normal, write_model

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from crash_harness import Died, Fault, memory_folder
from crash_harness import run as run_with_fault

import hlwq_convert as h
from hlwq_convert import assembly, conversion, entries, journal, resume, store
from hlwq_formats import atomic, file_ops, interrupts, writer
from hlwq_formats.interrupts import Gate, lift_gates, set_gates, uninterrupted

FILES = {
    module.__file__
    for module in (assembly, conversion, entries, journal, resume, store, atomic, file_ops, interrupts, writer)
}
SIGNAL = signal.SIGUSR1
Place = tuple[CodeType, int]


class Interrupted(BaseException):
    pass


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted


def note(number: int, frame: FrameType | None) -> None:
    noted.append(number)


noted: list[int] = []


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    noted.clear()
    before = signal.signal(SIGNAL, interrupt), signal.signal(signal.SIGUSR2, note)
    yield
    assert signal.getsignal(SIGNAL) is interrupt  # given back, whatever happened
    assert signal.getsignal(signal.SIGUSR2) is note
    assert interrupts._waiting == []
    signal.signal(SIGNAL, before[0])
    signal.signal(signal.SIGUSR2, before[1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {"a.weight": normal((64, 80), 1), "b.weight": normal((64, 80), 2), "norm": normal((80,), 3)}
    return write_model(tmp_path_factory.mktemp("source") / "m", tensors)


@pytest.fixture(scope="module")
def new(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("new") / "o.hlwq"
    h.convert(source, out)
    return out.read_bytes()


@cache
def after_a_call(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions that follow those after which CPython looks for signals."""
    found, looks = set(), False
    for instruction in dis.get_instructions(code):
        if looks:
            found.add(instruction.offset)
        looks = instruction.opname.startswith("CALL") or instruction.opname == "JUMP_BACKWARD"
        if instruction.opname == "JUMP_BACKWARD":
            found.add(instruction.argval)
    return frozenset(found)


class Tracer:
    """Counts the places of our code where a handler may run, in the order in which they are come to, and sends the
    signal at one of them: the `turn`-th time that this place is come to."""

    def __init__(self, place: Place | None = None, turn: int = 0) -> None:
        self.place, self.turn = place, turn
        self.seen: Counter[Place] = Counter()
        self.sent = False

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "call" and not frame.f_code.co_flags & inspect.CO_GENERATOR:  # closing one is a call, too
            self._come_to((frame.f_code, -1))
        elif event == "opcode" and frame.f_lasti in after_a_call(frame.f_code):
            self._come_to((frame.f_code, frame.f_lasti))
        return self

    def _come_to(self, place: Place) -> None:
        self.seen[place] += 1
        if place == self.place and self.seen[place] == self.turn:
            self.sent = True
            os.kill(os.getpid(), SIGNAL)  # handled before the next instruction of this function, and so of its caller


def convert(source: Path, out: Path, tracer: Tracer) -> bool:
    """Convert, traced; return whether that was interrupted."""
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        h.convert(source, out, workers=1, overwrite=True)
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    return False


def die_after_a_checkpoint(source: Path, out: Path) -> None:
    class AfterOne(Fault):
        def before(self, operation: str) -> None:
            # the order of what other threads write is not the same each time
            mine = operation == "write" and threading.current_thread() is threading.main_thread()
            if mine and Path(f"{out}.part.journal").exists():
                self.count += 1
                if self.count > 3:  # the lines of the journal itself
                    raise Died

    assert run_with_fault(source, out, AfterOne(), overwrite=True) == "died"
    assert len(list(out.parent.iterdir())) == 2


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="since 3.12 tracing of single instructions misses some of them")
@pytest.mark.parametrize("state", ["fresh", "with checkpoints", "resumed"])
def test_a_signal_anywhere(source: Path, new: bytes, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "CHECKPOINT_SECONDS", 3600 if state == "fresh" else 0)
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        out = Path(folder, "o.hlwq")
        part = [f"{out.name}.part", f"{out.name}.part.journal"]

        def begin() -> None:
            for path in Path(folder).iterdir():
                path.unlink()
            if state == "resumed":
                die_after_a_checkpoint(source, out)

        begin()
        tracer = Tracer()
        assert not convert(source, out, tracer)
        places, results = dict(tracer.seen), Counter[str]()
        assert len(places) > 150
        for place, times in places.items():
            for turn in {1, times} if state == "fresh" else {times}:
                begin()
                assert convert(source, out, Tracer(place, turn)), (place, turn)
                left = sorted(path.name for path in Path(folder).iterdir())
                if left == [out.name]:
                    assert out.read_bytes() == new
                else:  # what can be resumed is never lost
                    assert left in ([part] if state == "resumed" else [[], part]), (place, turn, left)
                results[" ".join(left)] += 1
                if left == part:
                    lines = [line[33:] for line in Path(folder, part[1]).read_bytes().splitlines()]
                    assert len(set(lines)) == len(lines), "written twice"
                    h.convert(source, out, workers=1)
                    assert out.read_bytes() == new
                    assert os.listdir(folder) == [out.name]
    assert results[out.name] < 100  # few places are behind the rename


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="since 3.12 tracing of single instructions misses some of them")
@pytest.mark.parametrize("state", ["fresh", "with checkpoints"])
def test_a_signal_anywhere_in_a_ladder(source: Path, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "CHECKPOINT_SECONDS", 3600 if state == "fresh" else 0)
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:

        def make(tracer: Tracer) -> dict[str, bytes]:
            before = sys.gettrace()
            sys.settrace(tracer)
            try:
                h.convert_ladder(source, Path(folder, "o.hlwq"), bits=(4, 5), workers=1, overwrite=True)
            except Interrupted:
                assert tracer.sent
            finally:
                sys.settrace(before)
            return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

        monkeypatch.setitem(globals(), "FILES", {assembly.__file__, conversion.__file__, writer.__file__})
        tracer = Tracer()
        new = make(tracer)
        assert sorted(new) == ["o-4bit.hlwq", "o-5bit.hlwq"]
        places = [place for place in tracer.seen if place[0].co_name not in ("put", "write", "_upper_bound", "step")]
        assert len(places) > 150
        results = Counter[int]()
        for place in places:
            for path in Path(folder).iterdir():
                path.unlink()
            left = make(Tracer(place, tracer.seen[place]))
            published = {name for name in left if name.endswith(".hlwq")}
            assert published in (set(), set(new)), (place, published)  # both or none
            parts = {name for name in left if name.endswith(".part")}
            assert not parts if state == "fresh" else parts in (set(), {f"{name}.part" for name in new})
            assert {name for name in left if name.endswith(".journal")} == {f"{name}.journal" for name in parts}
            assert all(left[name] == new[name] for name in published)
            results[len(published)] += 1
            if parts:
                h.convert_ladder(source, Path(folder, "o.hlwq"), bits=(4, 5), workers=1)
                assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == new
        assert 0 < results[2] < 100  # few places are behind the renames


# --- gates ------------------------------------------------------------------------------------------


@pytest.fixture
def gates() -> Iterator[dict[int, Gate]]:
    gates: dict[int, Gate] = {}
    set_gates(gates)
    yield gates
    lift_gates(gates)


@uninterrupted
def send_and_go_on(done: list[str], *numbers: int) -> str:
    for number in numbers or (SIGNAL,):
        signal.raise_signal(number)
        done.append("went on")
    return "result"


def test_a_signal_waits_for_the_end_of_an_uninterrupted_function(gates: dict[int, Gate]) -> None:
    done: list[str] = []
    with pytest.raises(Interrupted):
        send_and_go_on(done)
    assert done == ["went on"]
    with pytest.raises(Interrupted):
        signal.raise_signal(SIGNAL)


def test_a_signal_waits_for_the_outermost_function(gates: dict[int, Gate]) -> None:
    done: list[str] = []

    @uninterrupted
    def outer() -> None:
        send_and_go_on(done)
        done.append("outer went on")

    with pytest.raises(Interrupted):
        outer()
    assert done == ["went on", "outer went on"]


def test_each_of_several_signals_is_handled(gates: dict[int, Gate]) -> None:
    with pytest.raises(Interrupted):
        send_and_go_on([], signal.SIGUSR2, SIGNAL, signal.SIGUSR2)
    assert noted == [signal.SIGUSR2]  # once for all that wait, as the kernel does


def test_a_failure_comes_before_the_signal(gates: dict[int, Gate]) -> None:
    @uninterrupted
    def fail() -> None:
        signal.raise_signal(SIGNAL)
        raise ValueError("first")

    with pytest.raises(Interrupted) as caught:
        fail()
    assert isinstance(caught.value.__context__, ValueError)


def test_no_signal_is_handled_in_another_thread(gates: dict[int, Gate]) -> None:
    """It is the main thread's, however long another one takes for what must not be interrupted."""
    entered, leave = threading.Event(), threading.Event()
    done: list[str] = []

    @uninterrupted
    def elsewhere() -> None:
        entered.set()
        assert leave.wait(30)

    @uninterrupted
    def here() -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        assert entered.wait(30)
        signal.raise_signal(SIGNAL)
        leave.set()
        thread.join()
        done.append("went on")

    with pytest.raises(Interrupted):
        here()
    assert done == ["went on"]


def test_threads_set_no_gates() -> None:
    gates: dict[int, Gate] = {}
    thread = threading.Thread(target=set_gates, args=(gates,))
    thread.start()
    thread.join()
    assert gates == {}


def test_gates_are_set_once_and_a_handler_that_was_set_since_stays(gates: dict[int, Gate]) -> None:
    more: dict[int, Gate] = {}
    set_gates(more)
    assert more == {}
    signal.signal(SIGNAL, signal.SIG_IGN)
    lift_gates(gates)
    assert signal.getsignal(SIGNAL) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGUSR2) is note
    signal.signal(SIGNAL, interrupt)


def test_all_gates_are_lifted_when_a_handler_raises_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    gates: dict[int, Gate] = {}
    set_gates(gates)
    assert len(gates) >= 2
    honest = signal.signal

    def set_and_interrupt(number: int, handler: Any) -> None:
        honest(number, handler)
        monkeypatch.setattr(signal, "signal", honest)
        raise Interrupted

    monkeypatch.setattr(signal, "signal", set_and_interrupt)
    with pytest.raises(Interrupted):
        lift_gates(gates)
    assert not any(isinstance(signal.getsignal(number), Gate) for number in gates)


def test_a_second_signal_while_cleaning_up(source: Path, tmp_path: Path) -> None:
    """Two at once, as from two presses of Ctrl-C: nothing is left."""

    def twice(stage: str, done: int, total: int) -> None:
        file_ops.OPS.before = lambda name: signal.raise_signal(SIGNAL)  # type: ignore[method-assign]
        signal.raise_signal(SIGNAL)

    try:
        with pytest.raises(Interrupted):
            h.convert(source, tmp_path / "o.hlwq", workers=1, progress=twice)
    finally:
        del file_ops.OPS.before
    assert list(tmp_path.iterdir()) == []
