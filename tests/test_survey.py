"""What the first look at a tensor promises: scalar codes of what it lets pass decode to something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import normal, tensor, write_model

import hlwq_convert as h
from hlwq_convert import store
from hlwq_convert.device import Device, Encode
from hlwq_convert.kernels.encode import encoder
from hlwq_convert.kernels.fit import fit
from hlwq_convert.kernels.survey import find_magnitude, survey_weights
from hlwq_convert.plan import Choice
from hlwq_convert.quantize import CHUNK, ScalarCode, choose_exponent
from hlwq_convert.rotate import fwht, sign_vector
from hlwq_convert.scalar import Effort
from hlwq_convert.source import open_source
from hlwq_convert.source_digests import digest_tensor
from hlwq_convert.survey import _SAFE, survey
from hlwq_convert.trellis import TrellisCode
from hlwq_formats.dtypes import narrow
from hlwq_formats.files import new_memory
from hlwq_formats.safetensors_dir import ModelDir, SourceTensor


def blocks(largest: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Blocks of 128 that are hard on a scale: all energy in one weight, in one coordinate, and between."""
    rng = np.random.default_rng(5)
    values = np.zeros((64, 128), np.float32)
    values[0, 3] = 1
    values[1] = 1
    values[2] = sign_vector()
    values[3] = -sign_vector() * (1 + np.arange(128) % 2) / 2
    values[4:] = rng.standard_t(1.5, (60, 128))
    return (values / np.abs(values).max(axis=1, keepdims=True) * np.float32(largest)).astype(np.float32)


@pytest.mark.parametrize("dtype", sorted(_SAFE))
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("effort", ["fast", "best"])
def test_what_is_safe_decodes_to_something_finite(dtype: str, bits: int, effort: Effort) -> None:
    """Each block as a tensor of its own, with the codebook that is fitted to it, and with that of all of them."""
    largest = _SAFE[dtype] * 0.996
    together = narrow(blocks(largest).ravel(), dtype)
    exponent = choose_exponent(largest)
    for one in narrow(blocks(largest).ravel(), dtype).reshape(-1, 128):
        for sample in (one, together):
            levels = fit(sample.tobytes(), dtype, exponent, sign_vector(), bits)
            chunk = encoder(ScalarCode(dtype, bits, exponent, levels, sign_vector(), effort))(one.tobytes())
            assert np.isfinite(chunk.sums[1]).all()


@pytest.mark.parametrize("effort", ["default", "best"])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_loud_block_that_vanishes(tmp_path: Path, dtype: str, effort: Effort) -> None:
    """255 blocks have too small a scale to count, and a codebook that gives the loud one a scale of 0."""
    hadamard = fwht(np.eye(128, dtype=np.float32))
    coordinates = np.r_[[8.0], [-0.9] * 72, [-0.3] * 20, [0.1] * 35]
    quiet, loud = hadamard @ coordinates * sign_vector(), hadamard @ np.ones(128) * sign_vector()
    weights = np.tile(quiet / np.abs(quiet).max() * 1e-16, (256, 1))
    weights[100] = loud / np.abs(loud).max() * 0.01
    source = write_model(tmp_path / "m", {"w": tensor(weights.astype(np.float32), dtype)})
    (info,) = h.convert(source, tmp_path / "o.hlwq", bits=2, effort=effort).tensors
    assert (info.encoding, info.reason) == ("raw", "quantized it would decode to zeros")


def test_an_encoder_is_made_once(tmp_path: Path) -> None:
    """Several GPUs take turns in making them."""
    source = open_source(write_model(tmp_path / "m", {"w": normal((64, 128))}))
    made: list[int] = []

    def make_encoder(code: ScalarCode | TrellisCode) -> Encode:
        assert isinstance(code, ScalarCode)
        made.append(code.bits)
        encode = encoder(code)
        return lambda raw, start: encode(raw)

    choices = [Choice(3, "asked"), Choice(None, "asked"), Choice(5, "asked")]
    device = Device(make_encoder, new_memory, CHUNK)
    survey(source.model, source.tensors[0], choices, "default", "error", device)
    assert made == [3, 5]


@pytest.mark.parametrize("dtype", sorted(_SAFE))
def test_the_first_weight_of_a_magnitude_is_found(dtype: str) -> None:
    """Of either sign."""
    values = np.random.default_rng(2).uniform(-0.5, 0.5, 1000).astype(np.float32)
    values[[300, 700]] = -1, 1
    raw = narrow(values, dtype).tobytes()
    assert find_magnitude(raw, dtype, survey_weights(raw, dtype)[0]) == 300
    assert find_magnitude(raw[301 * len(raw) // 1000 :], dtype, 1.0) == 399


@pytest.mark.parametrize("options", [{"bits": 4}, {"bpw": 6.0}], ids=["scalar", "trellis"])
def test_a_large_tensor_is_hashed_by_a_task_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """The file is the same, with the digest of each source."""
    source = write_model(tmp_path / "m", {"a": normal((300, 128), 1), "b": normal((64, 96), 2), "n": normal((96,), 3)})
    h.convert(source, tmp_path / "together.hlwq", effort="fast", **options)
    hashed: list[str] = []

    def digest(model: ModelDir, tensor: SourceTensor, *how: Any) -> str:
        hashed.append(tensor.name)
        return digest_tensor(model, tensor, *how)

    monkeypatch.setattr(store, "_TOGETHER", 64 * 96)
    monkeypatch.setattr(store, "digest_tensor", digest)
    h.convert(source, tmp_path / "alone.hlwq", effort="fast", **options)
    assert sorted(set(hashed)) == ["a", "b"]
    assert (tmp_path / "alone.hlwq").read_bytes() == (tmp_path / "together.hlwq").read_bytes()
