"""Split sets put together by hand (spec/vectors/sets): a good one, and sets that are wrong in exactly one way."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vector_parts import Parts, base, canonical, empty, sha256

ZEROS = "0" * 64
LEVELS = struct.pack("<4f", -1.5, -0.5, 0.5, 1.5)


@dataclass(frozen=True)
class Case:
    """Files side by side, in the order of their names; `error` and `fault` are None for a good set."""

    name: str
    error: str | None
    fault: str | None
    files: list[bytes]


def name_set(parts: list[Parts]) -> None:
    """Give all parts of a set its identifier (spec section 8.1)."""
    documents = [copy.deepcopy(part.document) for part in parts]
    for document in documents:
        document["split"]["set"] = ZEROS
    name = sha256(b"".join(map(canonical, documents)))
    for part in parts:
        part.document["split"]["set"] = name


def three(codes: bytes = bytes(range(32))) -> list[Parts]:
    """A set of three parts: a tensor with its alias and an asset, none of all these, and two tensors."""
    parts = [empty(signs=True) for _ in range(3)]
    for index, part in enumerate(parts):
        part.document["split"] = {"count": 3, "index": index, "set": ZEROS, "size": 1000}
    parts[0].scalar("a", "F32", [100], 0, codes, LEVELS, b"\x00\x2c")
    parts[0].alias("d", "F32", [100], "a")
    parts[0].asset("config.json", b"{}\n")
    parts[2].raw("b", "BF16", [2], struct.pack("<2H", 0x3F80, 0xC000))
    parts[2].scalar("e", "BF16", [2, 64], -3, bytes(32), LEVELS, b"\x00\x3c")
    name_set(parts)
    return parts


def build(parts: list[Parts]) -> list[bytes]:
    """The files."""
    return [part.build() for part in parts]


def edited(edit: Callable[[list[Parts]], Any]) -> list[bytes]:
    """The files of a set that was changed before it got its identifier."""
    parts = three()
    edit(parts)
    name_set(parts)
    return build(parts)


def with_other_signs(parts: list[Parts]) -> None:
    """Change the signs of the last part."""
    parts[2].replace(0, bytes(16))


def sets() -> Iterator[Case]:
    """All of spec/vectors/sets."""
    good, other = build(three()), build(three(bytes(32)))
    yield Case("good", None, None, good)
    for name, fault, files in (
        ("mixed", "A part is of another set, of the same model.", [good[0], good[1], other[2]]),
        ("exchanged", "Two parts have each other's names.", [good[0], good[2], good[1]]),
        ("twice", "A part is there twice, and another is not.", [good[0], good[2], good[2]]),
        ("whole", "A file is no part of a set.", [good[0], base().build(), good[2]]),
        ("count", "A part says that there are four.", edited(lambda p: p[2].document["split"].update(count=4))),
        ("tensor-twice", "A tensor is in two parts.", edited(lambda p: p[1].raw("b", "U8", [1], b"b"))),
        ("signs", "The signs of a part are others.", edited(with_other_signs)),
        ("recipe", "The recipe of a part is another.", edited(lambda p: p[1].document["recipe"].update(effort="x"))),
        ("source", "The source of a part is another.", edited(lambda p: p[1].document["source"].update(repo="x"))),
        ("tool", "The tool of a part is another.", edited(lambda p: p[1].document["tool"].update(name="x"))),
    ):
        yield Case(name, "BadSet", fault, files)
    parts = three()
    for part in parts:
        part.document["split"]["set"] = ZEROS
    yield Case("identifier", "BadSet", "The identifier is not that of the documents.", build(parts))
    parts = three()
    parts[1].document["split"]["size"] = 999
    yield Case("changed", "BadSet", "A part was changed after the set had its identifier.", build(parts))
