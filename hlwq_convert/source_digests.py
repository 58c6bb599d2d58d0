"""Digests of what a model holds: of its tensors, and of its files against the names that the Hugging Face cache gives
them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable

from hlwq_formats.errors import BadModelDir, Usage
from hlwq_formats.files import Memory, new_memory
from hlwq_formats.safetensors_dir import ModelDir, SourceTensor

_PIECE = 4 << 20


def digest_tensor(
    model: ModelDir,
    tensor: SourceTensor,
    step: Callable[[int], None] = lambda count: None,
    memory: Memory = new_memory,
    size: int = _PIECE,
) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal, read to `memory` in pieces of `size`. `step` is called with the
    bytes of each, and may raise."""
    digest = hashlib.sha256()
    for piece in model.stream(tensor, size, memory):
        digest.update(piece)
        step(len(piece))
    return digest.hexdigest()


def verify_source_digests(model: ModelDir, progress: Callable[[int, int], None]) -> None:
    """Hash every shard that is a link to a blob of the cache, whose name is the SHA-256 of its content.

    Raises BadModelDir (65) for a difference, Usage when there is a shard without such a name.
    """
    done, total = 0, sum(size for _, size in model.files)
    for file, size in model.files:
        link = model.path / file
        expected = os.path.basename(os.readlink(link)) if link.is_symlink() else ""
        if not re.fullmatch("[0-9a-f]{64}", expected):
            raise Usage(
                f"--verify-source: {file} is no link to a blob of the Hugging Face cache: there is no digest of it",
                hint="convert the snapshot folder in the cache",
            )
        digest = hashlib.sha256()
        for piece in model.file_pieces(file, _PIECE):
            digest.update(piece)
            done += len(piece)
            progress(done, total)
        if digest.hexdigest() != expected:
            raise BadModelDir(
                f"SHA-256 of its {size} bytes is {digest.hexdigest()[:16]}..., the cache says {expected[:16]}...",
                file=file,
                hint="fetch it again",
            )
