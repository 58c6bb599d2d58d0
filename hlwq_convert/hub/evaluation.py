"""What cards and gates read of the documents that `hlwq-eval --json` writes, in one place."""

from __future__ import annotations

import os

import msgspec

from hlwq_formats.errors import BadEvaluation, escape
from hlwq_formats.files import InputFile

_MAX = 16 << 20


class Evaluation(msgspec.Struct, frozen=True):
    """The output of one converted file measured against its source. Other keys are ignored.

    `content_id` says of which file; `text` names what was read, in windows of `ctx` tokens; `perplexity_ratio` is
    to the source; Kullback-Leibler divergence is of the next-token distributions, in nats.
    """

    content_id: str
    text: str
    ctx: int
    perplexity: float
    perplexity_ratio: float
    kl_mean: float
    kl_p99: float


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Read and check a document; BadEvaluation when it is none."""
    with InputFile(path) as file:
        if file.size > _MAX:
            raise BadEvaluation(f"{file.size} bytes, at most {_MAX} are read", file=file.name)
        data = file.read(0, file.size)
    try:
        found = msgspec.json.decode(data, type=Evaluation)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadEvaluation(f"not what hlwq-eval --json writes: {escape(str(error))}", file=os.fspath(path)) from None
    return found


def of_content(evaluations: list[Evaluation], content_id: str | None) -> Evaluation | None:
    """The one that was measured on the file with this content."""
    return next((evaluation for evaluation in evaluations if evaluation.content_id == content_id), None)
