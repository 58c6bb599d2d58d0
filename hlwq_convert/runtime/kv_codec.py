"""The codec of the key-value cache: the key or value of one token in one head is one block, coded as in a file.

    rotated = fwht(signs * x)                        # W coordinates, nearly Gaussian (QuaRot, arXiv:2404.00456)
    codes, scale = nearest N(0, 1) levels at the RMS, their least-squares scale in fp16   # scalar.encode, "fast"
    x ~ signs * (scale * fwht(levels[codes]))        # spec section 6.3

Only float32 + - * / and a correctly rounded sqrt in a fixed order, each token by itself: a token gets the same bytes
whether it comes alone or among a thousand.

Inside, the coordinate comes first, (W, rows): every pass of the transform then runs over long contiguous rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache

import torch

from hlwq_formats.errors import Usage

from ..normal_levels import normal_levels

WIDTHS = {64: 64, 96: 128, 128: 128, 256: 256}
"""head_dim -> W, the coordinates that are stored: a power of two, so 96 are padded with zeros."""

CHUNK = 1 << 18
"""Coordinates that are coded at once: what is dense beside the result stays a few MiB."""


def rotation_width(head_dim: int) -> int:
    """The W of a head_dim; raises Usage for one that cannot be rotated."""
    if head_dim not in WIDTHS:
        known = ", ".join(map(str, WIDTHS))
        raise Usage(f"head_dim is {head_dim}, a quantized cache can rotate {known}", hint="leave the cache as it is")
    return WIDTHS[head_dim]


def packed_width(head_dim: int, bits: int) -> int:
    """Bytes of the codes of one token in one head."""
    return rotation_width(head_dim) * bits // 8


@torch.no_grad()
def encode(states: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Code keys or values, (batch, heads, tokens, head_dim) of any floating-point dtype.

    Returns codes, (batch, heads, tokens, W * bits / 8) uint8 in the order of hlwq_formats.bitpack, and scales,
    (batch, heads, tokens) float16. A token whose scale rounds to 0 has codes 0 and decodes to zeros; one that holds
    NaN or infinity decodes to NaN.
    """
    *shape, head_dim = states.shape
    codes = torch.empty(*shape, packed_width(head_dim, bits), dtype=torch.uint8, device=states.device)
    scales = torch.empty(*shape, dtype=torch.float16, device=states.device)
    for part in _chunks(states.shape, rotation_width(head_dim)):
        codes[:, :, part], scales[:, :, part] = _encode(states[:, :, part], bits)
    return codes, scales


@torch.no_grad()
def decode(codes: torch.Tensor, scales: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Decode what `encode` returned into `out`, (batch, heads, tokens, head_dim): float32, rounded to its dtype."""
    for part in _chunks(out.shape, rotation_width(out.shape[-1])):
        _decode(codes[:, :, part], scales[:, :, part], bits, out[:, :, part])


def _chunks(shape: torch.Size, width: int) -> Iterator[slice]:
    """Slices of the tokens, each of about CHUNK coordinates."""
    batch, heads, tokens, _ = shape
    step = max(1, CHUNK // (batch * heads * width))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def _encode(states: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    *shape, head_dim = states.shape
    width = rotation_width(head_dim)
    rows = states.reshape(-1, head_dim)
    blocks = torch.zeros(width, len(rows), device=states.device)
    blocks[:head_dim] = rows.T
    rotated = _fwht(blocks.mul_(_signs(width, states.device)[:, None]))

    levels = _levels(bits, states.device)
    # the square root of torch is rounded wrongly in float32; rounding the one in float64 is right
    rms = (_tree_sum(rotated * rotated) * (1 / width)).double().sqrt().float()
    step = torch.where(rms > 0, rms, 1.0)
    codes = torch.bucketize(rotated * (1 / step), (levels[:-1] + levels[1:]) * 0.5)
    chosen = levels[codes]
    # + 0 makes a zero of either sign positive: the sign would go into the scale
    product = _tree_sum(rotated * chosen).clamp_min(0) + 0
    scale = torch.where(rms.isfinite(), product / _tree_sum(chosen * chosen), torch.nan)
    scales = (scale * (1 / width)).clamp_max(65504).half()
    codes = torch.where(scales == 0, 0, codes)
    return _pack(codes, bits).reshape(*shape, -1), scales.reshape(shape)


def _decode(codes: torch.Tensor, scales: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    fours = _unpack_fours(codes.reshape(-1, codes.shape[-1]), bits)  # (W / 4, rows)
    groups, rows = fours.shape
    values = _table(bits, codes.device).index_select(0, fours.reshape(-1))  # after the passes at distance 1 and 2
    values = _fwht(values.reshape(groups, -1)).reshape(groups, rows, 4)
    values *= scales.reshape(-1).float()[:, None]
    target = out.view(*out.shape[:-1], -1, 4)  # (batch, heads, tokens, head_dim / 4, 4)
    kept = target.shape[-2]
    values = values[:kept].transpose(0, 1).reshape(target.shape)
    torch.mul(values, _signs(4 * groups, codes.device).reshape(-1, 4)[:kept], out=target)


def _fwht(columns: torch.Tensor) -> torch.Tensor:
    """The transform of rotate.fwht along the first axis of (W, n) float32, a power of two; in place."""
    distance = 1
    while distance < len(columns):
        pairs = columns.view(len(columns) // (2 * distance), 2, -1)
        a, b = pairs[:, 0], pairs[:, 1]
        difference = a - b
        a += b
        b.copy_(difference)
        distance *= 2
    return columns


def _tree_sum(columns: torch.Tensor) -> torch.Tensor:
    """The sums of rotate.block_sums along the first axis: torch.sum has an order that depends on the shape."""
    while len(columns) > 1:
        half = len(columns) // 2
        columns = columns[:half] + columns[half:]
    return columns[0]


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(W, rows) codes below 2**bits to (rows, W * bits / 8) uint8: eight codes are `bits` bytes, lowest first."""
    eights = codes.reshape(-1, 8, codes.shape[1])
    words = eights[:, 0].clone()
    for i in range(1, 8):
        words |= eights[:, i] << (i * bits)
    octets = torch.stack([words >> (8 * j) & 255 for j in range(bits)], dim=1)  # (W / 8, bits, rows)
    return octets.reshape(-1, codes.shape[1]).T.to(torch.uint8)


def _unpack_fours(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, W * bits / 8) uint8 to (W / 4, rows) int32: four neighbouring codes as one number."""
    octets = packed.reshape(len(packed), -1, bits).permute(2, 1, 0).int()  # (bits, W / 8, rows)
    words = octets[0]
    for j in range(1, bits):
        words = words | octets[j] << (8 * j)
    mask = (1 << 4 * bits) - 1
    return torch.stack([words & mask, words >> (4 * bits) & mask], dim=1).reshape(-1, len(packed))


@cache
def _signs(width: int, device: torch.device) -> torch.Tensor:
    """(W,) float32 of 1 and -1: the sign vector of the files, or its beginning, or the rest of its SHA-256 too."""
    digest = torch.frombuffer(bytearray(hashlib.sha256(b"hlwq signs v1").digest()), dtype=torch.uint8)
    bits = (digest[:, None] >> torch.arange(8)) & 1
    return (1 - 2 * bits.reshape(-1)[:width].float()).to(device)


@cache
def _levels(bits: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(normal_levels(bits)).to(device)


@cache
def _table(bits: int, device: torch.device) -> torch.Tensor:
    """(16**bits, 4) float32: what the passes at distance 1 and 2 make of the levels of four codes."""
    codes = torch.arange(16**bits, device=device) >> (bits * torch.arange(4, device=device)[:, None])
    return _fwht(_levels(bits, device)[codes & ((1 << bits) - 1)]).T.contiguous()
