"""What the coder of a trellis loses against the entropy of its indices: in the report, and bounded."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from models import normal, real_model, write_model

import hlwq_convert as h
from hlwq_convert.frequencies import add_counts, count_magnitudes
from hlwq_convert.inspection import Inspection, inspect
from hlwq_convert.report import totals
from hlwq_formats import metadata as md
from hlwq_formats.errors import BadMetadata
from hlwq_formats.layout import numel
from hlwq_formats.reader import Reader
from hlwq_formats.writer import Writer

PART = 0.005
"""Of the bytes, for every tensor of 100,000 weights or more, and for every file."""
BITS = 0.006
"""A weight, for every tensor of a million weights or more, and for files of up to 4.5 bits."""


def check(found: Inspection) -> list[float]:
    """The bits a weight that the large tensors of a file lose. Fails above the bounds."""
    losses = []
    for tensor in (t for t in found.tensors if t.encoding == "trellis"):
        assert tensor.coder_loss is not None
        assert tensor.entropy_bytes is not None
        assert numel(tensor.shape) >= 100_000
        assert 0 < tensor.coder_loss < PART, tensor.name
        if numel(tensor.shape) >= 1 << 20:
            losses.append(8 * tensor.entropy_bytes * tensor.coder_loss / numel(tensor.shape))
            assert losses[-1] < BITS, tensor.name
    assert losses
    return losses


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gaussian") / "m", {"w.weight": normal((1024, 2048), dtype="F32")})


@pytest.mark.once
@pytest.mark.parametrize("bpw", [2, 3.5, 5.5])
def test_gaussian_weights(gaussian: Path, tmp_path: Path, bpw: float) -> None:
    found = h.convert(gaussian, tmp_path / "o.hlwq", bpw=bpw)
    (loss,) = check(found)
    assert loss > 0.001  # half of what the states of the lanes take is lost for sure
    assert found.summary.coder_loss_bpw == pytest.approx(loss)
    assert f"coder: {found.summary.coder_loss:.2%} or {loss:.4f} bits a weight above the entropy" in totals(found)


@pytest.mark.once
@pytest.mark.parametrize(("name", "bpw"), [("all-MiniLM-L6-v2", 2.5), ("all-MiniLM-L6-v2", 4.5),
                                           ("SmolLM2-135M-Instruct", 3.5)])  # fmt: skip
def test_real_weights(tmp_path: Path, name: str, bpw: float) -> None:
    found = h.convert(real_model(name), tmp_path / "o.hlwq", bpw=bpw, effort="fast")
    check(found)
    assert found.summary.coder_loss is not None
    assert found.summary.coder_loss_bpw is not None
    assert 0 < found.summary.coder_loss < PART / 2
    assert 0 < found.summary.coder_loss_bpw < BITS


@pytest.mark.once
def test_the_entropy_is_that_of_the_stored_indices(gaussian: Path, tmp_path: Path) -> None:
    """By floating point and the definition, from the file alone."""
    from hlwq_formats import rans

    (tensor,) = h.convert(gaussian, tmp_path / "o.hlwq", bpw=3).tensors
    with Reader(tmp_path / "o.hlwq") as reader:
        entry = reader.stored_tensor("w.weight")
        assert isinstance(entry, md.TrellisTensor)
        pairs, data = (b"".join(reader.iter_section("tensor", "w.weight", k)) for k in ("frequencies", "symbols"))
        lengths = next(s.chunks for s in entry.sections if s.kind == "symbols")
    assert isinstance(lengths, list)
    tables, parts, at = rans.make_tables(np.frombuffer(pairs, "<u2")), [], 0
    for length in lengths:
        parts.append(rans.decode(data[at : at + length], rans.CHUNK, tables, entry.states))
        at += length
    indices, bits = np.concatenate(parts), 0.0
    for parity in (0, 1):
        counts = np.bincount(np.abs(indices[indices % 2 == parity])).astype(float)
        counts = counts[counts > 0]
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
    bits += np.count_nonzero(indices)
    assert tensor.entropy_bytes == pytest.approx(bits / 8, abs=8)


def with_report(source: Path, target: Path, report: bytes) -> Path:
    """The file with another report."""
    with Reader(source) as reader, Writer(target) as writer:
        for owner, name, section in md.all_sections(reader.metadata):
            if name != md.REPORT:
                stored = b"".join(reader.iter_section(owner, name, section.kind))
                writer.write_section(section.kind, stored, compress=section.zstd is not md.UNSET)
        assets = [asset for asset in reader.metadata.assets if asset.name != md.REPORT]
        assets.append(md.Asset(md.REPORT, [writer.write_section("asset", report)]))
        writer.finish(msgspec.structs.replace(reader.metadata, assets=assets), lambda _: None)  # only the report is new
    return target


def test_files_without_the_entropy_load_and_impossible_ones_do_not(gaussian: Path, tmp_path: Path) -> None:
    made = h.convert(gaussian, tmp_path / "o.hlwq", bpw=3)
    with Reader(tmp_path / "o.hlwq") as reader:
        report = json.loads(reader.read_asset(md.REPORT))
    (entry,) = report["tensors"]
    assert entry["entropy_bytes"] == made.tensors[0].entropy_bytes
    del entry["entropy_bytes"]
    old = inspect(with_report(tmp_path / "o.hlwq", tmp_path / "old.hlwq", json.dumps(report).encode()))
    assert (old.tensors[0].coder_loss, old.summary.coder_loss, old.summary.coder_loss_bpw) == (None, None, None)
    assert old.tensors[0].cosine == made.tensors[0].cosine
    assert "coder:" not in totals(old)
    for wrong in (-1, 10**9, 10**30, 0.5, "1"):
        entry["entropy_bytes"] = wrong
        with_report(tmp_path / "o.hlwq", tmp_path / "bad.hlwq", json.dumps(report).encode())
        with pytest.raises(BadMetadata):
            inspect(tmp_path / "bad.hlwq")
        (tmp_path / "bad.hlwq").unlink()


def test_scalar_codes_have_none(gaussian: Path, tmp_path: Path) -> None:
    found = h.convert(gaussian, tmp_path / "o.hlwq", bits=4)
    assert found.tensors[0].coder_loss is found.summary.coder_loss is None
    with Reader(tmp_path / "o.hlwq") as reader:
        assert set(json.loads(reader.read_asset(md.REPORT))["tensors"][0]) == {"name", "cosine", "rel_mse"}


def test_counts_add_up() -> None:
    indices = np.random.default_rng(0).integers(-9, 10, 1000, np.int32)
    indices[3] = -70_000
    parts = [count_magnitudes(part) for part in np.split(indices, [400, 410])]
    whole = add_counts(add_counts(parts[0], parts[1]), parts[2])
    assert whole.tolist() == count_magnitudes(indices).tolist()
    assert add_counts(parts[2], parts[0]).tolist() == add_counts(parts[0], parts[2]).tolist()
