"""The figures of an evaluation, their cache, their pictures, and what sensitivities say about bits: no torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hlwq_convert.evaluation import reference as references
from hlwq_convert.evaluation.labels import Box, place_labels
from hlwq_convert.evaluation.reference import Reference, load_reference, reference_key, store_reference
from hlwq_convert.evaluation.results import Entry, Evaluation, Missing
from hlwq_convert.evaluation.sensitivity import (
    Measured,
    continue_sensitivity,
    measuring_order,
    summarise,
    write_sensitivity,
)
from hlwq_convert.evaluation.statistics import Scores, mean_interval, quality, student_quantile
from hlwq_convert.evaluation.tables import markdown, rows
from hlwq_convert.evaluation.task_scores import compare
from hlwq_convert.evaluation.windows import cut_windows, read_text
from hlwq_formats.errors import CannotCreate, Usage

# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "exact"), [(2, 4.30265), (3, 3.18245), (5, 2.57058), (15, 2.13145), (100, 1.98397)]
)
def test_student_quantiles_are_those_of_the_tables(freedom: int, exact: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(exact, rel=0.01 if freedom < 3 else 0.0015)


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(3, 2, 8)) for _ in range(2000)]
    covered = sum(i.low <= 3 <= i.high for i in intervals if i is not None) / 2000
    assert 0.935 < covered < 0.965


def scores(windows: int = 8, tokens: int = 50, worse: float = 0.1) -> tuple[Scores, np.ndarray]:
    rng = np.random.default_rng(1)
    source = rng.exponential(3, (windows, tokens)) + rng.normal(0, 1, (windows, 1))
    kl = rng.exponential(0.05, (windows, tokens))
    return Scores(source + worse, kl, rng.random((windows, tokens)) < 0.9), source


def test_a_constant_difference_has_a_ratio_without_doubt() -> None:
    worse, source = scores()
    found = quality(worse, source)
    assert found.perplexity == pytest.approx(math.exp(source.mean() + 0.1))
    assert found.perplexity_ratio == pytest.approx(math.exp(0.1))
    assert found.perplexity_ratio_interval is not None
    # the perplexity of a window varies by a factor of e; pairing takes that out
    assert found.perplexity_ratio_interval.high - found.perplexity_ratio_interval.low < 1e-9


def test_quantiles_and_shares_are_over_all_tokens() -> None:
    worse, source = scores()
    found = quality(worse, source)
    flat = np.sort(worse.kl.ravel())
    assert found.kl_max == flat[-1]
    assert flat[198] <= found.kl_median <= flat[201]
    assert (found.kl_p95, found.kl_p99) == (np.percentile(flat, 95), np.percentile(flat, 99))
    assert found.top1 == worse.agree.mean()
    assert found.kl_interval is not None
    assert found.kl_interval.low < found.kl_mean == worse.kl.mean() < found.kl_interval.high


def test_two_windows_have_no_interval() -> None:
    found = quality(*scores(windows=2))
    assert (found.perplexity_ratio_interval, found.kl_interval, found.top1_interval) == (None, None, None)


def test_tasks_are_compared_question_by_question() -> None:
    source = {("t", "acc"): {i: float(i % 2) for i in range(100)}, ("t", "one"): {0: 1.0}}
    model = {("t", "acc"): {i: float((i % 2 and i > 9) or i == 50) for i in range(99)}, ("t", "one"): {0: 1.0}}
    (found,) = compare("m", model, source)
    assert (found.samples, found.source_better, found.model_better) == (99, 5, 1)
    assert found.value == pytest.approx(45 / 99)
    assert found.difference == pytest.approx(-4 / 99)
    assert found.standard_error == pytest.approx(math.sqrt(45 / 99 * 54 / 99 / 98))
    assert found.difference_interval is not None
    assert found.difference_interval.low < -4 / 99 < found.difference_interval.high


# --- text and windows -----------------------------------------------------------------------------


def test_windows_do_not_overlap_and_spread_over_the_text() -> None:
    tokens = range(1000)
    cut = cut_windows(tokens, None, 100, 4)
    assert cut.tolist() == [list(range(start, start + 100)) for start in (0, 200, 500, 700)]
    first = cut_windows(tokens, -1, 101, 3)
    assert first[:, 0].tolist() == [-1, -1, -1]
    assert first[:, 1].tolist() == [0, 300, 600]
    assert cut_windows(tokens, None, 300, 99).shape == (3, 300)
    with pytest.raises(Usage, match="1000 tokens, one window takes 1001"):
        cut_windows(tokens, None, 1001, 1)


def test_the_text_of_the_package_is_there_and_others_must_be_text(tmp_path: Path) -> None:
    assert len(read_text(None).encode()) == 199_628
    (tmp_path / "t").write_bytes(b"abc\xff")
    with pytest.raises(Usage, match="byte 3 is 0xff"):
        read_text(str(tmp_path / "t"))


# --- the cache of references ----------------------------------------------------------------------


def some_reference(seed: int = 0) -> Reference:
    rng = np.random.default_rng(seed)
    many, few = (2, 3, 4), (2, 3)
    return Reference(
        rng.integers(0, 99, many, np.int32), rng.random(many, np.float32), rng.random(few, np.float32),
        rng.integers(0, 99, many, np.int32), rng.random(many, np.float32), rng.random(few),
    )  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_reference_comes_back_and_a_damaged_one_does_not(cache: Path) -> None:
    key = reference_key(source="s")
    assert key != reference_key(source="other")
    assert load_reference(key) is None
    path = store_reference(key, some_reference())
    assert path is not None and path.is_relative_to(cache)
    loaded = load_reference(key)
    assert loaded is not None
    for name, array in vars(some_reference()).items():
        assert np.array_equal(getattr(loaded[0], name), array) and getattr(loaded[0], name).dtype == array.dtype
    good = path.read_bytes()
    for at in range(0, len(good), 97):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert load_reference(key) is None
    for end in (0, 31, 32, len(good) - 1):
        path.write_bytes(good[:end])
        assert load_reference(key) is None


def test_old_references_make_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = store_reference("a", some_reference()).stat().st_size  # type: ignore[union-attr]
    monkeypatch.setattr(references, "KEPT_BYTES", 2 * size)
    store_reference("b", some_reference())
    store_reference("c", some_reference())
    assert [load_reference(key) is not None for key in "abc"] == [False, True, True]


def test_a_cache_that_cannot_be_written_is_no_failure(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    assert store_reference("a", some_reference()) is None


# --- tables and the chart -------------------------------------------------------------------------


def entry(name: str, kind: str, bpw: float, kl: float) -> Entry:
    worse, source = scores()
    found = quality(Scores(worse.nll, worse.kl / worse.kl.mean() * kl, worse.agree), source)
    return Entry(name, kind, round(bpw * 1e6), bpw, found)  # type: ignore[arg-type]


def evaluation(*entries: Entry) -> Evaluation:
    return Evaluation(
        model="dir/model", text="t.txt", text_sha256="0" * 64, ctx=51, windows=8, tokens=400, dtype="float32",
        device="cpu", top_k=256, samples=256, rest=0.05, entries=[entry("dir/model", "source", 16, 0), *entries],
        missing=[Missing("HQQ", "ImportError: No module named 'hqq'")], tasks=[], warnings=[],
    )  # fmt: skip


def test_markdown_has_a_row_for_each_model() -> None:
    text = markdown(evaluation(entry("a/x|y.hlwq", "hlwq", 5.17, 0.0123), entry("NF4", "peer", 6.9, 0.2)))
    lines = text.splitlines()
    assert lines[0].startswith("| model | size | bpw |")
    assert lines[2].startswith("| model | 16.0 MB | 16.000 |") and lines[2].count("|") == 12
    assert lines[3].startswith("| x\\|y.hlwq | 5.2 MB | 5.170 |") and " 0.0123 (" in lines[3]
    assert lines[4].startswith("| NF4 |")
    assert "Not measured: HQQ (ImportError: No module named 'hqq')." in text


def test_tasks_name_models_as_the_first_table_does() -> None:
    (score,) = compare("a/x.hlwq", {("t", "acc"): {0: 1.0, 1: 0.0}}, {("t", "acc"): {0: 1.0, 1: 1.0}})
    document = msgspec.structs.replace(evaluation(entry("a/x.hlwq", "hlwq", 5.17, 0.0123)), tasks=[score])
    row = next(line for line in markdown(document).splitlines() if line.startswith("| t | "))
    assert row == "| t | acc | x.hlwq | 2 | 0.5000 ± 0.5000 | -0.5000 | 1 | 0 |"


def test_equal_names_keep_their_folders() -> None:
    names = [row[0] for row in rows(evaluation(entry("a/m.hlwq", "hlwq", 5, 0.1), entry("b/m.hlwq", "hlwq", 4, 0.2)))]
    assert names == ["dir/model", "a/m.hlwq", "b/m.hlwq"]


def test_the_pareto_line_drops_what_another_beats() -> None:
    pytest.importorskip("matplotlib")
    from hlwq_convert.evaluation.chart import draw_chart, pareto

    good = [entry(str(bits), "hlwq", bits, 4.0**-bits) for bits in (5, 2, 8)]
    beaten = entry("NF4 $x$", "peer", 6, 0.1)
    assert [e.name for e in pareto([*good, beaten])] == ["2", "5", "8"]
    picture = draw_chart(evaluation(*good, beaten))
    assert picture.startswith(b"\x89PNG") and picture == draw_chart(evaluation(*good, beaten))


def cover(a: Box, b: Box) -> bool:
    return min(a.right, b.right) > max(a.left, b.left) and min(a.top, b.top) > max(a.bottom, b.bottom)


def test_labels_cover_neither_points_nor_each_other() -> None:
    rng = np.random.default_rng(0)
    frame = Box(0, 0, 1000, 600)
    points = [(float(x), float(y)) for x, y in rng.uniform((200, 100), (800, 500), (25, 2))]
    points += [(700.0, 300.0), (700.0, 304.0), (700.0, 296.0)]  # three on one spot
    sizes = [(float(width), 14.0) for width in rng.uniform(40, 160, len(points))]
    marks = [Box(x - 8, y - 8, x + 8, y + 8) for x, y in points]
    places = place_labels(points, sizes, marks, frame)
    assert place_labels(points, sizes, marks, frame) == places
    boxes = [*marks, *places]
    first = len(marks)
    assert [(i, j) for i in range(first, len(boxes)) for j in range(i) if cover(boxes[i], boxes[j])] == []
    for place, size in zip(places, sizes, strict=True):
        assert (place.right - place.left, place.top - place.bottom) == pytest.approx(size)
        assert frame.left <= place.left and place.right <= frame.right
        assert frame.bottom <= place.bottom and place.top <= frame.top


def test_a_label_with_room_stands_to_the_right_and_above_and_one_without_stays_inside() -> None:
    frame = Box(0, 0, 100, 100)
    assert place_labels([(50, 50)], [(20, 10)], [], frame) == [Box(59, 59, 79, 69)]
    assert place_labels([(95, 95)], [(20, 10)], [], frame) == [Box(66, 90, 86, 100)]


# --- sensitivities --------------------------------------------------------------------------------


def random_tensors(seed: int = 0, count: int = 40) -> tuple[dict[str, int], dict[str, float]]:
    """Numbers of weights, and divergence for a unit of relative squared error."""
    rng = np.random.default_rng(seed)
    names = [f"layers.{i // 4}.{'qkvo'[i % 4]}.weight" for i in range(count)]
    weights = {name: int(rng.integers(1000, 50_000)) for name in names}
    return weights, {name: float(10 ** rng.normal(-1, 0.5)) for name in names}


def measured(weights: dict[str, int], slope: dict[str, float], error: float = 0.01) -> dict[str, Measured]:
    return {name: Measured(weights[name], error, slope[name] * error) for name in slope}


def total(slope: dict[str, float], errors: dict[str, float]) -> float:
    return sum(slope[name] * errors[name] for name in slope)


def test_no_other_way_to_spend_the_bits_has_less_divergence() -> None:
    weights, slope = random_tensors()
    found = summarise(weights, measured(weights, slope), {})
    uniform = dict.fromkeys(weights, 0.01)
    ours = {name: 0.01 / found.tensors[name] for name in weights}  # the step times 1 / sqrt(s)

    def bits(errors: dict[str, float]) -> float:
        return sum(weights[name] * -math.log2(errors[name]) / 2 for name in weights)

    assert bits(ours) == pytest.approx(bits(uniform))
    assert total(slope, ours) / total(slope, uniform) == pytest.approx(found.gain)
    assert found.gain < 0.9
    rng = np.random.default_rng(1)
    for _ in range(100):  # move bits from one tensor to another
        a, b = rng.choice(list(weights), 2, replace=False)
        moved = rng.normal(0, 2000)
        other = ours | {a: ours[a] * 4 ** (moved / weights[a]), b: ours[b] * 4 ** (-moved / weights[b])}
        assert bits(other) == pytest.approx(bits(ours))
        assert total(slope, other) > total(slope, ours)


def test_the_width_of_the_noise_does_not_matter() -> None:
    weights, slope = random_tensors()
    coarse, fine = (summarise(weights, measured(weights, slope, error), {}) for error in (0.1, 0.001))
    assert fine.tensors == pytest.approx(coarse.tensors)


def test_what_is_not_measured_is_predicted_from_its_type_and_depth() -> None:
    weights = {f"layers.{i}.{part}": 1000 for i in range(5) for part in "qkv"}
    slope = {f"layers.{i}.q": 2.0**i for i in (0, 4)} | {"layers.2.k": 2.0**6}
    found = summarise(weights, measured(weights, slope), {})
    assert found.predicted == sorted(weights.keys() - slope.keys())
    logs = {name: math.log2(s) for name, s in found.tensors.items()}
    assert logs["layers.2.q"] - logs["layers.0.q"] == pytest.approx(2)  # halfway between its neighbours
    assert logs["layers.0.k"] == logs["layers.4.k"] == pytest.approx(logs["layers.2.k"])
    assert logs["layers.3.v"] == pytest.approx(logs["layers.4.q"])  # the median of all
    assert sum(logs.values()) == pytest.approx(0)


def test_a_tensor_that_does_nothing_and_one_that_does_all_stay_within_bounds() -> None:
    weights = {"a": 1000, "b": 1000, "c": 1000}
    found = summarise(weights, measured(weights, {"a": 1e-12, "b": 1.0, "c": 0.0}), {})
    assert found.tensors["b"] / found.tensors["a"] == pytest.approx(2**16)
    assert summarise(weights, {}, {}).tensors == {"a": 1, "b": 1, "c": 1}


def test_large_tensors_come_first_and_equal_ones_far_apart() -> None:
    weights = {f"layers.{i}.up": 500 for i in range(8)} | {"embed": 9000} | {f"layers.{i}.k": 100 for i in range(8)}
    order = measuring_order(weights)
    assert order[0] == "embed"
    assert [name.split(".")[1] for name in order[1:5]] == ["0", "4", "2", "6"]
    assert sorted(order) == sorted(weights)
    assert all(name.endswith("up") for name in order[1:9])


def test_a_measurement_is_continued_only_with_the_same_settings(tmp_path: Path) -> None:
    weights, slope = random_tensors(count=4)
    path = tmp_path / "s.json"
    assert continue_sensitivity(path, {}) == {}
    document = summarise(weights, measured(weights, slope), {"source": "a", "noise": "b"})
    write_sensitivity(path, document)
    assert continue_sensitivity(path, {"source": "a", "noise": "b"}) == document.measured
    content = json.loads(path.read_text())
    assert content["version"] == 1 and content["tensors"] == pytest.approx(document.tensors)
    with pytest.raises(CannotCreate, match="its noise differs"):
        continue_sensitivity(path, {"source": "a", "noise": "c"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: text.replace('"rel_mse": 0.01', '"rel_mse": -1', 1),
        lambda text: text.replace('"rel_mse": 0.01', '"rel_mse": 1e999', 1),
        lambda text: text.replace('"version": 1', '"version": 1, "version": 1'),
    ],
)
def test_another_file_in_its_place_is_not_replaced(tmp_path: Path, damage: Callable[[str], str]) -> None:
    weights, slope = random_tensors(count=2)
    path = tmp_path / "s.json"
    write_sensitivity(path, summarise(weights, measured(weights, slope), {}))
    path.write_text(changed := damage(path.read_text()))
    with pytest.raises(CannotCreate, match="choose another output or pass --overwrite"):
        continue_sensitivity(path, {})
    assert path.read_text() == changed
