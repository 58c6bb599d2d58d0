"""How many CPUs a process may use, and results in order."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hlwq_convert.parallel import _cgroup_quota, default_workers, ordered_map


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
