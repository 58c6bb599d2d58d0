"""hlwq-convert: a model directory into one .hlwq file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import rich_click as click

from hlwq_formats.errors import escape

from .common import ProgressLine, common_options, ignore_signals, print_json, print_warnings, run_command


def _values(of: Any) -> Callable[[str], list[Any]]:
    """The type of an option with one value, or several with commas between them."""

    def split(text: str) -> list[Any]:
        return [of.convert(part.strip(), None, None) for part in text.split(",")]

    return split


@click.command()
@click.argument("model", type=click.Path())
@click.argument("output", type=click.Path())
@click.option(
    "--bits",
    "-b",
    type=_values(click.IntRange(2, 8)),
    metavar="BITS[,...]",
    help="Bits a weight, 2 to 8.  [default: 5]",
)
@click.option("--recipe", metavar="NAME|FILE", help="Bits by tensor: uniform, mixed, or a TOML file.")
@click.option(
    "--set",
    "sets",
    metavar="REGEX=BITS",
    multiple=True,
    help="Bits (or raw) for matching tensors; the last match wins.",
)
@click.option(
    "--bpw",
    type=_values(click.FLOAT),
    metavar="BITS[,...]",
    help="Bits a weight of the whole file, 1.5 to 8, at a variable rate.",
)
@click.option(
    "--size",
    type=_values(click.STRING),
    metavar="BYTES[,...]",
    help="Size of the whole file, such as 16.2GB, at a variable rate.",
)
@click.option("--split-size", metavar="BYTES", help="Cut a file of over so many bytes, such as 20GB, into parts.")
@click.option("--min-bits", metavar="REGEX=BITS", multiple=True, help="With --bpw or --size: at least so many bits.")
@click.option("--max-bits", metavar="REGEX=BITS", multiple=True, help="With --bpw or --size: at most so many bits.")
@click.option(
    "--sensitivity", metavar="FILE", type=click.Path(), help="With --bpw or --size: which tensors matter more (JSON)."
)
@click.option(
    "--effort",
    type=click.Choice(["fast", "default", "best"]),
    default="default",
    help="How long to search: for block scales, or through a trellis of 8, 32 or 256 states; best compresses codes.",
)
@click.option("--workers", "-j", type=click.IntRange(1), help="Threads.  [default: the CPUs this process may use]")
@click.option("--device", default="cpu", metavar="DEVICE", help="cpu, cuda (all GPUs) or cuda:N; the same bytes.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output file.")
@click.option("--no-resume", is_flag=True, help="Begin anew instead of continuing an interrupted conversion.")
@click.option(
    "--nonfinite",
    type=click.Choice(["error", "raw"]),
    default="error",
    help="What to do with a tensor that holds NaN or infinity.",
)
@click.option("--passthrough", is_flag=True, help="Accept an already quantized model and keep every tensor as it is.")
@click.option("--allow-extra", is_flag=True, help="Leave out tensors that the index does not list.")
@click.option("--allow-inside-source", is_flag=True, help="Let the output lie in the model directory.")
@click.option(
    "--verify-source", is_flag=True, help="First compare each file with its digest in the Hugging Face cache."
)
@click.option("--dry-run", is_flag=True, help="Show the plan and the size from headers alone; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@common_options
def command(
    model: str, output: str, bits: list[int] | None, bpw: list[float] | None, size: list[str] | None, as_json: bool,
    quiet: bool, debug: bool, dry_run: bool, workers: int | None, device: str, overwrite: bool, no_resume: bool,
    nonfinite: Any, allow_inside_source: bool, verify_source: bool, **options: Any,
) -> None:  # fmt: skip
    """Convert the Hugging Face model MODEL, a folder or an org/name[@revision] of the Hub, into the file OUTPUT.

    With --split-size what is larger becomes OUTPUT-00001-of-00003.hlwq and so on, without the suffix of OUTPUT.

    Matrices are rotated and quantized; norms, biases, routers and other delicate tensors stay as they are.

    Several values, as in --bpw 3.5,4.25, make a file for each in one pass: OUTPUT-3.5bpw.hlwq, OUTPUT-4.25bpw.hlwq.
    """
    from ..conversion import compile_kernels, run
    from ..device import choose_device
    from ..hub.download import local_model
    from ..job import prepare_all
    from ..ladder import make_rungs, path_of
    from .memory import keep_freed_memory

    keep_freed_memory()
    began = time.monotonic()
    choose_device(device, 1)  # before anything is read
    with ProgressLine(quiet=quiet) as progress:
        folder = local_model(model, progress, bars=not quiet and sys.stderr.isatty())
    rungs = make_rungs(bits or (), bpw or (), size or ())
    jobs = prepare_all(folder, rungs, **options)
    outputs = [output] if len(rungs) == 1 else [path_of(output, rung) for rung in rungs]
    if verify_source:
        from ..source_digests import verify_source_digests

        with ProgressLine(quiet=quiet) as progress:
            verify_source_digests(jobs[0].source.model, lambda done, total: progress("hashing", done, total))
    if dry_run:
        _show_plan(jobs, outputs, as_json, quiet)
        return
    with ProgressLine(quiet=quiet) as progress:

        def step(stage: str, done: int, total: int) -> None:
            if stage == "publishing":
                ignore_signals()  # from here on the output might not be as it was
            else:
                progress(stage, done, total)

        compiling = compile_kernels(jobs, progress)
        inspections = run(
            jobs, outputs, workers=workers, overwrite=overwrite, resume=not no_resume, nonfinite=nonfinite,
            allow_inside_source=allow_inside_source, device=device, progress=step,
        )  # fmt: skip
    seconds = time.monotonic() - began - compiling
    rate = sum(inspection.weights for inspection in inspections) / seconds
    print_warnings(_all_warnings(inspections), quiet=quiet)
    if as_json:
        import msgspec

        more = {"seconds": seconds, "weights_per_second": rate, "compile_seconds": compiling}
        _print_documents([msgspec.to_builtins(inspection) | more for inspection in inspections])
    elif not quiet:
        from ..report import totals

        for path, inspection in zip(outputs, inspections, strict=True):
            print(f"{escape(path)}\n{totals(inspection)}")
        extra = f", after {compiling:.1f} s of compiling, once on this machine" if compiling >= 1 else ""
        print(f"{seconds:.1f} s, {rate / 1e6:.1f} million weights a second{extra}")


def _all_warnings(inspections: list[Any]) -> list[str]:
    """Each warning once: several files of a model share most of them."""
    return list(dict.fromkeys(message for inspection in inspections for message in inspection.warnings))


def _print_documents(documents: list[Any]) -> None:
    """That of a single file, or a list."""
    print_json(documents[0] if len(documents) == 1 else documents)


def _show_plan(jobs: list[Any], outputs: list[str], as_json: bool, quiet: bool) -> None:
    from ..dry_run import dry_run_all
    from ..report import human_bytes, print_inspection

    inspections = dry_run_all(jobs, outputs)
    print_warnings(_all_warnings(inspections), quiet=quiet)
    if as_json:
        _print_documents(inspections)
    elif not quiet:
        for path, inspection in zip(outputs, inspections, strict=True):
            if len(outputs) > 1:
                print(escape(path))
            print_inspection(inspection)
        folder = os.path.dirname(os.path.abspath(outputs[0]))
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        status = os.statvfs(folder)
        free = human_bytes(status.f_bavail * status.f_frsize)
        size = human_bytes(sum(inspection.file_bytes for inspection in inspections))
        print(f"would write {size}, {free} are free; equal tensors are found only when converting")


def main() -> NoReturn:
    """Entry point."""
    run_command(command, "hlwq-convert")
