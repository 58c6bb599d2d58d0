"""A whole model: plan -> read -> quantize -> write, one tensor after the other, its chunks in parallel."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from hlwq_formats import metadata as md
from hlwq_formats.dtypes import ITEM_BITS, narrow, widen
from hlwq_formats.errors import CannotCreate, NonFinite, SelfCheckFailed
from hlwq_formats.layout import BLOCK, scalar_lengths
from hlwq_formats.reader import Reader
from hlwq_formats.safetensors_dir import ModelDir, SourceTensor
from hlwq_formats.sections import zstd_version
from hlwq_formats.writer import Writer
from numpy.typing import NDArray

from . import __version__
from .codebook import GROUP, fit_lloyd_max, sample_groups
from .decode import CodeChunk, code_chunks, scalar_code
from .duplicates import READ, find_duplicates
from .inspection import Inspection, Report, TensorReport, inspect
from .metrics import ErrorSums
from .parallel import default_workers, ordered_map
from .plan import Choice, plan
from .quantize import CHUNK, EncodedChunk, ScalarCode, choose_exponent, dequantize, quantize, sample_blocks
from .recipe import make_recipe
from .rotate import SIGN_BYTES, sign_vector
from .scalar import Effort
from .source import Source, open_source

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all)."""


@dataclass(frozen=True)
class Job:
    """A model and what is to become of each of its tensors."""

    source: Source
    recipe: md.Recipe
    choices: dict[str, Choice]
    warnings: list[str]


@dataclass
class _Run:
    """The state that the tensors of one conversion share."""

    model: ModelDir
    writer: Writer
    pool: ThreadPoolExecutor
    effort: Effort
    nonfinite: str
    step: Callable[[int], None]
    report: list[TensorReport] = field(default_factory=list)
    checksums: dict[str, list[int]] = field(default_factory=dict)  # of the decoded chunks of each tensor


class _CannotDecode(Exception):
    """A tensor so near the end of its dtype's range that its decoding overflows."""


def prepare(
    src: str | os.PathLike[str],
    bits: int | None = None,
    *,
    recipe: str | None = None,
    sets: Sequence[str] = (),
    effort: Effort = "default",
    passthrough: bool = False,
) -> Job:
    """Read the headers of a model and decide how each tensor is stored; reads no weights."""
    combined = make_recipe(bits, recipe, sets, effort)
    source = open_source(src, passthrough=passthrough)
    if passthrough:
        choices = {tensor.name: Choice(None, "passthrough") for tensor in source.tensors}
    else:
        choices = plan(source.tensors, combined)
    return Job(source, combined, choices, [])


def convert(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    bits: int | None = None,
    *,
    recipe: str | None = None,
    sets: Sequence[str] = (),
    effort: Effort = "default",
    workers: int | None = None,
    overwrite: bool = False,
    nonfinite: Literal["error", "raw"] = "error",
    passthrough: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Convert a Hugging Face model directory into one .hlwq file and return what is in it.

    `bits` (2..8, default 5) or `recipe`, and `sets` ("REGEX=BITS" or "REGEX=raw"), choose the width of each
    tensor. The file appears whole or not at all, and its bytes depend on the model, these options and the
    versions alone. Raises an HlwqError for everything that can go wrong.
    """
    job = prepare(src, bits, recipe=recipe, sets=sets, effort=effort, passthrough=passthrough)
    return run(job, out, workers=workers, overwrite=overwrite, nonfinite=nonfinite, progress=progress)


def run(
    job: Job,
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    overwrite: bool = False,
    nonfinite: Literal["error", "raw"] = "error",
    progress: Progress | None = None,
) -> Inspection:
    """Carry out a prepared conversion; warnings are added to `job.warnings`."""
    source, model = job.source, job.source.model
    check_output_place(out, source)
    total = sum(tensor.length for tensor in source.tensors)
    with (
        Writer(out, overwrite=overwrite, reserve=_upper_bound(job)) as writer,
        ThreadPoolExecutor(workers or default_workers(), "hlwq") as pool,
    ):
        run = _Run(model, writer, pool, job.recipe.effort, nonfinite, _stepper(progress, "converting", total))
        aliases = find_duplicates(model, source.tensors)
        job.warnings.extend(tie_warnings(job, aliases))
        choices = merge_choices(job.choices, aliases)

        signs = writer.write_section("signs", SIGN_BYTES)
        tensors: list[md.Tensor] = []
        for tensor in source.tensors:
            if (target := aliases.get(tensor.name)) is not None:
                tensors.append(md.AliasTensor(tensor.name, tensor.dtype, list(tensor.shape), target))
                run.step(tensor.length)
            else:
                tensors.append(_write_tensor(run, tensor, choices[tensor.name]))
        assets = [
            md.Asset(name, [writer.write_section("asset", source.read_asset(name), compress=True)])
            for name, _ in source.assets
        ]
        report = writer.write_section("asset", md.encode(Report(run.report)), compress=True)
        assets.append(md.Asset(md.REPORT, [report]))
        model.check_unchanged()
        metadata = make_metadata(job, signs, tensors, assets)
        check = partial(_check_decoding, run, _stepper(progress, "checking", total))
        writer.finish(metadata, check)
    return inspect(out)


def make_metadata(job: Job, signs: md.Section, tensors: list[md.Tensor], assets: list[md.Asset]) -> md.Metadata:
    """The document of a conversion."""
    tool = md.Tool("hlwq-convert", __version__, zstd_version())
    return md.Metadata(tensors, assets, signs, job.recipe, job.source.provenance, None, tool)


def check_output_place(out: str | os.PathLike[str], source: Source) -> None:
    """Refuse (CannotCreate) an output in the model directory, where the next conversion would read it."""
    root = os.path.realpath(source.model.path)
    if Path(root) in Path(os.path.realpath(out)).parents:
        raise CannotCreate("the output lies inside the model directory", file=os.fspath(out), hint="choose another folder")
    for file, _ in source.model.files:
        if os.path.exists(out) and os.path.samefile(out, source.model.path / file):
            raise CannotCreate(f"the output is the source file {file}", file=os.fspath(out))


def merge_choices(choices: dict[str, Choice], aliases: dict[str, str]) -> dict[str, Choice]:
    """Give each tensor that stands for others the most bits that any of them asks for; raw is the most."""
    merged = dict(choices)
    for name, target in aliases.items():
        merged[target] = max(merged[target], choices[name], key=lambda c: 99 if c.bits is None else c.bits)
    return merged


def tie_warnings(job: Job, aliases: dict[str, str]) -> list[str]:
    """A warning for a config that ties embeddings which the weights do not."""
    config = job.source.config
    heads = [name for name in job.choices if name.endswith("lm_head.weight")]
    if config.get("tie_word_embeddings") is not True or not heads:
        return []
    embeddings = [name for name in job.choices if name.endswith("embed_tokens.weight")]
    tied = {aliases.get(name, name) for name in (*heads, *embeddings)}
    if not embeddings or len(tied) == 1:
        return []
    return ["config.json ties lm_head to the embeddings, but their weights differ: both are kept"]


def _upper_bound(job: Job) -> int:
    """Bytes that the output cannot exceed by much: every tensor as planned, every asset uncompressed."""
    total = 1 << 16
    for tensor in job.source.tensors:
        bits = job.choices[tensor.name].bits
        stored = tensor.length if bits is None else sum(scalar_lengths(tensor.numel, bits).values())
        total += stored + 1024  # its metadata, report and padding
    return total + sum(size for _, size in job.source.assets)


def _stepper(progress: Progress | None, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def step(amount: int) -> None:
        nonlocal done
        done += amount
        if progress is not None:
            progress(stage, done, total)

    return step


# --- one tensor -------------------------------------------------------------------------------------


def _write_tensor(run: _Run, tensor: SourceTensor, choice: Choice) -> md.Tensor:
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
    except _CannotDecode:
        run.writer.rewind(position)
        run.step(-tensor.length)
        return _write_raw(run, tensor, f"at {choice.bits} bits it would decode to infinity")


def _write_raw(run: _Run, tensor: SourceTensor, reason: str) -> md.RawTensor:
    section = run.writer.open_section("raw", tensor.length)
    for start in range(0, tensor.length, READ):
        piece = run.model.read(tensor, start, min(READ, tensor.length - start))
        section.write(piece)
        run.step(len(piece))
    return md.RawTensor(tensor.name, tensor.dtype, list(tensor.shape), reason, [section.done()])


def _chunks(tensor: SourceTensor) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of each chunk of a tensor."""
    size = CHUNK * ITEM_BITS[tensor.dtype] // 8
    for start in range(0, tensor.length, size):
        yield start, min(size, tensor.length - start)


def _survey(run: _Run, tensor: SourceTensor) -> tuple[float, int, int]:
    """The largest finite magnitude, the number of weights that are not finite, and the first of those."""

    def look(place: tuple[int, int]) -> tuple[float, int, int]:
        weights = widen(run.model.read(tensor, *place), tensor.dtype)
        finite = np.isfinite(weights)
        if finite.all():
            return float(np.abs(weights).max()), 0, -1
        first = place[0] * 8 // ITEM_BITS[tensor.dtype] + int(np.argmin(finite))
        return 0.0, int(np.count_nonzero(~finite)), first

    found = list(ordered_map(run.pool, look, _chunks(tensor)))
    bad = sum(count for _, count, _ in found)
    return max(f[0] for f in found), bad, next((first for _, count, first in found if count), -1)


def _fit(run: _Run, tensor: SourceTensor, bits: int, exponent: int, signs: NDArray[np.float32]) -> NDArray[np.float32]:
    """The codebook of a tensor, from its sampled blocks."""
    block_bytes = BLOCK * ITEM_BITS[tensor.dtype] // 8
    groups = sample_groups(-(-tensor.length // block_bytes))
    if groups.step == GROUP:  # every block
        pieces = [run.model.read(tensor, 0, tensor.length)]
    else:
        places = (first * block_bytes for first in groups)
        pieces = [run.model.read(tensor, at, min(GROUP * block_bytes, tensor.length - at)) for at in places]
    return fit_lloyd_max(sample_blocks(b"".join(pieces), tensor.dtype, exponent, signs), bits)


def _write_scalar(run: _Run, tensor: SourceTensor, bits: int, reason: str, largest: float) -> md.ScalarTensor:
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
    for raw, chunk in ordered_map(run.pool, work, _chunks(tensor)):
        digest.update(raw)
        sections["codes"].write(chunk.codes)
        sections["scales"].write(chunk.scales)
        sums.add(chunk.sums)
        checksums.append(chunk.checksum)
        finite &= chunk.finite
        run.step(len(raw))
    if not finite:
        raise _CannotDecode
    closeness = sums.closeness()
    if closeness is not None:
        run.report.append(TensorReport(tensor.name, closeness.cosine, closeness.rel_mse))
    run.checksums[tensor.name] = checksums
    return md.ScalarTensor(
        tensor.name, tensor.dtype, list(tensor.shape), reason, bits, BLOCK, exponent, digest.hexdigest(),
        [section.done() for section in sections.values()],
    )  # fmt: skip


def _check_decoding(run: _Run, step: Callable[[int], None], reader: Reader) -> None:
    """Decode every quantized tensor from the written file: it must give the bits that the errors were
    measured on."""
    import zlib

    for tensor in reader.metadata.tensors:
        if not isinstance(tensor, md.ScalarTensor):
            continue
        code = scalar_code(reader, tensor)

        def decode(chunk: CodeChunk, code: ScalarCode = code) -> tuple[int, int]:
            values = narrow(dequantize(chunk.packed, chunk.scales, code, chunk.count), code.dtype)
            return zlib.crc32(values.tobytes()), values.nbytes

        expected = run.checksums[tensor.name]
        for i, (found, size) in enumerate(ordered_map(run.pool, decode, code_chunks(reader, tensor))):
            if found != expected[i]:
                raise SelfCheckFailed(
                    f"weights from {i * CHUNK} decode to checksum {found:08x}, encoded were {expected[i]:08x}; "
                    "nothing was published",
                    file=reader.path,
                    tensor=tensor.name,
                )
            step(size)
