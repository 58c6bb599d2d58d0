"""hlwq-inspect: what is in a .hlwq file, and how close each tensor is to its source."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import rich_click as click

from hlwq_formats.errors import BadDigest, NotFromSource, Usage, escape

from .common import ProgressLine, common_options, print_json, print_warnings, run_command

if TYPE_CHECKING:
    from ..inspection import Inspection, TensorInfo
    from ..listing import SortKey


@click.command()
@click.argument("file", type=click.Path())
@click.argument("other", type=click.Path(), required=False)
@click.option("--verify", is_flag=True, help="Read and check every byte of the file, and say what is damaged.")
@click.option(
    "--against",
    metavar="MODEL_DIR",
    type=click.Path(),
    help="Prove that the file came from this model and is as close to it as its report says.",
)
@click.option("--fail-under", type=float, metavar="COSINE", help="Exit with 1 when a tensor's cosine is below.")
@click.option(
    "--sort",
    type=click.Choice(["name", "bits", "bytes", "cosine", "sqnr"]),
    default="name",
    help="Order of the tensors: by name, or worst first.",
)
@click.option("--filter", "pattern", metavar="REGEX", help="List only tensors whose name it finds; totals are of all.")
@click.option("--chart", is_flag=True, help="Show bars instead of the table.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the tensors as CSV.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option(
    "--html",
    metavar="PAGE",
    type=click.Path(),
    help="Write a page with charts instead of the table; more with --against.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing PAGE.")
@common_options
def command(file: str, other: str | None, debug: bool, **options: Any) -> int:
    """Show what FILE holds: each tensor, its encoding, its size and its closeness to the source.

    With OTHER, show how the two files differ. Any part of a split set, or its folder, stands for all of it. A file may
    be on a web server (https://...) or on the Hugging Face Hub (ORG/REPO[@REVISION]/FILE.hlwq): only header, metadata
    and report are fetched.
    """
    asked = _Options(**options)
    if asked.chart + asked.as_csv + asked.as_json > 1:
        raise Usage("--chart, --csv and --json exclude one another")
    if other is not None:
        if asked.for_one_file:
            raise Usage("two files are compared with --sort, --filter and --json alone", hint="inspect them one by one")
        return _compare(file, other, asked)
    return _inspect(file, asked)


@dataclass(frozen=True)
class _Options:
    verify: bool
    against: str | None
    fail_under: float | None
    sort: SortKey
    pattern: str | None
    chart: bool
    as_csv: bool
    as_json: bool
    html: str | None
    overwrite: bool
    quiet: bool

    @property
    def for_one_file(self) -> bool:
        given = self.verify, self.chart, self.as_csv, self.against, self.html, self.fail_under is not None
        return any(given)


def _inspect(file: str, asked: _Options) -> int:
    from ..inspection import inspect_damaged, inspect_reader
    from ..listing import choose
    from ..remote import find, open_reader

    if (asked.verify or asked.against) and find(file) is not None:
        raise Usage("--verify and --against read all weights", hint="fetch the file and inspect the copy")
    if asked.html is not None:
        _check_page(asked.html, file, asked.overwrite)
    more: dict[str, object] = {}
    damaged, problems, good, source, page = [], [], 0, None, None
    with open_reader(file) as reader, ProgressLine(quiet=asked.quiet) as progress:
        if asked.verify:
            from ..verification import verify

            verification = verify(reader, lambda done, total: progress("verifying", done, total))
            damaged, good, more = verification.damaged, verification.good_tensors, {"verification": verification}
        inspection = inspect_damaged(reader) if damaged else inspect_reader(reader)
        tensors = choose(inspection.tensors, asked.sort, asked.pattern)
        if asked.against is not None and not damaged:
            from ..against import compare
            from ..source import open_source

            source = open_source(asked.against, passthrough=True)
            problems = compare(reader, source, lambda done, total: progress("comparing", done, total))
            more["against"] = problems
        if asked.html is not None and not damaged and not problems:
            from ..histograms import worst_histograms
            from ..html_report import make_page

            page = make_page(inspection, worst_histograms(reader, source, inspection) if source else [])
    print_warnings(inspection.warnings, quiet=asked.quiet)
    if asked.as_json or not asked.quiet:
        _print(inspection, tensors, more, asked)
    if not (asked.as_json or asked.as_csv or asked.quiet):
        for line in [*map(str, damaged), *problems]:
            print(f"! {line}")
        if asked.verify and not damaged:
            print(f"verified: all {inspection.file_bytes:,} bytes are as they were written")
        if source is not None and not problems:
            origin = escape(str(asked.against))
            print(f"all {len(inspection.tensors)} tensors come from {origin}, and their errors are as reported")
    if damaged:
        raise _damage(file, damaged, f"{good} of {len(inspection.tensors)} tensors are good")
    if problems:
        others = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        model = escape(str(asked.against), 120)
        raise NotFromSource(f"does not match {model}: {problems[0][:200]}{others}", file=file)
    if page is not None and asked.html is not None:
        from ..whole_file import write_whole

        write_whole(asked.html, page, overwrite=asked.overwrite)
        if not (asked.as_json or asked.as_csv or asked.quiet):
            print(f"wrote {escape(asked.html)}")
    return 0 if asked.fail_under is None else _gate(inspection, asked.fail_under)


def _damage(file: str, damaged: Sequence[object], rest: str) -> BadDigest:
    names = "; ".join(str(damage)[:120] for damage in damaged[:2]) + (" ..." if len(damaged) > 2 else "")
    parts = "part is" if len(damaged) == 1 else "parts are"
    return BadDigest(f"{len(damaged)} {parts} damaged ({names}); {rest}", file=file, hint="fetch the file again")


def _check_page(html: str, file: str, overwrite: bool) -> None:
    """Refuse, before anything is read, a place where the page cannot be."""
    from hlwq_formats.atomic import check_destination

    check_destination(html, overwrite=overwrite)
    if os.path.exists(html) and os.path.exists(file) and os.path.samefile(html, file):
        raise Usage("--html would replace the file that it shows", hint="choose another name for the page")


def _print(inspection: Inspection, tensors: list[TensorInfo], more: dict[str, object], asked: _Options) -> None:
    """The result on stdout in the form that was asked for."""
    if asked.as_json:
        import msgspec

        if asked.sort != "name" or asked.pattern is not None:
            inspection = msgspec.structs.replace(inspection, tensors=tensors)
        print_json(msgspec.to_builtins(inspection) | msgspec.to_builtins(more))
    elif asked.as_csv:
        from ..listing import to_csv

        sys.stdout.write(to_csv(tensors))
    elif asked.chart:
        from ..charts import charts
        from ..report import show, totals

        show(charts(inspection))
        print(f"\n{totals(inspection)}")
    elif asked.html is not None:
        from ..report import totals

        print(totals(inspection))
    else:
        from ..report import print_inspection

        print_inspection(inspection, tensors)


def _compare(file: str, other: str, asked: _Options) -> int:
    """Two files side by side."""
    import msgspec

    from ..comparison import compare_files
    from ..comparison_table import choose_pairs, comparison_report
    from ..inspection import inspect_reader
    from ..remote import open_reader

    with open_reader(file) as a, open_reader(other) as b:
        comparison = compare_files(a, b, inspect_reader(a), inspect_reader(b))
    print_warnings([*comparison.a.warnings, *comparison.b.warnings], quiet=asked.quiet)
    pairs = choose_pairs(comparison.tensors, asked.sort, asked.pattern)
    if asked.as_json:
        if asked.sort != "name" or asked.pattern is not None:
            comparison = msgspec.structs.replace(comparison, tensors=pairs)
        print_json(comparison)
    elif not asked.quiet:
        from ..report import show

        show(comparison_report(comparison, pairs))
    return 0


def _gate(inspection: Inspection, limit: float) -> int:
    """1 when a tensor's cosine is below the limit or unknown."""
    below = [t for t in inspection.tensors if t.cosine is not None and not t.cosine >= limit]
    if below:
        worst = min(below, key=lambda t: t.cosine or 0)
        names = "tensor is" if len(below) == 1 else "tensors are"
        print(f"hlwq: {len(below)} {names} below cosine {limit}; the worst has {worst.cosine:.5f}", file=sys.stderr)
    if inspection.summary.unreported:
        print(f"hlwq: {inspection.summary.unreported} quantized tensors have no reported error", file=sys.stderr)
    return 1 if below or inspection.summary.unreported else 0


def main() -> NoReturn:
    """Entry point."""
    run_command(command, "hlwq-inspect")
