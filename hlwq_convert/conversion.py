"""A whole model: plan -> find duplicates -> choose steps -> assemble, until the file has the size asked for."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from hlwq_formats.atomic import check_destination
from hlwq_formats.errors import CannotCreate, Internal, NoDevice, Usage, escape

from .assembly import MissedSize, Planning, Progress, Settings, assemble
from .duplicates import find_duplicates
from .inspection import Inspection
from .job import Job, prepare
from .parallel import default_workers
from .plan import Choice
from .quantize import ScalarCode
from .scalar import Effort
from .sizing import find_steps, weights_of
from .source import Source
from .survey import Encode, MakeEncoder
from .trellis import TrellisCode

TOLERANCE = 0.002
"""How much smaller than asked for a file of variable rate may be; it is never larger."""

_EXACT_TRIES, _TRIES = 3, 8
_GRAIN = 512  # bytes; sections begin at multiples of 64, and the metadata has more digits or fewer


def convert(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    bits: int | None = None,
    *,
    recipe: str | None = None,
    sets: Sequence[str] = (),
    effort: Effort = "default",
    bpw: float | None = None,
    size: int | str | None = None,
    min_bits: Sequence[str] = (),
    max_bits: Sequence[str] = (),
    sensitivity: str | os.PathLike[str] | None = None,
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
    tensor. With `bpw`, bits a weight of the finished file, or `size`, its bytes ("16.2GB"), tensors are coded at the
    variable rate that gives this size; `min_bits` and `max_bits` ("REGEX=BITS") bound some of them and `sensitivity`,
    a file, says which matter more.

    The file appears whole or not at all, and its bytes depend on the model, these options and the versions alone. A
    conversion that was killed or interrupted is continued, unless `resume` is False.
    `device` "cuda" (all GPUs) or "cuda:N" encodes on GPUs: the same bytes; needs torch with CUDA.
    Raises an HlwqError for everything that can go wrong.
    """
    job = prepare(
        src, bits, recipe=recipe, sets=sets, effort=effort, bpw=bpw, size=size, min_bits=min_bits, max_bits=max_bits,
        sensitivity=sensitivity, passthrough=passthrough, allow_extra=allow_extra,
    )  # fmt: skip
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
    make_encoder = choose_encoder(device)
    check_output_place(out, job.source, allow_inside_source=allow_inside_source)
    check_destination(out, overwrite=overwrite)
    workers = workers or default_workers()
    settings = Settings(workers, overwrite, resume, nonfinite, make_encoder)
    compile_kernels(job, progress)
    with ThreadPoolExecutor(workers, "hlwq") as pool:
        aliases = find_duplicates(job.source.model, job.source.tensors)
        job.warnings.extend(tie_warnings(job, aliases))
        choices = merge_choices(job.choices, aliases)
        if job.target is None:
            return assemble(job, out, Planning(choices, aliases), settings, pool, progress)
        return _hit_size(job, out, Planning(choices, aliases), settings, pool, progress)


def _hit_size(
    job: Job,
    out: str | os.PathLike[str],
    planning: Planning,
    settings: Settings,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
) -> Inspection:
    """Convert with the steps that samples suggest; should the file miss its size, once more with others."""
    assert job.target is not None
    most = job.target.bytes_for(weights_of(job, planning.aliases))
    least = most - max(int(most * TOLERANCE), _GRAIN)
    wanted = most - (most - least) // 4  # what samples say is a little too much, more often than too little
    for number in range(_TRIES):
        if progress is not None:
            progress("choosing steps", 0, 0)
        choices, symbols = find_steps(job, planning.choices, planning.aliases, wanted, pool)
        chosen = Planning(choices, planning.aliases, symbols, least if number < _EXACT_TRIES else 0, most)
        try:
            return assemble(job, out, chosen, settings, pool, progress)
        except MissedSize as missed:
            wanted -= missed.size - (most + least) // 2
            if number >= _EXACT_TRIES:
                wanted -= number * _GRAIN  # never larger matters more than not much smaller
    raise Internal(f"the file cannot be brought to {most} bytes", file=os.fspath(out))


def compile_kernels(job: Job, progress: Progress | None = None) -> float:
    """Make ready the machine code that the job needs and return the seconds that took: some, the first time on a
    machine, and almost none when it is there. `run` does it too, when it was not done."""
    scalar = {(t.dtype, bits) for t in job.source.tensors if (bits := job.choices[t.name].bits) is not None}
    trellis = {t.dtype for t in job.source.tensors if job.choices[t.name].encoding == "trellis"}
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


def choose_encoder(device: str) -> MakeEncoder:
    """What encodes on `device`: "cpu", "cuda" or "cuda:N". Raises NoDevice (69) where there is none."""
    if device == "cpu":
        return _on_cpu
    if re.fullmatch(r"cuda(:\d{1,3})?", device) is None:
        raise Usage(f"device is {escape(device)}, expected cpu, cuda or cuda:N")
    try:
        from .runtime.gpu import make_encoders
    except ImportError:
        raise NoDevice(
            f"device {device} needs torch", hint="install hlwq-convert[torch] or leave out --device"
        ) from None
    return make_encoders(device)


def _on_cpu(code: ScalarCode | TrellisCode) -> Encode:
    # not before something is encoded: numba takes time and memory
    from .kernels.encode import encoder
    from .kernels.trellis import encoder as trellis_encoder

    if isinstance(code, TrellisCode):
        return trellis_encoder(code)
    encode = encoder(code)
    return lambda raw, start: encode(raw)


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
