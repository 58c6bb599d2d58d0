"""READ: a model directory as tensors in file order, the files that travel with it, and where it came from."""

from __future__ import annotations

import fnmatch
import os
import re
from dataclasses import dataclass
from pathlib import Path

from hlwq_formats import metadata as md
from hlwq_formats.errors import AlreadyQuantized, BadModelDir, MissingInput, escape
from hlwq_formats.paths import clashing_name, unsafe_path
from hlwq_formats.safetensors_dir import ModelDir, SourceTensor
from hlwq_formats.strict_json import parse

ASSETS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "preprocessor_config.json",
    "modules.json", "*_Pooling/config.json", "sentence_bert_config.json", "LICENSE*", "NOTICE*", "README.md",
)  # fmt: skip
"""What may travel: names of files that describe a model. Never code, pickles or dot files."""

FORBIDDEN = (
    ".py", ".pyc", ".so", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".hlwq", ".part", ".journal",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A checked model directory. `tensors` are in the order of the container: by the bytes of their names."""

    model: ModelDir
    tensors: list[SourceTensor]
    assets: list[tuple[str, int]]  # name, bytes
    config: dict[str, object]
    provenance: md.Source

    def read_asset(self, name: str) -> bytes:
        """The content of an asset."""
        return self.model.read_file(name, md.MAX_ASSET)


def open_source(path: str | os.PathLike[str], *, passthrough: bool = False, allow_extra: bool = False) -> Source:
    """Read the headers of a model directory, not its weights.

    `passthrough` accepts a checkpoint that is already quantized, `allow_extra` tensors that the index does not
    list. Raises what ModelDir raises, and AlreadyQuantized (69).
    """
    model = ModelDir(path, allow_extra=allow_extra)
    if not (model.path / "config.json").exists():
        raise MissingInput("config.json is missing", file=str(path), hint="a Hugging Face model directory has one")
    config = parse(
        model.read_file("config.json", md.MAX_ASSET), lambda problem: BadModelDir(problem, file="config.json")
    )
    if not isinstance(config, dict):
        raise BadModelDir("not a JSON object", file="config.json")
    tensors = sorted(model.tensors.values(), key=lambda tensor: tensor.name.encode())
    if not passthrough:
        _refuse_quantized(config, tensors)
    return Source(model, tensors, _list_assets(model), config, _provenance(model))


def _refuse_quantized(config: dict[str, object], tensors: list[SourceTensor]) -> None:
    settings = config.get("quantization_config")
    if settings is None and isinstance(text := config.get("text_config"), dict):
        settings = text.get("quantization_config")
    hint = "convert the original model, or pass --passthrough to keep every tensor as it is"
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise AlreadyQuantized(
            f"the model is already quantized ({escape(str(method), 40)})", file="config.json", hint=hint
        )
    for tensor in tensors:
        if tensor.name.endswith(("weight_scale", "weight_scale_inv")):
            raise AlreadyQuantized(
                "a scale of already quantized weights", file=tensor.file, tensor=tensor.name, hint=hint
            )


def _list_assets(model: ModelDir) -> list[tuple[str, int]]:
    found = []
    for pattern in ASSETS:
        for path in sorted(model.path.glob(pattern)):
            name = path.relative_to(model.path).as_posix()
            if path.is_file() and not name.startswith(".") and not fnmatch.fnmatch(name, "*.index.json"):
                if name.lower().endswith(FORBIDDEN):
                    continue
                if (problem := unsafe_path(name)) is not None:
                    raise BadModelDir(problem, file=name)
                found.append((name, model.size_of(name)))
    for name, size in found:
        if size > md.MAX_ASSET:
            raise BadModelDir(f"{size} bytes, at most {md.MAX_ASSET} can travel with a model", file=name)
    if sum(size for _, size in set(found)) > md.MAX_ASSETS_TOTAL:
        raise BadModelDir(f"over {md.MAX_ASSETS_TOTAL} bytes of files that travel with the model", file=str(model.path))
    if (clash := clashing_name([name for name, _ in set(found)])) is not None:
        raise BadModelDir("another file needs the same name on some systems", file=clash)
    return sorted(set(found), key=lambda asset: asset[0].encode())


def _provenance(model: ModelDir) -> md.Source:
    """Repository and revision as the Hugging Face cache names them: models--ORG--NAME/snapshots/HASH."""
    real = Path(os.path.realpath(model.path))
    repo = revision = None
    in_cache = real.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", real.name)
    if in_cache and (match := re.fullmatch(r"models--([\w.-]+)", real.parent.parent.name, re.ASCII)):
        repo, revision = match[1].replace("--", "/", 1), real.name
    return md.Source(repo=repo, revision=revision, files=[md.SourceFile(name, size) for name, size in model.files])
