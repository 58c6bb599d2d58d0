"""A strict reader of safetensors model directories, by positioned reads (spec of the format:
safetensors README "Format"; ours refuses what that leaves open).

Nothing is mapped into memory: a file that shrinks under a map kills the process. No file is kept open:
each read opens the shard again and compares its identity, so a replaced or rewritten file is noticed.
"""

from __future__ import annotations

import errno
import os
import re
import reprlib
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from .dtypes import ITEM_BITS, nbytes
from .errors import BadModelDir, BadSafetensors, MissingInput, SourceChanged, UnsafePath, UnsupportedDtype, escape
from .files import InputFile, Memory, new_memory
from .layout import MAX_NUMEL, numel
from .metadata import MAX_NAME_BYTES
from .paths import unsafe_path
from .strict_json import parse

MAX_HEADER = 64 << 20
MAX_TENSORS = 200_000
SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of a model directory: `length` bytes at `offset` of the shard `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return numel(self.shape)


class ModelDir:
    """The tensors of a model directory: one safetensors file, or shards with an index.

    With `allow_extra`, tensors that the index does not list are left out, and `warnings` says so. Raises
    MissingInput (66), BadModelDir, BadSafetensors or UnsafePath (65), UnsupportedDtype (69).
    """

    def __init__(self, path: str | os.PathLike[str], *, allow_extra: bool = False) -> None:
        self.path = Path(path)
        self.warnings: list[str] = []
        self._allow_extra = allow_extra
        self._total_size: object = None
        if not self.path.is_dir():
            what = "not a directory" if self.path.exists() else "no such directory"
            raise MissingInput(f"{what}: a Hugging Face model directory is expected", file=str(self.path))
        try:
            names = sorted(entry.name for entry in os.scandir(self.path))
        except OSError as error:
            raise MissingInput(f"cannot list: {error.strerror}", file=str(self.path)) from None
        self._identities: dict[str, tuple[int, ...]] = {}
        weight_map = self._find_shards(names)
        unfinished = [name for name in names if name.removesuffix(".aria2").removesuffix(".incomplete") in weight_map]
        if unfinished := [name for name in unfinished if name not in weight_map]:
            raise self._bad(f"an unfinished download: {_listed(unfinished)}", hint="finish it")
        self.tensors: dict[str, SourceTensor] = {}
        self.files: list[tuple[str, int]] = []
        for file, expected in weight_map.items():
            self._read_shard(file, expected)
        total = sum(tensor.length for tensor in self.tensors.values())
        if self._total_size not in (None, total):
            stated = escape(reprlib.repr(self._total_size), 40)
            self.warnings.append(f"the index states a total_size of {stated} bytes, its tensors have {total}")

    # --- which files ---------------------------------------------------------------------------

    def _find_shards(self, names: list[str]) -> dict[str, set[str] | None]:
        """Shard name -> tensors that the index puts there (None without an index)."""
        indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
        shards = [name for name in names if name.endswith(SUFFIX)]
        if len(indices) > 1:
            raise self._bad("several safetensors indices: " + _listed(indices), hint="keep the one that counts")
        if indices:
            if "model.safetensors" in shards:
                raise self._bad(f"ambiguous: both model.safetensors and {escape(indices[0])}", hint="remove one")
            return self._read_index(indices[0])
        parts = re.search(r"-of-(\d+)\.safetensors$", shards[0]) if shards else None
        if len(shards) == 1 and (parts is None or int(parts[1]) == 1):
            if (problem := unsafe_path(shards[0])) is not None:
                raise UnsafePath(problem, file=shards[0])
            return {shards[0]: None}
        if shards:
            raise self._bad(
                f"{len(shards)} shards and no {INDEX_SUFFIX[1:]}: " + _listed(shards), hint="fetch the index too"
            )
        partial = [name for name in names if name.endswith((".incomplete", ".aria2"))]
        if partial:
            raise MissingInput(f"an unfinished download: {_listed(partial)}", file=str(self.path), hint="finish it")
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
        if pickles:
            raise MissingInput(
                f"only pickles ({_listed(pickles)}), which can run code when opened and are not supported",
                file=str(self.path),
                hint="convert them to safetensors first",
            )
        raise MissingInput("no .safetensors file in this directory", file=str(self.path))

    def _read_index(self, name: str) -> dict[str, set[str] | None]:
        document = parse(self.read_file(name, MAX_HEADER), lambda problem: BadModelDir(problem, file=name))
        weight_map = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise BadModelDir("weight_map is not an object of tensor name to file name", file=name)
        if not weight_map or len(weight_map) > MAX_TENSORS:
            raise BadModelDir(f"weight_map has {len(weight_map)} tensors, expected 1 to {MAX_TENSORS}", file=name)
        notes = cast("dict[str, object]", document).get("metadata")
        self._total_size = notes.get("total_size") if isinstance(notes, dict) else None
        shards: dict[str, set[str] | None] = {}
        for tensor, file in weight_map.items():
            if unsafe_path(file) or "/" in file or not file.endswith(SUFFIX):
                raise UnsafePath(f'"{escape(file, 120)}" is no plain name of a {SUFFIX} file', file=name, tensor=tensor)
            cast("set[str]", shards.setdefault(file, set())).add(tensor)
        if len({file.casefold() for file in shards}) != len(shards):
            raise BadModelDir("two shards differ only in the case of their names", file=name)
        missing = [file for file in shards if not os.path.lexists(self.path / file)]
        if missing:
            raise MissingInput(f"{len(missing)} of {len(shards)} shards are missing: {_listed(missing)}", file=name)
        totals = {match[1] for file in shards if (match := re.search(r"-of-(\d+)\.safetensors$", file))}
        if len(totals) > 1 or any(int(total) != len(shards) for total in totals):
            raise BadModelDir(f"{len(shards)} shards named as parts of {_listed(sorted(totals))}", file=name)
        return dict(sorted(shards.items()))

    # --- one shard -----------------------------------------------------------------------------

    def _read_shard(self, file: str, expected: set[str] | None) -> None:
        with self._reopen(file) as shard:
            self.files.append((file, shard.size))
            tensors = read_safetensors_header(shard, file)
        if expected is not None and (names := {t.name for t in tensors}) != expected:
            absent, extra = sorted(expected - names), sorted(names - expected)
            if absent:
                raise BadModelDir(f"the index disagrees with the shard, which lacks {_listed(absent)}", file=file)
            problem = f"the index disagrees with the shard, which holds {_listed(extra)}"
            if not self._allow_extra:
                raise BadModelDir(problem, file=file, hint="pass --allow-extra to leave such tensors out")
            self.warnings.append(f"{escape(file)}: {problem}: left out")
            tensors = [tensor for tensor in tensors if tensor.name in expected]
        self.tensors.update((tensor.name, tensor) for tensor in tensors)
        if len(self.tensors) > MAX_TENSORS:
            raise BadModelDir(f"more than {MAX_TENSORS} tensors", file=file)

    def _open(self, name: str) -> InputFile:
        """Open a file of the directory, whose symlinks may lead only to a sibling or to a blob of the Hugging
        Face cache that the directory is in."""
        path = self.path / name
        if path.is_symlink() or "/" in name:
            target, root = Path(os.path.realpath(path)), Path(os.path.realpath(self.path))
            if not (root in target.parents or _is_blob(path, target, root)):
                raise UnsafePath("a symlink leads out of the model directory", file=name)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise BadModelDir("not a regular file", file=name)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UnsafePath("a symlink that leads to itself", file=name) from None
        return InputFile(path, name)

    # --- reading -------------------------------------------------------------------------------

    def read(self, tensor: SourceTensor, start: int, length: int) -> bytes:
        """`length` bytes of a tensor from byte `start`; SourceChanged (75) when the shard is another one now."""
        return next(self.read_pieces(tensor, [(start, length)]))

    def read_pieces(self, tensor: SourceTensor, places: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """`read` for each (start, length), opening the shard once."""
        with self._reopen(tensor.file) as shard:
            for start, length in places:
                yield shard.read(tensor.offset + start, length)

    def read_into(self, tensor: SourceTensor, start: int, buffer: memoryview) -> None:
        """`read` to writable memory of as many bytes."""
        with self._reopen(tensor.file) as shard:
            shard.read_into(tensor.offset + start, buffer)

    def stream(self, tensor: SourceTensor, size: int, memory: Memory = new_memory) -> Iterator[memoryview]:
        """The bytes of a tensor, `size` at a time, each piece in the same `memory`."""
        buffer = memory(min(size, tensor.length))
        with self._reopen(tensor.file) as shard:
            for start in range(0, tensor.length, size):
                piece = buffer[: tensor.length - start]
                shard.read_into(tensor.offset + start, piece)
                yield piece

    def file_pieces(self, file: str, size: int) -> Iterator[bytes]:
        """The bytes of a whole shard, `size` at a time."""
        with self._reopen(file) as shard:
            for start in range(0, shard.size, size):
                yield shard.read(start, min(size, shard.size - start))

    def check_unchanged(self) -> None:
        """Look at every file once more, after the last read: SourceChanged (75) when one was touched."""
        for file in self._identities:
            self._reopen(file).close()

    def _reopen(self, file: str) -> InputFile:
        """Open a file again, or for the first time; SourceChanged when it is not what it was then."""
        known = self._identities.get(file)
        try:  # a file that is the one that was looked at needs no second look at its path
            opened = self._open(file) if known is None else InputFile(self.path / file, file)
        except MissingInput as error:
            if known is None:
                raise
            raise SourceChanged(f"no longer readable: {error.problem}", file=file, hint="try again") from None
        if known is not None and opened.identity != known:
            opened.close()
            raise SourceChanged("changed while it was being converted", file=file, hint="try again")
        self._identities[file] = opened.identity
        return opened

    def size_of(self, name: str) -> int:
        """Bytes of another file of the directory, which from now on may not change."""
        with self._reopen(name) as file:
            return file.size

    def read_file(self, name: str, limit: int) -> bytes:
        """The content of another file of the directory; BadModelDir when it is over `limit` bytes."""
        with self._reopen(name) as file:
            if file.size > limit:
                raise BadModelDir(f"{file.size} bytes, at most {limit} are allowed", file=name)
            return file.read(0, file.size)

    def _bad(self, problem: str, hint: str) -> BadModelDir:
        return BadModelDir(problem, file=str(self.path), hint=hint)


def _is_blob(path: Path, target: Path, root: Path) -> bool:
    """Whether the link `path` in the snapshot `root` leads to a blob of its own repository, or by way of one to the
    store that all repositories of a cache share: CACHE/blobs/ab/ab12... (huggingface_hub 2, files stored by Xet)."""
    if root.parent.name != "snapshots":
        return False
    blobs, store = root.parents[1] / "blobs", root.parents[2] / "blobs"
    if target.parent == blobs:
        return True
    if not path.is_symlink():
        return False
    first = Path(os.path.normpath(os.path.join(os.path.realpath(path.parent), os.readlink(path))))
    return (
        first.parent == blobs
        and re.fullmatch("[0-9a-f]{64}", target.name) is not None
        and target.parent == store / target.name[:2]
    )


def read_safetensors_header(shard: InputFile, file: str) -> list[SourceTensor]:
    """Parse and check the header of a safetensors file; tensors must fill its data without hole or overlap."""

    def bad(problem: str, tensor: str | None = None) -> BadSafetensors:
        return BadSafetensors(problem, file=file, tensor=tensor)

    start = shard.read(0, min(shard.size, 64))
    for magic, what in (
        (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`"),
        (b"<!doctype", "an HTML page, perhaps an error page of a download: fetch it again"),
        (b"<html", "an HTML page, perhaps an error page of a download: fetch it again"),
    ):
        if start.lower().startswith(magic):
            raise bad(f"not a safetensors file but {what}")
    if len(start) < 8:
        raise bad(f"too short, {len(start)} of 8 bytes")
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER or 8 + length > shard.size:
        raise bad(f"a header of {length} bytes; the file has {shard.size}, the limit is {MAX_HEADER}")
    document = shard.read(8, length)
    if not document.startswith(b"{"):
        raise bad("the header does not start with {")
    header = parse(document, bad)
    if not isinstance(header, dict) or len(header) > MAX_TENSORS + 1:
        raise bad(f"the header is no object of at most {MAX_TENSORS} tensors")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise bad("__metadata__ is not an object of strings")
    tensors = [_parse_tensor(name, info, file, 8 + length) for name, info in header.items()]
    end = 8 + length
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.length)):
        if tensor.offset != end:
            problem = "overlaps the tensor before it" if tensor.offset < end else "follows a hole in the data"
            raise bad(f"starts at byte {tensor.offset} and {problem}, expected {end}", tensor.name)
        end += tensor.length
        if end > shard.size:
            raise bad(f"ends at byte {end}, the file has {shard.size}", tensor.name)
    if end != shard.size:
        raise bad(f"{shard.size - end} bytes after the last tensor, which ends at {end}")
    return tensors


def _parse_tensor(name: str, info: object, file: str, data_start: int) -> SourceTensor:
    def wrong(problem: str) -> BadSafetensors:
        return BadSafetensors(problem, file=file, tensor=name)

    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise wrong("the name is not valid Unicode") from None
    if not 1 <= len(encoded) <= MAX_NAME_BYTES or any(char < " " or char == "\x7f" for char in name):
        raise wrong(f"the name is empty, over {MAX_NAME_BYTES} bytes or has control characters")
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("expected an object of dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise UnsupportedDtype(f"unknown dtype {escape(reprlib.repr(dtype), 40)}", file=file, tensor=name)
    if not _are_counts(shape) or len(shape) > 8 or numel([max(d, 1) for d in shape]) > MAX_NUMEL:
        shown = escape(reprlib.repr(shape), 80)
        raise wrong(f"shape {shown} is not a list of at most 8 dimensions with under 2**53 elements")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"data_offsets {escape(reprlib.repr(offsets), 80)} are not two increasing positions")
    length = offsets[1] - offsets[0]
    if length != nbytes(dtype, numel(shape)):
        raise wrong(f"{dtype} {shape} takes {nbytes(dtype, numel(shape))} bytes, data_offsets span {length}")
    return SourceTensor(name, dtype, tuple(shape), file, data_start + offsets[0], length)


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= MAX_NUMEL for v in values)


def _listed(names: list[str]) -> str:
    """Up to 20 names, escaped, for a message."""
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(escape(name, 60) for name in names[:20]) + more
