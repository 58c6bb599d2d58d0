"""What a packed matrix does on a GPU, by its kernels, as operators that torch.compile takes as they are.

Importing this module imports Triton and defines torch.ops.hlwq.decode_rows, rotate_rows and multiply_rows, and
decode_chunks for the codes of a trellis.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from hlwq_formats.layout import BLOCK
from hlwq_formats.rans import CHUNK

from ..kernels.triton_decode import decode_blocks
from ..kernels.triton_linear import EACH, FEW, ROWS, add_parts, multiply_few_rows, multiply_rows, rotate_rows
from ..quantize import power_of_two
from ..trellis import unit_of
from .launch import DECODING, launching
from .launch import ROWS as DECODED_ROWS
from .launch_trellis import DeviceTrellis

ROTATED_EXPONENT = 3
"""Rotated activations are multiplied by 2**-3, the weights for them by 2**3, as in packed."""

_PROGRAMS = 2048
"""Warps that fill a GPU: fewer rows than that are cut into parts."""
_ADDING = 256
_MULTIPLYING: dict[str, Any] = {"rows": ROWS, "num_warps": 1, "num_stages": 1, "maxnreg": 168}


def decode(
    codes: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, signs: Sequence[int], exponent: int,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """(n_blocks, 128) weights, the bits of the loader: of (n_blocks, 16 * bits) uint8, int16, int32 as PackedMatrix has
    them, and four words of sign bits."""
    result = torch.empty((len(scales), BLOCK), dtype=_direct(dtype), device=codes.device)
    if len(scales):
        with launching(decode_blocks, codes.shape[1] // 16, result.dtype):
            decode_blocks[-(-len(scales) // DECODED_ROWS),](
                codes.contiguous().view(torch.int32), scales.contiguous().view(torch.float16),
                levels.view(torch.float32), *signs, float(power_of_two(exponent)), result, len(scales),
                bits=codes.shape[1] // 16, **DECODING,
            )  # fmt: skip
    return result.to(dtype)


def rotate(x: torch.Tensor, signs: Sequence[int]) -> torch.Tensor:
    """fwht(signs * x) * 2**-3 of (n, columns) bfloat16 or float16, n at most BATCH: float32 for n up to FEW."""
    n, columns = x.shape
    result = _rotated(x)
    with launching(rotate_rows, x.dtype, n <= FEW):
        rotate_rows[columns // BLOCK,](
            x.contiguous(), result, n, columns, *signs, factor=2.0**-ROTATED_EXPONENT, num_warps=4
        )
    return result


def multiply(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, exponent: int,
    bias: torch.Tensor | None, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """(n, rows) in `dtype`: the activations that `rotate` gave times a matrix of rows of whole blocks, plus bias."""
    (n, columns), bits = x.shape, codes.shape[1] // 16
    blocks = columns // BLOCK
    rows = len(scales) // blocks
    each = EACH[n - 1] if n <= FEW else 1
    groups = -(-rows // (ROWS * each))
    per_program = -(-blocks // min(blocks, max(1, _PROGRAMS // groups)))
    n_parts = -(-blocks // per_program)
    parts = torch.empty(n_parts * n * rows, dtype=torch.float32, device=x.device)
    result = torch.empty((n, rows), dtype=dtype, device=x.device)
    matrix = codes.view(torch.int32), scales.view(torch.float16), levels.view(torch.float32)
    unit = float(power_of_two(exponent + ROTATED_EXPONENT))
    with launching(multiply_rows, bits, dtype, min(n, FEW + 1), bias is None):
        if n <= FEW:
            multiply_few_rows[groups, n_parts](
                *matrix, x, parts, unit, rows, blocks, per_program, n=n, bits=bits, each=each, **_MULTIPLYING
            )
        else:
            multiply_rows[groups, n_parts](
                *matrix, x, parts, unit, n, rows, blocks, per_program, bits=bits, **_MULTIPLYING
            )
        add_parts[-(-rows // _ADDING), n](
            parts, result if bias is None else bias, result, rows, n_parts, has_bias=bias is not None, size=_ADDING
        )
    return result


def _rotated(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=torch.float32 if len(x) <= FEW else x.dtype, device=x.device)


def _direct(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a decoder rounds to: torch rounds from there to one that is no dtype of weights."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def decode_trellis(
    symbols: torch.Tensor, offsets: torch.Tensor, scales: torch.Tensor, pairs: torch.Tensor, signs: torch.Tensor,
    settings: Sequence[int], numel: int, first: int, last: int, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The weights of chunks `first` to `last` - 1 of a tensor of `numel`, flat and with the bits of the loader, and
    for each chunk 0 where no encoder writes it, (last - first,) int32. The tensors are the buffers of PackedTrellis."""
    row, states, step, exponent = settings
    result = symbols.new_empty(_weights_in(numel, first, last), dtype=_direct(dtype))
    if first == last:
        return result.to(dtype), symbols.new_empty(0, dtype=torch.int32)
    code = DeviceTrellis(row, states, float(unit_of(step, exponent)), scales, pairs, signs)
    cut_short = result.new_empty(BLOCK)
    good = code.decode(symbols.view(torch.int16), offsets[first : last + 1] // 2, first, result, cut_short)
    if rest := len(result) % BLOCK:
        result[-rest:] = cut_short[:rest]
    return result.to(dtype), good


def _undecoded(symbols, offsets, scales, pairs, signs, settings, numel, first, last, dtype):  # type: ignore[no-untyped-def]
    weights = symbols.new_empty(_weights_in(numel, first, last), dtype=dtype)
    return weights, symbols.new_empty(last - first, dtype=torch.int32)


def _weights_in(numel: int, first: int, last: int) -> int:
    return min(last * CHUNK, numel) - first * CHUNK


def _define(name: str, function: Any, fake: Any) -> None:
    @functools.wraps(function)
    def on_its_device(*arguments: Any) -> Any:
        with torch.cuda.device_of(arguments[0]):  # Triton launches on the current one
            return function(*arguments)

    torch.library.custom_op(f"hlwq::{name}", on_its_device, mutates_args=(), device_types="cuda").register_fake(fake)


_define("decode_rows", decode, lambda codes, scales, levels, signs, exponent, dtype: codes.new_empty(
    (len(scales), BLOCK), dtype=dtype))  # fmt: skip
_define("rotate_rows", rotate, lambda x, signs: _rotated(x))
_define("multiply_rows", multiply, lambda x, codes, scales, levels, exponent, bias, dtype: x.new_empty(
    (len(x), len(scales) * BLOCK // x.shape[1]), dtype=dtype))  # fmt: skip
_define("decode_chunks", decode_trellis, _undecoded)
