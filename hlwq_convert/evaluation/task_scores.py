"""Two models on the same questions: the differences are paired, for the questions differ far more than the models."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .results import TaskScore
from .statistics import mean_interval

Answers = Mapping[tuple[str, str], Mapping[int, float]]
"""(task, metric) -> number of the question -> its score, 1 for right and 0 for wrong."""


def compare(name: str, answers: Answers, source: Answers) -> list[TaskScore]:
    """One entry for each task and metric that both models have at least two questions of."""
    scores = []
    for (task, metric), own in answers.items():
        theirs = source.get((task, metric), {})
        both = sorted(own.keys() & theirs.keys())
        if len(both) < 2:
            continue
        values = np.array([own[question] for question in both], np.float64)
        difference = values - np.array([theirs[question] for question in both], np.float64)
        scores.append(
            TaskScore(
                task=task,
                metric=metric,
                name=name,
                samples=len(both),
                value=float(values.mean()),
                standard_error=float(values.std(ddof=1)) / math.sqrt(len(both)),
                source_better=int((difference < 0).sum()),
                model_better=int((difference > 0).sum()),
                difference=float(difference.mean()),
                difference_interval=mean_interval(difference),
            )
        )
    return scores
