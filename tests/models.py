"""Model directories for tests: written by hand, so that they can also be wrong, and real ones."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hlwq_formats.dtypes import NUMPY, narrow

Tensor = tuple[str, tuple[int, ...], bytes]
"""dtype tag, shape, little-endian bytes."""


def tensor_bytes(array: NDArray[Any], dtype: str) -> bytes:
    """The bytes of an array stored as `dtype`; floats are rounded to BF16, F16 and F32."""
    if dtype in ("BF16", "F16", "F32"):
        return narrow(np.ascontiguousarray(array, np.float32), dtype).tobytes()
    return np.ascontiguousarray(array, NUMPY[dtype]).tobytes()


def tensor(array: NDArray[Any], dtype: str = "BF16") -> Tensor:
    """An array as it stands in a model."""
    return dtype, array.shape, tensor_bytes(array, dtype)


def normal(shape: tuple[int, ...], seed: int = 0, dtype: str = "BF16") -> Tensor:
    """Gaussian weights as networks have them: standard deviation 0.02."""
    return tensor(np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(0.02), dtype)


def near_one(shape: tuple[int, ...], seed: int = 0, dtype: str = "BF16") -> Tensor:
    """Weights as norms have them."""
    return tensor(1 + np.random.default_rng(seed).standard_normal(shape, np.float32) / 10, dtype)


def join_safetensors(header: object, data: bytes = b"") -> bytes:
    """Length, header and data; a header that is bytes is taken as it is."""
    document = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(document)) + document + data


def make_header(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The header of tensors that lie one after the other in the given order."""
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    return header


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: object = None) -> None:
    """Write a safetensors file; `header` (an object, or bytes as they are) replaces the right one."""
    data = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(join_safetensors(make_header(tensors) if header is None else header, data))


def write_index(folder: Path, weight_map: object, **more: object) -> None:
    """Write model.safetensors.index.json."""
    document = {"metadata": {}, "weight_map": weight_map, **more}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def write_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    shards: int = 1,
    config: Mapping[str, object] | None = None,
    assets: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a model directory: one model.safetensors, or shards that take the tensors in turn and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "test"} if config is None else dict(config)))
    for name, content in (assets or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        write_safetensors(folder / file, part)
        weight_map.update(dict.fromkeys(part, file))
    write_index(folder, weight_map)
    return folder


def small_tensors(seed: int = 0) -> dict[str, Tensor]:
    """The weights of `small_model`: 186,336 in all, rows of 96 and 160, neither a multiple of 128."""
    hidden, wide, half, vocabulary = 96, 160, 48, 400
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
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
    shapes["model.norm.weight"] = (hidden,)
    tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        tensors[name] = near_one(shape, 1000 * seed + i) if "norm" in name else normal(shape, 1000 * seed + i)
    return tensors


def small_model(folder: Path, seed: int = 0) -> Path:
    """A llama of two layers in BF16, tied embeddings, three shards; lm_head is left out as the tie allows."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
        "vocab_size": 400,
    }
    tokenizer = json.dumps({"version": "1.0", "model": {"vocab": {f"token{i}": i for i in range(400)}}})
    return write_model(folder, small_tensors(seed), 3, config, {"tokenizer.json": tokenizer.encode()})


def real_model(name: str) -> Path:
    """The directory of a real model, which scripts/smollm2.py and scripts/minilm.py make and scripts/test asks for."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hlwq" / name
    if not (folder / "config.json").exists():
        pytest.skip(f"{name} is not here: scripts/test makes it where there is a package index")
    return folder
