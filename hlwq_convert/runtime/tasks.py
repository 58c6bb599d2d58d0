"""A model on tasks of lm-eval, question by question."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

from hlwq_formats.errors import MissingInput, Usage, escape

from ..evaluation.task_scores import Answers


def answer(model: Any, tokenizer: Any, tasks: Sequence[str]) -> Answers:
    """What a model scores on each question. A task is a name that lm-eval knows, or a path to its YAML.

    Raises MissingInput (66) without lm-eval or without the data set of a task, Usage for an unknown task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MissingInput(
            f"--tasks: {error.name} is not installed", hint='pip install "hlwq-convert[tasks]"'
        ) from None
    runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    answers: dict[tuple[str, str], dict[int, float]] = {}
    for task in tasks:
        try:
            with _bars_in_terminals_only():
                found = simple_evaluate(runner, tasks=[task], bootstrap_iters=0)
        except KeyError as error:
            raise Usage(f"--tasks {escape(task, 60)}: {escape(str(error.args[0]), 200)}") from None
        except OSError as error:  # what the libraries under lm-eval raise when a data set cannot be fetched or read
            raise MissingInput(
                f"--tasks {escape(task, 60)}: its data set cannot be had: {escape(str(error), 160)}",
                hint="run it once with a network; the data set is then kept in the cache of Hugging Face",
            ) from None
        for name, samples in found["samples"].items():
            for sample in samples:
                for metric in sample["metrics"]:
                    if isinstance(sample[metric], Real):
                        answers.setdefault((name, metric), {})[sample["doc_id"]] = float(sample[metric])
    return answers


@contextmanager
def _bars_in_terminals_only() -> Iterator[None]:
    """Send standard error to nowhere unless a person looks at it: lm-eval, what lies below it and the git that it asks
    for a commit all write there. What matters is raised."""
    if sys.stderr.isatty():
        yield
        return
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
