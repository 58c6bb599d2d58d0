"""hlwq-requantize: a job file, from the base model's newest commit to a published repository."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import NoReturn

import rich_click as click

from .common import ProgressLine, common_options, print_json, print_warnings, run_command


@click.command()
@click.argument("job_file", metavar="JOB.toml", type=click.Path())
@click.option("--work", default="requantize", show_default=True, type=click.Path(), help="The folder to work in.")
@click.option("--dry-run", is_flag=True, help="Do all but the push.")
@click.option("--publish", metavar="SHA256", help="Only push what --dry-run left in --work with this hand-over digest.")
@click.option("--summary", metavar="FILE", type=click.Path(), help="Append the report to FILE, in Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@common_options
def command(
    job_file: str, work: str, dry_run: bool, publish: str | None, summary: str | None, as_json: bool, quiet: bool,
    debug: bool,
) -> int:  # fmt: skip
    """Convert, check and publish a model as JOB.toml says, when its base has changed.

    Exits with 1, and publishes nothing, when a file does not pass its gates. The same command goes on where an
    earlier one was stopped.
    """
    from hlwq_formats.errors import HlwqError, Usage

    from ..hub.client import hide_progress
    from ..hub.job import read_job
    from ..hub.requantize import publish_handed, requantize
    from ..hub.summary import summarize, summarize_error

    if dry_run and publish is not None:
        raise Usage("--dry-run and --publish exclude each other")
    job = read_job(job_file)
    if quiet or not sys.stderr.isatty():
        hide_progress()
    try:
        with ProgressLine(quiet=quiet) as progress:
            if publish is not None:
                result = publish_handed(Path(work), publish, job)
            else:
                result = requantize(job, Path(work), progress, dry_run=dry_run)
    except HlwqError as error:
        with contextlib.suppress(OSError):  # the error itself is what must be said
            _append(summary, summarize_error(error))
        raise
    text = summarize(result)
    _append(summary, text)
    print_warnings(result.warnings, quiet=quiet)
    if as_json:
        print_json(result)
    elif not quiet:
        print(text, end="")
    failed = [one for one in result.checks if not one.good]
    for one in failed:
        print(f"hlwq: {one.file}: {one.gate} is {one.limit}, measured {one.found}", file=sys.stderr)
    return 1 if failed else 0


def _append(path: str | None, text: str) -> None:
    if path is not None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)


def main() -> NoReturn:
    """Entry point."""
    run_command(command, "hlwq-requantize")
