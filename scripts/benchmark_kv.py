"""Measure the quantized key-value cache on SmolLM2: bytes a token, closeness, perplexity, and tokens a second.

    python scripts/benchmark_kv.py [--model-dir DIR] [--text FILE] [--tokens N] [--tables NAME ...] [--json FILE]

Everything is measured outside the window that the cache keeps unquantized: the text goes through the model in pieces
of 64 tokens, each of which sees what is older than 128 to 191 tokens as it was coded, and perplexity counts only
tokens with at least 1,024 before them. Seconds are the CPU's, on one thread: what they are on the clock of a machine
that does nothing else. Needs the extra `run`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmark_report import machine, table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import hlwq_convert as h
from hlwq_convert.runtime import kv_cache, kv_codec
from hlwq_convert.runtime.kv_cache import BITS, FLUSH, QuantizedLayer, QuantizedStates
from hlwq_convert.runtime.kv_codec import decode, encode
from hlwq_convert.scalar import GAINS

SCRIPTS = Path(__file__).parent
FIRST_SCORED = 1024
WINDOW = 128
TABLES = ("memory", "closeness", "speed", "perplexity", "mixed", "prompt", "search")
MIXED = ((4, 3), (3, 4), (4, 2), (2, 4), (3, 2), (2, 3))
"""(bits of keys, bits of values) that are measured to see which deserve more."""


class MixedLayer(QuantizedLayer):
    """A layer whose keys and values have different bits: to measure, the product has no such thing."""

    def __init__(self, key_bits: int, value_bits: int) -> None:
        super().__init__(key_bits, WINDOW)
        self.value_bits = value_bits

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As in the base class, with the values in their own bits."""
        super().lazy_initialization(key_states, value_states)
        self.states = (self.states[0], QuantizedStates(value_states, self.value_bits))


def make_cache(config: Any, bits: int | tuple[int, int] | None) -> Any:
    """A dense cache for None, a quantized one for a number, one with (keys, values) in different bits."""
    if bits is None:
        return DynamicCache(config=config)
    if isinstance(bits, int):
        return h.QuantizedCache(config, bits, WINDOW)
    cache = h.QuantizedCache(config, bits[0], WINDOW)
    cache.layers = [MixedLayer(*bits) for _ in cache.layers]
    return cache


def cache_bytes(value: Any) -> int:
    """Bytes of the storage of every tensor that an object of a cache holds."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, list | tuple):
        return sum(map(cache_bytes, value))
    if isinstance(value, DynamicCache | h.QuantizedCache):
        return cache_bytes(value.layers)
    return sum(map(cache_bytes, vars(value).values())) if hasattr(value, "__dict__") else 0


@torch.inference_mode()
def score(net: Any, ids: torch.Tensor, cache: Any, start: int) -> float:
    """Perplexity of the tokens from FIRST_SCORED on, in pieces of FLUSH; those before `start` are in the cache."""
    losses = []
    for begin in range(start, ids.shape[1], FLUSH):
        logits = net(ids[:, begin : begin + FLUSH], cache=cache).logits[0].float()
        targets = ids[0, begin + 1 : begin + 1 + FLUSH]
        loss = torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="none")
        losses.append(loss[max(0, FIRST_SCORED - 1 - begin) :])
    return float(torch.cat(losses).mean().exp())


def read_text(net: Any, ids: torch.Tensor, bits: int | tuple[int, int] | None) -> tuple[float, Any]:
    """Perplexity of the text, given in pieces; and the filled cache."""
    cache = make_cache(net.config, bits)
    return score(net, ids, cache, 0), cache


def fill(config: Any, dense: DynamicCache, bits: int | None, context: int) -> Any:
    """A cache with the first `context` tokens of a dense one."""
    cache = make_cache(config, bits)
    for number, layer in enumerate(dense.layers):
        cache.update(layer.keys[:, :, :context].clone(), layer.values[:, :, :context].clone(), number)
    return cache


def memory_rows(config: Any, dense: DynamicCache, context: int) -> list[list[str]]:
    """Bytes of real caches at `context`, and of each token that is coded, against two bytes a value."""
    values = sum(2 * layer.keys.shape[1] * layer.keys.shape[3] for layer in dense.layers)  # of one token
    rows = []
    for bits in (None, *BITS):
        cache = fill(config, dense, bits, context)
        longer = fill(config, dense, bits, context - 8 * FLUSH)
        a_token = (cache_bytes(cache) - cache_bytes(longer)) / (8 * FLUSH)
        total = cache_bytes(cache)
        row = [f"{total / 1e6:.2f}", f"{2 * values * context / total:.2f}x", f"{a_token:,.0f}"]
        rows.append([name_of(bits), *row, f"{8 * a_token / values:.3f}", f"{2 * values / a_token:.2f}x"])
    return rows


def closeness_rows(dense: DynamicCache) -> list[list[str]]:
    """Cosine of the keys and values of all layers with their decoding, and relative squared error: mean and worst."""
    rows = []
    for bits in BITS:
        for kind in ("keys", "values"):
            cosines, errors = [], []
            for layer in dense.layers:
                states = getattr(layer, kind)
                found = torch.empty_like(states, dtype=torch.float32)
                decode(*encode(states, bits), bits, found)
                given = states.float()
                cosines.append(torch.nn.functional.cosine_similarity(found, given, dim=-1).flatten())
                errors.append(((found - given) ** 2).sum() / (given**2).sum())
            cosine, error = torch.cat(cosines), torch.stack(errors)
            row = [f"{cosine.mean():.5f}", f"{cosine.min():.5f}", f"{error.mean():.5f}", f"{error.max():.5f}"]
            rows.append([f"{bits} bits", kind, *row])
    return rows


@torch.inference_mode()
def speed_rows(net: Any, dense: DynamicCache, contexts: list[int], rounds: int, steps: int) -> list[list[str]]:
    """Tokens a second of decoding one by one at each context; caches take turns, the median of all turns counts."""
    rows = []
    for context in contexts:
        caches = {bits: fill(net.config, dense, bits, context) for bits in (None, *BITS)}
        seconds: dict[int | None, list[float]] = {bits: [] for bits in caches}
        token = torch.tensor([[1]])
        for turn in range(rounds + 1):
            for bits, cache in caches.items():
                for _ in range(steps):
                    began = time.process_time()
                    net(token, cache=cache)
                    if turn > 0:  # the first warms up
                        seconds[bits].append(time.process_time() - began)
                cache.crop(-steps)
        base = median(seconds[None])
        for bits, found in seconds.items():
            row = [f"{1 / median(found):.2f}", f"{base / median(found):.2f}x"]
            rows.append([f"{context:,}", name_of(bits), *row, f"{1000 * (median(found) - base):+.0f}"])
    return rows


@torch.inference_mode()
def prompt_rows(net: Any, ids: torch.Tensor) -> list[list[str]]:
    """A prompt of FIRST_SCORED tokens at once and in pieces: seconds of the CPU, and perplexity of what follows it."""
    rows = []
    for bits in (None, 3):
        for size in (FIRST_SCORED, FLUSH):
            began, cache = time.process_time(), make_cache(net.config, bits)
            for piece in ids[:, :FIRST_SCORED].split(size, dim=1):
                net(piece, cache=cache, logits_to_keep=1)
            seconds = time.process_time() - began
            way = "in pieces" if size == FLUSH else "at once"
            rows.append([name_of(bits), way, f"{seconds:.1f}", f"{score(net, ids, cache, FIRST_SCORED):.3f}"])
    return rows


def encode_with_search(states: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """kv_codec.encode with the search for scales of scalar.encode: to measure, the product has no such thing."""
    *shape, head_dim = states.shape
    width, levels = kv_codec.rotation_width(head_dim), kv_codec._levels(bits, states.device)
    blocks = torch.zeros(width, states.numel() // head_dim)
    blocks[:head_dim] = states.reshape(-1, head_dim).T
    rotated = kv_codec._fwht(blocks * kv_codec._signs(width, states.device)[:, None])
    rms = (rotated * rotated).mean(0).sqrt().clamp_min(1e-30)
    codes, scale, captured = torch.zeros_like(rotated, dtype=torch.int64), torch.zeros_like(rms), -torch.ones_like(rms)
    for gain in GAINS:
        found = torch.bucketize(rotated / (rms * float(gain)), (levels[:-1] + levels[1:]) * 0.5)
        product, energy = (rotated * levels[found]).sum(0), (levels[found] ** 2).sum(0)
        better = product * product / energy > captured
        codes, scale = torch.where(better, found, codes), torch.where(better, product / energy, scale)
        captured = torch.where(better, product * product / energy, captured)
    return kv_codec._pack(codes, bits).reshape(*shape, -1), (scale / width).half().reshape(shape)


@torch.inference_mode()
def search_rows(net: Any, ids: torch.Tensor, dense: DynamicCache, bits: int = 3) -> list[list[str]]:
    """What a search for scales does to keys and values, to perplexity, and to the time of coding."""
    rows = []
    for name, way in (("RMS", encode), ("search", encode_with_search)):
        kv_cache.encode = way  # type: ignore[attr-defined]
        began, figures = time.process_time(), []
        coded = [(states, *way(states, bits)) for layer in dense.layers for states in (layer.keys, layer.values)]
        seconds = time.process_time() - began
        for states, codes, scales in coded:
            found = torch.empty_like(states, dtype=torch.float32)
            decode(codes, scales, bits, found)
            figures.append(((found - states) ** 2).sum() / (states.float() ** 2).sum())
        microseconds = f"{1e6 * seconds / dense.get_seq_length():.0f}"
        rows.append([name, f"{torch.stack(figures).mean():.5f}", f"{read_text(net, ids, bits)[0]:.3f}", microseconds])
    kv_cache.encode = encode  # type: ignore[attr-defined]
    return rows


def name_of(bits: int | tuple[int, int] | None) -> str:
    """How a table calls a cache."""
    if isinstance(bits, tuple):
        return f"keys {bits[0]}, values {bits[1]}"
    return "dense" if bits is None else f"{bits} bits"


def find_model(given: Path | None) -> Path:
    """The directory that was given, or SmolLM2's, made if need be."""
    if given is not None:
        return given
    made = subprocess.run([sys.executable, str(SCRIPTS / "smollm2.py")], check=True, stdout=subprocess.PIPE, text=True)
    return Path(made.stdout.strip())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-dir", type=Path, help="default: SmolLM2, from scripts/smollm2.py")
    parser.add_argument("--text", type=Path, default=SCRIPTS.parent / "spec" / "hlwq-v1.md", help="default: the spec")
    parser.add_argument("--tokens", type=int, default=3072, help="of the text; default %(default)s")
    parser.add_argument("--contexts", type=int, nargs="*", default=[512, 1024, 2048, 3072], help="to time at")
    parser.add_argument("--rounds", type=int, default=5, help="of timing; default %(default)s")
    parser.add_argument("--tables", nargs="*", choices=TABLES, default=TABLES, help="default: all")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)

    model_dir = find_model(options.model_dir)
    net = AutoModelForCausalLM.from_pretrained(model_dir, local_files_only=True, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    ids = tokenizer(options.text.read_text(), return_tensors="pt", truncation=True, max_length=options.tokens).input_ids
    count = ids.shape[1]
    if count <= FIRST_SCORED:
        sys.exit(f"{options.text} has {count} tokens, more than {FIRST_SCORED} are needed")
    print(f"{machine()['cpu']}, torch {torch.__version__} on one thread; {model_dir.name} in BF16")
    print(f"{count:,} tokens of {options.text.name}, window {WINDOW}", flush=True)

    document: dict[str, Any] = {}

    def show(title: str, head: list[str], rows: list[list[str]]) -> None:
        document[title] = [dict(zip(head, row, strict=True)) for row in rows]
        print(table(title, head, rows), flush=True)

    perplexity, dense = read_text(net, ids, None)
    if "memory" in options.tables:
        head = ["cache", "MB", "of fp16", "bytes a coded token", "bits a value", "of fp16, coded"]
        show(f"Memory at {count:,} tokens", head, memory_rows(net.config, dense, count))
    if "closeness" in options.tables:
        head = ["cache", "of", "cosine mean", "cosine min", "squared error mean", "squared error worst layer"]
        show("Closeness of coded tokens", head, closeness_rows(dense))
    if "speed" in options.tables:
        head = ["context", "cache", "tokens a second", "of dense", "ms a token more"]
        contexts = [context for context in options.contexts if context <= count]
        show("Decoding one by one", head, speed_rows(net, dense, contexts, options.rounds, steps=4))
    if "prompt" in options.tables:
        title = f"A prompt of {FIRST_SCORED:,} tokens, and perplexity of those to {count:,}"
        show(title, ["cache", "prompt", "CPU seconds", "perplexity"], prompt_rows(net, ids))
    if "search" in options.tables:
        head = ["scales at 3 bits", "squared error", "perplexity", "us of coding a token"]
        show("Search for scales", head, search_rows(net, ids, dense))
    rows = [[name_of(None), f"{perplexity:.3f}", ""]]
    more = (*(BITS[::-1] if "perplexity" in options.tables else ()), *(MIXED if "mixed" in options.tables else ()))
    for bits in more:
        found = read_text(net, ids, bits)[0]
        rows.append([name_of(bits), f"{found:.3f}", f"{100 * (found / perplexity - 1):+.2f} %"])
    show(f"Perplexity of tokens {FIRST_SCORED:,} to {count:,}", ["cache", "perplexity", "of dense"], rows)
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
