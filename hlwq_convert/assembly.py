"""One file: survey -> encode -> write -> check, tensors in file order, their chunks in parallel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from hlwq_formats import metadata as md
from hlwq_formats.cut import remove_replaced
from hlwq_formats.errors import HlwqError
from hlwq_formats.layout import scalar_lengths, trellis_lengths
from hlwq_formats.reader import Reader
from hlwq_formats.split import header_of, plan_parts
from hlwq_formats.writer import Writer

from .inspection import Inspection, Report, inspect_reader, printable
from .job import Job, make_metadata
from .journal import Done, Journal
from .plan import Choice
from .resume import Planned, fingerprint, load_earlier, still_good
from .rotate import SIGN_BYTES
from .self_check import self_check
from .sizing import long_parts, planned_metadata, total_bytes
from .store import Run, write_tensors
from .survey import MakeEncoder
from .trellis import row_of

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all); (stage, 0, 0) for one whose end is not known. After ("publishing",
0, 0) the output may be there whatever comes, an interrupt too."""


@dataclass(frozen=True)
class Settings:
    """How to go about a conversion; none of it shows in the file but `nonfinite`."""

    workers: int
    overwrite: bool
    resume: bool
    nonfinite: str
    make_encoder: MakeEncoder


@dataclass(frozen=True)
class Planning:
    """What becomes of each tensor: aliases name the tensor that they equal. `symbols` are the bytes that trellises are
    expected to take, `least` and `most` the size that the file must have, when one is asked for."""

    choices: dict[str, Choice]
    aliases: dict[str, str]
    symbols: dict[str, int] = field(default_factory=dict)
    least: int = 0
    most: int | None = None


class MissedSize(Exception):
    """The file came out larger or smaller than it must be; nothing was published."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def assemble(
    job: Job,
    out: str | os.PathLike[str],
    planning: Planning,
    settings: Settings,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
) -> Inspection:
    """Write the file as it is planned, check it, publish it, and return what is in it."""
    source, model, aliases = job.source, job.source.model, planning.aliases
    total = sum(tensor.length for tensor in source.tensors)
    ahead = 2 * settings.workers
    reserve = _upper_bound(job, planning)
    if job.split_size is not None:
        planned_parts = _planned_parts(job, planning)
        long_parts(planned_parts, job.split_size)  # too many: now, not after hours
        if len(planned_parts) > 1:
            reserve += max(header_of(part).file_len for part in planned_parts)  # while it is cut, one is there twice
    with Writer(out, overwrite=settings.overwrite, reserve=reserve, resume=settings.resume) as writer:
        step = _stepper(progress, "converting", total)
        run = Run(
            model, writer, pool, settings.workers, job.recipe.effort, settings.nonfinite, settings.make_encoder, step,
            job.warnings,
        )  # fmt: skip
        planned = [(t, planning.choices[t.name]) for t in source.tensors if t.name not in aliases]
        journal = Journal(writer.journal, fingerprint(source, job.recipe, planned, settings.nonfinite))
        try:
            earlier, problem = load_earlier(writer, journal)
            if problem is not None:
                job.warnings.append(f"{printable(writer.part)} could not be resumed: {problem}")
            signs = writer.write_section("signs", SIGN_BYTES)
            done = still_good(writer, earlier, model, planned, pool, ahead)
            if earlier:
                journal.resume(len(done))
            stored = _store(run, journal, planned, done)
            tensors: list[md.Tensor] = [
                md.AliasTensor(t.name, t.dtype, list(t.shape), aliases[t.name]) if t.name in aliases else next(stored)
                for t in source.tensors
            ]
            assets = [
                md.Asset(name, [writer.write_section("asset", source.read_asset(name), compress=True)])
                for name, _ in source.assets
            ]
            report = writer.write_section("asset", md.encode(Report(run.report)), compress=True)
            assets.append(md.Asset(md.REPORT, [report]))
            model.check_unchanged()
            inspections = []

            metadata = make_metadata(job, signs, tensors, assets)
            parts = plan_parts(metadata, job.split_size)
            warnings = long_parts(parts, job.split_size)

            def verify(reader: Reader) -> None:
                size = total_bytes(parts)
                if planning.most is not None and not planning.least <= size <= planning.most:
                    raise MissedSize(size)
                self_check(reader, run.checksums, pool, ahead, _stepper(progress, "checking", total))
                if len(parts) == 1:
                    look(reader)

            def look(reader: Reader) -> None:
                inspections.append(inspect_reader(reader))  # here: nothing may fail after the file is published
                if progress is not None:
                    progress("publishing", 0, 0)

            if len(parts) == 1:
                writer.finish(metadata, verify)
            else:
                writer.finish_parts(metadata, parts, verify, look, _stepper(progress, "splitting", total_bytes(parts)))
            job.warnings.extend(warnings)
            if job.split_size is not None and settings.overwrite:
                remove_replaced(os.fspath(out), parts)
        except BaseException as error:
            run.stop.set()
            if not isinstance(error, Exception) and (writer.secured or writer.resumed) and not writer.published:
                with suppress(HlwqError):  # the last checkpoint stands whether or not another can be made
                    _checkpoint(run, journal)
            raise
        finally:
            journal.close()
    return msgspec.structs.replace(inspections[0], file=printable(os.fspath(out)), warnings=job.warnings)


def _store(run: Run, journal: Journal, planned: Planned, done: list[Done]) -> Iterator[md.StoredTensor]:
    """Yield the entries of all stored tensors in order, those of an earlier run first; now and then a checkpoint."""
    for item in done:
        for section in item.tensor.sections:
            run.writer.open_section(section.kind, section.length)
        if item.report is not None:
            run.report.append(item.report)
            run.checksums[item.tensor.name] = item.checksums
        yield item.tensor
    run.step(sum(tensor.length for tensor, _ in planned[: len(done)]))
    rest = planned[len(done) :]
    for (tensor, _), entry in zip(rest, write_tensors(run, rest), strict=True):
        checksums = run.checksums.get(tensor.name, [])
        if journal.note(Done(entry, run.report[-1] if checksums else None, checksums), tensor.length):
            _checkpoint(run, journal)
        yield entry


def _checkpoint(run: Run, journal: Journal) -> None:
    """Secure what is stored; from the first time on an interrupt keeps it."""
    run.writer.flush()
    journal.checkpoint()
    run.writer.secured = True


def _planned_parts(job: Job, planning: Planning) -> list[md.Metadata]:
    """The documents of the parts, as far as they are known before anything is read, without assets."""
    return plan_parts(planned_metadata(job, planning.choices, planning.aliases, [], planning.symbols), job.split_size)


def _upper_bound(job: Job, planning: Planning) -> int:
    """Bytes that the output cannot exceed by much: every tensor as planned, every asset uncompressed."""
    total = 1 << 16
    for tensor in job.source.tensors:
        choice = planning.choices[tensor.name]
        if choice.step is not None:
            scales, _ = trellis_lengths(tensor.numel, row_of(tensor.shape))
            stored = scales + planning.symbols.get(tensor.name, 0) * 101 // 100
        else:
            stored = tensor.length if choice.bits is None else sum(scalar_lengths(tensor.numel, choice.bits).values())
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
