"""Measure files, and the source as other quantizers change it, against the source: one model in memory at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from hlwq_formats.errors import Usage, escape
from hlwq_formats.file_set import open_set

from ..evaluation.reference import Reference, load_reference, reference_key, store_reference
from ..evaluation.results import Entry, Evaluation, Missing, TaskScore
from ..evaluation.source_digest import SourceDigest, digest_source, other_source
from ..evaluation.statistics import Scores, quality
from ..evaluation.task_scores import Answers, compare
from ..evaluation.windows import TEXT, cut_windows, read_text
from ..inspection import QUANTIZED, Inspection, inspect_reader, printable
from ..source import Source, open_source
from .causal_model import file_model, find_device, hush, load_tokenizer, source_model
from .peers import PEERS, apply_peer
from .scoring import first_token, score, source_reference
from .tasks import answer

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class Ground:
    """What every model is measured on: the source, the windows, and what the source predicts there."""

    source: Source
    digest: SourceDigest
    tokenizer: Any
    text: str
    text_sha256: str
    windows: NDArray[np.int64]  # (windows, ctx)
    dtype: torch.dtype
    device: torch.device
    reference: Reference
    kept: Path | None  # the file of the reference

    @property
    def key(self) -> dict[str, str]:
        """What the predictions depend on."""
        return _key(self.digest, self.windows, self.dtype, self.device)


def prepare_ground(
    model_dir: str, text: str | None, ctx: int, windows: int, dtype: str, device: str, hashing: Progress,
    progress: Progress,
) -> Ground:  # fmt: skip
    """Cut the text, and get the source's predictions from the cache or from the model.

    `hashing` is told of bytes of the source, `progress` of tokens.
    """
    hush()
    place, computing = find_device(device), {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    source = open_source(model_dir)
    content = read_text(text)
    tokenizer = load_tokenizer(source)
    tokens = tokenizer(content, add_special_tokens=False, verbose=False).input_ids
    cut = cut_windows(tokens, first_token(tokenizer), ctx, windows)
    longest = source.config.get("max_position_embeddings")
    if isinstance(longest, int) and ctx > longest:
        raise Usage(f"--ctx is {ctx}, the model takes {longest} tokens")
    digest = digest_source(source, lambda done, total: hashing("hashing the source", done, total))
    key = reference_key(**_key(digest, cut, computing, place))
    kept = load_reference(key)
    if kept is None:
        model = source_model(source, computing, place)
        reference = source_reference(model, cut, lambda done, total: progress("source", done, total))
        del model
        path = store_reference(key, reference)
    else:
        reference, path = kept
    name, sha256 = text or TEXT, hashlib.sha256(content.encode()).hexdigest()
    return Ground(source, digest, tokenizer, name, sha256, cut, computing, place, reference, path)


def _key(digest: SourceDigest, windows: NDArray[np.int64], dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    tokens = hashlib.sha256(repr(windows.shape).encode() + windows.tobytes()).hexdigest()
    return {
        "source": digest.whole, "tokens": tokens, "dtype": str(dtype), "device": device.type, "versions": versions,
    }  # fmt: skip


def evaluate(
    files: Sequence[str], ground: Ground, progress: Progress, *, peers: bool = False, tasks: Sequence[str] = ()
) -> Evaluation:
    """Measure each file in turn. `peers` adds other quantizers, `tasks` the tasks of lm-eval for every model."""
    inspections, warnings = [], []
    for file in files:  # what is wrong with a file shows before the hours begin
        with open_set(file) as reader:
            inspections.append(inspect_reader(reader))
            warnings += other_source(reader, ground.digest)
    entries, missing, scored = [_source_entry(ground)], [], list[TaskScore]()
    right: Answers = {}
    if tasks:
        model = source_model(ground.source, ground.dtype, ground.device)
        right = answer(model, ground.tokenizer, tasks)
        del model

    def measure(model: Any, name: str, kind: Any, size: int, bpw: float, **of_file: Any) -> None:
        stage = f"{escape(name, 60)} ({len(entries)} of {len(files) + peers * len(PEERS)})"
        scores = score(model, ground.windows, ground.reference, lambda done, total: progress(stage, done, total))
        entries.append(Entry(name, kind, size, bpw, quality(scores, ground.reference.nll), **of_file))
        if tasks:
            scored.extend(compare(name, answer(model, ground.tokenizer, tasks), right))

    for file, inspection in zip(files, inspections, strict=True):
        model = file_model(file, ground.source, ground.dtype, ground.device)
        measure(
            model, printable(file), "hlwq", inspection.file_bytes, inspection.bpw or 0,
            content_id=inspection.content_id, encoding=_main_encoding(inspection),
        )  # fmt: skip
        del model
    for peer in PEERS if peers else ():
        model = source_model(ground.source, ground.dtype, ground.device)
        try:
            size, bpw = apply_peer(peer, model, ground.source)
        except Exception as error:  # another project's code on a machine that it may not know
            missing.append(Missing(peer.name, escape(f"{type(error).__name__}: {error}".splitlines()[0], 160)))
            continue
        measure(model, peer.name, "peer", size, bpw)
        del model
    count, ctx = ground.windows.shape
    return Evaluation(
        model=printable(str(ground.source.model.path)), text=printable(ground.text), text_sha256=ground.text_sha256,
        ctx=ctx, windows=count, tokens=ground.reference.nll.size, dtype=str(ground.dtype).removeprefix("torch."),
        device=str(ground.device), top_k=ground.reference.top.shape[-1],
        samples=ground.reference.sample.shape[-1], rest=ground.reference.rest,
        entries=entries, missing=missing, tasks=scored, warnings=warnings,
    )  # fmt: skip


def _main_encoding(inspection: Inspection) -> Any:
    """Scalar or trellis, whichever takes more bytes; None for a file with neither."""
    sizes = {kind: inspection.summary.bytes_by_encoding[kind] for kind in QUANTIZED}
    return max(QUANTIZED, key=lambda kind: sizes[kind]) if any(sizes.values()) else None


def _source_entry(ground: Ground) -> Entry:
    size = sum(length for _, length in ground.source.model.files)
    weights = sum(tensor.numel for tensor in ground.source.tensors)
    nll = ground.reference.nll
    itself = Scores(nll, np.zeros_like(nll), np.ones(nll.shape, np.bool_))
    return Entry(printable(str(ground.source.model.path)), "source", size, 8 * size / weights, quality(itself, nll))
