"""Split sets: the parts of one container, files beside one another, opened as one (spec section 8.1).

Each part is a container of whole tensors. Its place in the set stands in its metadata and in its name: part 2 of 5 of
what would be out.hlwq is out-00002-of-00005.hlwq.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from operator import or_

import msgspec

from . import metadata as md
from .errors import BadSet, MissingInput, Usage, escape
from .layout import MAX_METADATA
from .reader import Reader

SUFFIX = ".hlwq"
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.hlwq", re.DOTALL)
_LISTED = 4


def part_name(whole: str, index: int, count: int) -> str:
    """The name of part `index`, from 0, of what would be called `whole` in one file."""
    return f"{whole.removesuffix(SUFFIX)}-{index + 1:05}-of-{count:05}{SUFFIX}"


def place_of(name: str) -> tuple[str, int, int] | None:
    """(name of the whole, index, count) that the name of a part says; None for any other name."""
    found = _PART.fullmatch(name)
    return (found[1] + SUFFIX, int(found[2]) - 1, int(found[3])) if found else None


def whole_of(name: str) -> str:
    """The name that the whole has of which a file of this name is a part; any other name is its own."""
    place = place_of(name)
    return place[0] if place else name


def first_files(names: Iterable[str], whole: str | None = None) -> list[str]:
    """Of the .hlwq files with these names, each that is no part, and the first part there of each set; with `whole`
    only those that it names, as a file or as a set."""
    groups: dict[tuple[str, int], str] = {}
    for name in sorted(name for name in names if name.endswith(SUFFIX)):
        own, _, count = place_of(name) or (name, 0, 0)
        if whole is None or own == whole.removesuffix(SUFFIX) + SUFFIX:
            groups.setdefault((own, count), name)
    return list(groups.values())


def open_set(path: str | os.PathLike[str]) -> Reader:
    """A reader of what `path` means: a container, or a whole set by any of its parts, by the name that it would have in
    one file, or by its folder, when nothing else is there.

    Raises what Reader raises, MissingInput (66) for parts that are not there, BadSet (65) for those that do not belong
    together, Usage (2) for a folder that holds more.
    """
    folder, name = os.path.split(_locate(os.fspath(path)))
    return join_parts(Reader(os.path.join(folder, name)), name, lambda other: Reader(os.path.join(folder, other)))


def _locate(path: str) -> str:
    is_folder = os.path.isdir(path)
    if not is_folder and os.path.lexists(path):
        return path
    folder, name = (path, None) if is_folder else os.path.split(path)
    try:
        found = first_files(os.listdir(folder or "."), name)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return path
    if len(found) > 1:
        names = ", ".join(escape(one, 60) for one in found[:_LISTED]) + (" ..." if len(found) > _LISTED else "")
        raise Usage(f"several files or sets are there: {names}", file=path, hint="name the one that you mean")
    if not found and is_folder:
        raise MissingInput(f"a folder without a {SUFFIX} file", file=path)
    return os.path.join(folder, found[0]) if found else path


def join_parts(first: Reader, name: str, open_other: Callable[[str], Reader]) -> Reader:
    """`first` where it is a whole file; else all of its set, whose other parts `open_other` opens by the names that
    follow from `name`. Everything is closed when this raises what `open_set` does."""
    split = first.metadata.split
    if split is None:
        return first
    with ExitStack() as opened:
        opened.callback(first.close)
        place = place_of(name)
        if place is None or place[1:] != (split.index, split.count):
            raise BadSet(
                f"it is part {split.index + 1} of {split.count} of a set, which its name does not say",
                file=first.path,
                hint=f"give it back the name that ends in {part_name('', split.index, split.count)}",
            )
        parts, missing, size = [], list[tuple[int, MissingInput]](), 0
        for index in range(split.count):
            try:
                part = first if index == split.index else open_other(part_name(place[0], index, split.count))
            except MissingInput as error:
                missing.append((index + 1, error))
                continue
            opened.callback(part.close)
            parts.append(part)
            size += part.header.meta_len
            if size > MAX_METADATA:
                raise BadSet(f"the metadata of all parts have over {MAX_METADATA} bytes", file=part.path)
        if missing:
            numbers = ", ".join(str(number) for number, _ in missing[:8]) + (" ..." if len(missing) > 8 else "")
            words = (
                f"part {numbers} of {split.count} is" if len(missing) == 1 else f"parts {numbers} of {split.count} are"
            )
            raise MissingInput(
                f"{words} missing: {missing[0][1].problem}",
                file=missing[0][1].file,
                hint="all parts of a set must lie side by side",
            )
        whole = SetReader(parts)
        opened.pop_all()
    return whole


def merge(parts: Sequence[tuple[str, md.Metadata]]) -> md.Metadata:
    """The document of the file that would hold all that these parts hold, given with their names in the order that
    these say. Raises BadSet when they are not just the parts of one set."""
    first_name, first = parts[0]
    documents = [document for _, document in parts]
    for index, (name, document) in enumerate(parts):
        ours, split = first.split, document.split
        if ours is None or split is None:
            raise BadSet(f"a whole file, expected part {index + 1} of a set of {len(parts)}", file=name)
        if split.set != ours.set:
            words = (
                f"part of set {split.set[:16]}..., {escape(os.path.basename(first_name), 120)} is of {ours.set[:16]}..."
            )
            raise BadSet(words, file=name, hint="parts of two conversions are mixed: fetch or make all of them again")
        if (split.index, split.count) != (index, len(parts)):
            raise BadSet(
                f"it is part {split.index + 1} of {split.count}, and its name says {index + 1} of {len(parts)}",
                file=name,
                hint="give each part its own name back",
            )
        if (document.signs, document.recipe, document.source, document.tool) != (
            first.signs, first.recipe, first.source, first.tool,
        ):  # fmt: skip
            raise BadSet("its signs, recipe, source or tool are not those of part 1", file=name)
    if first.split is None or md.set_id(documents) != first.split.set:
        raise BadSet("the parts are not those that their set was made of", file=first_name)
    owned = [(tensor, name) for name, document in parts for tensor in document.tensors]
    owned.sort(key=lambda own: own[0].name.encode())
    if len(owned) > md.MAX_TENSORS:
        raise BadSet(f"{len(owned)} tensors, at most {md.MAX_TENSORS} are allowed", file=first_name)
    for (one, _), (other, name) in pairwise(owned):
        if one.name == other.name:
            raise BadSet("another part has it too", file=name, tensor=one.name)
    return msgspec.structs.replace(first, tensors=[tensor for tensor, _ in owned], split=None)


class SetReader(Reader):
    """All parts of a set, open, as one container: lengths in `header` are sums over the parts, `file_id` is the
    identifier of the set, and errors name the part."""

    def __init__(self, parts: list[Reader]) -> None:
        self.metadata = merge([(part.path, part.metadata) for part in parts])
        self.path = parts[0].path
        headers = [part.header for part in parts]
        self.header = replace(
            headers[0],
            meta_len=sum(header.meta_len for header in headers),
            data_len=sum(header.data_len for header in headers),
            file_len=sum(header.file_len for header in headers),
            minor=max(header.minor for header in headers),
            incompat=reduce(or_, (header.incompat for header in headers)),
            compat=reduce(or_, (header.compat for header in headers)),
        )
        split = parts[0].metadata.split
        assert split is not None
        self.file_id = split.set
        self.tensors = {tensor.name: tensor for tensor in self.metadata.tensors}
        self.assets = parts[0].assets
        self._parts = parts
        self._holders = {tensor.name: part for part in parts for tensor in part.metadata.tensors}

    @property
    def parts(self) -> list[Reader]:
        """The files, in order."""
        return self._parts

    def _holder(self, kind: str, owner: str) -> Reader:
        return self._holders[owner] if kind == "tensor" else self._parts[0]

    def verify_shared(self) -> None:
        """As Reader.verify_shared, in every part."""
        for part in self._parts:
            part.verify_shared()

    def close(self) -> None:
        """Close all parts."""
        for part in self._parts:
            part.close()
