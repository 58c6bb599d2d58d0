"""One tensor from the source into the sections of a container, its chunks in parallel; and the check that
what was stored decodes to what was measured."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hlwq_formats import metadata as md
from hlwq_formats.dtypes import ITEM_BITS, narrow, widen
from hlwq_formats.errors import BadSafetensors, NonFinite, SelfCheckFailed
from hlwq_formats.layout import BLOCK, scalar_lengths
from hlwq_formats.reader import Reader
from hlwq_formats.safetensors_dir import ModelDir, SourceTensor
from hlwq_formats.writer import Writer

from .codebook import GROUP, fit_lloyd_max, sample_groups
from .decode import CodeChunk, code_chunks, scalar_code
from .duplicates import READ
from .inspection import TensorReport
from .metrics import ErrorSums
from .parallel import ordered_map
from .plan import Choice
from .quantize import CHUNK, EncodedChunk, ScalarCode, choose_exponent, dequantize, quantize, sample_blocks
from .rotate import sign_vector
from .scalar import Effort


@dataclass
class Run:
    """The state that the tensors of one conversion share."""

    model: ModelDir
    writer: Writer
    pool: ThreadPoolExecutor
    ahead: int  # chunks begun and not yet taken
    effort: Effort
    nonfinite: str
    step: Callable[[int], None]
    report: list[TensorReport] = field(default_factory=list)
    checksums: dict[str, list[int]] = field(default_factory=dict)  # of the decoded chunks of each tensor


class CannotDecode(Exception):
    """A tensor at an end of the float range: its decoding would overflow, or all of it vanish."""


def write_tensor(run: Run, tensor: SourceTensor, choice: Choice) -> md.Tensor:
    """Store one tensor as chosen, or raw where it cannot be quantized; NonFinite when it may not be stored."""
    if choice.bits is None:
        return _write_raw(run, tensor, choice.reason)
    largest, bad, first = _survey(run, tensor)
    if bad and run.nonfinite == "raw":
        return _write_raw(run, tensor, f"{bad} weights are NaN or infinite")
    if bad:
        raise NonFinite(
            f"{bad} of {tensor.numel} weights are NaN or infinite, the first at flat index {first}",
            file=tensor.file,
            tensor=tensor.name,
            hint="repair the model, or pass --nonfinite raw to keep such tensors unquantized",
        )
    position = run.writer.position
    try:
        return _write_scalar(run, tensor, choice.bits, choice.reason, largest)
    except CannotDecode as error:
        run.writer.rewind(position)
        run.step(-tensor.length)
        return _write_raw(run, tensor, f"at {choice.bits} bits it would decode to {error}")


def _write_raw(run: Run, tensor: SourceTensor, reason: str) -> md.RawTensor:
    section = run.writer.open_section("raw", tensor.length)
    for start in range(0, tensor.length, READ):
        piece = run.model.read(tensor, start, min(READ, tensor.length - start))
        if tensor.dtype == "BOOL" and max(piece) > 1:
            raise BadSafetensors(f"a boolean is {max(piece)}, expected 0 or 1", file=tensor.file, tensor=tensor.name)
        section.write(piece)
        run.step(len(piece))
    return md.RawTensor(tensor.name, tensor.dtype, list(tensor.shape), reason, [section.done()])


def _chunks(tensor: SourceTensor) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of each chunk of a tensor."""
    size = CHUNK * ITEM_BITS[tensor.dtype] // 8
    for start in range(0, tensor.length, size):
        yield start, min(size, tensor.length - start)


def _survey(run: Run, tensor: SourceTensor) -> tuple[float, int, int]:
    """The largest finite magnitude, the number of weights that are not finite, and the first of those."""

    def look(place: tuple[int, int]) -> tuple[float, int, int]:
        weights = widen(run.model.read(tensor, *place), tensor.dtype)
        finite = np.isfinite(weights)
        if finite.all():
            return float(np.abs(weights).max()), 0, -1
        first = place[0] * 8 // ITEM_BITS[tensor.dtype] + int(np.argmin(finite))
        return 0.0, int(np.count_nonzero(~finite)), first

    found = list(ordered_map(run.pool, run.ahead, look, _chunks(tensor)))
    bad = sum(count for _, count, _ in found)
    return max(f[0] for f in found), bad, next((first for _, count, first in found if count), -1)


def _fit(run: Run, tensor: SourceTensor, bits: int, exponent: int, signs: NDArray[np.float32]) -> NDArray[np.float32]:
    """The codebook of a tensor, from its sampled blocks."""
    block_bytes = BLOCK * ITEM_BITS[tensor.dtype] // 8
    groups = sample_groups(-(-tensor.length // block_bytes))
    if groups.step == GROUP:  # every block
        pieces = [run.model.read(tensor, 0, tensor.length)]
    else:
        places = (first * block_bytes for first in groups)
        pieces = [run.model.read(tensor, at, min(GROUP * block_bytes, tensor.length - at)) for at in places]
    return fit_lloyd_max(sample_blocks(b"".join(pieces), tensor.dtype, exponent, signs), bits)


def _write_scalar(run: Run, tensor: SourceTensor, bits: int, reason: str, largest: float) -> md.ScalarTensor:
    exponent = choose_exponent(largest)
    signs = sign_vector()
    code = ScalarCode(tensor.dtype, bits, exponent, _fit(run, tensor, bits, exponent, signs), signs, run.effort)

    def work(place: tuple[int, int]) -> tuple[bytes, EncodedChunk]:
        raw = run.model.read(tensor, *place)
        return raw, quantize(raw, code)

    sections = {kind: run.writer.open_section(kind, n) for kind, n in scalar_lengths(tensor.numel, bits).items()}
    sections["levels"].write(code.levels.tobytes())
    digest, sums, checksums = hashlib.sha256(), ErrorSums(), []
    finite = True
    for raw, chunk in ordered_map(run.pool, run.ahead, work, _chunks(tensor)):
        digest.update(raw)
        sections["codes"].write(chunk.codes)
        sections["scales"].write(chunk.scales)
        sums.add(chunk.sums)
        checksums.append(chunk.checksum)
        finite &= chunk.finite
        run.step(len(raw))
    if not finite:
        raise CannotDecode("infinity")
    closeness = sums.closeness()
    if closeness is not None and closeness.cosine == 0:
        raise CannotDecode("zeros")
    cosine, rel_mse = (None, None) if closeness is None else (closeness.cosine, closeness.rel_mse)
    run.report.append(TensorReport(tensor.name, cosine, rel_mse))
    run.checksums[tensor.name] = checksums
    return md.ScalarTensor(
        tensor.name, tensor.dtype, list(tensor.shape), reason, bits, BLOCK, exponent, digest.hexdigest(),
        [section.done() for section in sections.values()],
    )  # fmt: skip


def check_decoding(run: Run, step: Callable[[int], None], reader: Reader) -> None:
    """Decode every quantized tensor from the written file: it must give the bits that the errors were
    measured on."""
    for tensor in reader.metadata.tensors:
        if not isinstance(tensor, md.ScalarTensor):
            continue
        code = scalar_code(reader, tensor)

        def decode(chunk: CodeChunk, code: ScalarCode = code) -> tuple[int, int]:
            values = narrow(dequantize(chunk.packed, chunk.scales, code, chunk.count), code.dtype)
            return zlib.crc32(values.tobytes()), values.nbytes

        expected = run.checksums[tensor.name]
        for i, (found, size) in enumerate(ordered_map(run.pool, run.ahead, decode, code_chunks(reader, tensor))):
            if found != expected[i]:
                raise SelfCheckFailed(
                    f"weights from {i * CHUNK} decode to checksum {found:08x}, encoded were {expected[i]:08x}; "
                    "nothing was published",
                    file=reader.path,
                    tensor=tensor.name,
                )
            step(size)
