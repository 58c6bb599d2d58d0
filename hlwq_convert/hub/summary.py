"""A job's result as Markdown, for the summary of a CI run; every text of a file in it is made harmless."""

from __future__ import annotations

from hlwq_formats.errors import HlwqError

from ..report import human_bytes
from .card import evaluation_table, file_table, plain, table
from .requantize import Result

_STATES = {
    "unchanged": "nothing to do: what is published was made from this",
    "stopped": "**stopped by a gate; nothing was published**",
    "ready": "ready to be published; nothing was published",
    "published": "published",
}


def summarize(result: Result) -> str:
    """The report of a job."""
    parts = [
        f"## {plain(result.base)}",
        f"Base commit `{plain(result.commit)}`: {_STATES[result.state]}.",
    ]
    if result.containers:
        parts.append(file_table(result.containers))
    if any(container.evaluation for container in result.containers):
        parts.append(evaluation_table(result.containers))
    if result.checks:
        rows = [
            [c.file, c.gate, _number(c.gate, c.limit), _number(c.gate, c.found), "passed" if c.good else "**failed**"]
            for c in result.checks
        ]
        parts.append(table(["file", "gate", "limit", "measured", ""], rows))
    parts += [f"Warning: {plain(warning)}" for warning in result.warnings]
    if result.outcome is not None:
        done = "pushed" if result.outcome.changed else "there already"
        parts.append(f"{plain(result.outcome.repo)} at commit `{result.outcome.commit}` ({done})")
    if result.digest is not None:
        parts.append(f"Hand-over: `{result.digest}`")
    return "\n\n".join(parts) + "\n"


def _number(gate: str, value: float | None) -> str:
    if value is None:
        return "not measured"
    return human_bytes(value) if gate == "max_size" else f"{value:.6f}"


def summarize_error(error: HlwqError) -> str:
    """The report of a job that an error ended."""
    return f"## Stopped\n\n{plain(str(error), 600)}\n"
