"""A whole model: plan -> survey -> encode -> write -> check, tensors in file order, their chunks in parallel."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from hlwq_formats import metadata as md
from hlwq_formats.errors import BadModelDir, CannotCreate, HlwqError, NoDevice, Usage, escape
from hlwq_formats.layout import MAX_METADATA, scalar_lengths
from hlwq_formats.reader import Reader
from hlwq_formats.safetensors_dir import SourceTensor
from hlwq_formats.sections import zstd_version
from hlwq_formats.writer import Writer

from . import __version__
from .duplicates import find_duplicates
from .inspection import Inspection, Report, inspect_reader, printable
from .journal import Done, Journal
from .parallel import default_workers
from .plan import Choice, placeholder, plan
from .recipe import make_recipe
from .resume import Planned, fingerprint, load_earlier, still_good
from .rotate import SIGN_BYTES
from .scalar import Effort
from .self_check import self_check
from .source import Source, open_source
from .store import Run, write_tensors
from .survey import MakeEncoder

_MANY = 50_000

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all); (stage, 0, 0) for one whose end is not known."""


@dataclass(frozen=True)
class Job:
    """A model and what is to become of each of its tensors."""

    source: Source
    recipe: md.Recipe
    choices: dict[str, Choice]
    warnings: list[str]


def prepare(
    src: str | os.PathLike[str],
    bits: int | None = None,
    *,
    recipe: str | None = None,
    sets: Sequence[str] = (),
    effort: Effort = "default",
    passthrough: bool = False,
    allow_extra: bool = False,
) -> Job:
    """Read the headers of a model and decide how each tensor is stored; reads no weights."""
    sets = [sets] if isinstance(sets, str) else list(sets)
    combined = make_recipe(bits, recipe, sets, effort)
    if passthrough and (bits is not None or recipe is not None or sets):
        raise Usage("--passthrough keeps every tensor as it is: it takes no --bits, --recipe or --set")
    source = open_source(src, passthrough=passthrough, allow_extra=allow_extra)
    if passthrough:
        combined = md.Recipe(name=None, bits=None, effort=effort, rules=[])
        choices = {tensor.name: Choice(None, "passthrough") for tensor in source.tensors}
    else:
        choices = plan(source.tensors, combined, len(sets))
    _check_metadata_fits(source, choices)
    return Job(source, combined, choices, list(source.model.warnings))


def _check_metadata_fits(source: Source, choices: dict[str, Choice]) -> None:
    """Refuse now what could be refused only after hours: more tensors than the metadata can describe."""
    if len(source.tensors) < _MANY:
        return
    size = sum(len(md.encode(placeholder(tensor, choices[tensor.name]))) + 1 for tensor in source.tensors)
    if size > MAX_METADATA - _MANY:
        raise BadModelDir(
            f"{len(source.tensors)} tensors need about {size} bytes of metadata, a file can hold {MAX_METADATA}",
            file=str(source.model.path),
            hint="convert parts of the model on their own",
        )


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
    resume: bool = True,
    nonfinite: Literal["error", "raw"] = "error",
    passthrough: bool = False,
    allow_extra: bool = False,
    allow_inside_source: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Inspection:
    """Convert a Hugging Face model directory into one .hlwq file and return what is in it.

    `bits` (2..8, default 5) or `recipe`, and `sets` ("REGEX=BITS" or "REGEX=raw"), choose the width of each
    tensor. The file appears whole or not at all, and its bytes depend on the model, these options and the
    versions alone. A conversion that was killed or interrupted is continued, unless `resume` is False.
    `device` "cuda" (all GPUs) or "cuda:N" encodes on GPUs: the same bytes; needs the extra torch with CUDA.
    Raises an HlwqError for everything that can go wrong.
    """
    job = prepare(src, bits, recipe=recipe, sets=sets, effort=effort, passthrough=passthrough, allow_extra=allow_extra)
    return run(
        job, out, workers=workers, overwrite=overwrite, resume=resume, nonfinite=nonfinite,
        allow_inside_source=allow_inside_source, device=device, progress=progress,
    )  # fmt: skip


def run(
    job: Job,
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    nonfinite: Literal["error", "raw"] = "error",
    allow_inside_source: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Inspection:
    """Carry out a prepared conversion; warnings are added to `job.warnings`."""
    if nonfinite not in ("error", "raw"):
        raise Usage(f"nonfinite is {escape(str(nonfinite))}, expected error or raw")
    if workers is not None and (type(workers) is not int or workers < 1):
        raise Usage(f"workers is {escape(str(workers))}, expected 1 or more")
    source, model = job.source, job.source.model
    make_encoder = choose_encoder(device)
    check_output_place(out, source, allow_inside_source=allow_inside_source)
    workers = workers or default_workers()
    compile_kernels(job, progress)
    total = sum(tensor.length for tensor in source.tensors)
    with (
        Writer(out, overwrite=overwrite, reserve=_upper_bound(job), resume=resume) as writer,
        ThreadPoolExecutor(workers, "hlwq") as pool,
    ):
        step = _stepper(progress, "converting", total)
        run = Run(model, writer, pool, workers, job.recipe.effort, nonfinite, make_encoder, step, job.warnings)
        aliases = find_duplicates(model, source.tensors)
        job.warnings.extend(tie_warnings(job, aliases))
        choices = merge_choices(job.choices, aliases)
        planned = [(t, choices[t.name]) for t in source.tensors if t.name not in aliases]
        journal = Journal(writer.part, fingerprint(source, job.recipe, planned, nonfinite))
        try:
            earlier, problem = load_earlier(writer, journal)
            if problem is not None:
                job.warnings.append(f"{printable(writer.part)} could not be resumed: {problem}")
            signs = writer.write_section("signs", SIGN_BYTES)
            done = still_good(writer, earlier, model, planned, pool, 2 * workers)
            if earlier:
                journal.resume(len(done))
            stored = _store(run, journal, planned, done)
            tensors = [_alias(t, aliases[t.name]) if t.name in aliases else next(stored) for t in source.tensors]
            assets = [
                md.Asset(name, [writer.write_section("asset", source.read_asset(name), compress=True)])
                for name, _ in source.assets
            ]
            report = writer.write_section("asset", md.encode(Report(run.report)), compress=True)
            assets.append(md.Asset(md.REPORT, [report]))
            model.check_unchanged()
            metadata = make_metadata(job, signs, tensors, assets)
            inspections = []

            def verify(reader: Reader) -> None:
                self_check(reader, run.checksums, pool, 2 * workers, _stepper(progress, "checking", total))
                inspections.append(inspect_reader(reader))  # here: nothing may fail after the file is published

            writer.finish(metadata, verify)
        except BaseException as error:
            run.stop.set()
            if isinstance(error, Exception) or not journal.begun:
                journal.discard()
            else:
                writer.keep = True
                with suppress(HlwqError):  # the last checkpoint stands whether or not another can be made
                    writer.flush()
                    journal.checkpoint()
            raise
        journal.discard()
    return msgspec.structs.replace(inspections[0], file=printable(os.fspath(out)), warnings=job.warnings)


def _store(run: Run, journal: Journal, planned: Planned, done: list[Done]) -> Iterator[md.Tensor]:
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
            run.writer.flush()
            journal.checkpoint()
        yield entry


def _alias(tensor: SourceTensor, of: str) -> md.AliasTensor:
    return md.AliasTensor(tensor.name, tensor.dtype, list(tensor.shape), of)


def compile_kernels(job: Job, progress: Progress | None = None) -> float:
    """Make ready the machine code that the job needs and return the seconds that took: some, the first time on a
    machine, and almost none when it is there. `run` does it too, when it was not done."""
    codes = {(t.dtype, bits) for t in job.source.tensors if (bits := job.choices[t.name].bits) is not None}
    if not codes:
        return 0.0
    from .kernels.compiled import is_code_kept
    from .kernels.warm_up import warm_up

    # said only when it takes long enough for someone to wonder
    notice = threading.Timer(5.0 if is_code_kept() else 1.0, progress or _ignore, ("compiling kernels", 0, 0))
    notice.daemon = True
    notice.start()
    try:
        return warm_up(sorted(codes))
    finally:
        notice.cancel()


def choose_encoder(device: str) -> MakeEncoder:
    """What encodes on `device`: "cpu", "cuda" or "cuda:N". Raises NoDevice (69) where there is none."""
    if device == "cpu":
        from .kernels.encode import encoder

        return encoder
    if re.fullmatch(r"cuda(:\d{1,3})?", device) is None:
        raise Usage(f"device is {escape(device)}, expected cpu, cuda or cuda:N")
    try:
        from .runtime.gpu import make_encoders
    except ImportError:
        raise NoDevice(
            f"device {device} needs torch", hint="install hlwq-convert[torch] or leave out --device"
        ) from None
    return make_encoders(device)


def _ignore(stage: str, done: int, total: int) -> None:
    pass


def make_metadata(job: Job, signs: md.Section, tensors: list[md.Tensor], assets: list[md.Asset]) -> md.Metadata:
    """The document of a conversion."""
    tool = md.Tool("hlwq-convert", __version__, zstd_version())
    return md.Metadata(tensors, assets, signs, job.recipe, job.source.provenance, None, tool)


def check_output_place(out: str | os.PathLike[str], source: Source, *, allow_inside_source: bool = False) -> None:
    """Refuse (CannotCreate) an output that is a file of the model or, unless allowed, lies beside those."""
    root = os.path.realpath(source.model.path)
    if not allow_inside_source and Path(root) in Path(os.path.realpath(out)).parents:
        raise CannotCreate(
            "the output lies inside the model directory",
            file=os.fspath(out),
            hint="choose another folder or pass --allow-inside-source",
        )
    for file, _ in [*source.model.files, *source.assets]:
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
    text = config.get("text_config")  # of multimodal models
    tied_by = [c for c in (config, text) if isinstance(c, dict) and c.get("tie_word_embeddings") is True]
    heads = [name for name in job.choices if name.endswith("lm_head.weight")]
    if not tied_by or not heads or any(name in aliases or name in aliases.values() for name in heads):
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
