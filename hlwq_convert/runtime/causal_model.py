"""A causal language model of transformers from the weights of a model directory or of a .hlwq file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from logging import getLogger
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hlwq_formats.errors import MissingInput, NotFromSource, UnsupportedFeature, Usage, escape

from ..source import Source
from .load import TORCH, load_state_dict


def hush() -> None:
    """Let transformers, lm-eval and the peers print nothing: what they would say is raised here as an error, shown by
    our own progress, or is about kernels that are not used."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in ("huggingface_hub", "lm_eval", "torchao", "torch.utils._pytree"):
        getLogger(name).setLevel("ERROR")


def find_device(name: str) -> torch.device:
    """The device of this name; Usage where torch has none that works."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Usage(f"--device {escape(name, 40)}: {escape(str(error).splitlines()[0], 120)}") from None
    return device


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of a model directory. Code that comes with a model is never run."""
    try:
        return AutoTokenizer.from_pretrained(source.model.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer file can do to its reader
        raise MissingInput(
            f"no tokenizer can be made of its files: {escape(_first_line(error), 160)}", file=str(source.model.path)
        ) from None


def source_model(source: Source, dtype: torch.dtype, device: torch.device) -> Any:
    """The model as its source has it."""
    weights = {}
    for tensor in source.tensors:
        raw = bytearray(source.model.read(tensor, 0, tensor.length))
        weights[tensor.name] = torch.frombuffer(raw, dtype=TORCH[tensor.dtype]).reshape(tensor.shape)
    return _build(source, weights, str(source.model.path), dtype, device)


def file_model(path: str | os.PathLike[str], source: Source, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with the weights of a .hlwq file, rounded to the dtype of the source first, as a user loads them.

    Raises NotFromSource when names or shapes are not those of the source's architecture.
    """
    return _build(source, load_state_dict(path), os.fspath(path), dtype, device)


def _build(
    source: Source, weights: Mapping[str, torch.Tensor], origin: str, dtype: torch.dtype, device: torch.device
) -> Any:
    """A model in evaluation mode that computes in `dtype`, with every weight taken from `weights`."""
    folder = str(source.model.path)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):  # only to learn the class
            kind: Any = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
        model, found = kind.from_pretrained(
            None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # transformers raises all sorts for a config that it does not like
        raise UnsupportedFeature(
            f"transformers cannot build this model: {escape(_first_line(error), 200)}",
            file=folder,
            hint="hlwq-eval takes causal language models that need no code of their own",
        ) from error
    for problem, names in (
        ("lacks", found["missing_keys"]),
        ("has no use for", found["unexpected_keys"]),
        ("needs another shape of", found["mismatched_keys"]),
    ):
        if names:
            first = min(str(name) for name in names)
            raise NotFromSource(
                f'the model of {escape(folder, 100)} {problem} {len(names)} tensors, such as "{escape(first, 100)}"',
                file=origin,
            )
    return model.to(device).eval()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
