"""The first look at a tensor: its largest weight, and from that and a sample its code in each file.

One task for each tensor, some tensors ahead of the encoder, so that the disk is off its path. The encoder reads the
bytes again, then mostly from the page cache: keeping them would cost the memory of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hlwq_formats.dtypes import ITEM_BITS, widen
from hlwq_formats.errors import NonFinite
from hlwq_formats.layout import BLOCK, count_blocks
from hlwq_formats.rans import SEGMENT
from hlwq_formats.safetensors_dir import ModelDir, SourceTensor

from .codebook import GROUP, sample_groups
from .device import Device, Encode
from .metrics import ErrorSums
from .plan import Choice
from .quantize import ScalarCode, choose_exponent
from .rotate import sign_vector
from .scalar import Effort
from .trellis import STATES, TrellisCode, fit, is_storable, plain_code, row_of, row_scales

_PIECE = 4 << 20  # bytes that are encoded at once to see what comes of them

_SAFE = {"F16": 2.0**11, "BF16": 2.0**123, "F32": 2.0**123}
"""Scalar codes never make weights infinite whose largest is smaller than this: the fitted scale of a block gives it no
more than its norm, sqrt(128) times the largest weight, but for the rounding of the scale."""


Sample = list[tuple[int, bytes]]
"""Runs of blocks of a tensor: the flat index of the first weight of each, and its bytes."""


@dataclass(frozen=True, eq=False)
class Surveyed:
    """A tensor, how it is to be stored in a file, and, when it is quantized, everything its chunks need."""

    tensor: SourceTensor
    reason: str
    code: ScalarCode | TrellisCode | None = None  # None: raw
    encode: Encode | None = None
    zeros: int = 0
    packed: bool = False  # codes are not to be compressed


def survey(
    model: ModelDir, tensor: SourceTensor, choices: Sequence[Choice], effort: Effort, nonfinite: str,
    device: Device, look: Callable[[memoryview], None] = lambda piece: None,
) -> list[Surveyed]:  # fmt: skip
    """Read a tensor that is to be quantized, once, and find its code for each of the choices; what is raw in all of
    them is not read. `look` is called with each piece that is read, and may raise.

    Raises NonFinite (65) for NaN or infinity, unless `nonfinite` is "raw": then the tensor stays raw.
    """
    if all(choice.encoding == "raw" for choice in choices):
        return [Surveyed(tensor, choice.reason) for choice in choices]
    from .kernels.survey import RowEnergies, survey_weights

    row, variable = row_of(tensor.shape), any(choice.encoding == "trellis" for choice in choices)
    energies = RowEnergies(tensor.dtype, row, tensor.numel // row) if variable else None
    largest, loudest, zeros = 0.0, b"", 0
    for raw in model.stream(tensor, device.piece * ITEM_BITS[tensor.dtype] // 8, device.memory):
        look(raw)
        found, more_zeros = survey_weights(raw, tensor.dtype)
        if not np.isfinite(found):
            reason = _explain_nonfinite(model, tensor, nonfinite)
            return [Surveyed(tensor, choice.reason if choice.encoding == "raw" else reason) for choice in choices]
        if found > largest:
            largest, loudest = found, _loudest_block(raw, tensor.dtype, found)
        zeros += more_zeros
        if energies is not None:
            energies.add(raw)
    exponent = choose_exponent(largest)
    scales = None if energies is None else row_scales(energies.energies, row, exponent)
    sample = list(_sample(model, tensor))

    def find_code(choice: Choice) -> Surveyed:
        code: ScalarCode | TrellisCode
        if choice.step is not None and scales is not None:
            code = _fit_trellis(tensor, sample, exponent, choice.step, scales, effort)
            if not is_storable(code):
                return Surveyed(tensor, f"its weights of up to {largest:g} are at an end of the range of floats")
        elif choice.bits is not None:
            code = _fit_scalar(tensor, sample, exponent, choice.bits, effort)
        else:
            return Surveyed(tensor, choice.reason)
        encode = device.make_encoder(code)
        if isinstance(code, ScalarCode) and (what := _decodes_to(model, tensor, encode, largest, loudest)):
            return Surveyed(tensor, f"quantized it would decode to {what}")
        return Surveyed(tensor, choice.reason, code, encode, zeros)

    return [find_code(choice) for choice in choices]


def _fit_scalar(tensor: SourceTensor, sample: Sample, exponent: int, bits: int, effort: Effort) -> ScalarCode:
    from .kernels.fit import fit

    signs = sign_vector()
    joined = b"".join(raw for _, raw in sample)
    return ScalarCode(tensor.dtype, bits, exponent, fit(joined, tensor.dtype, exponent, signs, bits), signs, effort)


def _fit_trellis(
    tensor: SourceTensor, sample: Sample, exponent: int, step: float, scales: NDArray[np.uint8], effort: Effort
) -> TrellisCode:
    from .kernels.trellis import load_steps, search_segments

    row, states = row_of(tensor.shape), STATES[effort]
    code = plain_code(tensor.dtype, row, states, exponent, step, scales, sign_vector())
    steps = np.concatenate([load_steps(raw, start, code) for start, raw in sample])
    segments = np.zeros((-(-len(steps) // SEGMENT), SEGMENT), np.float32)
    segments.ravel()[: len(steps)] = steps
    indices = search_segments(segments, np.float32(1), states)
    return fit(code, steps, indices.ravel()[: len(steps)])


def _loudest_block(raw: memoryview, dtype: str, largest: float) -> bytes:
    """The bytes of the block with the largest weight of a piece, which begins with a block."""
    from .kernels.survey import find_magnitude

    size = BLOCK * ITEM_BITS[dtype] // 8
    start = find_magnitude(raw, dtype, largest) // BLOCK * size
    return bytes(raw[start : start + size])


def _decodes_to(model: ModelDir, tensor: SourceTensor, encode: Encode, largest: float, loudest: bytes) -> str:
    """What is wrong with all that a tensor would decode to, if something is: it is encoded to see, unless its largest
    weight is safe and the block that holds it does not vanish."""
    if largest < _SAFE[tensor.dtype] and (largest == 0 or encode(loudest, 0).sums[1, 0] > 0):
        return ""
    sums, first = ErrorSums(), 0
    for raw in model.read_pieces(tensor, _pieces(tensor)):
        sums.add(encode(raw, first).sums)
        if not sums.is_finite():
            return "infinity"
        first += len(raw) * 8 // ITEM_BITS[tensor.dtype]
    closeness = sums.closeness()
    return "zeros" if closeness is not None and closeness.cosine == 0 else ""


def _pieces(tensor: SourceTensor) -> list[tuple[int, int]]:
    return [(start, min(_PIECE, tensor.length - start)) for start in range(0, tensor.length, _PIECE)]


def _sample(model: ModelDir, tensor: SourceTensor) -> Iterator[tuple[int, bytes]]:
    """The blocks that codebooks and frequencies are fitted on, run by run."""
    item_bytes = ITEM_BITS[tensor.dtype] // 8
    groups = sample_groups(count_blocks(tensor.numel))
    size = tensor.length if groups.step == GROUP else GROUP * BLOCK * item_bytes  # every block, or a group
    starts = [0] if groups.step == GROUP else [first * BLOCK for first in groups]
    places = ((at * item_bytes, min(size, tensor.length - at * item_bytes)) for at in starts)
    return zip(starts, model.read_pieces(tensor, places), strict=True)


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
