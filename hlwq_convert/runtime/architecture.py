"""Which model a file is: the config inside it, and the class of transformers that stands for it.

A config comes from strangers. It may name only what transformers itself holds, it chooses no kernels (they may
be downloaded), and it runs no code, unless the caller gives the folder that holds the code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModel, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hlwq_formats.errors import AlreadyQuantized, HlwqError, MissingInput, NotThisModel, UnknownArchitecture, escape
from hlwq_formats.reader import Reader
from hlwq_formats.strict_json import parse

CODE_HINT = "give the folder that holds its code, if you trust it"

_CHOICES_OF_THE_CALLER = re.compile(
    r"_?(attn|experts)_implementation(_internal)?|use_kernels|kernel_config|fusion_config|compile_config"
)
"""Keys by which a config would choose how to compute; some values of them download and run native code."""


def read_json(reader: Reader, name: str) -> dict[str, Any]:
    """An asset that is a JSON object. NotThisModel (65) when it is anything else."""

    def fail(problem: str) -> HlwqError:
        return NotThisModel(f"{name}: {problem}", file=reader.path)

    document = parse(reader.read_asset(name), fail)
    if not isinstance(document, dict):
        raise fail("not a JSON object")
    return document


def read_config(reader: Reader, code: Path | None) -> PreTrainedConfig:
    """The config of the model.

    Raises NotThisModel (65) when there is none or it cannot be right, UnknownArchitecture (69) when transformers
    does not know it, AlreadyQuantized (69) for weights that another tool has packed.
    """
    if "config.json" not in reader.assets:
        raise NotThisModel(
            "no config.json inside, so the architecture is unknown",
            file=reader.path,
            hint="convert the model again from a folder that has one, or use load_state_dict",
        )
    document = read_json(reader, "config.json")
    refuse_code(reader, "config.json", document, code)
    if document.get("quantization_config") is not None:
        raise AlreadyQuantized(
            "the source was quantized by another tool before it was converted",
            file=reader.path,
            hint="use load_state_dict",
        )
    remove_keys(document, _CHOICES_OF_THE_CALLER)
    kind = document.get("model_type")
    reference = code and _reference(document, "AutoConfig")
    if reference:
        config_class = _class_of_folder(reader, reference, code)
    elif isinstance(kind, str) and kind in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[kind]
    else:
        raise UnknownArchitecture(
            f"transformers {transformers.__version__} knows no model_type {escape(str(kind), 80)}",
            file=reader.path,
            hint=CODE_HINT,
        )
    try:
        config: PreTrainedConfig = config_class.from_dict(document)
        return config
    except Exception as error:  # whatever the values of a stranger's config bring about in a class of transformers
        raise _unusable(reader, "config.json", error) from error


def model_class(reader: Reader, config: PreTrainedConfig, code: Path | None) -> type[PreTrainedModel]:
    """The class that the config names under `architectures`.

    A file with modules.json is a sentence-transformers model, which uses the model without a head whatever the
    config says; so does a config that names no architecture.
    """
    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if code is not None and (reference := _reference(config.to_dict(), name)):
        own: type[PreTrainedModel] = _class_of_folder(reader, reference, code)
        if not issubclass(own, PreTrainedModel):
            raise UnknownArchitecture(f"{escape(reference, 80)} is no model of transformers", file=reader.path)
        return own
    found: Any
    if name is None or "modules.json" in reader.assets:
        found = AutoModel._model_mapping.get(type(config), None)
        if isinstance(found, tuple):
            found = found[0]
    else:
        found = getattr(transformers, name, None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not (is_model and isinstance(config, found.config_class or ())):
        raise UnknownArchitecture(
            f"transformers {transformers.__version__} has no architecture {escape(str(name), 80)} for model_type "
            f"{escape(config.model_type, 80)}",
            file=reader.path,
            hint=CODE_HINT,
        )
    architecture: type[PreTrainedModel] = found
    return architecture


def set_generation_config(reader: Reader, model: PreTrainedModel) -> None:
    """Give the model the generation_config.json of the file, if it generates and there is one."""
    if not model.can_generate() or "generation_config.json" not in reader.assets:
        return
    document = read_json(reader, "generation_config.json")
    remove_keys(document, _CHOICES_OF_THE_CALLER)
    try:
        model.generation_config = GenerationConfig.from_dict(document)
    except Exception as error:
        raise _unusable(reader, "generation_config.json", error) from error


def refuse_code(reader: Reader, name: str, document: dict[str, Any], code: Path | None) -> None:
    """Raise UnknownArchitecture when a document asks for code that the caller did not give.

    With a folder, each reference must be to a file in it: MODULE.CLASS, never another repository.
    """
    for reference in _references(document):
        if code is None:
            raise UnknownArchitecture(
                f"{name}: the model runs code of its own ({escape(reference, 80)}), which no file of ours carries",
                file=reader.path,
                hint=CODE_HINT,
            )
        if not re.fullmatch(r"\w+\.\w+", reference):
            raise UnknownArchitecture(
                f"{name}: {escape(reference, 80)} does not name a class in a file of the folder", file=reader.path
            )
        module = code / f"{reference.split('.')[0]}.py"
        if not module.is_file():
            raise MissingInput(f"{escape(module.name, 80)} is missing, which {name} asks for", file=os.fspath(code))


def _references(value: object) -> Iterator[str]:
    """Every class that any auto_map of a document names, at any depth."""
    pending = [(value, False)]
    while pending:
        item, inside = pending.pop()
        if isinstance(item, dict):
            pending.extend((v, inside or k == "auto_map") for k, v in item.items())
        elif isinstance(item, list):
            pending.extend((v, inside) for v in item)
        elif inside and item is not None:
            yield str(item)


def _reference(document: dict[str, Any], wanted: str | None) -> str | None:
    """The entry of the auto_map with this key, or of a class with this name."""
    auto_map = document.get("auto_map")
    for key, value in auto_map.items() if isinstance(auto_map, dict) else ():
        if isinstance(value, str) and (key == wanted or value.split(".")[-1] == wanted):
            return value
    return None


def _class_of_folder(reader: Reader, reference: str, code: Path | None) -> Any:
    try:
        return get_class_from_dynamic_module(reference, os.fspath(code or ""), local_files_only=True)
    except Exception as error:
        raise _unusable(reader, reference, error, os.fspath(code or "")) from error


def remove_keys(value: object, keys: re.Pattern[str]) -> None:
    """Remove every key that matches from a document, at any depth."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            for key in [key for key in item if keys.fullmatch(key)]:
                del item[key]
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _unusable(reader: Reader, what: str, error: Exception, file: str | None = None) -> NotThisModel:
    """One line for what a library said of a document or of code."""
    problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return NotThisModel(f"{escape(what, 80)}: {escape(problem, 250)}", file=file or reader.path)
