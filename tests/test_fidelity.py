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


def test_rows_of_a_tiny_model(tmp_path: Path) -> None:
    model = write_model(
        tmp_path / "m", {"a.weight": normal((256, 512), 1, "F32"), "b.weight": normal((128, 384), 2, "F32")}
    )
    rows = {row["name"]: row for row in fidelity.measure(model, tmp_path, with_peers=False, with_output=False)}
    assert rows["scalar 5"]["bits"] == pytest.approx(5.125, abs=0.02)
    assert rows["scalar 5"]["error"] < rows["scalar 5, fast"]["error"] < 0.003
    gaps = [rows[name]["gap_db"] for name in ("trellis 4.5, best", "trellis 4.5", "trellis 4.5, fast", "scalar 5")]
    assert gaps == sorted(gaps)
    assert 0.2 < gaps[0] < 0.6
    assert 0 < fidelity.coder_loss(model, 4.5) < 0.03
    fidelity.print_table(list(rows.values()))
    assert fidelity.shannon_gap(3, 2.0**-6) == pytest.approx(0)
