"""What cards and gates read of the documents that `hlwq-eval --json` writes, in one place."""

from __future__ import annotations

import os

import msgspec

from hlwq_formats.errors import BadEvaluation, escape
from hlwq_formats.files import InputFile

_MAX = 16 << 20


class _Quality(msgspec.Struct, frozen=True):
    perplexity: float
    perplexity_ratio: float
    kl_mean: float
    kl_p99: float


class _Entry(msgspec.Struct, frozen=True):
    kind: str
    quality: _Quality
    content_id: str | None = None


class _Document(msgspec.Struct, frozen=True):
    text: str
    ctx: int
    entries: list[_Entry]


class Evaluation(msgspec.Struct, frozen=True):
    """The output of one converted file measured against its source.

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
    """Read and check a document, which is of one file; BadEvaluation when it is none. Other keys are ignored."""
    with InputFile(path) as file:
        if file.size > _MAX:
            raise BadEvaluation(f"{file.size} bytes, at most {_MAX} are read", file=file.name)
        data = file.read(0, file.size)
    try:
        found = msgspec.json.decode(data, type=_Document)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadEvaluation(f"not what hlwq-eval --json writes: {escape(str(error))}", file=os.fspath(path)) from None
    files = [entry for entry in found.entries if entry.kind == "hlwq" and entry.content_id is not None]
    if len(files) != 1:
        raise BadEvaluation(f"it is of {len(files)} files, expected one", file=os.fspath(path))
    quality = files[0].quality
    return Evaluation(
        str(files[0].content_id), found.text, found.ctx, quality.perplexity, quality.perplexity_ratio,
        quality.kl_mean, quality.kl_p99,
    )  # fmt: skip


def of_content(evaluations: list[Evaluation], content_id: str | None) -> Evaluation | None:
    """The one that was measured on the file with this content."""
    return next((evaluation for evaluation in evaluations if evaluation.content_id == content_id), None)
