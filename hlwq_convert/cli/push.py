"""hlwq-push: converted files, with a model card, to a repository of the Hugging Face Hub."""

from __future__ import annotations

import sys
from typing import NoReturn

import rich_click as click

from .common import ProgressLine, common_options, print_json, print_warnings, run_command


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path())
@click.argument("repo", metavar="ORG/REPO")
@click.option("--branch", default="main", show_default=True, help="The branch to push to; made when it is missing.")
@click.option("--tag", metavar="NAME", help="Tag the commit after it was compared.")
@click.option("--create-pr", is_flag=True, help="Propose the change in a pull request.")
@click.option("--private", is_flag=True, help="Make the repository private, when it is created.")
@click.option(
    "--evaluation",
    "evaluations",
    metavar="FILE",
    multiple=True,
    type=click.Path(),
    help="A document of `hlwq-eval --json` for the card; one for each file that was measured.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@common_options
def command(
    files: tuple[str, ...], repo: str, branch: str, tag: str | None, create_pr: bool, private: bool,
    evaluations: tuple[str, ...], as_json: bool, quiet: bool, debug: bool,
) -> None:  # fmt: skip
    """Push each FILE, with the config and the tokenizer that it carries, a report and a model card, to ORG/REPO.
    A split set is named by any of its parts, or by its folder.

    All goes in one commit, and every file on the Hub is compared with the local one afterwards. The token is
    HF_TOKEN, that of `hf auth login`, or in CI that of a trusted publisher (HF_OIDC_RESOURCE).
    """
    from ..hub.bundle import make_bundle
    from ..hub.client import hide_progress
    from ..hub.evaluation import read_evaluation
    from ..hub.push import publish, total_bytes
    from ..report import human_bytes

    if quiet or not sys.stderr.isatty():
        hide_progress()
    with ProgressLine(quiet=quiet) as progress:
        progress("verifying", 0, 0)
        bundle = make_bundle(files, repo, [read_evaluation(path) for path in evaluations])
        print_warnings(bundle.warnings, quiet=quiet)
        progress(f"pushing {human_bytes(total_bytes(bundle.items))}", 0, 0)
        outcome = publish(bundle, branch=branch, tag=tag, create_pr=create_pr, private=private)
    if as_json:
        print_json(outcome)
    elif not quiet:
        if not outcome.changed:
            print(f"{repo} holds this content already, at commit {outcome.commit[:12]}: nothing was pushed")
        else:
            print(f"{repo}: {len(bundle.items)} files in commit {outcome.commit[:12]}, each compared by its SHA-256")
        print(outcome.url + (f"\ntag {outcome.tag}" if outcome.tag else ""))


def main() -> NoReturn:
    """Entry point."""
    run_command(command, "hlwq-push")
