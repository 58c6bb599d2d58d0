"""What an evaluation found, as one document; its JSON is read by other tools, so its names stay."""

from __future__ import annotations

from typing import Literal

import msgspec

from .statistics import Interval, Quality


class Entry(msgspec.Struct, frozen=True):
    """One model that was measured: the source, a file, or the source as another quantizer changes it."""

    name: str
    kind: Literal["source", "hlwq", "peer"]
    bytes: int
    bpw: float  # of all weights, with everything that is stored
    quality: Quality
    content_id: str | None = None  # of a file
    encoding: Literal["scalar", "trellis"] | None = None  # of a file: what most of its bytes are


class Missing(msgspec.Struct, frozen=True):
    """A quantizer that could not be measured here."""

    name: str
    why: str


class TaskScore(msgspec.Struct, frozen=True):
    """A model on one task of lm-eval, paired with the source: each question is answered by both."""

    task: str
    metric: str
    name: str
    samples: int
    value: float
    standard_error: float
    source_better: int  # questions on which the source scores higher
    model_better: int
    difference: float  # value less the source's
    difference_interval: Interval | None


class Evaluation(msgspec.Struct, frozen=True):
    """Everything that hlwq-eval shows. Divergences are in nats, intervals have a confidence of 95 %."""

    model: str
    text: str
    text_sha256: str
    ctx: int
    windows: int
    tokens: int  # predicted, in all windows
    dtype: str
    device: str
    top_k: int  # tokens of each prediction of the source that are compared one by one
    samples: int  # and how many of the others are drawn
    rest: float  # mean probability of the others
    entries: list[Entry]  # the source first
    missing: list[Missing]
    tasks: list[TaskScore]
    warnings: list[str]
