"""hlwq-run: generate text with the model in a .hlwq file."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, NoReturn

import rich_click as click

from hlwq_formats.errors import NotAvailable, Usage

from .common import common_options, print_json, run_command


@click.command()
@click.argument("file", type=click.Path())
@click.option("--prompt", metavar="TEXT", help="The text to continue.  [default: standard input]")
@click.option("--chat", is_flag=True, help="Take the prompt as a message, through the model's chat template.")
@click.option(
    "--weights",
    type=click.Choice(["dense", "packed", "int4"]),
    default="dense",
    help="How they lie in memory: decoded, as in the file, or at 4 bits by torchao.",
)
@click.option("--kv-bits", type=click.IntRange(2, 4), help="Keep older keys and values at so many bits.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Stop after so many.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, the text in it.")
@common_options
def command(
    file: str,
    prompt: str | None,
    chat: bool,
    weights: Any,
    kv_bits: int | None,
    max_new_tokens: int,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Load the model in FILE and let it continue a text.

    The text goes to stdout as it comes, then tokens per second, time to first token and peak memory to stderr.
    """
    if prompt is None:
        if sys.stdin.isatty():
            raise Usage("there is no prompt", hint="pass --prompt TEXT, or pipe a text in")
        prompt = sys.stdin.read()
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; nothing of this needs a network
    try:
        import torch
        import transformers

        from ..runtime.generate import generate
        from ..runtime.model import load_model
    except ModuleNotFoundError as error:
        raise NotAvailable(f"{error.name} is not installed", hint='pip install "hlwq-convert[run]"') from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    began = time.monotonic()
    model, tokenizer = load_model(file, "cuda" if torch.cuda.is_available() else "cpu", weights=weights)
    load_seconds = time.monotonic() - began
    on_text = (lambda text: None) if as_json else _show
    made = generate(
        model, tokenizer, prompt, chat=chat, kv_bits=kv_bits, max_new_tokens=max_new_tokens, on_text=on_text
    )
    if as_json:
        import dataclasses

        more = {"weights": weights, "device": str(model.device), "load_seconds": load_seconds}
        print_json(dataclasses.asdict(made) | more)
        return
    print()
    if not quiet:
        rate = "" if made.tokens_per_second is None else f", {made.tokens_per_second:.1f} tokens/s"
        speed = f"{made.prompt_tokens} + {made.new_tokens} tokens, the first in {made.first_token_seconds:.2f} s{rate}"
        memory = f"peak memory {made.peak_bytes / 1e6:.0f} MB on {model.device}"
        print(f"hlwq: {speed}; loaded {weights} in {load_seconds:.1f} s; {memory}", file=sys.stderr)


def _show(text: str) -> None:
    """Print a piece of text at once; control characters that a model may write do nothing to the terminal."""
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)
    print("".join(shown), end="", flush=True)


def main() -> NoReturn:
    """Entry point."""
    run_command(command, "hlwq-run")
