"""How many CPUs a process may use, and results in order."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest

from hlwq_convert.parallel import Helpers, InOrder, _cgroup_quota, default_workers, ordered_map, take_turns


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4.0),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "400000 100000\n"}, 2.0),
        ("0::/not/mounted/here\n", {"cpu.max": "50000 100000\n"}, 0.5),
        (
            "5:memory:/x\n4:cpu,cpuacct:/docker/1\n",
            {"cpu,cpuacct/docker/1/cpu.cfs_quota_us": "300000", "cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000"},
            3.0,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
        ("0::/\n", {"cpu.max": "1 0"}, None),
        ("nonsense", {}, None),
        ("0::/../../etc\n", {}, None),
    ],
)
def test_the_quota_of_control_groups(
    tmp_path: Path, membership: str, files: dict[str, str], expected: float | None
) -> None:
    root = tree(tmp_path / "root", files)
    root.mkdir(exist_ok=True)
    (tmp_path / "membership").write_text(membership)
    assert _cgroup_quota(tmp_path / "membership", root) == expected


def test_no_control_groups(tmp_path: Path) -> None:
    assert _cgroup_quota(tmp_path / "absent", tmp_path) is None


def test_workers_follow_the_affinity() -> None:
    assert 1 <= default_workers() <= len(os.sched_getaffinity(0))


def test_results_come_in_order_and_few_are_begun_ahead() -> None:
    begun, taken, most = 0, 0, 0
    lock = threading.Lock()

    def work(i: int) -> int:
        nonlocal begun, most
        with lock:
            begun += 1
            most = max(most, begun - taken)
        time.sleep(0.002 if i % 3 == 0 else 0)
        return i

    with ThreadPoolExecutor(4) as pool:
        for i, result in enumerate(ordered_map(pool, 3, work, range(60))):
            assert result == i
            taken += 1
    assert most <= 4


def test_an_error_comes_in_its_place_and_nothing_more_is_begun() -> None:
    def work(i: int) -> int:
        if i == 5:
            raise ValueError("five")
        return i

    with ThreadPoolExecutor(2) as pool:
        results = ordered_map(pool, 2, work, range(100))
        assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match="five"):
            next(results)


def test_iterators_take_turns() -> None:
    begun = []

    def iterators() -> Iterator[Iterator[str]]:
        for name, length in ("a", 3), ("b", 1), ("c", 0), ("d", 2):
            begun.append(name)
            yield iter([f"{name}{i}" for i in range(length)])

    items = take_turns(iterators(), 2)
    assert (next(items), begun) == ("a0", ["a", "b"])
    assert list(items) == ["b0", "a1", "a2", "d0", "d1"]
    assert "".join(take_turns(map(iter, ["abc", "", "de"]), 1)) == "abcde"


def test_pieces_are_taken_in_order() -> None:
    for order in permutations(range(4)):
        taken: list[str] = []
        in_order = InOrder(taken.append)
        for i in order:
            in_order.add(i, "abcd"[i])
            assert "".join(taken) == "abcd"[: next((n for n in range(4) if n not in order[: order.index(i) + 1]), 4)]


def test_who_brings_a_piece_does_not_wait_for_others() -> None:
    """While one thread takes a piece, another brings the next one and goes on; the first takes that, too."""
    entered, leave, taken = threading.Event(), threading.Event(), []

    def take(piece: str) -> None:
        if piece == "a":
            entered.set()
            assert leave.wait(10)
        taken.append((piece, threading.get_ident()))

    in_order = InOrder(take)
    first = threading.Thread(target=in_order.add, args=(0, "a"))
    first.start()
    assert entered.wait(10)
    in_order.add(1, "b")
    assert taken == []
    leave.set()
    first.join()
    assert taken == [("a", first.ident), ("b", first.ident)]


def test_nothing_is_taken_after_what_failed() -> None:
    taken: list[str] = []

    def take(piece: str) -> None:
        taken.append(piece)
        raise ValueError(piece)

    in_order = InOrder(take)
    in_order.add(1, "b")
    with pytest.raises(ValueError, match="a"):
        in_order.add(0, "a")
    in_order.add(2, "c")
    assert taken == ["a"]


def test_a_piece_is_taken_when_all_up_to_it_have_been_brought() -> None:
    taken: list[int] = []

    def take(piece: int) -> None:
        time.sleep(0.001 * (piece % 3))
        taken.append(piece)

    in_order = InOrder(take)

    def bring(piece: int) -> int:
        time.sleep(0.002 * (piece * 7 % 5))
        in_order.add(piece, piece)
        return piece

    with ThreadPoolExecutor(4) as pool:
        for piece in ordered_map(pool, 8, bring, range(60)):
            assert taken[: piece + 1] == list(range(piece + 1))


def test_helpers_take_what_a_thread_has_too_much_of() -> None:
    """When none is free it does the work itself; when they have stopped all is done."""
    helpers, free, done = Helpers(1), threading.Event(), list[tuple[str, bool]]()
    own = threading.get_ident()

    def work(name: str) -> None:
        if threading.get_ident() != own:
            free.wait(30)
        done.append((name, threading.get_ident() == own))

    helpers.give(partial(work, "before"))
    with ThreadPoolExecutor(1) as pool:
        (helping,) = [pool.submit(task) for task in helpers.tasks()]
        while helpers._free._value == 0:
            time.sleep(0.001)
        helpers.give(partial(work, "given"))
        helpers.give(partial(work, "kept"))
        free.set()
        helpers.stop()
    assert helping.result() is None
    assert done == [("before", True), ("kept", True), ("given", False)]


def test_an_error_of_a_helper_is_one_of_its_task() -> None:
    helpers = Helpers(1)
    with ThreadPoolExecutor(1) as pool:
        (helping,) = [pool.submit(task) for task in helpers.tasks()]
        while helpers._free._value == 0:
            time.sleep(0.001)
        helpers.give(lambda: 1 // 0)
        helpers.stop()
    with pytest.raises(ZeroDivisionError):
        helping.result()
