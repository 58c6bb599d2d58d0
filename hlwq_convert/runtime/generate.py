"""Text from a model, piece by piece, and how long that took."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from hlwq_formats.errors import Usage

from .kv_cache import FLUSH, QuantizedCache


@dataclass(frozen=True)
class Generation:
    """What was generated, and its cost."""

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float  # from the call until the first new token
    tokens_per_second: float | None  # after the first token; None when there is no second
    peak_bytes: int  # of the process so far, or of the model's device


class _Pieces(TextStreamer):
    """A streamer that hands over each piece of text, and notes when tokens came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self.pieces: list[str] = []
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Tokens, the prompt's first."""
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Text that later tokens do not change any more."""
        self.pieces.append(text)
        if text:
            self._on_text(text)


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    chat: bool = False,
    kv_bits: int | None = None,
    max_new_tokens: int = 256,
    on_text: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Generation:
    """Continue a prompt, or answer it through the chat template, taking the most likely token each time.

    With `kv_bits`, older keys and values are kept at so many bits, and the prompt is given in pieces that see them as
    they are kept. `options` go to model.generate.

    Raises Usage (2) for a model without tokenizer, generation or template.
    """
    if not model.can_generate():
        raise Usage(f"{type(model).__name__} does not generate text")
    if tokenizer is None:
        raise Usage("the file carries no tokenizer")
    if chat:
        if not tokenizer.chat_template:
            raise Usage("the file carries no chat template", hint="leave --chat out")
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise Usage("the prompt is empty")
    streamer = _Pieces(tokenizer, on_text)
    if kv_bits is not None:
        options |= {"cache": QuantizedCache(model.config, kv_bits), "prefill_chunk_size": FLUSH}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    began = time.perf_counter()
    model.generate(  # type: ignore[operator]  # mypy takes it for an attribute of nn.Module
        **inputs.to(model.device), max_new_tokens=max_new_tokens, streamer=streamer, **(greedy | options)
    )
    times = streamer.times
    after_first = times[-1] - times[0]
    return Generation(
        "".join(streamer.pieces),
        inputs["input_ids"].shape[1],
        len(times),
        times[0] - began,
        (len(times) - 1) / after_first if after_first else None,
        peak_bytes(model.device),
    )


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
