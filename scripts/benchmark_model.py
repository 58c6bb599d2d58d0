"""Synthetic models for the benchmark: Qwen-like shapes, bfloat16, sharded safetensors, written as a stream.

The weights only have to look like weights to an encoder: Gaussian rows of varying scale, a few values with
heavy tails, a few outlier columns. They come from one pool of random numbers that every tensor starts to read
at another place, so a model is written about as fast as its bytes can be rounded.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hlwq_formats.dtypes import narrow

Shapes = dict[str, tuple[int, ...]]
Floats = NDArray[np.float32]

MIN_WEIGHTS = 100_000
_POOL = 1 << 24
_BAND = 1 << 21  # weights made at once
_SHARD = 1 << 30  # bytes, at most, but for a tensor that is larger by itself
_VOCABULARY = 151_936
_WIDTHS = (64, 128, 256, 512, 768, 1024, 1536, 2048, 2560, 3072, 4096, 5120, 8192)


def qwen_shapes(weights: int) -> Shapes:
    """Names and shapes of a model of about so many weights: a fifth in the embedding, but no more than Qwen has there,
    and the rest in the layers."""
    # A layer has 12 * hidden**2 weights; ten layers or more are to fit.
    hidden = max([_WIDTHS[0], *(width for width in _WIDTHS if 150 * width * width <= weights)])
    wide, half = 3 * hidden, hidden // 2
    layer = 12 * hidden * hidden
    layers = max(1, round(max(0.8 * weights, weights - _VOCABULARY * hidden) / layer))
    vocabulary = min(max(64, (weights - layers * layer) // hidden), _VOCABULARY)
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for number in range(layers):
        prefix = f"model.layers.{number}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (half, hidden),
            prefix + "self_attn.v_proj.weight": (half, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (wide, hidden),
            prefix + "mlp.up_proj.weight": (wide, hidden),
            prefix + "mlp.down_proj.weight": (hidden, wide),
        }
    return shapes | {"model.norm.weight": (hidden,)}


def one_tensor(weights: int) -> Shapes:
    """A model that is a single matrix."""
    return {"model.embed_tokens.weight": (max(1, weights // 4096), 4096)}


def write_model(folder: Path, shapes: Shapes, seed: int = 0) -> Path:
    """Write config.json, shards and their index; the same shapes and seed give the same bytes with one NumPy."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    pool = _make_pool(rng, min(_POOL, max(1 << 16, sum(map(math.prod, shapes.values())))))
    shards = _split(shapes)
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}

    def write(number: int) -> None:
        own = np.random.default_rng((seed, number))
        _write_shard(folder / files[number], {name: shapes[name] for name in shards[number]}, own, pool)

    with ThreadPoolExecutor() as threads:
        list(threads.map(write, range(len(shards))))
    total = 2 * sum(map(math.prod, shapes.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    vocabulary, hidden = shapes["model.embed_tokens.weight"]
    config = {"model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": hidden, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _write_shard(path: Path, shapes: Shapes, rng: np.random.Generator, pool: Floats) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    document = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(document)) + document)
        for shape in shapes.values():
            for band in _bands(rng, pool, shape):
                out.write(narrow(band.reshape(-1), "BF16").data)


def _split(shapes: Shapes) -> list[list[str]]:
    """The tensors in order, as the shards that hold them: two or more where there are two tensors."""
    limit = min(_SHARD, sum(map(math.prod, shapes.values())))  # half of the bytes
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _make_pool(rng: np.random.Generator, size: int) -> Floats:
    """N(0, 1), one value in a hundred of Student's t with 4 degrees of freedom, three times as wide."""
    pool = rng.standard_normal(size, np.float32)
    count = size // 100
    pool[rng.integers(0, size, count)] = 3 * rng.standard_t(4, count)
    return pool


def _bands(
    rng: np.random.Generator, pool: NDArray[np.float32], shape: tuple[int, ...]
) -> Iterator[NDArray[np.float32]]:
    """The float32 weights of a tensor, some rows at a time."""
    if len(shape) == 1:  # a norm
        yield 1 + 0.1 * rng.standard_normal(shape, np.float32)
        return
    rows, columns = shape
    column_scale = np.ones(columns, np.float32)
    column_scale[rng.integers(0, columns, max(1, columns // 256))] = 6
    step = max(1, min(_BAND, len(pool) // 2) // columns)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        offset = int(rng.integers(0, len(pool) - count * columns + 1))
        row_scale = np.float32(0.02) * np.exp(0.3 * rng.standard_normal((count, 1), np.float32))
        band = pool[offset : offset + count * columns].reshape(count, columns) * row_scale
        band *= column_scale
        yield band
