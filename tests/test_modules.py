"""Tensors by module and layer, and the bars that are drawn of them."""

from __future__ import annotations

import io

import pytest
from reports import inspection
from rich.console import Console

from hlwq_convert import charts
from hlwq_convert.inspection import TensorInfo
from hlwq_convert.modules import Cell, by_module, split_name


def info(name: str, sqnr: float | None = 27.0, bits: int = 5, size: int = 5120, encoding: str = "scalar") -> TensorInfo:
    return TensorInfo(name, [64, 128], "BF16", encoding, bits, size / 1024, size, "default", 0.999, sqnr, 0.002)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers.*.mlp.up_proj.weight", 3)),
        ("model.layers.12.mlp.experts.7.w1.weight", ("model.layers.*.mlp.experts.*.w1.weight", 12)),
        ("model.norm.weight", ("model.norm.weight", -1)),
        ("h.0.attn", ("h.*.attn", 0)),
        ("w1.weight", ("w1.weight", -1)),
        ("layers.٣.w", ("layers.٣.w", -1)),
        ("layers.1234567.w", ("layers.1234567.w", -1)),
        ("", ("", -1)),
    ],
)
def test_names_are_split_into_module_and_layer(name: str, expected: tuple[str, int]) -> None:
    assert split_name(name) == expected


def test_modules_sum_their_tensors() -> None:
    tensors = [info("l.10.up", 26.0), info("l.2.up", 28.0, 4, 4096), info("l.2.norm", None, 16, 256, "raw")]
    tensors += [TensorInfo("l.2.tied", [64, 128], "BF16", "alias", None, None, 0, "equals l.2.up")]
    norm, up = by_module(tensors)
    assert (norm.name, norm.quantized, norm.worst, norm.cells) == ("l.*.norm", 0, None, {2: Cell(None, None)})
    assert (up.name, up.tensors, up.weights, up.bytes, up.worst) == ("l.*.up", 2, 16384, 9216, "l.10.up")
    assert up.cells == {2: Cell(4.0, 28.0), 10: Cell(5.0, 26.0)}
    assert up.bits == 4.5


def test_a_cell_shows_the_worst_of_its_experts_and_all_of_their_bits() -> None:
    (module,) = by_module([info(f"l.0.experts.{i}.w", 20.0 + i, size=5120 + i) for i in range(4)])
    assert module.cells == {0: Cell(8 * (4 * 5120 + 6) / (4 * 8192), 20.0)}


# --- bars -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "text"), [(1, "████"), (0.5, "██"), (0.53125, "██▏"), (0, "▏"), (0.25, "█")])
def test_bars_have_eighths(share: float, text: str) -> None:
    assert charts.bar(share, 4) == text


def test_heights_go_from_low_to_high() -> None:
    assert charts.heights([0, 4, 7.9, 8, None, -1, 99], 0, 8) == "▁▅██·▁█"


def test_small_differences_are_not_drawn_large() -> None:
    assert charts.scale(by_module([info("l.0.w", 27.0), info("l.1.w", 27.1)])) == pytest.approx((26.55, 27.55))
    assert charts.scale(by_module([info("l.0.w", 20.0), info("l.1.w", 27.0)])) == (20.0, 27.0)
    assert charts.scale(by_module([info("l.0.w", None)])) is None


def shown(tensors: list[TensorInfo]) -> str:
    console = Console(file=io.StringIO(), width=220, color_system=None)
    console.print(charts.charts(inspection(tensors)))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_charts_show_layers_side_by_side() -> None:
    lines = shown([info(f"l.{i}.w", 20.0 + i) for i in range(8)]).splitlines()
    assert lines[0].split() == ["scalar", "█" * 30, "41.0", "kB", "99.4", "%"]
    assert lines[-1].split() == ["l.*.w", "█" * 12, "41.0", "kB", "5.00", "▁▂▃▄▅▆▇█", "20.00"]
    assert "20.0 to 27.0 dB" in lines[-2]


def test_charts_of_nothing_and_of_very_much() -> None:
    assert "SQNR by layer" in shown([])
    text = shown([info(f"l.{i}.w[red]\x1b{'x' * 300}{j}") for i in range(100) for j in range(60)])
    assert "and 20 smaller modules" in text
    assert "..." in text and "[red]" in text and "\x1b" not in text
