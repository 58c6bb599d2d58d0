"""POLICY: how each tensor is stored, and why, from names, shapes and dtypes alone."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from msgspec import UNSET

from hlwq_formats import metadata as md
from hlwq_formats.dtypes import WEIGHT_DTYPES
from hlwq_formats.errors import Usage, escape
from hlwq_formats.layout import BLOCK, scalar_lengths, trellis_lengths
from hlwq_formats.safetensors_dir import SourceTensor

from .trellis import row_of

MIN_ELEMENTS = 4096
EMBEDDING_BITS = 5
_MIN_EXPERT_COLUMNS = 64

_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe|lm_head|output\.weight$)", re.IGNORECASE)
_DELICATE = (
    (re.compile(r"norm|(^|\.)ln_", re.IGNORECASE), "norm"),
    (re.compile(r"A_log|\.D$|(^|\.)dt_"), "state-space parameter"),
    (re.compile(r"(^|[._])bias$"), "bias"),
    (re.compile(r"\.gate\.weight$|router", re.IGNORECASE), "router"),
    (re.compile(r"conv", re.IGNORECASE), "convolution"),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """How one tensor is stored: by scalar codes of `bits`, by a trellis with a `step`, or raw when both are None.

    A step is in units of a row's RMS; 0 stands for one that is still to be found.
    """

    bits: int | None
    reason: str
    step: float | None = None

    @property
    def encoding(self) -> Literal["raw", "scalar", "trellis"]:
        """What the entry of the tensor will say."""
        if self.step is not None:
            return "trellis"
        return "raw" if self.bits is None else "scalar"


def plan(tensors: Sequence[SourceTensor], recipe: md.Recipe, required: int = 0) -> dict[str, Choice]:
    """A choice for every tensor, in the given order.

    Raises Usage when one of the last `required` rules, those of --set, has no effect on this model; a recipe is
    written for many models, and its own rules may match nothing.
    """
    variable = recipe.target is not UNSET
    bits = None if variable else recipe.bits or EMBEDDING_BITS
    choices = {tensor.name: _default_choice(tensor, bits) for tensor in tensors}
    quantizable = {tensor.name for tensor in tensors if _impossible(tensor) is None}
    optional = len(recipe.rules) - required
    for number, rule in enumerate(recipe.rules):
        pattern = re.compile(rule.match)
        names = [name for name in choices if pattern.search(name)]
        usable = [name for name in names if rule.bits is None or name in quantizable]
        if not usable and number >= optional:
            raise _useless(rule, names, choices)
        for name in usable:
            choices[name] = Choice(rule.bits, f"rule {rule.match}"[:200])
    return choices


def _impossible(tensor: SourceTensor) -> str | None:
    """Why a tensor cannot be quantized at all, or None."""
    if tensor.dtype not in WEIGHT_DTYPES:
        return f"{tensor.dtype} is kept as it is"
    if len(tensor.shape) < 2:
        return f"{len(tensor.shape)}-D"
    if tensor.numel < MIN_ELEMENTS:
        return f"under {MIN_ELEMENTS} elements"
    return None


_shared = functools.cache(Choice)
"""Most tensors of a model are stored for one of a few reasons: they share the object that says so."""


def _default_choice(tensor: SourceTensor, bits: int | None) -> Choice:
    """What happens to a tensor that no rule names, at `bits` or, when that is None, at a variable rate."""
    for pattern, why in _DELICATE:
        if tensor.dtype in WEIGHT_DTYPES and pattern.search(tensor.name):
            return _shared(None, why)
    if (impossible := _impossible(tensor)) is not None:
        return _shared(None, impossible)
    rank = len(tensor.shape)
    if rank > 3:
        return _shared(None, f"{rank}-D")
    if rank == 3 and tensor.shape[-1] < _MIN_EXPERT_COLUMNS:
        return _shared(None, f"3-D with under {_MIN_EXPERT_COLUMNS} columns")
    if bits is None:
        return _shared(None, "default", 0.0)
    if _EMBEDDING.search(tensor.name) and bits < EMBEDDING_BITS:
        return _shared(EMBEDDING_BITS, "embedding floor")
    return _shared(bits, "default")


def _useless(rule: md.Rule, names: list[str], choices: dict[str, Choice]) -> Usage:
    shown = escape(rule.match, 120)
    if names:
        why = choices[names[0]].reason
        return Usage(
            f'--set: "{shown}" matches only what cannot be quantized', tensor=names[0], hint=f"it is raw: {why}"
        )
    plain = re.sub(r"[^\w.]", "", rule.match)
    parts = sorted({part for name in choices for part in (name, *name.split("."))})
    close = difflib.get_close_matches(plain, parts, 3, 0.5)
    hint = f"did you mean {', '.join(escape(c, 80) for c in close)}?" if close else "--dry-run lists the names"
    return Usage(f'--set: "{shown}" matches no tensor', hint=hint)


_UNKNOWN = "0" * 64  # a digest takes its place in the metadata whatever it is


def placeholder(tensor: SourceTensor, choice: Choice, symbols: int = 0) -> md.StoredTensor:
    """The entry of a tensor stored as chosen, without what only its weights can tell: of a trellis, the bytes of its
    `symbols` and frequencies."""
    shape = list(tensor.shape)
    if choice.step is not None:
        row = row_of(tensor.shape)
        n_scales, n_chunks = trellis_lengths(tensor.numel, row)
        chunks = [symbols // n_chunks + (i < symbols % n_chunks) for i in range(n_chunks)]
        # scales compress to about .39 of their bytes, and frequencies when they are many, above 4.7 bits a weight; what
        # they take is part of the symbols here
        stored = max(n_scales * 39 // 100, 1)
        sections = [md.Section("scales", stored, _UNKNOWN, md.Zstd([stored], 2 * stored, _UNKNOWN))]
        sections.append(md.Section("frequencies", 1, _UNKNOWN))
        if 80 * symbols > 47 * tensor.numel:
            sections[-1].zstd = md.Zstd([1], 2, _UNKNOWN)
        sections.append(md.Section("symbols", symbols, _UNKNOWN))
        sections[-1].chunks = chunks
        return md.TrellisTensor(
            tensor.name, tensor.dtype, shape, choice.reason, BLOCK, row, 32, 1 << 23, -30, _UNKNOWN, sections
        )
    if choice.bits is None:
        section = md.Section("raw", tensor.length, _UNKNOWN)
        return md.RawTensor(tensor.name, tensor.dtype, shape, choice.reason, [section])
    sections = [md.Section(k, n, _UNKNOWN) for k, n in scalar_lengths(tensor.numel, choice.bits).items()]
    return md.ScalarTensor(tensor.name, tensor.dtype, shape, choice.reason, choice.bits, BLOCK, 0, _UNKNOWN, sections)
