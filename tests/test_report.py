"""Tables for people, and the sums of an inspection."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from models import normal, write_model
from rich.console import Console

from hlwq_convert import convert
from hlwq_convert.dry_run import dry_run
from hlwq_convert.inspection import Inspection, TensorInfo, inspect
from hlwq_convert.job import prepare
from hlwq_convert.report import human_bytes, natural_order, print_inspection, tensor_table, totals
from hlwq_formats.layout import align


def info(name: str, reason: str = "default", **more: object) -> TensorInfo:
    return TensorInfo(name, [64, 128], "BF16", "scalar", 5, 5.2, 5400, reason, **more)  # type: ignore[arg-type]


def shown(*tensors: TensorInfo) -> list[str]:
    """The lines of the table."""
    console = Console(file=io.StringIO(), width=220, color_system=None)
    console.print(tensor_table(list(tensors)))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


# --- order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["layers.2.w", "layers.10.w"],
        ["layers.2.experts.9", "layers.2.experts.10", "layers.10.experts.1"],
        ["a", "a.0", "a.1", "a.b"],
        ["1", "2", "10", "a"],
        ["", "0", "x"],
        ["a1", "a1.w", "a2"],
        ["layers.9", "layers.100000000000000000"],
    ],
)
def test_numbers_sort_by_value(names: list[str]) -> None:
    found = names[::-1]
    found.sort(key=natural_order)
    assert found == names


@pytest.mark.parametrize("name", ["²", "٣", "x²٣", "9" * 5000])
def test_unusual_digits_do_no_harm(name: str) -> None:
    assert sorted([name, "layers.2"], key=natural_order) == sorted(["layers.2", name], key=natural_order)


def test_the_table_is_in_the_given_order() -> None:
    lines = shown(info("layers.10.w"), info("layers.2.w"))
    assert [line.split()[0] for line in lines[1:]] == ["layers.10.w", "layers.2.w"]


# --- text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_234_000, "1.2 MB"),
        (5_000_000_000, "5.0 GB"),
        (1_500_000_000_000, "1.50 TB"),
        (2e18, "2000000.00 TB"),
    ],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [("a\u202eb", r"a\u202eb"), ("\x1b[31mred", r"\x1b[31mred"), ("a\u2028b", r"a\u2028b"), ("[bold]x", "[bold]x")],
)
def test_names_are_shown_escaped(name: str, text: str) -> None:
    lines = shown(info(name))
    assert lines[1].split()[0] == text
    assert len(lines) == 2


def test_reasons_are_shown_escaped() -> None:
    assert r"rule \x1b[31m[red]" in shown(info("w", "rule \x1b[31m[red]"))[1]


def test_numbers_have_a_place_in_the_table() -> None:
    line = shown(info("w", cosine=0.998765, sqnr_db=26.987, rel_mse=0.002))[1]
    assert line.split() == ["w", "64x128", "BF16", "scalar", "5", "5,400", "0.99877", "26.99", "default"]


def test_what_was_not_measured_is_a_dash() -> None:
    assert shown(info("w"))[1].split()[6:8] == ["-", "-"]


def test_long_names_are_folded_not_cut() -> None:
    name = "x" * 512
    assert "".join(shown(info(name))).count("x") == 512 + 1  # one in 64x128


def test_an_inspection_is_printed_whole(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = inspect(converted)
    print_inspection(result)
    printed = capsys.readouterr().out
    assert [t.name for t in result.tensors if t.name not in printed] == []
    assert f"content {result.content_id}" in printed
    assert "\x1b" not in printed


def test_totals_count_tensors_and_bits(converted: Path) -> None:
    result = inspect(converted)
    first = totals(result).splitlines()[0]
    assert first.startswith("15 quantized, 5 raw, 0 aliased; 186,336 weights in ")
    assert first.endswith(f"{result.bpw:.3f} bits a weight")


def test_totals_of_a_dry_run_have_no_identity(model: Path) -> None:
    assert "content" not in totals(dry_run(prepare(model), "out.hlwq"))


# --- sums -------------------------------------------------------------------------------------------


def padding_of(result: Inspection, sections: list[int]) -> int:
    """Bytes between sections of these lengths, by the rule of the container."""
    end, padding = 128, 0
    for length in [*sections, 0]:
        padding += align(end) - end
        end = align(end) + length
    return padding


def test_bytes_by_encoding_sum_to_the_file(converted: Path) -> None:
    result = inspect(converted)
    assert sum(result.summary.bytes_by_encoding.values()) == result.file_bytes == converted.stat().st_size


def test_bytes_by_encoding_of_a_dry_run_sum_to_its_guess(model: Path) -> None:
    guess = dry_run(prepare(model), "out.hlwq")
    assert sum(guess.summary.bytes_by_encoding.values()) == guess.file_bytes


def test_padding_is_what_alignment_takes(converted: Path) -> None:
    result = inspect(converted)
    sections = [16]
    for t in result.tensors:
        n = t.shape[0] * (t.shape[1] if len(t.shape) > 1 else 1)
        blocks = -(-n // 128)
        sections += [t.bytes] if t.encoding == "raw" else [blocks * 80, 128, blocks * 2]
    sections += [asset.bytes for asset in result.assets]
    assert result.summary.bytes_by_encoding["padding"] == padding_of(result, sections)


def test_bytes_of_tensors_sum_to_their_encodings(converted: Path) -> None:
    result = inspect(converted)
    for encoding in ("scalar", "raw"):
        expected = sum(t.bytes for t in result.tensors if t.encoding == encoding)
        assert result.summary.bytes_by_encoding[encoding] == expected > 0


def test_aliases_take_no_bytes_and_count_no_weights(tmp_path: Path) -> None:
    same = normal((64, 128))
    result = convert(write_model(tmp_path / "m", {"a": same, "b": same}), tmp_path / "out.hlwq")
    assert [(t.encoding, t.bytes, t.reason) for t in result.tensors][1] == ("alias", 0, "equals a")
    assert (result.summary.aliased, result.weights) == (1, 64 * 128)
    assert sum(result.summary.bytes_by_encoding.values()) == result.file_bytes
