"""The files of one pass over a model: survey -> encode -> write -> check, tensors in file order, their chunks in
parallel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from hlwq_formats import metadata as md
from hlwq_formats.errors import HlwqError
from hlwq_formats.layout import scalar_lengths, trellis_lengths
from hlwq_formats.reader import Reader
from hlwq_formats.safetensors_dir import SourceTensor
from hlwq_formats.split import header_of, plan_parts
from hlwq_formats.writer import Writer, Writers

from .device import Device
from .entries import Output
from .inspection import Inspection, Report, inspect_reader, printable
from .job import Job, make_metadata
from .journal import Done, Journal
from .plan import Choice
from .resume import Digest, Planned, fingerprint, load_earlier, still_good
from .rotate import SIGN_BYTES
from .self_check import self_check
from .sizing import long_parts, planned_metadata, total_bytes
from .source_digests import digest_tensor
from .store import Run, write_tensors
from .trellis import row_of

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all); (stage, 0, 0) for one whose end is not known. After ("publishing",
0, 0) the output may be there whatever comes, an interrupt too."""


@dataclass(frozen=True)
class Settings:
    """How to go about a conversion; none of it shows in a file but `nonfinite`."""

    workers: int
    overwrite: bool
    resume: bool
    nonfinite: str
    device: Device


@dataclass(frozen=True)
class Planning:
    """What becomes of each tensor in one file: aliases name the tensor that they equal. When a size is asked for, the
    file must have `least` to `most` bytes, steps are chosen for `wanted`, and trellises are expected to take the bytes
    in `symbols`."""

    job: Job
    path: str
    choices: dict[str, Choice]
    aliases: dict[str, str]
    symbols: dict[str, int] = field(default_factory=dict)
    least: int = 0
    most: int | None = None
    wanted: int = 0


@dataclass(frozen=True)
class Made:
    """A file that is whole but for its name, or that is yet to be cut into parts, and what is in it."""

    planning: Planning
    writer: Writer
    metadata: md.Metadata
    parts: list[md.Metadata]  # the documents of the parts, or its own alone
    inspection: Inspection


@dataclass(frozen=True)
class Missed:
    """A file that came out larger or smaller than it must be."""

    writer: Writer
    size: int


class _MissedSize(Exception):
    """Keeps such a file from being committed."""


def assemble(
    plannings: Sequence[Planning],
    settings: Settings,
    pool: ThreadPoolExecutor,
    writers: Writers,
    progress: Progress | None,
) -> list[Made | Missed]:
    """Write the files of one model as they are planned, reading that once, and check them; none is published."""
    job, aliases = plannings[0].job, plannings[0].aliases
    source, ahead = job.source, 2 * settings.workers
    total = len(plannings) * sum(tensor.length for tensor in source.tensors)
    run = Run(
        source.model, pool, settings.workers, job.recipe.effort, settings.nonfinite, settings.device,
        stepper(progress, "converting", total),
    )  # fmt: skip
    stored = [tensor for tensor in source.tensors if tensor.name not in aliases]
    digest = functools.cache(partial(digest_tensor, source.model))
    outputs: list[Output] = []
    try:
        reserves = [_reserve(planning) for planning in plannings]
        for planning in plannings:
            writer = writers.enter(Writer(planning.path, overwrite=settings.overwrite, resume=settings.resume))
            outputs.append(_begin(planning, writer, stored, settings.nonfinite))
        signs = [_resume(run, output, stored, digest, ahead) for output in outputs]
        _store(run, outputs, reserves, stored)
        assets: list[list[md.Asset]] = [[] for _ in outputs]
        for name, _ in source.assets:
            content = source.read_asset(name)
            for output, listed in zip(outputs, assets, strict=True):
                listed.append(md.Asset(name, [output.writer.write_section("asset", content, compress=True)]))
        source.model.check_unchanged()
        step = stepper(progress, "checking", total)
        check = partial(self_check, pool=pool, workers=settings.workers, piece=settings.device.piece, step=step)
        return [_commit(*each, check) for each in zip(plannings, outputs, signs, assets, strict=True)]
    except BaseException as error:
        run.stop.set()
        for output in () if isinstance(error, Exception) else outputs:
            if output.writer.secured or output.writer.resumed:
                with suppress(HlwqError):  # the last checkpoint stands whether or not another can be made
                    _checkpoint(output)
        raise
    finally:
        for output in outputs:
            output.journal.close()


def _begin(planning: Planning, writer: Writer, stored: list[SourceTensor], nonfinite: str) -> Output:
    job = planning.job
    decisive = fingerprint(job.source, job.recipe, _planned(stored, planning.choices), nonfinite)
    return Output(writer, Journal(writer.journal, decisive), planning.choices, [])


def _planned(stored: list[SourceTensor], choices: dict[str, Choice]) -> Planned:
    return [(tensor, choices[tensor.name]) for tensor in stored]


def _resume(run: Run, output: Output, stored: list[SourceTensor], digest: Digest, ahead: int) -> md.Section:
    """Write the signs and, where an earlier run left off, go on behind the tensors that are still good."""
    writer, journal = output.writer, output.journal
    earlier, problem = load_earlier(writer, journal)
    if problem is not None:
        output.warnings.append(f"{printable(writer.part)} could not be resumed: {problem}")
    signs = writer.write_section("signs", SIGN_BYTES)
    done = still_good(writer, earlier, digest, _planned(stored, output.choices), run.pool, ahead)
    if earlier:
        journal.resume(len(done))
    for item in done:
        for section in item.tensor.sections:
            writer.open_section(section.kind, section.length)
        if item.report is not None:
            output.report.append(item.report)
            output.checksums[item.tensor.name] = item.checksums
        output.tensors.append(item.tensor)
    run.step(sum(tensor.length for tensor in stored[: len(done)]))
    return signs


def _store(run: Run, outputs: list[Output], reserves: list[int], stored: list[SourceTensor]) -> None:
    """Store in each file, which will take what is to be reserved, what it does not have yet; now and then a
    checkpoint."""
    had = [len(output.tensors) for output in outputs]
    takers = ([output for output, n in zip(outputs, had, strict=True) if n <= i] for i in range(len(stored)))
    rest = [(tensor, taken_by) for tensor, taken_by in zip(stored, takers, strict=True) if taken_by]
    storing = write_tensors(run, rest)
    for output, size in zip(outputs, reserves, strict=True):  # takes a while, in which the first tensors are looked at
        output.writer.reserve(size)
    for of in storing:
        for output in of.outputs:
            checksums = output.checksums.get(of.tensor.name, [])
            done = Done(output.tensors[-1], output.report[-1] if checksums else None, checksums)
            if output.journal.note(done, of.tensor.length):
                _checkpoint(output)


def _checkpoint(output: Output) -> None:
    """Secure what is stored; from the first time on an interrupt keeps it."""
    output.writer.flush()
    output.journal.checkpoint()
    output.writer.secured = True


def _commit(
    planning: Planning, output: Output, signs: md.Section, assets: list[md.Asset], check: Callable[..., None]
) -> Made | Missed:
    """Write the report and the metadata, check the file, and make it ready to be published, unless it missed its
    size."""
    job, writer, entries = planning.job, output.writer, iter(output.tensors)
    tensors: list[md.Tensor] = [
        md.AliasTensor(t.name, t.dtype, list(t.shape), planning.aliases[t.name])
        if t.name in planning.aliases
        else next(entries)
        for t in job.source.tensors
    ]
    report = writer.write_section("asset", md.encode(Report(output.report)), compress=True)
    metadata = make_metadata(job, signs, tensors, [*assets, md.Asset(md.REPORT, [report])])
    parts = plan_parts(metadata, job.split_size)
    size = total_bytes(parts)
    if planning.most is not None and not planning.least <= size <= planning.most:
        return Missed(writer, size)
    found: list[Inspection] = []

    def verify(reader: Reader) -> None:
        check(reader, output.checksums)
        found.append(inspect_reader(reader))  # here: nothing may fail after the file is published

    (writer.commit if len(parts) == 1 else writer.prepare)(metadata, verify)
    # not before: a file that missed its size is made again, and would say all of it twice
    job.warnings.extend([*output.warnings, *long_parts(parts, job.split_size)])
    return Made(planning, writer, metadata, parts, found[0])


def _reserve(planning: Planning) -> int:
    """Bytes that the disk must have."""
    reserve, limit = _upper_bound(planning), planning.job.split_size
    if limit is None:
        return reserve
    planned = planned_metadata(planning.job, planning.choices, planning.aliases, [], planning.symbols)
    parts = plan_parts(planned, limit)
    long_parts(parts, limit)  # too many: now, not after hours
    # while the file is cut, one part is there twice
    return reserve + (max(header_of(part).file_len for part in parts) if len(parts) > 1 else 0)


def _upper_bound(planning: Planning) -> int:
    """Bytes that the output cannot exceed by much: every tensor as planned, every asset uncompressed."""
    source, total = planning.job.source, 1 << 16
    for tensor in source.tensors:
        choice = planning.choices[tensor.name]
        if choice.step is not None:
            scales, _ = trellis_lengths(tensor.numel, row_of(tensor.shape))
            stored = scales + planning.symbols.get(tensor.name, 0) * 101 // 100
        else:
            stored = tensor.length if choice.bits is None else sum(scalar_lengths(tensor.numel, choice.bits).values())
        total += stored + 1024  # its metadata, report and padding
    return total + sum(size for _, size in source.assets)


def stepper(progress: Progress | None, stage: str, total: int) -> Callable[[int], None]:
    """What reports the progress of a stage, called with the bytes of each step."""
    done = 0

    def step(amount: int) -> None:
        nonlocal done
        done += amount
        if progress is not None:
            progress(stage, done, total)

    return step
