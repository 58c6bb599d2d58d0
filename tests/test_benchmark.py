"""The benchmark runs; how fast anything is, no test says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.once

SCRIPT = Path(__file__).parent.parent / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a tiny run prints, and its JSON."""
    folder = tmp_path_factory.mktemp("benchmark")
    options = ["--weights", "2e5", "--repeat", "1", "--no-peers", "--work", folder, "--json", folder / "out.json"]
    run = subprocess.run(
        [sys.executable, SCRIPT, *map(str, options)], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    assert [path.name for path in folder.iterdir()] == ["out.json"], "temporary files are left"
    return run.stdout, json.loads((folder / "out.json").read_text())


def test_everything_is_measured(result: tuple[str, dict[str, Any]]) -> None:
    stdout, document = result
    assert document.keys() == {
        "machine", "versions", "settings", "first_use_seconds", "cases", "conversion_stages", "memory_mib",
        "latency_ms", "targets",
    }  # fmt: skip
    cases = {case["name"]: case for case in document["cases"]}
    expected = {
        "memcpy",
        "decode kernel 5 bits",
        "encode kernel 4 bits default",
        "encode trellis 256 states",
        "encode trellis, rANS alone",
        "decode trellis",
        "convert 5 bits fast, disk",
        "cp, disk",
    }
    assert expected <= cases.keys()
    for name, case in cases.items():
        assert name in stdout
        if name == "load_state_dict" and importlib.util.find_spec("torch") is None:
            assert case["median_seconds"] is None
        else:
            assert len(case["seconds"]) == 1 and case["gigaweights_per_second"] > 0, name
    assert all(value > 0 for value in document["latency_ms"].values())
    assert document["settings"]["weights"] == pytest.approx(2e5, rel=0.1)
    if sys.platform == "linux":
        (memory,) = document["memory_mib"]
        assert memory["peak"] >= memory["baseline"] > memory["bare_import"] > 0


def test_the_report_names_no_folder_and_judges_no_tiny_model(result: tuple[str, dict[str, Any]]) -> None:
    stdout, document = result
    assert str(SCRIPT.parent.parent) not in stdout + json.dumps(document)
    assert {target["reached"] for target in document["targets"] if target["unit"] == "x"} == {None}
