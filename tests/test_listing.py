"""Order, filter and CSV of hlwq-inspect."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from conftest import Run

from hlwq_convert.inspection import TensorInfo
from hlwq_convert.listing import SortKey, choose, to_csv
from hlwq_formats.errors import Usage

TENSORS = [
    TensorInfo("l.10.w", [2, 3], "BF16", "scalar", 4, 4.5, 300, "default", 0.997, 22.0, 0.006),
    TensorInfo("l.2.w", [2, 3], "BF16", "scalar", 5, 5.2, 100, "default", 0.999, 21.0, 0.008),
    TensorInfo("norm", [3], "F32", "raw", 32, 32.0, 12, "norm"),
    TensorInfo("tied", [2, 3], "BF16", "alias", None, None, 0, "equals l.2.w"),
]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("name", ["l.2.w", "l.10.w", "norm", "tied"]),
        ("bits", ["norm", "l.2.w", "l.10.w", "tied"]),
        ("bytes", ["l.10.w", "l.2.w", "norm", "tied"]),
        ("cosine", ["l.10.w", "l.2.w", "norm", "tied"]),
        ("sqnr", ["l.2.w", "l.10.w", "norm", "tied"]),
    ],
)
def test_the_worst_come_first(key: SortKey, expected: list[str]) -> None:
    assert [t.name for t in choose(TENSORS[::-1], key)] == expected


def test_a_filter_finds_anywhere_in_the_name() -> None:
    assert [t.name for t in choose(TENSORS, "name", r"\.w$")] == ["l.2.w", "l.10.w"]
    assert choose(TENSORS, "name", "^w") == []
    with pytest.raises(Usage, match="--filter is not a regular expression"):
        choose(TENSORS, "name", "(")


def test_csv_has_one_line_a_tensor() -> None:
    rows = list(csv.reader(io.StringIO(to_csv(TENSORS))))
    assert rows[0] == list(TensorInfo.__struct_fields__[:1]) + rows[0][1:]
    assert set(rows[0]) == set(TensorInfo.__struct_fields__)
    assert rows[1] == [
        "l.10.w",
        "2x3",
        "BF16",
        "scalar",
        "4",
        "4.5",
        "300",
        "0.997",
        "22.0",
        "0.006",
        "",
        "",
        "default",
    ]
    assert rows[4] == ["tied", "2x3", "BF16", "alias", "", "", "0", "", "", "", "", "", "equals l.2.w"]


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("@x", "'@x"),
        ("+x", "'+x"),
        ("-x", "'-x"),
        ('a,"b"', 'a,"b"'),
        ("a\u202eb\x1b", "a\\u202eb\\x1b"),
        ("x" * 512, "x" * 512),
    ],
)
def test_csv_is_safe_to_open(name: str, cell: str) -> None:
    text = to_csv([TensorInfo(name, [], "F32", "raw", 32, 32.0, 4, name)])
    rows = list(csv.reader(io.StringIO(text)))
    assert (rows[1][0], rows[1][1], rows[1][-1]) == (cell, "0-d", cell)
    assert "\x1b" not in text


def test_the_options_reach_every_form(converted: Path, run_tool: Run) -> None:
    arguments = ("inspect", converted, "--sort", "sqnr", "--filter", "mlp")
    document = json.loads(run_tool(*arguments, "--json").stdout)
    names = [tensor["name"] for tensor in document["tensors"]]
    errors = [tensor["sqnr_db"] for tensor in document["tensors"]]
    assert len(names) == 6 and errors == sorted(errors)
    assert document["summary"]["quantized"] == 15  # totals are of the whole file
    rows = list(csv.reader(io.StringIO(run_tool(*arguments, "--csv").stdout)))
    assert [row[0] for row in rows[1:]] == names
    table = run_tool(*arguments).stdout.splitlines()
    assert [line.split()[0] for line in table[1:7]] == names
    chart = run_tool("inspect", converted, "--chart").stdout
    assert "SQNR by layer" in chart and "bits a weight" in chart


def test_forms_exclude_one_another(converted: Path, run_tool: Run) -> None:
    result = run_tool("inspect", converted, "--csv", "--json")
    assert (result.returncode, result.stdout) == (2, "")
