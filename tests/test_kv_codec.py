"""The codec of the key-value cache against the NumPy reference of the files, and against itself in other pieces."""

from __future__ import annotations

import numpy as np
import pytest

from hlwq_convert.normal_levels import normal_levels
from hlwq_convert.rotate import fwht, sign_vector
from hlwq_convert.scalar import encode as encode_blocks
from hlwq_formats.bitpack import pack, unpack
from hlwq_formats.errors import Usage

torch = pytest.importorskip("torch")

from hlwq_convert.runtime import kv_codec  # noqa: E402

BITS = (2, 3, 4)
NORMAL_MSE = {2: 0.117482, 3: 0.034548, 4: 0.009501}


def states(head_dim: int, tokens: int = 33, batch: int = 2, heads: int = 3, seed: int = 0) -> torch.Tensor:
    """Tokens of very different size, with the outlier channels that keys have."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, heads, tokens, head_dim, generator=generator)
    values *= 10 ** (4 * torch.rand(batch, heads, tokens, 1, generator=generator) - 2)
    values[..., 7] *= 20
    return values


def decoded(codes: torch.Tensor, scales: torch.Tensor, bits: int, head_dim: int) -> torch.Tensor:
    out = torch.empty(*scales.shape, head_dim)
    kv_codec.decode(codes, scales, bits, out)
    return out


@pytest.mark.parametrize("bits", BITS)
def test_a_token_of_128_is_coded_to_the_bytes_of_a_block_in_a_file(bits: int) -> None:
    values = states(128)
    codes, scales = kv_codec.encode(values, bits)
    blocks = np.asfortranarray(values.reshape(-1, 128).numpy())
    expected, expected_scales = encode_blocks(fwht(blocks * sign_vector()), normal_levels(bits), "fast")
    assert codes.numpy().tobytes() == pack(np.ascontiguousarray(expected).reshape(-1), bits)
    assert scales.numpy().tobytes() == expected_scales.tobytes()
    assert codes.shape == (2, 3, 33, 16 * bits) and scales.shape == (2, 3, 33)

    values = fwht(np.asfortranarray(normal_levels(bits)[expected]))
    restored = sign_vector() * (expected_scales.astype(np.float32)[:, None] * values)
    assert decoded(codes, scales, bits, 128).numpy().tobytes() == np.ascontiguousarray(restored).tobytes()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_decoding_is_the_formula_with_the_matrix_of_hadamard(head_dim: int, bits: int) -> None:
    width = kv_codec.rotation_width(head_dim)
    codes, scales = kv_codec.encode(states(head_dim), bits)
    found = decoded(codes, scales, bits, head_dim)
    hadamard = np.ones((1, 1))
    while len(hadamard) < width:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    numbers = unpack(codes.numpy().tobytes(), bits, scales.numel() * width).reshape(-1, width)
    signs = kv_codec._signs(width, torch.device("cpu")).numpy()
    expected = signs * (normal_levels(bits)[numbers].astype(np.float64) @ hadamard) * scales.reshape(-1, 1).numpy()
    size = np.abs(expected).max(axis=1, keepdims=True)
    assert (np.abs(found.reshape(-1, head_dim).numpy() - expected[:, :head_dim]) <= 1e-6 * size).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_the_error_is_that_of_the_levels_on_normal_numbers(head_dim: int, bits: int) -> None:
    values = states(head_dim, tokens=200)
    found = decoded(*kv_codec.encode(values, bits), bits, head_dim)
    error = ((found - values) ** 2).sum(-1) / (values**2).sum(-1)
    # a block is normalised by its own size, which makes its error a little less than that of normal numbers;
    # of 128 coordinates with the error of padding, the 96 that are read back keep three quarters
    kept = head_dim / kv_codec.rotation_width(head_dim)
    assert 0.8 * NORMAL_MSE[bits] * kept < error.mean() < 1.02 * NORMAL_MSE[bits] * kept


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_a_token_gets_the_same_bytes_alone_and_among_others(
    head_dim: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = states(head_dim)
    codes, scales = kv_codec.encode(values, bits)
    whole = decoded(codes, scales, bits, head_dim)
    parts = [kv_codec.encode(values[:, :, i : i + 1], bits) for i in range(33)]
    assert torch.equal(torch.cat([part[0] for part in parts], dim=2), codes)
    assert torch.equal(torch.cat([part[1] for part in parts], dim=2), scales)
    assert torch.equal(decoded(codes[1:, 2:, 20:], scales[1:, 2:, 20:], bits, head_dim), whole[1:, 2:, 20:])
    monkeypatch.setattr(kv_codec, "CHUNK", 5 * 6 * kv_codec.rotation_width(head_dim))  # chunks of 5 tokens
    assert all(map(torch.equal, kv_codec.encode(values, bits), (codes, scales)))
    assert torch.equal(decoded(codes, scales, bits, head_dim), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_rounded_once(dtype: torch.dtype) -> None:
    values = states(64).to(dtype)
    codes, scales = kv_codec.encode(values, 3)
    assert all(map(torch.equal, kv_codec.encode(values.float(), 3), (codes, scales)))
    out = torch.empty(2, 3, 33, 64, dtype=dtype)
    kv_codec.decode(codes, scales, 3, out)
    assert torch.equal(out, decoded(codes, scales, 3, 64).to(dtype))


def test_zeros_tiny_huge_and_broken_tokens() -> None:
    values = torch.ones(1, 1, 6, 64)
    values *= torch.tensor([0, 1e-12, 1e9, 1, 1, 1])[:, None]
    values[0, 0, 3, 0], values[0, 0, 4, 5], values[0, 0, 5, 1] = torch.inf, -torch.inf, torch.nan
    codes, scales = kv_codec.encode(values, 3)
    found = decoded(codes, scales, 3, 64)[0, 0]
    assert (found[:2] == 0).all() and (codes[0, 0, :2] == 0).all()
    assert scales[0, 0, 2] == 65504 and found[2].isfinite().all()
    assert found[3:].isnan().all()


def test_signs_begin_like_those_of_the_files() -> None:
    for width in (64, 128, 256):
        signs = kv_codec._signs(width, torch.device("cpu")).numpy()
        assert signs.shape == (width,) and set(np.abs(signs)) == {1} and (signs[:128] == sign_vector()[:width]).all()


@pytest.mark.parametrize("head_dim", [16, 72, 80, 192, 512])
def test_a_head_dim_that_cannot_be_rotated_is_one_clear_line(head_dim: int) -> None:
    with pytest.raises(Usage, match=f"head_dim is {head_dim}, a quantized cache can rotate 64, 96, 128, 256"):
        kv_codec.encode(torch.zeros(1, 1, 1, head_dim), 3)


def test_what_was_first_used_in_inference_mode_serves_training_code() -> None:
    for function in (kv_codec._signs, kv_codec._levels, kv_codec._table):
        function.cache_clear()
    values = states(64)
    with torch.inference_mode():
        first = kv_codec.encode(values, 2)
    values.requires_grad_()
    codes, scales = kv_codec.encode(values, 2)
    assert torch.equal(codes, first[0]) and not decoded(codes, scales, 2, 64).requires_grad
