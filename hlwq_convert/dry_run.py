"""What a conversion would write, from headers alone: the real metadata around sections of known length."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from hlwq_formats.file_set import part_name
from hlwq_formats.split import header_of, plan_parts

from .inspection import Inspection, Place, Report, describe, describe_split
from .job import Job
from .parallel import default_workers
from .sizing import find_steps, long_parts, planned_assets, planned_metadata, weights_of


def dry_run(job: Job, out: str | os.PathLike[str]) -> Inspection:
    """Describe the file that the job would make. Its size is exact but for the digits of the report and for
    duplicate tensors, which show only when weights are read."""
    symbols: dict[str, int] = {}
    choices, symbols = job.choices, dict[str, int]()
    if job.target is not None:
        with ThreadPoolExecutor(default_workers(), "hlwq") as pool:
            choices, symbols = find_steps(job, choices, {}, job.target.bytes_for(weights_of(job, {})), pool)
    metadata = planned_metadata(job, choices, {}, planned_assets(job, choices), symbols)
    parts = plan_parts(metadata, job.split_size)
    headers = [header_of(part) for part in parts]
    name = os.path.basename(os.fspath(out))
    return describe(
        metadata,
        file=os.fspath(out),
        file_bytes=sum(header.file_len for header in headers),
        metadata_bytes=sum(header.meta_len for header in headers),
        minor=max(header.minor for header in headers),
        report=Report([]),
        warnings=[*job.warnings, *long_parts(parts, job.split_size)],
        split=describe_split(
            parts[0].split, [Place(part_name(name, i, len(parts)), h.file_len) for i, h in enumerate(headers)]
        ),
    )
