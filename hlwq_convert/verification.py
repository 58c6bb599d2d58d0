"""Look at every byte of a file and say what is damaged and what is still good."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from hlwq_formats import metadata as md
from hlwq_formats.errors import BadData, escape
from hlwq_formats.reader import Reader

from .decode import pieces
from .parallel import call, default_workers, ordered_map


class Damage(msgspec.Struct, frozen=True):
    """A part of a file that is not what was written: `kind` is "tensor", "asset" or "signs"."""

    kind: str
    name: str
    problem: str

    def __str__(self) -> str:
        return f'{self.kind} "{escape(self.name)}": {self.problem}' if self.name else f"{self.kind}: {self.problem}"


class Verification(msgspec.Struct, frozen=True):
    """What is damaged. Without intact signs no quantized tensor can be decoded, whatever `good_tensors` says."""

    damaged: list[Damage]
    good_tensors: int


def verify(reader: Reader, progress: Callable[[int, int], None]) -> Verification:
    """Check every byte of an open file, all of it even when some of it is bad.

    `progress` is called with (bytes done, bytes in all). A tensor that is an alias is as good as the one it names.
    """
    workers, done, damaged = default_workers(), 0, []
    with ThreadPoolExecutor(workers, "hlwq") as pool:
        for damage, size in ordered_map(pool, 4 * workers, call, _tasks(reader)):
            damaged += damage
            done += size
            progress(done, reader.header.data_len)
    bad = {damage.name for damage in damaged if damage.kind == "tensor"}
    aliases = [t for t in reader.metadata.tensors if isinstance(t, md.AliasTensor)]
    damaged += [Damage("tensor", t.name, f"equals {escape(t.of)}") for t in aliases if t.of in bad]
    return Verification(damaged, len(reader.tensors) - sum(damage.kind == "tensor" for damage in damaged))


def _tasks(reader: Reader) -> Iterator[Callable[[], tuple[list[Damage], int]]]:
    look = partial(_look, len(reader.parts) > 1)
    for part in reader.parts:
        if part.metadata.signs is not None:
            yield partial(look, "signs", "", part.signs, part.metadata.signs.length)
    for tensor in reader.metadata.tensors:
        if not isinstance(tensor, md.AliasTensor):
            size = sum(section.length for section in tensor.sections)
            check = partial(reader.verify_tensor, tensor, check_symbols)
            yield partial(look, "tensor", tensor.name, check, size)
    for name, asset in reader.assets.items():
        yield partial(look, "asset", name, partial(reader.read_asset, name), asset.sections[0].length)


def check_symbols(reader: Reader, tensor: md.TrellisTensor, pairs: NDArray[np.uint16]) -> None:
    """A SymbolCheck that takes the fast decoder."""
    for piece in pieces(reader, tensor, "BF16"):
        piece.decode(np.empty(piece.count, np.uint16))


def _look(in_parts: bool, kind: str, name: str, look: Callable[[], object], size: int) -> tuple[list[Damage], int]:
    try:
        look()
    except BadData as error:
        place = "" if error.section is None or kind == "asset" else f"{error.section}@{error.offset or 0:#x}: "
        part = f"{escape(os.path.basename(error.file or ''), 120)}: " if in_parts else ""
        return [Damage(kind, name, part + place + error.problem)], size
    return [], size
