"""A whole model: plan -> find duplicates -> choose steps -> assemble, until each file has the size asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal, Unpack

from hlwq_formats.atomic import check_destination
from hlwq_formats.cut import check_place, remove_leftovers
from hlwq_formats.errors import CannotCreate, Internal, Usage, escape
from hlwq_formats.writer import Writers

from .assembly import Made, Planning, Progress, Settings, assemble
from .device import choose_device
from .duplicates import find_duplicates
from .inspection import Inspection
from .job import Job, Options, prepare, prepare_all
from .ladder import Rung, make_rungs, path_of
from .parallel import default_workers
from .plan import Choice
from .publishing import publish
from .sizing import find_steps, weights_of
from .source import Source

TOLERANCE = 0.002
"""How much smaller than asked for a file of variable rate may be; it is never larger."""

_EXACT_TRIES, _TRIES = 3, 8
_GRAIN = 512  # bytes; sections begin at multiples of 64, and the metadata has more digits or fewer


def convert(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    bits: int | None = None,
    *,
    bpw: float | None = None,
    size: int | str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    nonfinite: Literal["error", "raw"] = "error",
    allow_inside_source: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Inspection:
    """Convert a Hugging Face model directory into one .hlwq file and return what is in it.

    `bits` (2..8, default 5) or `recipe`, and `sets` ("REGEX=BITS" or "REGEX=raw"), choose the width of each
    tensor. With `bpw`, bits a weight of the finished file, or `size`, its bytes ("16.2GB"), tensors are coded at the
    variable rate that gives this size; `min_bits` and `max_bits` ("REGEX=BITS") bound some of them and `sensitivity`,
    a file, says which matter more. `effort` is "fast", "default" or "best".

    A file of over `split_size` bytes ("20GB") is cut into the parts of a set, OUT-00001-of-00003.hlwq and so on; any of
    them, or their folder, stands for all.

    The file appears whole or not at all, and its bytes depend on the model, these options and the versions alone. A
    conversion that was killed or interrupted is continued, unless `resume` is False.
    `device` "cuda" (all GPUs) or "cuda:N" encodes on GPUs: the same bytes; needs torch with CUDA.
    Raises an HlwqError for everything that can go wrong.
    """
    job = prepare(src, bits, bpw=bpw, size=size, **options)
    return run(
        [job], [out], workers=workers, overwrite=overwrite, resume=resume, nonfinite=nonfinite,
        allow_inside_source=allow_inside_source, device=device, progress=progress,
    )[0]  # fmt: skip


def convert_ladder(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: Sequence[int] = (),
    bpw: Sequence[float] = (),
    size: Sequence[int | str] = (),
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    nonfinite: Literal["error", "raw"] = "error",
    allow_inside_source: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> list[Inspection]:
    """Convert a model into one file for each value of `bits`, `bpw` or `size`, reading it once for all of them.

    The files are those that `convert` makes, named OUT-4bit.hlwq, OUT-4.25bpw.hlwq or OUT-16.2GB.hlwq when `out` is
    OUT.hlwq, and appear together, at the end. Everything else is as in `convert`.
    """
    rungs = make_rungs(bits, bpw, size)
    if rungs == [Rung()]:
        raise Usage("a ladder needs values of bits, bpw or size")
    jobs = prepare_all(src, rungs, **options)
    return run(
        jobs, [path_of(out, rung) for rung in rungs], workers=workers, overwrite=overwrite, resume=resume,
        nonfinite=nonfinite, allow_inside_source=allow_inside_source, device=device, progress=progress,
    )  # fmt: skip


def run(
    jobs: Sequence[Job],
    outs: Sequence[str | os.PathLike[str]],
    *,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    nonfinite: Literal["error", "raw"] = "error",
    allow_inside_source: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Inspection]:
    """Carry out prepared conversions, in one pass when they are the several of `prepare_all`; warnings are added to
    each one's `warnings`. The files appear together, at the end."""
    if nonfinite not in ("error", "raw"):
        raise Usage(f"nonfinite is {escape(str(nonfinite))}, expected error or raw")
    if workers is not None and (type(workers) is not int or workers < 1):
        raise Usage(f"workers is {escape(str(workers))}, expected 1 or more")
    workers = workers or default_workers()
    encoding = choose_device(device, workers)
    for out in outs:
        check_output_place(out, jobs[0].source, allow_inside_source=allow_inside_source)
        (check_destination if jobs[0].split_size is None else check_place)(out, overwrite=overwrite)
        remove_leftovers(out)
    settings = Settings(workers, overwrite, resume, nonfinite, encoding)
    compile_kernels(jobs, progress)
    with ThreadPoolExecutor(workers, "hlwq") as pool, Writers() as writers:
        aliases = find_duplicates(jobs[0].source.model, jobs[0].source.tensors)
        for job in jobs:
            job.warnings.extend(tie_warnings(job, aliases))
        plannings = [_plan(job, os.fspath(out), aliases) for job, out in zip(jobs, outs, strict=True)]
        made = _make(plannings, settings, pool, writers, progress)
        found = publish([made[planning.path] for planning in plannings], writers, progress, overwrite=overwrite)
    # returned from inside of the `with`, it would leave a moment in which a signal passes by the writers
    return found  # noqa: RET504


def _plan(job: Job, path: str, aliases: dict[str, str]) -> Planning:
    choices = merge_choices(job.choices, aliases)
    if job.target is None:
        return Planning(job, path, choices, aliases)
    most = job.target.bytes_for(weights_of(job, aliases))
    least = most - max(int(most * TOLERANCE), _GRAIN)
    wanted = most - (most - least) // 4  # what samples say is a little too much, more often than too little
    return Planning(job, path, choices, aliases, least=least, most=most, wanted=wanted)


def _make(
    plannings: list[Planning],
    settings: Settings,
    pool: ThreadPoolExecutor,
    writers: Writers,
    progress: Progress | None,
) -> dict[str, Made]:
    """Convert with the steps that samples suggest; those files that miss their size once more with others."""
    made: dict[str, Made] = {}
    for number in range(_TRIES):
        if plannings[0].job.target is not None:
            plannings = _choose_steps(plannings, number, pool, progress)
        # never larger matters more than not much smaller
        allowed = plannings if number < _EXACT_TRIES else [replace(planning, least=0) for planning in plannings]
        missed = []
        for planning, result in zip(plannings, assemble(allowed, settings, pool, writers, progress), strict=True):
            if isinstance(result, Made):
                made[planning.path] = result
            else:
                result.writer.abandon()
                missed.append(_correct(planning, result.size, number))
        if not missed:
            return made
        plannings = missed
    raise Internal(f"the file cannot be brought to {plannings[0].most} bytes", file=plannings[0].path)


def _choose_steps(
    plannings: list[Planning], number: int, pool: ThreadPoolExecutor, progress: Progress | None
) -> list[Planning]:
    if progress is not None:
        progress("choosing steps", 0, 0)
    jobs, choices, wanted = zip(*((p.job, p.choices, p.wanted) for p in plannings), strict=True)
    # sizes are planned with packed codes: where these were compressed, a file that must grow may be beyond the plans
    found = find_steps(jobs, choices, plannings[0].aliases, wanted, pool, nearest=number > 0)
    return [replace(p, choices=steps, symbols=symbols) for p, (steps, symbols) in zip(plannings, found, strict=True)]


def _correct(planning: Planning, size: int, number: int) -> Planning:
    """What to aim at after the file came out with this size in try `number`."""
    assert planning.most is not None
    wanted = planning.wanted - (size - (planning.most + planning.least) // 2)
    return replace(planning, wanted=wanted - (number * _GRAIN if number >= _EXACT_TRIES else 0))


def compile_kernels(jobs: Sequence[Job], progress: Progress | None = None) -> float:
    """Make ready the machine code that the jobs need and return the seconds that took: some, the first time on a
    machine, and almost none when it is there. `run` does it too, when it was not done."""
    coded = [(tensor.dtype, job.choices[tensor.name]) for job in jobs for tensor in job.source.tensors]
    scalar = {(dtype, choice.bits) for dtype, choice in coded if choice.bits is not None}
    trellis = {dtype for dtype, choice in coded if choice.encoding == "trellis"}
    if not scalar and not trellis:
        return 0.0
    from .kernels.compiled import is_code_kept
    from .kernels.warm_up import warm_up

    # said only when it takes long enough for someone to wonder
    notice = threading.Timer(5.0 if is_code_kept() else 1.0, progress or _ignore, ("compiling kernels", 0, 0))
    notice.daemon = True
    notice.start()
    try:
        return warm_up(sorted(scalar), sorted(trellis))
    finally:
        notice.cancel()


def _ignore(stage: str, done: int, total: int) -> None:
    pass


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
    """Give each tensor that stands for others the most bits that any of them asks for; raw is the most, and any width
    that was asked for more than a rate that nobody asked for."""
    if not aliases:
        return choices
    merged = dict(choices)
    for name, target in aliases.items():
        merged[target] = max(merged[target], choices[name], key=lambda c: 99 if c.encoding == "raw" else c.bits or 0)
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
