"""Files of a size that was asked for: whole conversions at a variable rate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from models import normal, small_model, tensor, write_model

import hlwq_convert as h
from hlwq_convert.against import compare
from hlwq_convert.conversion import TOLERANCE
from hlwq_convert.rate import Sample, predict, take_samples
from hlwq_convert.source import open_source
from hlwq_convert.target import Target, Wish, make_target
from hlwq_formats import metadata as md
from hlwq_formats.errors import BadModelDir, Usage
from hlwq_formats.reader import Reader

Q, UP, DOWN = (f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three matrices of 1.6 million weights in all, one of them with rows of very different size."""
    rng = np.random.default_rng(7)
    uneven = rng.standard_normal((700, 1024), np.float32) * np.exp2(rng.uniform(-6, 0, (700, 1))).astype(np.float32)
    tensors = {
        Q: normal((512, 1024), 1),
        UP: tensor(uneven),
        DOWN: normal((400, 900), 2),
        "model.norm.weight": normal((9,)),
    }
    return write_model(tmp_path_factory.mktemp("source") / "m", tensors)


def test_the_file_has_the_size_that_was_asked_for(matrices: Path, tmp_path: Path) -> None:
    for number, options in enumerate(({"bpw": 2.5}, {"bpw": 4.25, "effort": "fast"}, {"size": "1.1MB"})):
        found = h.convert(matrices, tmp_path / f"{number}.hlwq", **options)  # type: ignore[arg-type]
        wanted = int(options["bpw"] * found.weights / 8) if "bpw" in options else 1_100_000
        assert wanted * (1 - TOLERANCE) <= found.file_bytes <= wanted
        assert found.format_version == "1.1"
        rates = {t.name: t.bpw for t in found.tensors if t.encoding == "trellis"}
        assert list(rates) == sorted([Q, UP, DOWN])
        assert max(rates.values()) - min(rates.values()) < 0.1  # type: ignore[type-var, operator]
        errors = [t.sqnr_db for t in found.tensors if t.sqnr_db is not None]
        assert max(errors) - min(errors) < 0.1  # the same relative error everywhere


def test_same_bytes_for_any_number_of_workers_and_again(matrices: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{workers}.hlwq" for workers in (1, 2, 5)]
    for file, workers in zip(files, (1, 2, 5), strict=True):
        h.convert(matrices, file, bpw=3.7, workers=workers)
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()


def test_verified_compared_and_read_back(matrices: Path, tmp_path: Path) -> None:
    h.convert(matrices, tmp_path / "o.hlwq", bpw=5, sets=("down_proj=4",))
    with Reader(tmp_path / "o.hlwq") as reader:
        reader.verify()
        assert {t.name: type(t) for t in reader.metadata.tensors}[DOWN] is md.ScalarTensor
        assert compare(reader, open_source(matrices), lambda done, total: None) == []
    with h.open(tmp_path / "o.hlwq") as file:
        assert file.get_tensor(UP).shape == (700, 1024)


def test_bounds_and_sensitivities(matrices: Path, tmp_path: Path) -> None:
    plain = {t.name: t.bpw for t in h.convert(matrices, tmp_path / "a.hlwq", bpw=4).tensors}
    bounded = h.convert(matrices, tmp_path / "b.hlwq", bpw=4, min_bits=["q_proj=5.5"], max_bits=["up_proj=3"])
    rates = {t.name: t.bpw for t in bounded.tensors}
    assert rates[Q] == pytest.approx(5.5, abs=0.03)
    assert rates[UP] == pytest.approx(3, abs=0.03)
    (tmp_path / "s.json").write_text(json.dumps({"tensors": {Q: 16.0}, "rules": {"q_proj": 0.1, "down": 0.25}}))
    weighed = h.convert(matrices, tmp_path / "c.hlwq", bpw=4, sensitivity=tmp_path / "s.json")
    rates = {t.name: t.bpw for t in weighed.tensors}
    assert rates[Q] - rates[UP] == pytest.approx(2 + plain[Q] - plain[UP], abs=0.06)  # type: ignore[operator]
    assert rates[UP] - rates[DOWN] == pytest.approx(1 + plain[UP] - plain[DOWN], abs=0.06)  # type: ignore[operator]


def test_dry_run_and_json(matrices: Path, tmp_path: Path, run_tool: Run) -> None:
    out = tmp_path / "o.hlwq"
    planned = json.loads(run_tool("convert", matrices, out, "--bpw", "4.5", "--dry-run", "--json").stdout)
    assert not out.exists()
    real = json.loads(run_tool("convert", matrices, out, "--bpw", "4.5", "--json").stdout)
    assert abs(planned["file_bytes"] - real["file_bytes"]) < 0.002 * real["file_bytes"]
    assert real["metadata"]["recipe"]["target"] == "--bpw 4.5"
    assert run_tool("inspect", out, "--verify").stdout.splitlines()[-1].startswith("verified")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"bpw": 1.4}, "--bpw is 1.4"), ({"bpw": 9}, "--bpw is 9"), ({"bpw": 4, "size": 9}, "exclude each other"),
        ({"bpw": 4, "bits": 5}, "exclude --bits"), ({"size": "12 parsecs"}, "--size is 12 parsecs"),
        ({"min_bits": ["x=3"]}, "need a size"), ({"bpw": 4, "min_bits": ["x"]}, "expected REGEX=BITS"),
        ({"bpw": 4, "max_bits": ["x=99"]}, "bits are 99"), ({"bpw": 4, "max_bits": ["(=9"]}, "regular expression"),
        ({"size": 1000}, "with these options it takes"), ({"size": "1GB"}, "with these options it takes"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(matrices: Path, tmp_path: Path, options: dict[str, object], problem: str) -> None:
    with pytest.raises(Usage) as caught:
        h.convert(matrices, tmp_path / "o.hlwq", **options)  # type: ignore[arg-type]
    assert problem in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["[]", "{}", '{"tensors": 1}', '{"tensors": {"a": "b"}}', '{"tensors": {"a": 0}}',
                                  '{"tensors": {"a": 1e999}}', '{"rules": {"a": -1}}'])  # fmt: skip
def test_bad_sensitivities(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(BadModelDir):
        make_target(4, None, sensitivity=tmp_path / "s.json")


def test_a_tiny_model_of_odd_shapes(tmp_path: Path) -> None:
    """Rows shorter than 64 share one scale; the tail of a block and of a segment; F32 and F16."""
    tensors = {
        "a.weight": normal((5000, 3), dtype="F32"), "b.weight": normal((63, 127), dtype="F16"),
        "c.weight": normal((2, 2, 1100), dtype="BF16"), "d.weight": tensor(np.zeros((64, 64), np.float32)),
    }  # fmt: skip
    found = h.convert(write_model(tmp_path / "m", tensors), tmp_path / "o.hlwq", size=16_000, min_bits=["c=2"])
    assert 14_000 < found.file_bytes <= 16_000
    with Reader(tmp_path / "o.hlwq") as reader:
        reader.verify()
        rows = {t.name: t.row for t in reader.metadata.tensors if isinstance(t, md.TrellisTensor)}
        assert rows == {"a.weight": 15000, "b.weight": 127, "c.weight": 1100, "d.weight": 64}
        assert compare(reader, open_source(tmp_path / "m"), lambda done, total: None) == []
    with h.open(tmp_path / "o.hlwq") as file:
        assert not np.asarray(file.get_tensor("d.weight")).any()


def test_prediction_is_close(matrices: Path, tmp_path: Path) -> None:
    """What samples say a step costs, against what it costs."""
    from concurrent.futures import ThreadPoolExecutor

    found = h.convert(matrices, tmp_path / "o.hlwq", bpw=4)
    source = open_source(matrices)
    with ThreadPoolExecutor(2) as pool, Reader(tmp_path / "o.hlwq") as reader:
        wanted = [t for t in source.tensors if t.name in (Q, UP, DOWN)]
        for sample in take_samples(source.model, wanted, Target(4, None), pool):
            assert isinstance(sample, Sample)
            assert sample.wish == Wish(1, 0, float("inf"))
            entry = reader.stored_tensor(sample.tensor.name)
            assert isinstance(entry, md.TrellisTensor)
            step = entry.step * 2.0**entry.exponent  # times a power of two and a gain: only the order of size is known
            assert step > 0
            stored = sum(s.length for s in entry.sections if s.kind in ("symbols", "frequencies"))
            near = min(abs(predict(sample, s, 32) - stored) for s in np.geomspace(0.1, 0.4, 60))
            assert near < 0.02 * stored
    assert found.bpw is not None


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hlwq_convert import journal

    source = small_model(tmp_path / "m")
    h.convert(source, tmp_path / "whole.hlwq", bpw=6)
    monkeypatch.setattr(journal, "CHECKPOINT_BYTES", 1)
    calls = 0

    def stop(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls += stage == "converting"
        if calls == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        h.convert(source, tmp_path / "o.hlwq", bpw=6, progress=stop)
    assert (tmp_path / "o.hlwq.part").exists()
    resumed = h.convert(source, tmp_path / "o.hlwq", bpw=6)
    assert resumed.warnings == []
    assert (tmp_path / "o.hlwq").read_bytes() == (tmp_path / "whole.hlwq").read_bytes()
