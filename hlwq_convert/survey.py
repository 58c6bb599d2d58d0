"""The first look at a tensor: its digest, its largest weight, and from those and a sample its code.

One task for each tensor, some tensors ahead of the encoder, so that digests and disk are off its path. The
encoder reads the bytes again, then mostly from the page cache: keeping them would cost the memory of a tensor.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hlwq_formats.dtypes import ITEM_BITS, widen
from hlwq_formats.errors import NonFinite
from hlwq_formats.layout import BLOCK, count_blocks
from hlwq_formats.safetensors_dir import ModelDir, SourceTensor

from .codebook import GROUP, sample_groups
from .plan import Choice
from .quantize import EncodedChunk, ScalarCode, choose_exponent
from .rotate import sign_vector
from .scalar import Effort

_PIECE = 1 << 20  # bytes; what was read is hashed while it is in the core's cache


@dataclass(frozen=True, eq=False)
class Surveyed:
    """A tensor, how it is to be stored, and, when it is quantized, everything its chunks need."""

    tensor: SourceTensor
    reason: str
    sha256: str = ""
    code: ScalarCode | None = None  # None: raw
    encode: Callable[[bytes], EncodedChunk] | None = None
    zeros: int = 0


MakeEncoder = Callable[[ScalarCode], Callable[[bytes], EncodedChunk]]
"""kernels.encode.encoder, or its like for another device."""


class Stopped(Exception):
    """The conversion ended while a survey ran."""


def survey(
    model: ModelDir, tensor: SourceTensor, choice: Choice, effort: Effort, nonfinite: str, stop: threading.Event,
    make_encoder: MakeEncoder,
) -> Surveyed:  # fmt: skip
    """Read a tensor that is to be quantized and choose its code; a raw one is not read.

    Raises NonFinite (65) for NaN or infinity, unless `nonfinite` is "raw": then the tensor stays raw.
    """
    if choice.bits is None:
        return Surveyed(tensor, choice.reason)
    from .kernels.fit import fit
    from .kernels.survey import survey_weights

    digest, largest, zeros = hashlib.sha256(), 0.0, 0
    for raw in model.read_pieces(tensor, _pieces(tensor)):
        if stop.is_set():
            raise Stopped
        digest.update(raw)
        found, more_zeros = survey_weights(raw, tensor.dtype)
        if not np.isfinite(found):
            return Surveyed(tensor, _explain_nonfinite(model, tensor, nonfinite))
        largest, zeros = max(largest, found), zeros + more_zeros
    exponent, signs = choose_exponent(largest), sign_vector()
    levels = fit(_sample(model, tensor), tensor.dtype, exponent, signs, choice.bits)
    code = ScalarCode(tensor.dtype, choice.bits, exponent, levels, signs, effort)
    return Surveyed(tensor, choice.reason, digest.hexdigest(), code, make_encoder(code), zeros)


def _pieces(tensor: SourceTensor) -> list[tuple[int, int]]:
    return [(start, min(_PIECE, tensor.length - start)) for start in range(0, tensor.length, _PIECE)]


def _sample(model: ModelDir, tensor: SourceTensor) -> bytes:
    """The bytes of the blocks that the codebook is fitted on."""
    block_bytes = BLOCK * ITEM_BITS[tensor.dtype] // 8
    groups = sample_groups(count_blocks(tensor.numel))
    if groups.step == GROUP:  # every block
        return model.read(tensor, 0, tensor.length)
    starts = (first * block_bytes for first in groups)
    size = GROUP * block_bytes
    return b"".join(model.read_pieces(tensor, ((at, min(size, tensor.length - at)) for at in starts)))


def _explain_nonfinite(model: ModelDir, tensor: SourceTensor, nonfinite: str) -> str:
    """The reason to keep such a tensor raw, or the error."""
    bad, first = 0, -1
    for (start, _), raw in zip(_pieces(tensor), model.read_pieces(tensor, _pieces(tensor)), strict=True):
        finite = np.isfinite(widen(raw, tensor.dtype))
        if first < 0 and not finite.all():
            first = start * 8 // ITEM_BITS[tensor.dtype] + int(np.argmin(finite))
        bad += int(np.count_nonzero(~finite))
    if nonfinite == "raw":
        return f"{bad} weights are NaN or infinite"
    raise NonFinite(
        f"{bad} of {tensor.numel} weights are NaN or infinite, the first at flat index {first}",
        file=tensor.file,
        tensor=tensor.name,
        hint="repair the model, or pass --nonfinite raw to keep such tensors unquantized",
    )
