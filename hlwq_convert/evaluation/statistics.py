"""From the scores of single tokens to figures with intervals. Logarithms are natural: divergences are in nats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import msgspec
import numpy as np
from numpy.typing import NDArray

MIN_SAMPLES = 3
"""With fewer there is no interval."""


@dataclass(frozen=True)
class Scores:
    """One model on one text: an entry for each predicted token, (windows, tokens)."""

    nll: NDArray[np.float64]  # -ln of the probability given to the token that came
    kl: NDArray[np.float64]  # KL(source || model) of the prediction
    agree: NDArray[np.bool_]  # whether the most likely token is the source's


class Interval(msgspec.Struct, frozen=True):
    """A 95 % confidence interval."""

    low: float
    high: float


class Quality(msgspec.Struct, frozen=True):
    """How a model predicts, and how that differs from its source; intervals are null with under three windows."""

    perplexity: float
    perplexity_ratio: float
    perplexity_ratio_interval: Interval | None
    kl_mean: float
    kl_interval: Interval | None
    kl_median: float
    kl_p95: float
    kl_p99: float
    kl_max: float
    top1: float
    top1_interval: Interval | None


def quality(scores: Scores, source_nll: NDArray[np.float64]) -> Quality:
    """Summarise the scores of a model beside the source's own nll, (windows, tokens) of the same tokens.

    Perplexity is exp of the mean over all tokens. The intervals take windows as the independent observations:
    tokens of one window depend on each other. That of the ratio is paired: it comes from the difference of the two
    models on each window.
    """
    difference = mean_interval((scores.nll - source_nll).mean(axis=1))
    median, p95, p99 = np.percentile(scores.kl, [50, 95, 99])
    return Quality(
        perplexity=math.exp(scores.nll.mean()),
        perplexity_ratio=math.exp((scores.nll - source_nll).mean()),
        perplexity_ratio_interval=difference and Interval(math.exp(difference.low), math.exp(difference.high)),
        kl_mean=float(scores.kl.mean()),
        kl_interval=mean_interval(scores.kl.mean(axis=1)),
        kl_median=float(median),
        kl_p95=float(p95),
        kl_p99=float(p99),
        kl_max=float(scores.kl.max()),
        top1=float(scores.agree.mean()),
        top1_interval=mean_interval(scores.agree.mean(axis=1)),
    )


def mean_interval(values: NDArray[np.float64]) -> Interval | None:
    """Student's interval of the mean of (n,) independent values, None for under three."""
    n = len(values)
    if n < MIN_SAMPLES:
        return None
    half = student_quantile(0.975, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    return Interval(float(values.mean()) - half, float(values.mean()) + half)


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t by the expansion 26.7.5 of Abramowitz & Stegun: within 1 % from 2 degrees of freedom on
    and .1 % from 3 on, for the probability .975."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))
