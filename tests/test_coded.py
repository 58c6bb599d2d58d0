"""Codes that are compressed, one byte each: the same tensors as packed ones, in fewer bytes."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from models import normal, small_model, tensor, write_model
from msgspec import UNSET

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from vector_parts import Parts, sha256

import hlwq_convert as h
from hlwq_convert import entries, journal, store
from hlwq_convert.against import compare
from hlwq_convert.decode import code_chunks, decode_quantized, get_numpy
from hlwq_convert.kernels import packing
from hlwq_convert.source import open_source
from hlwq_convert.verification import verify
from hlwq_formats import bitpack
from hlwq_formats import metadata as md
from hlwq_formats.errors import BadData, BadDigest, BadFrames
from hlwq_formats.file_set import open_set
from hlwq_formats.layout import BLOCK, scalar_lengths
from hlwq_formats.reader import Reader
from hlwq_formats.sections import compress_codes, decompress_codes

torch = pytest.importorskip("torch")

from hlwq_convert.runtime.packed import packed_bytes, read_packed  # noqa: E402

VECTORS = Path(__file__).resolve().parent.parent / "spec" / "vectors"
BIG = "b.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A matrix of two frames, one of less, one of an odd shape, and what stays raw."""
    tensors = {
        "a.weight": normal((600, 500)),
        BIG: normal((1030, 1024), 1, "F16"),
        "c.weight": normal((99, 77), 2, "F32"),
        "norm.weight": normal((9,)),
    }
    return write_model(tmp_path_factory.mktemp("source") / "m", tensors)


def convert(source: Path, out: Path, *, coded: bool = True, **options: object) -> h.Inspection:
    """With --effort best, or, when not `coded`, the same codes packed."""
    with pytest.MonkeyPatch.context() as patch:
        if not coded:
            patch.setattr(entries, "pays", lambda stored, raw: False)
        return h.convert(source, out, effort="best", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def coded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The matrices at 5 bits; tests must not change it."""
    out = tmp_path_factory.mktemp("coded") / "o.hlwq"
    convert(source, out)
    return out


def codes_of(path: Path) -> dict[str, md.Section]:
    """The codes of each scalar tensor."""
    with Reader(path) as reader:
        return {t.name: t.sections[0] for t in reader.metadata.tensors if isinstance(t, md.ScalarTensor)}


def is_coded(section: md.Section) -> bool:
    return section.zstd_codes is not UNSET


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_same_tensors_and_ids_as_packed(source: Path, tmp_path: Path, bits: int) -> None:
    found = convert(source, tmp_path / "c.hlwq", bits=bits)
    packed = convert(source, tmp_path / "p.hlwq", bits=bits, coded=False)
    assert found.content_id == packed.content_id
    assert packed.format_version == "1.0"
    names = {name for name, section in codes_of(tmp_path / "c.hlwq").items() if is_coded(section)}
    assert names - {"c.weight"} == ({"a.weight", BIG} if 2 < bits < 8 else set())
    assert found.format_version == ("1.2" if names else "1.0")
    one, other = (h.load_state_dict(tmp_path / f"{name}.hlwq") for name in "cp")
    assert all(torch.equal(one[name], other[name]) for name in one)
    with Reader(tmp_path / "c.hlwq") as reader, Reader(tmp_path / "p.hlwq") as plain:
        reader.verify()
        for name in (BIG, "c.weight"):
            codes = reader.read_section("tensor", name, "codes")
            assert codes == plain.read_section("tensor", name, "codes")
            assert np.array_equal(get_numpy(reader, name), get_numpy(plain, name))


def test_sections_are_what_they_say(coded: Path, source: Path) -> None:
    with Reader(coded) as reader:
        assert reader.header.incompat == 1
        assert compare(reader, open_source(source), lambda done, total: None) == []
        for name, section in codes_of(coded).items():
            assert section.zstd_codes is not UNSET
            tensor = reader.stored_tensor(name)
            n = int(np.prod(tensor.shape))
            frames, codes = list(section.zstd_codes.frames), b""
            assert md.raw_length(section) == scalar_lengths(n, 5)["codes"]
            assert 100 * section.length <= 97 * md.raw_length(section)
            assert len(frames) == (2 if name == BIG else 1)
            for frame in reader.iter_section("tensor", name, "codes", frames):
                count = min(1 << 20, -(-n // 128) * 128 - len(codes))
                codes += decompress_codes(frame, count, 5).tobytes()
            packed = bitpack.pack(np.frombuffer(codes, np.uint8), 5)
            assert packed == reader.read_section("tensor", name, "codes")
            assert hashlib.sha256(packed).hexdigest() == md.raw_sha256(section)


def test_the_bits_of_a_weight_count_stored_bytes(coded: Path) -> None:
    found = h.inspect(coded)
    assert found.file_bytes == coded.stat().st_size == sum(found.summary.bytes_by_encoding.values())
    rates = {t.name: t.bpw for t in found.tensors if t.encoding == "scalar"}
    assert 4.85 < rates[BIG] < 4.96  # type: ignore[operator]


def test_only_best_compresses(source: Path, tmp_path: Path) -> None:
    for effort in ("fast", "default"):
        assert h.convert(source, tmp_path / f"{effort}.hlwq", effort=effort).format_version == "1.0"
        assert not any(is_coded(section) for section in codes_of(tmp_path / f"{effort}.hlwq").values())


def test_same_bytes_for_any_number_of_workers(coded: Path, source: Path, tmp_path: Path) -> None:
    for workers in (1, 5):
        convert(source, tmp_path / f"{workers}.hlwq", workers=workers)
        assert (tmp_path / f"{workers}.hlwq").read_bytes() == coded.read_bytes()


def test_codes_that_only_begin_well_are_packed(tmp_path: Path) -> None:
    """At 8 bits nothing is saved but by zeros: 4 % in the first frame, 2 % in the tensor."""
    values = np.random.default_rng(0).standard_normal((2048, 1024), np.float32)
    values[:41] = 0
    steps: list[int] = []
    h.convert(
        write_model(tmp_path / "m", {"w": tensor(values)}), tmp_path / "o.hlwq", 8, effort="best",
        progress=lambda stage, done, total: steps.append(done) if stage == "converting" else None,
    )  # fmt: skip
    assert not is_coded(codes_of(tmp_path / "o.hlwq")["w"])
    assert steps[-1] == values.size * 2
    assert steps.count(0) == 2  # begun anew
    values[1024:1065] = 0
    found = h.convert(write_model(tmp_path / "n", {"w": tensor(values)}), tmp_path / "n.hlwq", 8, effort="best")
    assert is_coded(codes_of(tmp_path / "n.hlwq")["w"])
    assert found.format_version == "1.2"


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small_model(tmp_path / "m")
    h.convert(source, tmp_path / "whole.hlwq", effort="best")
    monkeypatch.setattr(journal, "CHECKPOINT_BYTES", 1)
    calls = 0

    def stop(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls += stage == "converting"
        if calls == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        h.convert(source, tmp_path / "o.hlwq", effort="best", progress=stop)
    stored = (tmp_path / "o.hlwq.part.journal").read_text().count('"zstd_codes"')
    assert stored > 2
    encoded = []
    honest = store.compress_codes
    monkeypatch.setattr(store, "compress_codes", lambda codes: encoded.append(len(codes)) or honest(codes))
    resumed = h.convert(source, tmp_path / "o.hlwq", effort="best")
    assert resumed.warnings == []
    assert (tmp_path / "o.hlwq").read_bytes() == (tmp_path / "whole.hlwq").read_bytes()
    assert len(encoded) == resumed.summary.quantized - stored


def test_damage_is_named(coded: Path, tmp_path: Path, run_tool: Run) -> None:
    with Reader(coded) as reader:
        at = reader._offsets[reader._index["tensor", BIG, "codes"]]
        frames = codes_of(coded)[BIG].zstd_codes.frames  # type: ignore[union-attr]
    data = bytearray(coded.read_bytes())
    data[at + frames[0] + 1000] ^= 4
    path = tmp_path / "d.hlwq"
    path.write_bytes(data)
    done = run_tool("inspect", path, "--verify")
    assert done.returncode == 65
    assert f'"{BIG}": codes@{at:#x}: SHA-256 is' in done.stderr
    assert "3 of 4 tensors are good" in done.stderr
    with Reader(path) as reader:
        for look in (decode_quantized, lambda r, t: list(r.code_chunks(t))):
            with pytest.raises(BadDigest, match=f'tensor "{BIG}": codes@'):
                look(reader, reader.stored_tensor(BIG))
        assert verify(reader, lambda done, total: None).good_tensors == 3
    with pytest.raises(BadData):
        h.load_state_dict(path)


def rewritten(coded: Path, path: Path, bad: int) -> Path:
    """The file with frame `bad` of BIG exchanged for one of the same length that holds a code too many."""
    with Reader(coded) as reader:
        document = json.loads(md.encode(reader.metadata))
        blobs = [b"".join(reader.iter_section(k, o, s.kind)) for k, o, s in md.all_sections(reader.metadata)]
    parts = Parts(document, blobs)
    index = [(owner, s.kind) for _, owner, s in md.all_sections(reader.metadata)].index((BIG, "codes"))
    frames = document["tensors"][1]["sections"][0]["zstd_codes"]["frames"]
    start = sum(frames[:bad])
    count = (1 << 20) if bad == 0 else 1030 * 1024 - (1 << 20)
    codes = decompress_codes(blobs[index][start : start + frames[bad]], count, 5).copy()
    codes[77] = 32
    new = compress_codes(codes)
    parts.blobs[index] = blobs[index][:start] + new + blobs[index][start + frames[bad] :]
    frames[bad] = len(new)
    document["tensors"][1]["sections"][0].update(length=len(parts.blobs[index]), sha256=sha256(parts.blobs[index]))
    path.write_bytes(parts.build())
    return path


@pytest.mark.parametrize("number", [0, 1])
def test_a_frame_that_holds_no_codes_is_named(coded: Path, tmp_path: Path, run_tool: Run, number: int) -> None:
    path = rewritten(coded, tmp_path / "b.hlwq", number)
    problem = f"frame {number} of [0-9]+ bytes: it holds the code 32, expected less than 32"
    with Reader(path) as reader:
        with pytest.raises(BadFrames, match=problem):
            decode_quantized(reader, reader.stored_tensor(BIG))
        with pytest.raises(BadFrames, match=problem):
            reader.verify()
    done = run_tool("inspect", path, "--verify")
    assert done.returncode == 65
    assert f"frame {number} of" in done.stderr


@pytest.mark.parametrize("path", sorted((VECTORS / "bad").glob("coded-*.hlwq")), ids=lambda p: p.stem)
def test_a_bad_vector_is_not_decoded(path: Path) -> None:
    """By the parallel decoder, which does not go through Reader.verify."""
    with pytest.raises(BadData) as caught:
        h.load_state_dict(path)
    index = json.loads((VECTORS / "bad" / "index.json").read_bytes())
    assert type(caught.value).__name__ == index[path.name]["error"]


def test_packed_in_memory(coded: Path) -> None:
    with Reader(coded) as reader:
        tensor = reader.stored_tensor("a.weight")
        matrix = read_packed(reader, tensor, torch.bfloat16, torch.device("cpu"))
        assert packed_bytes(tensor) == sum(scalar_lengths(300_000, 5).values()) + BLOCK
    assert torch.equal(matrix.rows(0, 600, torch.bfloat16), h.load_state_dict(coded)["a.weight"])


@pytest.mark.parametrize("compressed", [True, False])
def test_codes_are_put_where_the_caller_wants_them(source: Path, tmp_path: Path, compressed: bool) -> None:
    """As for a GPU: packed, whatever the storage."""
    convert(source, tmp_path / "o.hlwq", coded=compressed)
    asked: list[bytearray] = []

    def memory(size: int) -> memoryview:
        asked.append(bytearray(size))
        return memoryview(asked[-1])

    with Reader(tmp_path / "o.hlwq") as reader:
        entry = reader.stored_tensor(BIG)
        assert isinstance(entry, md.ScalarTensor)
        found = [bytes(chunk.packed) for chunk in code_chunks(reader, entry, into=memory)]
        assert len(found) == 2
        assert found == [bytes(place) for place in asked] == [chunk.packed for chunk in code_chunks(reader, entry)]
        assert b"".join(found) == reader.read_section("tensor", BIG, "codes")


def test_a_size_beyond_what_is_left_when_codes_are_compressed(tmp_path: Path) -> None:
    source, stages = small_model(tmp_path / "m"), list[str]()
    options = {"effort": "best", "sets": ["embed=4", "mlp=4"], "max_bits": ["attn=3"]}
    found = h.convert(source, tmp_path / "o.hlwq", size=104_000, progress=lambda s, *_: stages.append(s), **options)  # type: ignore[arg-type]
    assert found.file_bytes <= 104_000
    assert stages.count("choosing steps") > 1


def test_compressed_codes_in_parts(coded: Path, source: Path, tmp_path: Path) -> None:
    h.convert(source, tmp_path / "m.hlwq", effort="best", split_size=400_000)
    paths = sorted(tmp_path.iterdir())
    with open_set(tmp_path) as whole, Reader(coded) as one:
        assert len(paths) == len(whole.parts) == 3
        assert [part.header.incompat for part in whole.parts] == [5, 5, 5]
        assert whole.content_id == one.content_id
        whole.verify()
        for tensor in one.metadata.tensors:
            assert get_numpy(whole, tensor.name).tobytes() == get_numpy(one, tensor.name).tobytes()
        with pytest.raises(BadDigest) as caught:
            whole.check_packed(whole.stored_tensor(BIG), "0" * 64)  # type: ignore[arg-type]
        assert caught.value.file == os.fspath(paths[1])


def test_a_dry_run_is_an_upper_bound_and_says_so(coded: Path, source: Path, tmp_path: Path, run_tool: Run) -> None:
    done = run_tool("convert", source, tmp_path / "o.hlwq", "--effort", "best", "--dry-run", "--json")
    planned = json.loads(done.stdout)
    assert "sizes are upper bounds" in done.stderr
    assert planned["warnings"] == ["sizes are upper bounds: codes are compressed where that saves 3 %"]
    assert coded.stat().st_size < planned["file_bytes"] < 1.06 * coded.stat().st_size
    done = run_tool("convert", source, tmp_path / "o.hlwq", "--dry-run", "--json")
    assert (json.loads(done.stdout)["warnings"], done.stderr) == ([], "")


def test_a_size_is_hit_with_some_codes_compressed(source: Path, tmp_path: Path) -> None:
    found = convert(source, tmp_path / "o.hlwq", size=800_000, sets=["a.weight=6"])
    assert 798_400 <= found.file_bytes <= 800_000
    assert [name for name, section in codes_of(tmp_path / "o.hlwq").items() if is_coded(section)] == ["a.weight"]


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_kernel_packs_like_the_reference(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 1280).astype(np.uint8)
    assert packing.pack(codes, bits) == bitpack.pack(codes, bits)
