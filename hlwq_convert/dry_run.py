"""What a conversion would write, from headers alone: the real metadata around sections of known length."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from hlwq_formats.file_set import part_name
from hlwq_formats.split import header_of, plan_parts

from .inspection import Inspection, Place, Report, describe, describe_split
from .job import Job
from .parallel import default_workers
from .plan import Choice
from .sizing import find_steps, long_parts, planned_assets, planned_metadata, weights_of


def dry_run(job: Job, out: str | os.PathLike[str]) -> Inspection:
    """Describe the file that the job would make. Its size is exact but for the digits of the report and for
    duplicate tensors, which show only when weights are read; with "best" it is an upper bound, as a warning says."""
    return dry_run_all([job], [out])[0]


def dry_run_all(jobs: Sequence[Job], outs: Sequence[str | os.PathLike[str]]) -> list[Inspection]:
    """`dry_run` for jobs that differ in nothing but the size."""
    found = [(job.choices, dict[str, int]()) for job in jobs]
    wanted = [job.target.bytes_for(weights_of(job, {})) for job in jobs if job.target is not None]
    if wanted:
        with ThreadPoolExecutor(default_workers(), "hlwq") as pool:
            found = find_steps(jobs, [job.choices for job in jobs], {}, wanted, pool)
    return [_describe(job, out, *each) for job, out, each in zip(jobs, outs, found, strict=True)]


def _describe(job: Job, out: str | os.PathLike[str], choices: dict[str, Choice], symbols: dict[str, int]) -> Inspection:
    metadata = planned_metadata(job, choices, {}, planned_assets(job, choices), symbols)
    parts = plan_parts(metadata, job.split_size)
    headers = [header_of(part) for part in parts]
    name = os.path.basename(os.fspath(out))
    warnings = [*job.warnings, *long_parts(parts, job.split_size)]
    if job.recipe.effort == "best" and any(choice.encoding == "scalar" for choice in choices.values()):
        warnings.append("sizes are upper bounds: codes are compressed where that saves 3 %")
    return describe(
        metadata,
        file=os.fspath(out),
        file_bytes=sum(header.file_len for header in headers),
        metadata_bytes=sum(header.meta_len for header in headers),
        minor=max(header.minor for header in headers),
        report=Report([]),
        warnings=warnings,
        split=describe_split(
            parts[0].split, [Place(part_name(name, i, len(parts)), h.file_len) for i, h in enumerate(headers)]
        ),
    )
