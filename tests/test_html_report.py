"""The page of an inspection: its data, its safety, its place on disk. tests/test_browser.py looks at it."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import os
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from conftest import Run
from models import normal, write_model
from reports import EVIL, inspection, many, quantized

from hlwq_convert import convert
from hlwq_convert.codebook import REACH
from hlwq_convert.decode import get_numpy
from hlwq_convert.histograms import SHOWN_BINS, worst_histograms
from hlwq_convert.html_report import make_page
from hlwq_convert.inspection import TensorInfo, inspect
from hlwq_convert.normal_levels import normal_levels
from hlwq_convert.page_data import page_data, shown
from hlwq_convert.source import open_source
from hlwq_formats.reader import Reader


class Outline(html.parser.HTMLParser):
    """Tags of a page, its policy, and the texts of its styles and scripts."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.policy = ""
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attributes)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        assert not any(name.startswith("on") or name in ("src", "style") for name in given)

    def handle_data(self, text: str) -> None:
        if self.tags and self.tags[-1] in self.texts and text.strip():
            self.texts[self.tags[-1]].append(text)


def test_texts_of_the_file_make_no_markup() -> None:
    plain = Outline(make_page(inspection([quantized("t", reason="t")], "t"), []))
    evil = Outline(make_page(inspection([quantized(EVIL, reason=EVIL)], EVIL), []))
    assert evil.tags == plain.tags
    data = json.loads(evil.texts["script"][0])
    assert data["tensors"]["name"] == [shown(EVIL)]
    assert data["texts"]["reason"] == [shown(EVIL)]
    assert "\u202e" not in str(data)


def test_what_cannot_be_seen_is_shown_as_escapes_and_expressions_stay_readable() -> None:
    assert shown("a\u202eb\x1b\u2028\U000e0001") == r"a\u202eb\x1b\u2028\U000e0001"
    assert shown(r"\bup_proj(\.weight)?$ é 語") == r"\bup_proj(\.weight)?$ é 語"


def test_the_policy_allows_its_own_style_and_script_alone() -> None:
    outline = Outline(make_page(inspection([]), []))

    def allowed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    (style,), (_, script) = outline.texts["style"], outline.texts["script"]
    assert outline.policy == (
        f"default-src 'none'; style-src {allowed(style)}; script-src {allowed(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def test_the_page_names_no_address() -> None:
    page = re.sub(r"'sha256-[^']*'", "", make_page(inspection([quantized("w")]), []).decode())  # base64 may have //
    assert re.findall(r"(?:https?:)?//[a-z][^\s\"')]*", page) == ["http://www.w3.org/2000/svg"]  # a name, never asked


def test_the_page_is_the_same_every_time(converted: Path) -> None:
    assert make_page(inspect(converted), []) == make_page(inspect(converted), [])


def test_the_table_holds_every_tensor_in_natural_order(converted: Path) -> None:
    result = inspect(converted)
    data = json.loads(msgspec.json.encode(page_data(result, [])))
    columns = data["tensors"]
    assert sorted(columns["name"]) == sorted(t.name for t in result.tensors)
    by_name = {t.name: t for t in result.tensors}
    for i, name in enumerate(columns["name"]):
        tensor = by_name[name]
        assert columns["bytes"][i] == tensor.bytes
        assert columns["sqnr"][i] == (None if tensor.sqnr_db is None else pytest.approx(tensor.sqnr_db, abs=1e-4))
        assert data["texts"]["shape"][columns["shape"][i]] == "x".join(map(str, tensor.shape))
        assert data["texts"]["reason"][columns["reason"][i]] == tensor.reason
    assert all(len(column) == len(result.tensors) for column in columns.values())


def test_sizes_by_module_sum_to_what_tensors_and_files_take(converted: Path) -> None:
    result = inspect(converted)
    kinds = result.summary.bytes_by_encoding
    expected = result.file_bytes - kinds["shared"] - kinds["header"] - kinds["padding"]
    assert sum(row["bytes"] for row in page_data(result, [])["sizes"]) == expected
    tensors = [quantized(f"m{i}") for i in range(40)]
    sizes = page_data(inspection(tensors), [])["sizes"]
    assert sizes[0] == {
        "name": "26 smaller modules", "label": "26 smaller modules", "bytes": 26 * tensors[0].bytes, "bits": None,
        "part": "other",
    }  # fmt: skip


def test_maps_have_modules_down_and_layers_across() -> None:
    raw = TensorInfo("l.2.up.weight", [576, 576], "BF16", "raw", 16, 16.0, 663552, "rule")
    norm = TensorInfo("l.0.norm.weight", [576], "BF16", "raw", 16, 16.0, 1152, "norm")
    tensors = [quantized("l.10.up.weight", 26.0), quantized("l.2.down.weight", 28.0), raw, norm, quantized("head")]
    maps = page_data(inspection(tensors), [])["maps"]
    bits = tensors[0].bpw
    assert maps["layers"] == [2, 10]
    assert [(row["label"], row["cells"]) for row in maps["rows"]] == [
        ("down", [[bits, 28.0], None]),
        ("up", [[None, None], [bits, 26.0]]),
    ]
    assert maps["sqnr"] == (26.0, 28.0)
    assert maps["bits"] == pytest.approx((bits - 0.25, bits + 0.25))
    assert maps["rest"] == "Outside the layers: head 5.13 bits, 27.00 dB."


def test_tensors_of_variable_rate_stand_beside_the_others() -> None:
    trellis = TensorInfo("l.0.w", [576, 576], "BF16", "trellis", None, 4.5, 186624, "default", 0.999, 27.0, 0.002)
    data = page_data(inspection([trellis, quantized("l.1.w")]), [])
    assert data["maps"]["rows"][0]["cells"] == [[4.5, 27.0], [quantized("x").bpw, 27.0]]
    assert data["tensors"]["bits"] == [4.5, round(quantized("x").bpw or 0, 4)]
    assert data["texts"]["encoding"] == ["trellis", "scalar 5"]
    assert data["sizes"][0]["part"] == "scalar"  # the larger of the two


def test_maps_of_several_stacks_have_headings() -> None:
    names = ["enc.layers.0.w", "dec.layers.0.w", "dec.layers.1.v"]
    rows = page_data(inspection([quantized(name) for name in names]), [])["maps"]["rows"]
    assert [row["label"] for row in rows] == ["dec.layers", "v", "w", "enc.layers", "w"]


def test_maps_of_hostile_files_are_bounded() -> None:
    tensors = [quantized(f"l.{i}.m{i}") for i in range(500)]
    maps = page_data(inspection(tensors), [])["maps"]
    assert len(maps["rows"]) == 80 and len(maps["layers"]) == 80
    assert "420 more modules are in the table below." in maps["note"]
    maps = page_data(inspection([quantized(f"l.{i}.w") for i in range(500)]), [])["maps"]
    assert len(maps["layers"]) == 400 and "Layers from 400 on" in maps["note"]


def test_a_page_of_60_000_tensors_is_of_moderate_size() -> None:
    assert len(make_page(many(), [])) < 8_000_000  # 130 bytes a tensor, half of them its name


# --- histograms -------------------------------------------------------------------------------------


def test_histograms_show_what_the_rotation_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    heavy = rng.standard_t(3, (256, 512)).astype(np.float32)
    model = write_model(tmp_path / "m", {"l.0.w": ("F32", heavy.shape, heavy.tobytes())})
    convert(model, tmp_path / "o.hlwq", bits=4)
    with Reader(tmp_path / "o.hlwq") as reader:
        (one,) = worst_histograms(reader, open_source(model), inspect(tmp_path / "o.hlwq"))
        levels = reader.levels(reader.stored_tensor("l.0.w"))  # type: ignore[arg-type]
    assert one.coordinates == sum(one.before) == sum(one.after) == heavy.size
    assert one.levels == levels.tolist() and len(levels) == 16
    blocks = heavy.reshape(-1, 128).astype(np.float64)
    unit = blocks / np.sqrt((blocks**2).mean(axis=1, keepdims=True))
    expected = np.histogram(np.clip(unit, -REACH, REACH), SHOWN_BINS, (-REACH, REACH))[0]
    assert np.abs(np.array(one.before) - expected).sum() <= 4  # float32 may round a value over the edge of its bin
    before, after = one.kurtosis
    clipped = np.clip(unit, -REACH, REACH)
    assert before == pytest.approx((clipped**4).mean() / (clipped**2).mean() ** 2, rel=1e-4)
    assert before > 8 and abs(after - 3) < 0.5
    density = np.array(one.after) / heavy.size / (2 * REACH / SHOWN_BINS)
    centres = (np.arange(SHOWN_BINS) + 0.5) * (2 * REACH / SHOWN_BINS) - REACH
    assert np.abs(density - np.exp(-(centres**2) / 2) / np.sqrt(2 * np.pi)).max() < 0.02


def test_histograms_are_of_the_worst_tensor_of_each_module(model: Path, converted: Path) -> None:
    result = inspect(converted)
    with Reader(converted) as reader:
        found = worst_histograms(reader, open_source(model), result)
    assert len(found) == 8
    worst = {t.name: t.sqnr_db for t in result.tensors if t.sqnr_db is not None}
    for one in found:
        twins = [re.sub(r"\d", digit, one.name) for digit in "01"]
        assert worst[one.name] == min(worst[twin] for twin in twins)
    assert found[0].name == "model.embed_tokens.weight"


def test_a_sample_of_zeros_has_no_histogram(tmp_path: Path) -> None:
    weights = np.zeros((600, 1024), np.float32)
    weights[599, 1000] = 1  # the sample takes every second group of 16 blocks, and not this one
    model = write_model(tmp_path / "m", {"w": ("F32", weights.shape, weights.tobytes())})
    convert(model, tmp_path / "o.hlwq")
    with Reader(tmp_path / "o.hlwq") as reader:
        assert worst_histograms(reader, open_source(model), inspect(tmp_path / "o.hlwq")) == []


def test_tensors_too_small_to_fit_show_the_normal_levels(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", {"w": normal((64, 64))})
    convert(model, tmp_path / "o.hlwq")
    with Reader(tmp_path / "o.hlwq") as reader:
        (one,) = worst_histograms(reader, open_source(model), inspect(tmp_path / "o.hlwq"))
    assert one.levels == normal_levels(5).tolist()


def test_levels_of_a_trellis_are_what_its_coordinates_decode_to(tmp_path: Path) -> None:
    # one row has one scale, and so few blocks are all sampled
    weights = np.random.default_rng(0).standard_t(3, 1 << 17).astype(np.float32)
    model = write_model(tmp_path / "m", {"w": ("F32", (1, weights.size), weights.tobytes())})
    convert(model, tmp_path / "o.hlwq", bpw=4)
    with Reader(tmp_path / "o.hlwq") as reader:
        (one,) = worst_histograms(reader, open_source(model), inspect(tmp_path / "o.hlwq"))
        signs = reader.signs()
        decoded = get_numpy(reader, "w").astype(np.float64).reshape(-1, 128) * signs
    assert one.coordinates == sum(one.before) == sum(one.after) == weights.size
    hadamard = np.array([[1 - 2 * ((i & j).bit_count() % 2) for i in range(128)] for j in range(128)]) / np.sqrt(128)
    unit = decoded @ hadamard / np.sqrt(np.square(weights, dtype=np.float64).mean())
    assert one.step is not None and 0.1 < one.step < 0.2  # of 4 bits
    steps = unit / one.step
    assert np.abs(steps - np.round(steps)).max() < 1e-3
    most = round(one.levels[-1] / one.step)
    assert np.allclose(one.levels, one.step * np.arange(-most, most + 1))
    assert (np.abs(steps) > most + 0.5).mean() < 0.001  # those have no frequency of their own
    rotated = (weights.astype(np.float64).reshape(-1, 128) * signs) @ hadamard
    unit = np.clip(rotated / np.sqrt(np.square(rotated).mean()), -REACH, REACH)
    assert one.kurtosis[1] == pytest.approx((unit**4).mean() / (unit**2).mean() ** 2, rel=1e-3)


# --- the command ------------------------------------------------------------------------------------


def test_the_command_writes_a_page(model: Path, converted: Path, tmp_path: Path, run_tool: Run) -> None:
    page = tmp_path / "r.html"
    result = run_tool("inspect", converted, "--html", page, "--against", model, "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert len(json.loads(Outline(page.read_bytes()).texts["script"][0])["histograms"]) == 8
    assert os.listdir(tmp_path) == ["r.html"]


def test_a_page_is_replaced_only_when_asked(converted: Path, tmp_path: Path, run_tool: Run) -> None:
    page = tmp_path / "r.html"
    page.write_text("dear")
    result = run_tool("inspect", converted, "--html", page)
    assert (result.returncode, result.stdout, page.read_text()) == (73, "", "dear")
    assert "pass --overwrite" in result.stderr
    result = run_tool("inspect", converted, "--html", page, "--overwrite")
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, f"wrote {page}")
    assert page.read_bytes().startswith(b"<!doctype html>")


def test_a_page_never_replaces_the_file_it_shows(converted: Path, tmp_path: Path, run_tool: Run) -> None:
    copy = tmp_path / "m.hlwq"
    copy.write_bytes(converted.read_bytes())
    (tmp_path / "link.html").hardlink_to(copy)
    for name in ("m.hlwq", "link.html"):
        assert run_tool("inspect", copy, "--html", tmp_path / name, "--overwrite").returncode == 2
    assert copy.read_bytes() == converted.read_bytes()


def test_no_page_is_made_of_a_file_that_fails(converted: Path, tmp_path: Path, run_tool: Run) -> None:
    other = write_model(tmp_path / "m", {"w": normal((64, 128))})
    result = run_tool("inspect", converted, "--html", tmp_path / "r.html", "--against", other, "--quiet")
    assert result.returncode == 65
    assert sorted(os.listdir(tmp_path)) == ["m"]
