"""Measure what the quantization noise of each tensor alone does to the model's output."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from hlwq_formats import metadata as md
from hlwq_formats.errors import NotFromSource, UnsupportedFeature
from hlwq_formats.file_set import open_set
from hlwq_formats.layout import numel
from hlwq_formats.reader import Reader

from ..evaluation.sensitivity import (
    Measured,
    Sensitivity,
    continue_sensitivity,
    measuring_order,
    summarise,
    write_sensitivity,
)
from ..evaluation.source_digest import other_source
from .causal_model import source_model
from .evaluate import Ground
from .load import get_torch
from .scoring import score


def measure_sensitivity(
    noise: str, output: str, ground: Ground, progress: Callable[[int, int], None], *,
    budget: float | None = None, overwrite: bool = False,
) -> Sensitivity:  # fmt: skip
    """Put each quantized tensor of the file `noise` alone into the source's model and measure the divergence.

    `output` is complete in itself after each tensor, the missing ones predicted; a run with the same settings
    continues it. `budget` is in seconds; progress is called with (tensors done, tensors in all).
    """
    with open_set(noise) as reader:
        if problems := other_source(reader, ground.digest):
            raise NotFromSource(problems[0].removeprefix(f"{reader.path}: "), file=noise)
        settings = ground.key | {"noise": reader.content_id}
        measured = {} if overwrite else continue_sensitivity(output, settings)
        stored = [t for t in reader.metadata.tensors if not isinstance(t, md.RawTensor | md.AliasTensor)]
        weights = {tensor.name: numel(tensor.shape) for tensor in stored}
        document = summarise(weights, measured, settings)
        write_sensitivity(output, document)
        model = source_model(ground.source, ground.dtype, ground.device)
        began = time.monotonic()
        for name in measuring_order(weights):
            if name not in measured:
                if budget is not None and time.monotonic() - began >= budget:
                    break
                measured[name] = _measure(model, reader, name, ground)
                document = summarise(weights, measured, settings)
                write_sensitivity(output, document)
            progress(len(measured), len(weights))
    return document


@torch.no_grad()
def _measure(model: Any, reader: Reader, name: str, ground: Ground) -> Measured:
    """The divergence with the noise of this tensor, which is taken out again."""
    weight = _parameter(model, name)
    original = weight.data
    noisy = get_torch(reader, name).to(original)
    energy = float(original.double().square().sum())
    error = float((noisy - original).double().square().sum()) / energy if energy else 0.0
    weight.data = noisy
    try:
        scores = score(model, ground.windows, ground.reference, lambda done, total: None)
    finally:
        weight.data = original
    return Measured(original.numel(), error, float(scores.kl.mean()))


def _parameter(model: Any, name: str) -> torch.nn.Parameter:
    """The parameter that a tensor of the checkpoint became; some checkpoints lack the prefix of the inner model."""
    for candidate in (name, f"{model.base_model_prefix}.{name}"):
        try:
            parameter: torch.nn.Parameter = model.get_parameter(candidate)
        except AttributeError:
            continue
        return parameter
    raise UnsupportedFeature(
        "transformers keeps this tensor under another name or as part of another one: its noise cannot be put in alone",
        tensor=name,
    )
