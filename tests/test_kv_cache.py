"""The quantized cache in real (tiny) transformers models, against an oracle: transformers' own dense layers, which
show each token as it decodes once it is old enough."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest

import hlwq_convert as h
from hlwq_formats.errors import Usage

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, GenerationMixin  # noqa: E402

from hlwq_convert.runtime.kv_cache import FLUSH, QuantizedLayer  # noqa: E402
from hlwq_convert.runtime.kv_codec import decode, encode  # noqa: E402

SMALL: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only wait for each other in models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(kind: str = "Llama", dtype: torch.dtype = torch.float32, **changes: Any) -> GenerationMixin:
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()


def tokens(count: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(2, 100, (batch, count), generator=torch.Generator().manual_seed(count))


def states(count: int, head_dim: int = 64, batch: int = 2, heads: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(batch, heads, count, head_dim, generator=generator) for _ in range(2)]


def stored(cache: h.QuantizedCache) -> list[torch.Tensor]:
    """Every tensor that the attention layers hold."""
    layers = [layer for layer in cache.layers if isinstance(layer, QuantizedLayer)]
    return [t for layer in layers for s in layer.states for t in (s.codes, s.scales, s.recent)]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) > 0 and all(map(torch.equal, left, right))


class Oracle(DynamicCache):
    """Dense layers that show tokens before (length // FLUSH * FLUSH - window) as they decode."""

    def __init__(self, config: Any, bits: int, window: int) -> None:
        super().__init__(config=config)
        self.bits, self.window, self.seen = bits, window, False

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        length = self.layers[layer_idx].get_seq_length()
        dense = super().update(keys, values, layer_idx)
        first = length + keys.shape[2] - dense[0].shape[2]
        old = length // FLUSH * FLUSH - self.window - first
        return tuple(self._degrade(tensor, old) for tensor in dense)

    def _degrade(self, tensor: torch.Tensor, old: int) -> torch.Tensor:
        if old <= 0:
            return tensor
        self.seen = True
        tensor = tensor.clone()
        decode(*encode(tensor[:, :, :old], self.bits), self.bits, tensor[:, :, :old])
        return tensor


def generate(net: GenerationMixin, ids: torch.Tensor, cache: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, **options}
    return net.generate(ids, cache=cache, output_logits=True, **options)


def assert_like_the_oracle(net: GenerationMixin, ids: torch.Tensor, bits: int = 3, window: int = 64, **o: Any) -> None:
    oracle, cache = Oracle(net.config, bits, window), h.QuantizedCache(net.config, bits, window)
    expected, found = generate(net, ids, oracle, **o), generate(net, ids, cache, **o)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.logits) == len(expected.logits) and all(map(torch.equal, found.logits, expected.logits))
    dense = generate(net, ids, DynamicCache(config=net.config), **o)
    assert oracle.seen and not all(map(torch.equal, found.logits, dense.logits))  # or nothing was tested
    assert [layer for layer in cache.layers if isinstance(layer, QuantizedLayer) and layer.states[0].coded]


# --- one layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sliding_window", [None, 40, 150])
@pytest.mark.parametrize("window", [0, 5, 64, 128])
def test_what_is_stored_does_not_depend_on_how_tokens_came(window: int, sliding_window: int | None) -> None:
    keys, values = states(400, batch=1, heads=2)
    pieces = random.Random(window)
    at_once = QuantizedLayer(3, window, sliding_window)
    at_once.update(keys, values)
    for sizes in ([1], [FLUSH], [370, 1], [pieces.randint(1, 100) for _ in range(99)]):
        layer, start = QuantizedLayer(3, window, sliding_window), 0
        for size in itertools.cycle(sizes):
            layer.update(keys[:, :, start : start + size], values[:, :, start : start + size])
            if (start := start + size) >= 400:
                break
        assert (layer.begin, layer.length) == (at_once.begin, at_once.length)
        for mine, theirs in zip(layer.states, at_once.states, strict=True):
            assert equal([mine.codes, mine.scales, mine.recent], [theirs.codes, theirs.scales, theirs.recent])
    assert at_once.begin == (384 - sliding_window + 1 if sliding_window else 0)
    assert at_once.begin + at_once.states[0].coded == max(384 - window, at_once.begin)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_bytes_outside_the_window(head_dim: int, bits: int) -> None:
    layer = QuantizedLayer(bits, 128)
    layer.update(*(tensor.bfloat16() for tensor in states(128 + 10 * FLUSH, head_dim)))
    for part in layer.states:
        for tensor in (part.codes, part.scales, part.recent):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # no view that keeps more in memory
        tokens = 2 * 3 * 10 * FLUSH
        width = 128 if head_dim == 96 else head_dim
        assert part.codes.nbytes + part.scales.nbytes == tokens * (width * bits // 8 + 2)
        assert part.recent.nbytes == 2 * 3 * 128 * head_dim * 2


def test_keys_and_values_may_differ_in_head_dim() -> None:
    keys, values = states(300, 256)[0], states(300, 128)[1]
    layer = QuantizedLayer(4, 0)
    for token in range(300):
        dense = layer.update(keys[:, :, token : token + 1], values[:, :, token : token + 1])
    assert dense[0].shape == keys.shape and dense[1].shape == values.shape
    for found, given in zip(dense, (keys, values), strict=True):
        assert 0.08 < (found - given)[:, :, :256].norm() / given[:, :, :256].norm() < 0.1  # 4 bits: .0095 ** .5
        assert torch.equal(found[:, :, 256:], given[:, :, 256:])


def test_rows_of_the_batch_are_reordered_repeated_and_selected() -> None:
    layer = QuantizedLayer(3, 64)
    layer.update(*states(300))
    before = [part.read(300) for part in layer.states]
    layer.reorder_cache(torch.tensor([1, 1]))
    assert equal([part.read(300) for part in layer.states], [tensor[[1, 1]] for tensor in before])
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 2, 3]))
    assert equal([part.read(300) for part in layer.states], [tensor[[1, 1, 1]] for tensor in before])


def test_cropping_takes_recent_tokens_then_coded_ones() -> None:
    given = states(300)
    layer = QuantizedLayer(3, 64)
    layer.update(*given)
    dense = [part.read(300) for part in layer.states]
    for left in (299, 256, 193, 192, 191, 17):
        layer.crop(left - layer.get_seq_length())
        assert layer.get_seq_length() == left and layer.get_mask_sizes(1) == (left + 1, 0)
        assert equal([part.read(left) for part in layer.states], [tensor[:, :, :left] for tensor in dense])
    layer.update(*(tensor[:, :, 17:] for tensor in given))  # 17 tokens were coded early, the others come again
    assert layer.states[0].coded == 192 and equal([part.read(300) for part in layer.states], dense)
    for wrong in (1, -301):
        with pytest.raises(Usage, match=r"crop\(-?\d+\) of 300 tokens, expected -300 to 0"):
            layer.crop(wrong)


def test_a_sliding_window_cannot_go_back_to_what_it_dropped() -> None:
    layer = QuantizedLayer(3, 64, sliding_window=200)
    layer.update(*states(500))
    with pytest.raises(Usage, match=r"crop\(-60\) needs tokens that the sliding window has dropped"):
        layer.crop(-60)
    assert layer.get_seq_length() == 500
    layer.crop(-50)  # the window has what the last multiple of FLUSH needs
    assert layer.get_mask_sizes(1) == (200, 251)


def test_recorded_tokens_are_coded_when_they_are_sure() -> None:
    keys, values = states(260)
    sure = QuantizedLayer(3, 64)
    sure.update(keys[:, :, :250], values[:, :, :250])
    layer = QuantizedLayer(3, 64)
    layer.activate_past_recording()
    for start in range(0, 250, 10):
        layer.update(keys[:, :, start : start + 20], values[:, :, start : start + 20])
        layer.crop(-10)
    for mine, theirs in zip(layer.states, sure.states, strict=True):
        assert equal([mine.codes, mine.scales, mine.recent], [theirs.codes, theirs.scales, theirs.recent])


def test_a_reset_layer_starts_anew() -> None:
    layer = QuantizedLayer(2, 64)
    layer.update(*states(300))
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.get_mask_sizes(7) == (7, 0)
    assert torch.equal(layer.update(*states(9, 128, 1))[0], states(9, 128, 1)[0])


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("window", [64, 100])
def test_decoding_step_by_step_equals_a_prompt_in_pieces_of_64(window: int, sliding: bool) -> None:
    # float64, or roundings that depend on the shape of a product move a code now and then
    net = model("Mistral", torch.float64, sliding_window=150 if sliding else None)
    ids, seen = tokens(330, batch=2), []
    for size in (1, FLUSH):
        cache = h.QuantizedCache(net.config, 3, window)
        with torch.no_grad():
            logits = [net(piece, cache=cache).logits for piece in ids.split(size, dim=1)]
        seen.append((torch.cat(logits, dim=1), stored(cache)))
    (steps, steps_stored), (pieces, pieces_stored) = seen
    exact = [tensor for tensor in pieces_stored if not tensor.dtype.is_floating_point or tensor.dtype == torch.float16]
    assert equal([t for t in steps_stored if t.dtype != torch.float64], exact) and len(exact) == 8
    assert exact[0].shape == (2, 2, (149 if sliding else 320) - window, 24)
    torch.testing.assert_close(steps, pieces, rtol=0, atol=1e-10)


def test_a_prompt_at_once_is_attended_to_as_it_is_and_stored_the_same() -> None:
    net, ids = model(), tokens(400)
    cache = h.QuantizedCache(net.config, 3, 64)
    with torch.no_grad():
        assert torch.equal(net(ids, cache=cache).logits, net(ids).logits)
    layer = QuantizedLayer(3, 64)
    dense = DynamicCache(config=net.config)
    with torch.no_grad():
        net(ids, cache=dense)
    for number in range(2):
        layer.reset()
        keys, values = dense.layers[number].keys, dense.layers[number].values
        for token in range(400):
            layer.update(keys[:, :, token : token + 1], values[:, :, token : token + 1])
        expected = [t for s in layer.states for t in (s.codes, s.scales, s.recent)]
        assert equal(stored(cache)[6 * number : 6 * number + 6], expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_greedy_in_a_batch_with_padding_and_grouped_heads(head_dim: int, bits: int) -> None:
    net, ids = model(head_dim=head_dim), tokens(180, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    assert_like_the_oracle(net, ids, bits, attention_mask=mask)


def test_beams() -> None:
    assert_like_the_oracle(model(), tokens(180, batch=2), num_beams=3, num_return_sequences=2, output_scores=True)


def test_sampling_in_bfloat16_far_beyond_the_window() -> None:
    net = model(dtype=torch.bfloat16)
    assert_like_the_oracle(net, tokens(310), 2, 0, do_sample=True, max_new_tokens=90)


def test_sliding_and_full_layers() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    net = model("Gemma2", num_hidden_layers=3, layer_types=kinds, sliding_window=150, query_pre_attn_scalar=64)
    assert [layer.is_sliding for layer in h.QuantizedCache(net.config).layers] == [True, False, True]
    for prompt in (120, 310):  # below the sliding window, and beyond
        assert_like_the_oracle(net, tokens(prompt), max_new_tokens=90)
    assert_like_the_oracle(net, tokens(310), num_beams=2)


def test_assisted_decoding() -> None:
    net = model(initializer_range=0.05)
    ids = tokens(40).repeat(1, 6)  # the prompt repeats itself, so some guesses come true
    assert_like_the_oracle(net, ids, prompt_lookup_num_tokens=7, max_new_tokens=50)
    cache = h.QuantizedCache(net.config, 3, 64)
    found = generate(net, ids, cache, prompt_lookup_num_tokens=7)
    length = found.sequences.shape[1] - 1
    assert cache.get_seq_length() == length
    assert cache.layers[1].states[0].coded == length // FLUSH * FLUSH - 64


def test_a_prompt_in_pieces_through_generate() -> None:
    assert_like_the_oracle(model(), tokens(300), prefill_chunk_size=FLUSH)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generate_with_a_prompt_in_pieces_equals_step_by_step(options: dict[str, Any]) -> None:
    net, ids = model(dtype=torch.float64), tokens(200, batch=2)
    steps, pieces, at_once = (
        generate(net, ids, h.QuantizedCache(net.config, 3, 64), prefill_chunk_size=size, **options)
        for size in (1, FLUSH, None)
    )
    assert torch.equal(steps.sequences, pieces.sequences)
    torch.testing.assert_close(pieces.logits, steps.logits, rtol=0, atol=1e-10)
    assert (at_once.logits[0] - steps.logits[0]).abs().max() > 1e-3  # what pieces are for


def test_after_a_crop_to_a_multiple_of_64_pieces_still_equal_steps() -> None:
    net, ids, more, seen = model(dtype=torch.float64), tokens(330), tokens(100), []
    for size in (1, FLUSH):
        cache = h.QuantizedCache(net.config, 3, 64)
        with torch.no_grad():
            for piece in ids.split(size, dim=1):
                net(piece, cache=cache)
            cache.crop(256 - 330)
            logits = [net(piece, cache=cache).logits for piece in more.split(size, dim=1)]
        seen.append((torch.cat(logits, dim=1), stored(cache)))
    torch.testing.assert_close(seen[1][0], seen[0][0], rtol=0, atol=1e-10)
    assert equal(*([t for t in kept if t.dtype != torch.float64] for _, kept in seen))


def test_linear_attention_keeps_its_own_state() -> None:
    net = model(
        "Qwen3Next", num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    )  # fmt: skip
    caches = [DynamicCache(config=net.config), Oracle(net.config, 3, 64), h.QuantizedCache(net.config, 3, 64)]
    with torch.no_grad():
        prompt = [net(tokens(200), cache=cache).logits for cache in caches]
        assert equal(prompt[:1] * 2, prompt[1:])
        steps = [[net(tokens(30)[:, i : i + 1], cache=c).logits for i in range(30)] for c in caches]
    assert equal(steps[1], steps[2]) and not equal(steps[0], steps[2])
    for number in (0, 2):
        layers = [cache.layers[number] for cache in caches]
        assert {type(layer).__name__ for layer in layers} == {"LinearAttentionLayer"}
        held = [[layer.conv_states[0], layer.recurrent_states[0]] for layer in layers]
        assert equal(held[1], held[2])
        # no attention comes before the first one: its state is the one without quantization
        assert number or equal(held[0], held[2])
    assert_like_the_oracle(net, tokens(185), num_beams=2)


# --- what cannot be -------------------------------------------------------------------------------


def test_a_head_dim_that_cannot_be_rotated() -> None:
    net = model(head_dim=80)
    with pytest.raises(Usage, match="head_dim is 80, a quantized cache can rotate 64, 96, 128, 256; leave the cache"):
        net.generate(tokens(3), cache=h.QuantizedCache(net.config), max_new_tokens=2)


@pytest.mark.parametrize(("bits", "window"), [(1, 128), (5, 128), (3, -1)])
def test_bits_and_window_that_cannot_be(bits: int, window: int) -> None:
    with pytest.raises(Usage, match=f"bits is {bits} and window {window}, expected 2, 3 or 4 bits"):
        h.QuantizedCache(model().config, bits, window)


def test_layers_of_another_kind_are_refused_by_name() -> None:
    config = transformers.FalconH1Config(num_hidden_layers=2)
    with pytest.raises(Usage, match="kind LinearAttentionAndFullAttentionLayer, which cannot be quantized"):
        h.QuantizedCache(config)
