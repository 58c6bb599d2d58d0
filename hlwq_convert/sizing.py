"""How large a planned file will be, and the steps with which it has the size that was asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from hlwq_formats import metadata as md
from hlwq_formats.errors import Usage
from hlwq_formats.sections import make_section
from hlwq_formats.split import header_of, plan_parts

from .inspection import Report, TensorReport
from .job import Job, make_metadata
from .plan import Choice, placeholder
from .rate import choose_steps, take_samples
from .rotate import SIGN_BYTES
from .trellis import STATES

Choices = dict[str, Choice]


def weights_of(job: Job, aliases: dict[str, str]) -> int:
    """Weights that the file will hold, those of aliases not counted."""
    return sum(tensor.numel for tensor in job.source.tensors if tensor.name not in aliases)


def planned_assets(job: Job, choices: Choices) -> list[md.Asset]:
    """The assets as they will be stored, with a report that takes about as many bytes as the real one."""
    assets = [_asset(name, job.source.read_asset(name)) for name, _ in job.source.assets]
    quantized = [(t.name, choices[t.name]) for t in job.source.tensors if choices[t.name].encoding != "raw"]
    return [*assets, _asset(md.REPORT, md.encode(_placeholder_report(quantized)))]


def planned_metadata(
    job: Job, choices: Choices, aliases: dict[str, str], assets: list[md.Asset], symbols: dict[str, int]
) -> md.Metadata:
    """The document of the file that the choices make; `symbols` are the bytes that trellises take."""
    tensors: list[md.Tensor] = [
        md.AliasTensor(t.name, t.dtype, list(t.shape), aliases[t.name])
        if t.name in aliases
        else placeholder(t, choices[t.name], symbols.get(t.name, 0))
        for t in job.source.tensors
    ]
    return make_metadata(job, make_section("signs", SIGN_BYTES, compress=False)[0], tensors, assets)


def total_bytes(parts: list[md.Metadata]) -> int:
    """Bytes of all files with these documents."""
    return sum(header_of(part).file_len for part in parts)


def long_parts(parts: list[md.Metadata], split_size: int | None) -> list[str]:
    """A warning for each file that is longer than was asked for; Usage when there are more than a set may have."""
    if len(parts) > md.MAX_PARTS:
        least = -(-total_bytes(parts) // (md.MAX_PARTS // 2))
        raise Usage(
            f"--split-size {split_size} makes {len(parts)} parts, a set has at most {md.MAX_PARTS}",
            hint=f"take {least} bytes or more",
        )
    return [
        f"--split-size is {split_size}: part {number} of {len(parts)} takes {length} bytes, and cannot be cut"
        for number, part in enumerate(parts, 1)
        if split_size is not None and (length := header_of(part).file_len) > split_size
    ]


def find_steps(
    jobs: Sequence[Job],
    choices: Sequence[Choices],
    aliases: dict[str, str],
    wanted: Sequence[int],
    pool: ThreadPoolExecutor,
    *,
    nearest: bool = False,
) -> list[tuple[Choices, dict[str, int]]]:
    """For each file its choices with the steps with which it takes `wanted` bytes or a little less, and the bytes that
    its symbols and frequencies are expected to take. The jobs are of one model and differ in nothing but the size.

    Reads samples of the weights, once. Raises Usage when there is no such file, unless the `nearest` one is wanted.
    """
    job, target = jobs[0], jobs[0].target
    assert target is not None
    variable = [t for t in job.source.tensors if t.name not in aliases and choices[0][t.name].encoding == "trellis"]
    samples = take_samples(job.source.model, variable, target, pool)
    assets = planned_assets(job, choices[0])

    def find(job: Job, choices: Choices, wanted: int) -> tuple[Choices, dict[str, int]]:
        def size_of(symbols: dict[str, int]) -> int:
            return total_bytes(plan_parts(planned_metadata(job, choices, aliases, assets, symbols), job.split_size))

        steps, symbols = choose_steps(samples, STATES[job.recipe.effort], wanted, size_of, pool, nearest=nearest)
        return {name: replace(choice, step=steps.get(name, choice.step)) for name, choice in choices.items()}, symbols

    return [find(*each) for each in zip(jobs, choices, wanted, strict=True)]


def _asset(name: str, data: bytes) -> md.Asset:
    return md.Asset(name, [make_section("asset", data, compress=True)[0]])


def _placeholder_report(quantized: list[tuple[str, Choice]]) -> Report:
    """Numbers that take about as many compressed bytes as measured ones."""

    def digits(name: str) -> int:
        return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16)

    return Report(
        [
            TensorReport(
                name,
                0.999 + digits(name) * 1e-18,
                0.002 + digits(name + "#") * 1e-18,
                digits(name) % 10**6 if choice.step is not None else None,
            )
            for name, choice in quantized
        ]
    )
