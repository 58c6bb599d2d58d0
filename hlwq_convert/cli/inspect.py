"""hlwq-inspect: what is in a .hlwq file, and how close each tensor is to its source."""

from __future__ import annotations

import sys
from typing import NoReturn

import rich_click as click

from .common import ProgressLine, common_options, print_json, print_warnings, run_command


@click.command()
@click.argument("file", type=click.Path())
@click.option("--verify", is_flag=True, help="Read and check every byte of the file.")
@click.option("--fail-under", type=float, metavar="COSINE", help="Exit with 1 when a tensor's cosine is below.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@common_options
def command(file: str, verify: bool, fail_under: float | None, as_json: bool, quiet: bool, debug: bool) -> int:
    """Show what FILE holds: each tensor, its encoding, its size and its closeness to the source."""

    from hlwq_formats.reader import Reader

    from ..inspection import inspect_reader
    from ..report import print_inspection

    with Reader(file) as reader:
        inspection = inspect_reader(reader)
        if verify:
            with ProgressLine(quiet=quiet) as progress:
                reader.verify(lambda done, total: progress("verifying", done, total))
    print_warnings(inspection.warnings, quiet=quiet)
    if as_json:
        print_json(inspection)
    elif not quiet:
        print_inspection(inspection)
        if verify:
            print(f"verified: all {inspection.file_bytes:,} bytes are as they were written")
    if fail_under is None:
        return 0
    below = [t for t in inspection.tensors if t.cosine is not None and not t.cosine >= fail_under]
    if below:
        worst = min(below, key=lambda t: t.cosine or 0)
        names = "tensor is" if len(below) == 1 else "tensors are"
        print(
            f"hlwq: {len(below)} {names} below cosine {fail_under}; the worst has {worst.cosine:.5f}", file=sys.stderr
        )
    if inspection.summary.unreported:
        print(f"hlwq: {inspection.summary.unreported} quantized tensors have no reported error", file=sys.stderr)
    return 1 if below or inspection.summary.unreported else 0


def main() -> NoReturn:
    """Entry point."""
    run_command(command, "hlwq-inspect")
