"""hlwq-eval: what a conversion did to a model's predictions."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from typing import Any, NoReturn

import rich_click as click

from hlwq_formats.errors import MissingInput, Usage, escape

from .common import ProgressLine, common_options, print_json, print_warnings, run_command


@click.command()
@click.argument("files", metavar="[FILE]...", nargs=-1, type=click.Path())
@click.option("--against", "model_dir", metavar="MODEL_DIR", required=True, type=click.Path(), help="The source.")
@click.option("--text", metavar="FILE", type=click.Path(), help="UTF-8 text.  [default: one that comes with this tool]")
@click.option("--ctx", type=click.IntRange(2), default=1024, show_default=True, help="Tokens in a window.")
@click.option("--windows", type=click.IntRange(1), default=16, show_default=True, help="Windows, spread over the text.")
@click.option("--device", default="cpu", show_default=True, help="Where torch computes: cpu, cuda, cuda:1, mps.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="What torch computes in; bfloat16 takes half the memory and adds noise of its own.",
)
@click.option("--peers", is_flag=True, help="Also measure bitsandbytes NF4, torchao int4 and HQQ on the same source.")
@click.option("--tasks", metavar="LIST", help="Tasks of lm-eval, names or YAML files, with commas between.")
@click.option("--chart", metavar="PNG", type=click.Path(), help="Draw divergence against bits a weight.")
@click.option(
    "--sensitivity",
    metavar="JSON",
    type=click.Path(),
    help="Instead, measure what the noise of each tensor of FILE does alone; without FILE, at 4 bits.",
)
@click.option("--budget", type=click.FloatRange(0, min_open=True), help="Minutes for --sensitivity.")
@click.option("--overwrite", is_flag=True, help="Replace an existing chart or measurement.")
@click.option("--markdown", is_flag=True, help="Print Markdown in a terminal too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@common_options
def command(
    files: tuple[str, ...], model_dir: str, peers: bool, tasks: str | None, chart: str | None,
    sensitivity: str | None, budget: float | None, overwrite: bool, markdown: bool, as_json: bool, quiet: bool,
    debug: bool, **options: Any,
) -> None:  # fmt: skip
    """Measure how FILEs predict a text, compared with the model that they were made from.

    Perplexity, KL divergence of the predictions, and how often the most likely token is the same.
    """
    _check(files, sensitivity, budget, peers, tasks, chart)
    if chart is not None or sensitivity is not None:
        from hlwq_formats.atomic import check_destination

        # a measurement is continued, so it may exist
        check_destination(chart or sensitivity or "", overwrite=overwrite or sensitivity is not None)
    packages = {"torch": "eval", "transformers": "eval"}
    packages |= ({"matplotlib": "eval"} if chart else {}) | ({"lm_eval": "tasks"} if tasks else {})
    _check_inputs(files, packages)
    from ..runtime.evaluate import evaluate, prepare_ground

    with ProgressLine(quiet=quiet) as hashing, ProgressLine(quiet=quiet, unit="tokens") as progress:
        ground = prepare_ground(model_dir, hashing=hashing, progress=progress, **options)
    if sensitivity is not None:
        _measure_sensitivity(files, ground, sensitivity, budget, overwrite, as_json, quiet)
        return
    with ProgressLine(quiet=quiet, unit="tokens") as progress:
        evaluation = evaluate(files, ground, progress, peers=peers, tasks=tasks.split(",") if tasks else ())
    if chart is not None:
        from ..evaluation.chart import draw_chart
        from ..whole_file import write_whole

        write_whole(chart, draw_chart(evaluation), overwrite=overwrite)
    print_warnings(evaluation.warnings, quiet=quiet)
    if as_json:
        print_json(evaluation)
    elif not quiet:
        from ..evaluation.tables import print_evaluation

        print_evaluation(evaluation, as_markdown=markdown)


def _check(
    files: tuple[str, ...], sensitivity: str | None, budget: float | None, peers: bool, tasks: str | None,
    chart: str | None,
) -> None:  # fmt: skip
    """Refuse what cannot be meant before anything is loaded."""
    if sensitivity is None and budget is not None:
        raise Usage("--budget is for --sensitivity")
    if sensitivity is not None and (len(files) > 1 or peers or tasks or chart):
        raise Usage("--sensitivity takes at most one FILE and no --peers, --tasks or --chart")
    if sensitivity is None and not files and not peers:
        raise Usage("there is nothing to measure", hint="give a FILE, --peers or --sensitivity")


def _check_inputs(files: tuple[str, ...], packages: dict[str, str]) -> None:
    """Find out before the source takes its minutes what is missing: files, and packages (with the extra of each)."""
    from hlwq_formats.file_set import open_set

    for package, extra in packages.items():
        if find_spec(package) is None:
            raise MissingInput(f"{package} is not installed", hint=f'pip install "hlwq-convert[{extra}]"')
    for file in files:
        open_set(file).close()


def _measure_sensitivity(
    files: tuple[str, ...], ground: Any, output: str, budget: float | None, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    from ..conversion import convert
    from ..runtime.sensitivity import measure_sensitivity

    with tempfile.TemporaryDirectory(prefix="hlwq-") as folder, ProgressLine(quiet=quiet, unit="tensors") as progress:
        noise = files[0] if files else os.path.join(folder, "noise.hlwq")
        if not files:
            convert(ground.source.model.path, noise, bits=4)
        found = measure_sensitivity(
            noise, output, ground, lambda done, total: progress("sensitivity", done, total),
            budget=None if budget is None else 60 * budget, overwrite=overwrite,
        )  # fmt: skip
    if as_json:
        print_json(found)
    elif not quiet:
        from ..evaluation.tables import print_sensitivity

        print_sensitivity(found)
        print(f"{escape(output)}: {len(found.tensors)} tensors, {len(found.predicted)} of them predicted")


def main() -> NoReturn:
    """Entry point."""
    run_command(command, "hlwq-eval")
