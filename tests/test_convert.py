"""A whole conversion: what is kept, what is equal, and that nothing half-written stays."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import normal, write_model

import hlwq_convert as h
from hlwq_convert.kernels import encode as kernel
from hlwq_convert.quantize import EncodedChunk, ScalarCode
from hlwq_convert.scalar import Effort
from hlwq_convert.source import open_source
from hlwq_formats import metadata as md
from hlwq_formats.bitpack import pack, unpack
from hlwq_formats.dtypes import narrow, widen
from hlwq_formats.errors import (
    BadSafetensors,
    CannotCreate,
    HlwqError,
    MissingInput,
    NonFinite,
    SelfCheckFailed,
    SourceChanged,
    Usage,
)
from hlwq_formats.reader import Reader


def bf16(values: np.ndarray) -> bytes:
    return narrow(np.ascontiguousarray(values, np.float32), "BF16").tobytes()


def gaussian(rows: int, columns: int, seed: int = 0, scale: float = 0.02) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * scale).astype(np.float32)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_source_tensor_is_there_and_raw_ones_are_untouched(model: Path, converted: Path) -> None:
    source = open_source(model)
    with Reader(converted) as reader:
        assert list(reader.tensors) == [t.name for t in source.tensors]
        for tensor in source.tensors:
            entry = reader.tensors[tensor.name]
            assert (entry.dtype, tuple(entry.shape)) == (tensor.dtype, tensor.shape)
            raw = source.model.read(tensor, 0, tensor.length)
            if isinstance(entry, md.RawTensor):
                assert b"".join(reader.raw_chunks(entry)) == raw
            if isinstance(entry, md.ScalarTensor):
                assert entry.source_sha256 == hashlib.sha256(raw).hexdigest()


def test_the_report_is_the_error_of_what_is_loaded(model: Path, converted: Path) -> None:
    source = open_source(model)
    quantized = [t for t in h.inspect(converted).tensors if t.encoding == "scalar"]
    assert len(quantized) >= 8
    with h.open(converted) as file:
        for info in quantized:
            tensor = source.model.tensors[info.name]
            original = widen(source.model.read(tensor, 0, tensor.length), "BF16").astype(np.float64)
            decoded = file.get_tensor(info.name).astype(np.float64).reshape(-1)
            error = ((decoded - original) ** 2).sum() / (original**2).sum()
            cosine = decoded @ original / np.sqrt((decoded @ decoded) * (original @ original))
            assert info.rel_mse == pytest.approx(error, rel=1e-5)
            assert info.cosine == pytest.approx(cosine, abs=1e-7)
            assert info.rel_mse < 0.0025


@pytest.mark.parametrize("workers", [1, 2, 16])
def test_the_number_of_workers_changes_no_byte(model: Path, converted: Path, tmp_path: Path, workers: int) -> None:
    h.convert(model, tmp_path / "out.hlwq", workers=workers)
    assert digest(tmp_path / "out.hlwq") == digest(converted)


def test_pieces_of_several_chunks_change_no_byte(tmp_path: Path) -> None:
    """From 8 workers on; tensors of several pieces take turns."""
    shape = (4400, 1024)
    source = write_model(tmp_path / "m", {name: normal(shape, seed) for seed, name in enumerate("abc")})
    for workers in (1, 16):
        h.convert(source, tmp_path / f"{workers}.hlwq", bits=2, effort="fast", workers=workers)
    assert digest(tmp_path / "1.hlwq") == digest(tmp_path / "16.hlwq")


@pytest.mark.parametrize("features", [[], ["AVX512"], ["AVX512", "AVX2"]])
def test_the_cpu_changes_no_byte(model: Path, converted: Path, tmp_path: Path, features: list[str]) -> None:
    # NumPy dispatches by feature, or by level since 2.4
    names = {"AVX512": ("X86_V4", "AVX512F", "AVX512_SKX", "AVX512_ICL", "AVX512_SPR"), "AVX2": ("X86_V3", "AVX2")}
    dispatched = np._core._multiarray_umath.__cpu_dispatch__  # type: ignore[attr-defined]
    disabled = " ".join(name for feature in features for name in names[feature] if name in dispatched)
    code = (
        "import sys, numpy as np, hlwq_convert as h; h.convert(sys.argv[1], sys.argv[2])\n"
        "on = np._core._multiarray_umath.__cpu_features__\n"
        "sys.exit(any(on.get(name) for name in sys.argv[3].split()))"  # 1: the switch had no effect
    )
    env = {**os.environ, "NPY_DISABLE_CPU_FEATURES": disabled, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "out.hlwq"), disabled]
    subprocess.run(command, check=True, env=env, capture_output=True, cwd=tmp_path)
    assert digest(tmp_path / "out.hlwq") == digest(converted)


def test_the_file_names_nothing_of_this_machine(model: Path, converted: Path, tmp_path: Path) -> None:
    assert str(model.parent).encode() not in converted.read_bytes()
    elsewhere = shutil.copytree(model, tmp_path / "elsewhere")
    h.convert(elsewhere, tmp_path / "other-name.hlwq")
    assert digest(tmp_path / "other-name.hlwq") == digest(converted)


def test_equal_tensors_become_an_alias_at_the_larger_bits(tmp_path: Path) -> None:
    weights = ("BF16", (64, 96), bf16(gaussian(64, 96)))
    other = ("BF16", (64, 96), bf16(gaussian(64, 96, seed=1)))
    source = write_model(tmp_path / "m", {"a.weight": weights, "b.weight": other, "c.weight": weights})
    h.convert(source, tmp_path / "o.hlwq", sets=["^a=3", "^c=7"])
    info = {t.name: t for t in h.inspect(tmp_path / "o.hlwq").tensors}
    assert (info["a.weight"].bits, info["c.weight"].encoding, info["c.weight"].bytes) == (7, "alias", 0)
    assert info["b.weight"].encoding == "scalar"
    with h.open(tmp_path / "o.hlwq") as file:
        np.testing.assert_array_equal(file.get_tensor("a.weight"), file.get_tensor("c.weight"))


def test_untied_weights_under_a_tied_config_are_both_kept_with_a_warning(tmp_path: Path, run_tool) -> None:
    tensors = {
        name: ("BF16", (64, 96), bf16(gaussian(64, 96, seed)))
        for seed, name in enumerate(["model.embed_tokens.weight", "lm_head.weight"])
    }
    source = write_model(tmp_path / "m", tensors, config={"tie_word_embeddings": True})
    result = run_tool("convert", source, tmp_path / "o.hlwq")
    assert result.returncode == 0
    assert "warning" in result.stderr and "both are kept" in result.stderr
    assert [t.encoding for t in h.inspect(tmp_path / "o.hlwq").tensors] == ["scalar", "scalar"]


@pytest.mark.parametrize(("value", "where"), [(np.nan, 17), (np.inf, 6143), (-np.inf, 0)])
def test_weights_that_are_not_finite(tmp_path: Path, value: float, where: int) -> None:
    weights = gaussian(64, 96)
    weights.reshape(-1)[where] = value
    source = write_model(tmp_path / "m", {"layer.weight": ("F32", (64, 96), weights.tobytes())})
    with pytest.raises(NonFinite) as caught:
        h.convert(source, tmp_path / "o.hlwq")
    assert "layer.weight" in str(caught.value)
    assert f"1 of 6144 weights are NaN or infinite, the first at flat index {where}" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]

    h.convert(source, tmp_path / "o.hlwq", nonfinite="raw")
    with Reader(tmp_path / "o.hlwq") as reader:
        entry = reader.tensors["layer.weight"]
        assert isinstance(entry, md.RawTensor)
        assert "1 weights are NaN" in entry.reason
        assert b"".join(reader.raw_chunks(entry)) == weights.tobytes()


def test_a_tensor_whose_decoding_would_overflow_stays_raw(tmp_path: Path) -> None:
    weights = np.full((64, 96), 65504, np.float16)
    weights[::2, ::3] = -65504
    tensors = {
        "a.weight": ("F16", (64, 96), weights.tobytes()),
        "b.weight": ("F32", (64, 96), gaussian(64, 96).tobytes()),
    }
    h.convert(write_model(tmp_path / "m", tensors), tmp_path / "o.hlwq", bits=3)
    with h.open(tmp_path / "o.hlwq") as file:
        entry = file.reader.tensors["a.weight"]
        assert isinstance(entry, md.RawTensor)
        assert "infinity" in entry.reason
        np.testing.assert_array_equal(file.get_tensor("a.weight"), weights)
        file.reader.verify()


@pytest.mark.parametrize("effort", ["default", "best"])
def test_raw_pieces_need_not_be_whole_bytes_of_items(tmp_path: Path, effort: Effort) -> None:
    """Of 6 bits, and more than one piece."""
    raw = np.random.default_rng(0).bytes(9 << 20)
    source = write_model(tmp_path / "m", {"w": ("F6_E2M3", ((9 << 20) * 8 // 6,), raw)})
    h.convert(source, tmp_path / "o.hlwq", effort=effort)
    with h.open(tmp_path / "o.hlwq") as file:
        entry = file.reader.tensors["w"]
        assert isinstance(entry, md.RawTensor)
        assert b"".join(file.reader.raw_chunks(entry)) == raw


@pytest.mark.parametrize("shape", [(), (0,), (0, 128), (128, 0), (1, 4096), (4099, 1), (3, 32, 64), (64, 3, 4, 8)])
def test_shapes_come_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    h.convert(write_model(tmp_path / "m", {"t": ("F32", shape, values.tobytes())}), tmp_path / "o.hlwq", bits=8)
    with h.open(tmp_path / "o.hlwq") as file:
        back = file.get_tensor("t")
        assert back.shape == shape
        np.testing.assert_allclose(back, values, atol=0.05)


@pytest.mark.parametrize("numel", [4096 + k for k in (1, 7, 64, 127, 128, 129, 576)])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_odd_lengths_come_back(tmp_path: Path, numel: int, dtype: str) -> None:
    values = gaussian(1, numel)
    h.convert(
        write_model(tmp_path / "m", {"t": (dtype, (1, numel), narrow(values, dtype).tobytes())}), tmp_path / "o.hlwq"
    )
    with h.open(tmp_path / "o.hlwq") as file:
        back = file.get_tensor("t").astype(np.float32)
        assert ((back - values) ** 2).sum() < 0.003 * (values**2).sum()


def test_norms_of_1e_9_and_1e6_in_one_tensor_and_alone(tmp_path: Path) -> None:
    small, large = gaussian(32, 128, 1, 1e-9), gaussian(32, 128, 2, 1e6)
    tensors = {
        name: ("F32", values.shape, values.tobytes())
        for name, values in {"both": np.concatenate([small, large]), "small": small, "large": large}.items()
    }
    h.convert(write_model(tmp_path / "m", tensors), tmp_path / "o.hlwq")
    with h.open(tmp_path / "o.hlwq") as file:
        for name, values in {"small": small, "large": large}.items():
            back = file.get_tensor(name)
            assert ((back - values).astype(np.float64) ** 2).sum() < 0.003 * (values.astype(np.float64) ** 2).sum()
        both = file.get_tensor("both")
        # 2**50 below the largest block: the small rows vanish, to zero and not to noise
        assert (both[:32] == 0).all()
        assert ((both[32:] - large) ** 2).sum() < 0.003 * (large**2).sum()


def test_passthrough_keeps_every_byte(tmp_path: Path) -> None:
    fp8 = bytes(range(256)) * 16
    tensors = {
        "w": ("F8_E4M3", (64, 64), fp8),
        "w_scale_inv": ("F32", (1,), b"\0\0\x80?"),
        "n": ("BF16", (64, 96), bf16(gaussian(64, 96))),
    }
    source = write_model(tmp_path / "m", tensors, config={"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(HlwqError) as caught:
        h.convert(source, tmp_path / "o.hlwq")
    assert caught.value.exit_status == 69
    h.convert(source, tmp_path / "o.hlwq", passthrough=True)
    with Reader(tmp_path / "o.hlwq") as reader:
        assert {t.name: b"".join(reader.raw_chunks(t)) for t in reader.metadata.tensors} == {
            name: raw for name, (_, _, raw) in tensors.items()
        }


def test_only_files_that_describe_a_model_travel(tmp_path: Path) -> None:
    assets = {
        "tokenizer.json": b"{}", "1_Pooling/config.json": b'{"a": 1}', "LICENSE.txt": b"free", "vocab.bin": b"pickle",
        "modeling_x.py": b"import os", ".env": b"TOKEN=1", "notes.txt": b"private", "README.md": b"# m",
    }  # fmt: skip
    source = write_model(tmp_path / "m", {"t": ("F32", (2,), bytes(8))})
    for name, content in assets.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    h.convert(source, tmp_path / "o.hlwq")
    with Reader(tmp_path / "o.hlwq") as reader:
        expected = ["1_Pooling/config.json", "LICENSE.txt", "README.md", "config.json", "tokenizer.json", "report.json"]
        assert list(reader.assets) == expected
        assert reader.read_asset("LICENSE.txt") == b"free"


def test_an_output_inside_the_model_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", {"t": ("F32", (2,), bytes(8))})
    before = sorted(p.name for p in source.iterdir())
    with pytest.raises(CannotCreate, match="inside the model directory"):
        h.convert(source, source / "o.hlwq")
    os.link(source / "model.safetensors", tmp_path / "o.hlwq")
    with pytest.raises(CannotCreate, match="is the source file"):
        h.convert(source, tmp_path / "o.hlwq", overwrite=True)
    assert sorted(p.name for p in source.iterdir()) == before


def test_an_existing_output_survives_a_failed_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "m", {"t": ("F32", (64, 96), gaussian(64, 96).tobytes())})
    out = tmp_path / "o.hlwq"
    out.write_bytes(b"dear")
    with pytest.raises(CannotCreate, match="exists already"):
        h.convert(source, out)
    monkeypatch.setattr(kernel, "encoder", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        h.convert(source, out, overwrite=True)
    assert out.read_bytes() == b"dear"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "o.hlwq"]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_planted_encoder_bug_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "m", {"t": ("F32", (64, 96), gaussian(64, 96).tobytes())})
    honest = kernel.encoder

    def careless_encoder(code: ScalarCode) -> Callable[[bytes], EncodedChunk]:
        def one_wrong_code(raw: bytes) -> EncodedChunk:
            chunk = honest(code)(raw)
            if len(raw) < 4 * 64 * 96:  # the block that the survey tries
                return chunk
            codes = unpack(chunk.codes, code.bits, 64 * 96).copy()
            codes[4321] ^= 1
            return replace(chunk, codes=pack(codes, code.bits))

        return one_wrong_code

    monkeypatch.setattr(kernel, "encoder", careless_encoder)
    with pytest.raises(SelfCheckFailed, match="nothing was published") as caught:
        h.convert(source, tmp_path / "o.hlwq")
    assert caught.value.exit_status == 70
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_source_that_changes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "m", {"t": ("F32", (64, 96), gaussian(64, 96).tobytes())})
    honest = kernel.encoder

    def touching_encoder(code: ScalarCode) -> Callable[[bytes], EncodedChunk]:
        with (source / "model.safetensors").open("r+b") as shard:
            shard.seek(-1, os.SEEK_END)
            shard.write(b"\0")
        return honest(code)

    monkeypatch.setattr(kernel, "encoder", touching_encoder)
    with pytest.raises(SourceChanged) as caught:
        h.convert(source, tmp_path / "o.hlwq")
    assert caught.value.exit_status == 75
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_fast_is_recorded_and_a_little_worse(model: Path, converted: Path, tmp_path: Path) -> None:
    fast = h.convert(model, tmp_path / "o.hlwq", effort="fast")
    assert fast.metadata.recipe.effort == "fast"
    assert fast.file_bytes == pytest.approx(h.inspect(converted).file_bytes, abs=200)
    assert (fast.summary.sqnr_db_mean or 0) < (h.inspect(converted).summary.sqnr_db_mean or 0) - 0.5


def test_a_recipe_file_and_its_name(model: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        'default = 4\n[[rule]]\nmatch = "q_proj"\nbits = 7\n[[rule]]\nmatch = "up_proj"\nbits = "raw"\n'
    )
    result = h.convert(model, tmp_path / "o.hlwq", recipe=str(tmp_path / "r.toml"))
    bits = {t.name.split(".")[-2]: t.bits for t in result.tensors}
    assert (bits["q_proj"], bits["up_proj"], bits["down_proj"], bits["embed_tokens"]) == (7, 16, 4, 5)
    assert result.metadata.recipe.name == "r.toml"
    with pytest.raises(MissingInput):
        h.convert(model, tmp_path / "p.hlwq", recipe="no-such-recipe")


def test_report_json_is_plain_json(converted: Path) -> None:
    with Reader(converted) as reader:
        report = json.loads(reader.read_asset("report.json"))
    assert {"name", "cosine", "rel_mse"} == set(report["tensors"][0])


@pytest.mark.parametrize(
    "options",
    [
        {"effort": "fastt"},
        {"nonfinite": "bogus"},
        {"workers": 0},
        {"workers": 1.5},
        {"bits": 9},
        {"bits": True},
        {"sets": ["q_proj=1"]},
        {"sets": ["[[q]_proj=4"]},
        {"passthrough": True, "bits": 4},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_before_anything_is_written(
    model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(Usage):
        h.convert(model, tmp_path / "o.hlwq", **options)
    assert list(tmp_path.iterdir()) == []


def test_one_set_may_be_a_string(model: Path, tmp_path: Path) -> None:
    result = h.convert(model, tmp_path / "o.hlwq", sets="q_proj=7")
    assert {t.bits for t in result.tensors if "q_proj" in t.name} == {7}


@pytest.mark.parametrize("out", ["", "folder/"])
def test_an_output_without_a_name(model: Path, out: str) -> None:
    with pytest.raises(CannotCreate, match="names no file"):
        h.convert(model, out)


def test_weights_too_small_for_any_scale_stay_raw(tmp_path: Path) -> None:
    weights = np.full((64, 64), 1.4e-45, np.float32)
    h.convert(write_model(tmp_path / "m", {"w": ("F32", (64, 64), weights.tobytes())}), tmp_path / "o.hlwq")
    with h.open(tmp_path / "o.hlwq") as file:
        assert "decode to zeros" in file.reader.tensors["w"].reason
        np.testing.assert_array_equal(file.get_tensor("w"), weights)


def test_zeros_are_quantized_exactly_and_have_no_error(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", {"w": ("BF16", (64, 64), bytes(8192))})
    (info,) = h.convert(source, tmp_path / "o.hlwq").tensors
    assert (info.encoding, info.cosine, info.sqnr_db, info.rel_mse) == ("scalar", None, None, None)
    with h.open(tmp_path / "o.hlwq") as file:
        assert (file.get_tensor("w") == 0).all()


def test_the_cosine_is_never_above_one(tmp_path: Path) -> None:
    weights = np.full((64, 128), 1e-9, np.float32)
    weights[0] = 1e6
    source = write_model(tmp_path / "m", {"w": ("F32", (64, 128), weights.tobytes())})
    (info,) = h.convert(source, tmp_path / "o.hlwq", bits=8).tensors
    assert info.cosine is not None
    assert 0.999 < info.cosine <= 1


def test_a_boolean_of_2_is_the_fault_of_the_source(tmp_path: Path) -> None:
    with pytest.raises(BadSafetensors, match="boolean is 2"):
        h.convert(write_model(tmp_path / "m", {"b": ("BOOL", (2,), b"\1\2")}), tmp_path / "o.hlwq")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_an_asset_that_changes_is_noticed(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", {"w": ("F32", (2,), bytes(8))}, assets={"merges.txt": b"a b"})

    def rewrite(*_: object) -> None:
        (source / "merges.txt").write_bytes(b"c d")

    with pytest.raises(SourceChanged, match=r"merges\.txt"):
        h.convert(source, tmp_path / "o.hlwq", progress=rewrite)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
