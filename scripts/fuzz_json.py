"""Changes to JSON documents that keep them JSON, and changes to bytes that know nothing of what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec

from hlwq_formats.dtypes import ITEM_BITS

Plain = Callable[[bytes], bytes]

NUMBERS = [0, 1, -1, 2, 3, 7, 8, 9, 16, 63, 64, 65, 112, 113, 127, 128, 129, 255, 256, 512, 65504, 1 << 20,
           (1 << 20) + 1, 1 << 26, (1 << 26) + 1, 1 << 30, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 53) - 1, 1 << 53,
           (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**400]  # fmt: skip
TEXTS = [
    *ITEM_BITS, "raw", "scalar", "alias", "signs", "codes", "levels", "scales", "asset", "report.json", "a", "A", "b",
    "a/b", "a//b", "../a", "/a", "a\\b", "CON", "nul.txt", "a.", "a ", "é", "e\u0301", "\x80", "\u2028", "\u202e",
    "\x1b[1m", "\n", "\0", "\x7f", "\U0001d54a", "ﬀ", "K", "x" * 255, "x" * 256, "x" * 513, "é" * 257, "a/a/a/a/a",
    "F128", "u8", "__metadata__", "__class__", "dtype", "shape", "data_offsets", "weight_map", "sections", "zstd",
    "zstd_codes", "frames", "notes", "model-00001-of-00002.safetensors", "x.safetensors", "y.safetensors",
    "link.safetensors", "CON.safetensors", "a:b.safetensors", "../x", "sub/", ".safetensors", "0" * 64,
]  # fmt: skip
ODD: list[Any] = [None, True, False, 0.0, -0.0, 1.5, 1e300, "", [], {}, [[]], [0], {"a": 0}, [0, 0], ["a"]]
SPELLINGS = [b"\\ud800", b"\\u0041", b"\\u0000", b"\\/", b"\\n", b" ", b"\n", b"\t", b"\xff", b"\xed\xa0\x80",
             b"\xc1\xa1", b"\xef\xbb\xbf", b"NaN", b"Infinity", b"1e999", b"-0", b"-", b".0", b"e0", b"0", b'"',
             b'":"', b'",', b",", b"null", b"\x00"]  # fmt: skip
MAX_STEPS = 9


def any_value(rng: Random) -> Any:
    """A value that may stand where another one stood."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(NUMBERS)
    if kind < 0.8:
        return rng.choice(TEXTS)
    return copied(rng.choice(ODD))


def copied(value: Any) -> Any:
    """A copy that shares nothing which can change."""
    return msgspec.json.decode(msgspec.json.encode(value)) if isinstance(value, dict | list) else value


def change_json(root: Any, rng: Random) -> None:
    """Make one change somewhere in a tree of dicts and lists."""
    node = root
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            insert(node, rng)
            return
        key = rng.choice(keys)
        inner = node[key]
        if not isinstance(inner, dict | list) or rng.random() < 0.15:
            break
        node = inner
    action = rng.random()
    if action < 0.2 and isinstance(node, list):  # objects mostly keep their keys, or they end at the schema
        if action < 0.1:
            del node[key]
        else:
            insert(node, rng, copied(inner))
    elif action < 0.27:
        other = rng.choice(keys)
        node[key], node[other] = node[other], node[key]
    elif action < 0.31:
        insert(node, rng)
    elif action < 0.33:
        del node[key]
    elif action < 0.39:
        node[key] = any_value(rng)
    elif type(inner) is int and rng.random() < 0.1:
        node[key] = rng.choice((bool(inner), str(inner), None, [inner], float(inner % 1000)))
    elif type(inner) is int:
        near = inner + rng.choice((1, -1, 2, 8, -8, 64, -64, 128, inner))
        node[key] = near if rng.random() < 0.5 else rng.choice(NUMBERS)
    elif isinstance(inner, str):
        at = rng.randrange(len(inner) + 1)
        text = rng.choice(TEXTS)
        node[key] = text if rng.random() < 0.5 else inner[:at] + text[:20] + inner[at + rng.randrange(3) :]
    elif isinstance(inner, dict | list):
        change_json(inner, rng)


def insert(node: Any, rng: Random, *values: Any) -> None:
    """Put a value into a list or an object, under some new name."""
    value = values[0] if values else any_value(rng)
    if isinstance(node, dict):
        node[rng.choice(TEXTS)] = value
    else:
        node.insert(rng.randrange(len(node) + 1), value)


def decoded(text: bytes) -> Any:
    """The JSON value of a text, None when it is none that msgspec reads."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def canonical(value: Any) -> bytes:
    """The one way to write a document; integers over 64 bits, which msgspec refuses, by the slower way."""
    try:
        return msgspec.json.encode(value, order="sorted")
    except OverflowError:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def steps(rng: Random) -> range:
    """One change, or a few."""
    return range(1 if rng.random() < 0.6 else rng.randrange(2, MAX_STEPS))


def json_text(data: bytes, rng: Random, plain: Plain) -> bytes:
    """A document by itself."""
    tree = decoded(data)
    if not isinstance(tree, dict | list) or rng.random() < 0.25:
        return plain(data)
    for _ in steps(rng):
        change_json(tree, rng)
    if rng.random() < 0.5 and isinstance(tree, dict):
        in_order(tree)
    text = canonical(tree)
    return change_text(text, rng, plain) if rng.random() < 0.15 else text


def change_text(text: bytes, rng: Random, plain: Plain) -> bytes:
    """What no tree can hold: a key twice, other spellings, deep nesting, or whatever `plain` makes."""
    action = rng.random()
    at = rng.randrange(len(text) + 1)
    if action < 0.3:
        pieces = text.split(b",")
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(pieces))
        return b",".join(pieces)
    if action < 0.65:  # mostly in a string or a number, where a spelling belongs
        at = max(text.rfind(rng.choice((b'"', b":", b",")), 0, at) + 1, 0)
        return text[:at] + rng.choice(SPELLINGS) + text[at:]
    if action < 0.7:
        depth = rng.choice((9, 500, 1100, 3000))
        at = text.rfind(b":", 0, at) + 1
        return text[:at] + b"[" * depth + b"]" * depth + (b"," if rng.random() < 0.5 else b"") + text[at:]
    return plain(text)


def in_order(document: dict[str, Any]) -> None:
    """Sort tensors and assets by their names, where they have such."""
    for key in ("tensors", "assets"):
        entries = document.get(key)
        if isinstance(entries, list) and all(isinstance(e, dict) and isinstance(e.get("name"), str) for e in entries):
            entries.sort(key=lambda e: (key == "assets" and e["name"] == "report.json", e["name"].encode()))


def plain_change(data: bytes, rng: Random) -> bytes:
    """What a fuzzer's own mutator does, for tests: flip, overwrite, insert, erase, repeat or cut a few bytes."""
    result = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(result) + 1)
        action = rng.randrange(6)
        if action == 0 and at < len(result):
            result[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            result[at : at + 1] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))])
        elif action == 2:
            result[at:at] = rng.choice((b"\x00", b'"', b",", b"[", b"{", b"9", b"\xff", b"\\u0000", b" ", b"-", b"e9"))
        elif action == 3:
            del result[at : at + rng.randrange(1, 9)]
        elif action == 4:
            result[at:at] = result[at : at + rng.randrange(1, 65)]
        else:
            del result[at if rng.random() < 0.3 else len(result) - rng.randrange(min(9, len(result) + 1)) :]
    return bytes(result)
