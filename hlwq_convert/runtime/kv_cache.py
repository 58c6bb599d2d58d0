"""A transformers cache that keeps keys and values at 2, 3 or 4 bits, but for the most recent tokens.

What is stored depends on the tokens alone, not on how they came: whenever the length passes a multiple of FLUSH, all
but the last `window` tokens before that multiple are coded. A forward pass sees what was coded before it began, and
its own tokens as they are.

Attention needs dense keys and values: each forward pass decodes the coded tokens of one layer at a time, for that
layer's attention alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from hlwq_formats.errors import Usage

from .kv_codec import decode, encode, packed_width

BITS = (2, 3, 4)
FLUSH = 64
"""Tokens that are coded together. A prompt given in pieces of 64 (`generate(prefill_chunk_size=64)`) is attended to
exactly as if its tokens came one by one."""


class QuantizedCache(Cache):
    """`cache` for a model of this config: `bits` (2, 3 or 4) for each key and value, and an fp16 scale for
    each head and token, of all but the last `window` to `window + 63` tokens.

    Attention layers are quantized, full and sliding; the state of linear-attention layers and layers without a cache
    are transformers' own. Raises Usage for another kind of layer and, with the first tokens, for a head_dim other
    than 64, 96, 128 or 256.
    """

    def __init__(self, config: PreTrainedConfig, bits: int = 3, window: int = 128) -> None:
        if bits not in BITS or window < 0:
            raise Usage(f"bits is {bits} and window {window}, expected 2, 3 or 4 bits and a window of 0 or more tokens")
        super().__init__(layers=[_quantized(layer, bits, window) for layer in DynamicCache(config=config).layers])


def _quantized(layer: Any, bits: int, window: int) -> Any:
    """The layer that takes the place of one of DynamicCache's."""
    if type(layer) is DynamicLayer:
        return QuantizedLayer(bits, window)
    if type(layer) is DynamicSlidingWindowLayer:
        return QuantizedLayer(bits, window, layer.sliding_window)
    if type(layer) in (LinearAttentionLayer, DummyLayer):
        return layer
    raise Usage(f"this model has cache layers of the kind {type(layer).__name__}, which cannot be quantized")


class QuantizedLayer(CacheLayerMixin):
    """The cache of one attention layer; with `sliding_window`, of the last `sliding_window - 1` tokens and those that
    came since a multiple of FLUSH."""

    is_croppable = True

    def __init__(self, bits: int, window: int, sliding_window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bits = bits
        self.window = window
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.states: tuple[QuantizedStates, ...] = ()  # of keys, of values; the base class's own stay None
        self.begin = 0  # the oldest token that is kept
        self.length = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take batch, heads, head_dim, dtype and device from the first tokens."""
        self.states = (QuantizedStates(key_states, self.bits), QuantizedStates(value_states, self.bits))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens, (batch, heads, new, head_dim); return all that they may attend to, and them, dense."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.record_past:
            self._flush()
        visible, _ = self.get_mask_sizes(key_states.shape[-2])
        self.length += key_states.shape[-2]
        dense = []
        for states, new in zip(self.states, (key_states, value_states), strict=True):
            states.append(new)
            dense.append(states.read(visible))
        if not self.record_past:
            self._flush()
        return dense[0], dense[1]

    def _flush(self) -> None:
        """Drop what no later token can see, then code what is older than the window, as of the last multiple of
        FLUSH."""
        whole = self.length // FLUSH * FLUSH
        begin = self.begin if self.sliding_window is None else max(self.begin, whole + 1 - self.sliding_window)
        for states in self.states:
            states.drop_oldest(begin - self.begin)
            states.code_oldest(whole - self.window - begin - states.coded)
        self.begin = begin

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens `update` will return for so many new ones, and the position of the first."""
        past = self.length if self.sliding_window is None else min(self.length, self.sliding_window - 1)
        return past + query_length, self.length - past

    def get_seq_length(self) -> int:
        """Tokens that were seen and not cropped."""
        return self.length

    def get_max_length(self) -> int:
        """The sliding window; -1 without one."""
        return -1 if self.sliding_window is None else self.sliding_window

    def activate_past_recording(self) -> None:
        """Have each `crop` decide what is coded, not `update`, whose tokens it may take back (assisted decoding)."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens. Tokens that were coded before stay coded; raises Usage where a
        sliding window would have to show tokens that were dropped."""
        length = self.length + tokens_to_remove
        if tokens_to_remove > 0 or length < 0:
            raise Usage(f"crop({tokens_to_remove}) of {self.length} tokens, expected -{self.length} to 0")
        if self.sliding_window is not None and max(0, length + 1 - self.sliding_window) < self.begin:
            raise Usage(f"crop({tokens_to_remove}) needs tokens that the sliding window has dropped")
        for states in self.states:
            states.drop_newest(-tokens_to_remove)
        self.length = length
        self._flush()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give each row of the batch the tokens of row `beam_idx[row]`."""
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        self._change(lambda tensor: tensor[indices])

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for states in self.states:
            states.codes, states.scales, states.recent = map(change, (states.codes, states.scales, states.recent))


class QuantizedStates:
    """The keys or the values of one layer: coded tokens, and after them recent ones as they came.

    codes: (batch, heads, coded, bytes) uint8; scales: (batch, heads, coded) float16;
    recent: (batch, heads, tokens, head_dim) in the model's dtype.
    """

    def __init__(self, like: torch.Tensor, bits: int) -> None:
        batch, heads, _, head_dim = like.shape
        self.bits = bits
        self.codes = like.new_empty(batch, heads, 0, packed_width(head_dim, bits), dtype=torch.uint8)
        self.scales = like.new_empty(batch, heads, 0, dtype=torch.float16)
        self.recent = like.new_empty(batch, heads, 0, head_dim)

    @property
    def coded(self) -> int:
        """Tokens that are coded."""
        return self.scales.shape[-1]

    def append(self, new: torch.Tensor) -> None:
        """Add recent tokens."""
        self.recent = torch.cat([self.recent, new], dim=2)

    def read(self, count: int) -> torch.Tensor:
        """The last `count` tokens, dense: (batch, heads, count, head_dim)."""
        old = count - self.recent.shape[2]
        if old <= 0:
            return self.recent[:, :, -count:]
        batch, heads, _, head_dim = self.recent.shape
        dense = self.recent.new_empty(batch, heads, count, head_dim)
        decode(self.codes[:, :, -old:], self.scales[:, :, -old:], self.bits, dense[:, :, :old])
        dense[:, :, old:] = self.recent
        return dense

    def code_oldest(self, count: int) -> None:
        """Code the first recent tokens, if `count` is above 0."""
        if count > 0:
            codes, scales = encode(self.recent[:, :, :count], self.bits)
            self.codes = torch.cat([self.codes, codes], dim=2)
            self.scales = torch.cat([self.scales, scales], dim=2)
            self.recent = self.recent[:, :, count:].clone()  # a view would keep what was coded in memory

    def drop_oldest(self, count: int) -> None:
        """Forget the first `count` tokens."""
        if count > 0:
            recent = max(0, count - self.coded)
            self.codes = self.codes[:, :, count:].clone()
            self.scales = self.scales[:, :, count:].clone()
            self.recent = self.recent[:, :, recent:].clone()

    def drop_newest(self, count: int) -> None:
        """Forget the last `count` tokens."""
        recent = max(0, self.recent.shape[2] - count)
        coded = self.coded - max(0, count - self.recent.shape[2])
        self.codes, self.scales = self.codes[:, :, :coded], self.scales[:, :, :coded]
        self.recent = self.recent[:, :, :recent]
