"""hlwq-inspect: what is in a .hlwq file, and how close each tensor is to its source."""

from __future__ import annotations

import sys
from typing import NoReturn

import rich_click as click

from hlwq_formats.errors import escape

from .common import ProgressLine, common_options, print_json, print_warnings, run_command


@click.command()
@click.argument("file", type=click.Path())
@click.option("--verify", is_flag=True, help="Read and check every byte of the file, and say what is damaged.")
@click.option(
    "--against",
    metavar="MODEL_DIR",
    type=click.Path(),
    help="Prove that the file came from this model and is as close to it as its report says.",
)
@click.option("--fail-under", type=float, metavar="COSINE", help="Exit with 1 when a tensor's cosine is below.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@common_options
def command(
    file: str, verify: bool, against: str | None, fail_under: float | None, as_json: bool, quiet: bool, debug: bool
) -> int:
    """Show what FILE holds: each tensor, its encoding, its size and its closeness to the source."""

    from hlwq_formats.errors import BadDigest, NotFromSource
    from hlwq_formats.reader import Reader

    from ..inspection import inspect_damaged, inspect_reader
    from ..report import print_inspection

    more: dict[str, object] = {}
    damaged, problems = [], []
    with Reader(file) as reader, ProgressLine(quiet=quiet) as progress:
        if verify:
            from ..verification import verify as verify_all

            verification = verify_all(reader, lambda done, total: progress("verifying", done, total))
            damaged, more = verification.damaged, {"verification": verification}
        inspection = inspect_damaged(reader) if damaged else inspect_reader(reader)
        if against is not None and not damaged:
            from ..against import compare
            from ..source import open_source

            source = open_source(against, passthrough=True)
            problems = compare(reader, source, lambda done, total: progress("comparing", done, total))
            more["against"] = problems
    print_warnings(inspection.warnings, quiet=quiet)
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(inspection) | msgspec.to_builtins(more))
    elif not quiet:
        print_inspection(inspection)
        for line in [*map(str, damaged), *problems]:
            print(f"! {line}")
        if verify and not damaged:
            print(f"verified: all {inspection.file_bytes:,} bytes are as they were written")
        if against is not None and not damaged and not problems:
            print(
                f"all {len(inspection.tensors)} tensors come from {escape(against)}, and their errors are as reported"
            )
    if damaged:
        names = "; ".join(str(damage)[:120] for damage in damaged[:2]) + (" ..." if len(damaged) > 2 else "")
        parts = "part is" if len(damaged) == 1 else "parts are"
        raise BadDigest(
            f"{len(damaged)} {parts} damaged ({names}); {verification.good_tensors} of {len(inspection.tensors)} "
            "tensors are good",
            file=file,
            hint="fetch the file again",
        )
    if problems:
        more_words = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise NotFromSource(f"does not match {escape(str(against), 120)}: {problems[0][:200]}{more_words}", file=file)
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
