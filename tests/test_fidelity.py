"""scripts/fidelity on a tiny model, so that it cannot rot."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from models import normal, write_model

pytestmark = pytest.mark.once

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

fidelity: Any = import_module("fidelity")


def test_rows_of_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(
        tmp_path / "m", {"a.weight": normal((256, 512), 1, "F32"), "b.weight": normal((128, 384), 2, "F32")}
    )
    names = ("scalar 5", "scalar 5, fast", "trellis 4.5", "trellis 4.5, fast", "trellis 4.5, best")
    peers = [peer for peer in fidelity.PEERS if peer.name == "gguf-py Q5_0"]
    peers += [fidelity.Peer("a peer", "nobody_has_this", dict), fidelity.Peer("a slow one", "gguf", dict, 10)]
    ours = [(name, options) for name, options in fidelity.OURS if name in names]
    found, missing = fidelity.measure(model, tmp_path, peers, with_output=False, ours=ours)
    rows = {row["name"]: row for row in found}
    assert rows["gguf-py Q5_0"]["bits"] == 5.5
    equal = rows["trellis, size of gguf-py Q5_0"]
    assert equal["bits"] == pytest.approx(5.5, abs=0.03)  # in steps of 64 bytes a section
    assert equal["gap_db"] < rows["gguf-py Q5_0"]["gap_db"] - 4
    assert missing == ["a peer (nobody_has_this is not installed)", "a slow one (too slow for 180,224 weights)"]
    assert rows["scalar 5"]["bits"] == pytest.approx(5.125, abs=0.02)
    assert rows["scalar 5"]["error"] < rows["scalar 5, fast"]["error"] < 0.003
    gaps = [rows[name]["gap_db"] for name in ("trellis 4.5, best", "trellis 4.5", "trellis 4.5, fast", "scalar 5")]
    assert gaps == sorted(gaps)
    assert 0.2 < gaps[0] < 0.6
    beyond = rows["trellis 4.5"]["beyond_entropy"]
    assert 0 < beyond["scales"] < 8 / 384
    assert 0 < beyond["symbols"] < 0.01
    assert 0 < beyond["frequencies"] < 0.02
    assert "beyond_entropy" not in rows["scalar 5"]
    assert rows["scalar 5"]["cosine"] == pytest.approx(1 - rows["scalar 5"]["error"] / 2, abs=1e-4)
    assert rows["scalar 5"]["sqnr_db"] == pytest.approx(27, abs=0.3)
    fidelity.print_table(found, missing)
    table = capsys.readouterr().out
    assert "| trellis, size of gguf-py Q5_0 |" in table
    assert "not measured: a peer (nobody_has_this is not installed), a slow one" in table
    fidelity.draw(found, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    assert fidelity.shannon_gap(3, 2.0**-6) == pytest.approx(0)
