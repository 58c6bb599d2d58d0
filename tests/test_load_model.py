"""Whole models out of one file: the same logits as a state dict that was loaded by hand, or one clear line."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hlwq_convert as h
from hlwq_formats.errors import AlreadyQuantized, HlwqError, NotThisModel, TooLittleMemory, UnknownArchitecture

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    BertConfig,
    GemmaConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    MPNetConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SIZES: dict[str, Any] = dict(
    vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip
DECODER = SIZES | dict(num_key_value_heads=2, head_dim=16, pad_token_id=0)
# twelve: in a file "experts.10" comes before "experts.2"
EXPERTS = DECODER | dict(num_experts_per_tok=2)

MODELS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "llama, tied": (LlamaConfig, DECODER | dict(tie_word_embeddings=True)),
    "llama": (LlamaConfig, DECODER | dict(tie_word_embeddings=False)),
    "qwen2": (Qwen2Config, DECODER),
    "qwen3": (Qwen3Config, DECODER),
    "gemma": (GemmaConfig, DECODER),
    "gemma3": (Gemma3TextConfig, DECODER),
    "bert": (BertConfig, SIZES),
    "mpnet": (MPNetConfig, SIZES),
    "mixtral": (MixtralConfig, EXPERTS | dict(num_local_experts=12)),
    "qwen3 moe": (Qwen3MoeConfig, EXPERTS | dict(num_experts=12, moe_intermediate_size=64)),
}
ARCHITECTURES = {
    "bert": "BertForMaskedLM", "mpnet": "MPNetModel", "mixtral": "MixtralForCausalLM", "gemma3": "Gemma3ForCausalLM",
    "qwen3 moe": "Qwen3MoeForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM", "llama": "LlamaForCausalLM", "llama, tied": "LlamaForCausalLM",
}  # fmt: skip
IDS = torch.arange(3, 23).reshape(2, 10)


def source_model(name: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A random model; its vectors are random too, so that none can be left out unseen."""
    config, sizes = MODELS[name]
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, ARCHITECTURES[name])(config(**sizes))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1, 0.1)
    return model.to(dtype).eval()


def convert(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder / "source")
    h.convert(folder / "source", folder / "out.hlwq", **options)
    return folder / "out.hlwq"


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    output: torch.Tensor = model(IDS)[0]
    return output


def loaded_by_hand(path: Path, source: Path) -> PreTrainedModel:
    """What transformers makes of the same tensors when they lie in a model directory."""
    from safetensors.torch import save_file

    for file in source.glob("*.safetensors"):
        file.unlink()
    state = {name: value.clone() for name, value in h.load_state_dict(path).items()}
    save_file(state, source / "model.safetensors", {"format": "pt"})
    config = transformers.AutoConfig.from_pretrained(source)
    found: PreTrainedModel = getattr(transformers, config.architectures[0]).from_pretrained(source).eval()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_the_state_dict_loaded_by_hand(name: str, tmp_path: Path) -> None:
    source = source_model(name)
    path = convert(source, tmp_path)
    model, tokenizer = h.load_model(path)
    assert tokenizer is None and not model.training and type(model) is type(source)
    expected = loaded_by_hand(path, tmp_path / "source")
    assert torch.equal(logits(model), logits(expected))
    for (key, value), (_, other) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(value, other), key
    assert not torch.equal(logits(model), logits(source))  # it was quantized: nothing was taken from the source
