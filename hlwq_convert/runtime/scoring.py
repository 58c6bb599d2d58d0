"""What a model predicts for each token of some windows, and how far that is from what its source predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hlwq_formats.errors import NonFinite

from ..evaluation.reference import SAMPLES, TOP_K, Reference
from ..evaluation.statistics import Scores

_ROWS = 128
"""Predictions that are looked at together: with a vocabulary of 128,000 a temporary takes 64 MiB."""

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""


def first_token(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before every text, if any: a model that is used to it needs it."""
    ids = tokenizer("a").input_ids
    return int(ids[0]) if ids and ids[0] == tokenizer.bos_token_id else None


def source_reference(
    model: Any, windows: NDArray[np.int64], progress: Progress, top_k: int = TOP_K, samples: int = SAMPLES
) -> Reference:
    """What the source predicts for (windows, ctx) tokens: of each but the first of a window."""
    count, ctx = windows.shape
    generator = torch.Generator(model.device).manual_seed(0)
    parts = []
    for log_p, targets in _predictions(model, windows, progress):
        best = log_p.topk(min(top_k, log_p.shape[1]))
        rest, log_rest = _rest(log_p, best.indices)
        m = samples if best.indices.shape[1] < log_p.shape[1] else 0
        if m:
            drawn = (rest - log_rest[:, None]).exp().multinomial(m, replacement=True, generator=generator)
        else:
            drawn = best.indices[:, :0]
        nll = -log_p.gather(1, targets[:, None])
        parts.append((best.indices.int(), best.values, log_rest, drawn.int(), log_p.gather(1, drawn), nll.double()))
    columns = (torch.cat([part.cpu() for part in column]) for column in zip(*parts, strict=True))
    top, best_p, rest_p, sample, sample_p, nll_all = (column.reshape(count, ctx - 1, -1).numpy() for column in columns)
    return Reference(top, best_p, rest_p[:, :, 0], sample, sample_p, nll_all[:, :, 0])


def score(model: Any, windows: NDArray[np.int64], reference: Reference, progress: Progress) -> Scores:
    """Scores of a model on the windows that the reference was made of.

    With P and Q merged outside the top, and p', q' the probabilities there over their sums P', Q', the divergence is

        sum over the top of p ln(p / q)  +  P' ln(P' / Q')  +  P' E[r - 1 - ln r],  r = q' / p'

    where the mean is that over the samples, drawn by p'. Its terms are never negative, and those of r - 1 have the
    mean 0.
    """
    top, log_p, log_rest, sample, log_s = (
        torch.from_numpy(array).flatten(0, 1)
        for array in (reference.top, reference.log_p, reference.log_rest, reference.sample, reference.log_s)
    )
    start = 0
    nll, kl, agree = [], [], []
    for log_q, targets in _predictions(model, windows, progress):
        rows = slice(start, start := start + len(targets))
        chosen, drawn = (tokens[rows].long().to(log_q.device) for tokens in (top, sample))
        log_p_rest, log_q_rest = log_rest[rows].double(), _rest(log_q, chosen)[1].cpu().double()
        p = log_p[rows].double()
        divergence = (p.exp() * (p - log_q.gather(1, chosen).cpu().double())).sum(1)
        outside = log_p_rest - log_q_rest
        if drawn.shape[1]:
            log_q_drawn = log_q.gather(1, drawn).cpu().double() - log_q_rest[:, None]
            log_r = log_q_drawn - (log_s[rows].double() - log_p_rest[:, None])
            outside += (log_r.exp() - 1 - log_r).mean(1)
        divergence += torch.where(log_p_rest == -torch.inf, 0, log_p_rest.exp() * outside)  # none outside
        kl.append(divergence.clamp(min=0))  # rounding can take what is nearly 0 below it
        agree.append((log_q.argmax(1) == chosen[:, 0]).cpu())
        nll.append(-log_q.gather(1, targets[:, None])[:, 0].cpu().double())
    return Scores(*(torch.cat(parts).reshape(reference.nll.shape).numpy() for parts in (nll, kl, agree)))


@torch.inference_mode()
def _predictions(
    model: Any, windows: NDArray[np.int64], progress: Progress
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(rows, vocabulary) float32 ln of probabilities and (rows,) the tokens that came, window by window."""
    for number, window in enumerate(windows):
        tokens = torch.from_numpy(window).to(model.device)
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        for start in range(0, len(logits), _ROWS):
            rows = logits[start : start + _ROWS].float()
            if not rows.isfinite().all():
                raise NonFinite(f"the model's output is not finite in window {number}", hint="try another --dtype")
            yield rows.log_softmax(1), tokens[1 + start : 1 + start + len(rows)]
        progress((number + 1) * windows.shape[1], windows.size)


def _rest(log_p: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, vocabulary) with -inf for the tokens in `chosen`, (rows, k), and (rows,) ln of the sum of the others."""
    rest = log_p.scatter(1, chosen, -torch.inf)
    return rest, rest.logsumexp(1)
