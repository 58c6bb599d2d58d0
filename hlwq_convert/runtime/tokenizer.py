"""The tokenizer of a file. transformers reads tokenizers from a folder only, so their files, and no others, lie
in a private temporary one while it does."""

from __future__ import annotations

import fnmatch
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from hlwq_formats.errors import NotThisModel, escape
from hlwq_formats.reader import Reader

from .architecture import read_json, refuse_code

_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.*",
)  # fmt: skip


def read_tokenizer(reader: Reader, config: PreTrainedConfig, code: Path | None) -> Any:
    """The tokenizer, chat template included; None for a file that carries none.

    Raises UnknownArchitecture (69) for one with code of its own that is not in the folder `code`, NotThisModel (65)
    for files that make no tokenizer.
    """
    names = [name for name in reader.assets if any(fnmatch.fnmatchcase(name, pattern) for pattern in _FILES)]
    if not names:
        return None
    if "tokenizer_config.json" in names:
        refuse_code(reader, "tokenizer_config.json", read_json(reader, "tokenizer_config.json"), code)
    with tempfile.TemporaryDirectory(prefix="hlwq-tokenizer-") as folder:
        for name in names:
            Path(folder, name).write_bytes(reader.read_asset(name))
        for source in code.glob("*.py") if code else ():
            shutil.copy(source, folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=code is not None
            )
        except Exception as error:  # whatever strangers' files bring about in the tokenizers' classes
            problem = f"{type(error).__name__}: {' '.join(str(error).replace(folder + os.sep, '').split())}"
            raise NotThisModel(f"the tokenizer: {escape(problem, 250)}", file=reader.path) from error
    tokenizer.name_or_path = ""  # it was the temporary folder
    return tokenizer
