"""Whether a file may be published: what was measured on it against what the job asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .card import Container
from .job import Gates, parse_size


@dataclass(frozen=True)
class Check:
    """One gate of one file; `found` is None where nothing was measured, which fails."""

    file: str
    gate: str
    limit: float
    found: float | None
    good: bool


def check(container: Container, gates: Gates) -> list[Check]:
    """Every gate that is set. A number that is not finite passes none."""
    summary, output = container.inspection.summary, container.evaluation
    cosine = summary.cosine_min if summary.unreported == 0 else None
    size = parse_size(gates.max_size) if gates.max_size is not None else None
    found: list[tuple[str, float | None, float | None, int]] = [
        ("min_cosine", gates.min_cosine, cosine, 1),
        ("max_kl", gates.max_kl, output.kl_mean if output else None, -1),
        ("max_perplexity_ratio", gates.max_perplexity_ratio, output.perplexity_ratio if output else None, -1),
        ("max_size", size, container.inspection.file_bytes, -1),
    ]
    return [
        Check(container.name, gate, limit, value, _passes(value, limit, sign))
        for gate, limit, value, sign in found
        if limit is not None
    ]


def _passes(value: float | None, limit: float, sign: int) -> bool:
    return value is not None and math.isfinite(value) and sign * value >= sign * limit
