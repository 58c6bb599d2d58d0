"""Documents made to cost far more than their size: refused in little time and memory."""

from __future__ import annotations

import contextlib
import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from hlwq_formats import metadata as md
from hlwq_formats.errors import BadData, BadMetadata, HlwqError, UnsupportedDtype, escape
from hlwq_formats.paths import clashing_name, unsafe_path
from hlwq_formats.safetensors_dir import ModelDir
from hlwq_formats.strict_json import parse

MIB = 1 << 20


def cost(action: Callable[[], object]) -> tuple[float, float, BaseException | None]:
    """(seconds, MiB of Python memory, what it raised)."""
    raised: BaseException | None = None
    tracemalloc.start()
    try:
        action()
    except HlwqError as error:
        raised = error
    peak = tracemalloc.get_traced_memory()[1] / MIB
    tracemalloc.stop()
    began = time.perf_counter()
    with contextlib.suppress(HlwqError):
        action()
    return time.perf_counter() - began, peak, raised


def model_of(folder: Path, header: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


HEADERS: dict[str, bytes] = {
    "a dtype of 20 MiB of control characters": (
        b'{"a":{"dtype":"%s","shape":[1],"data_offsets":[0,1]}}' % (b"\xc2\x85" * (10 * MIB))
    ),
    "one object of a million keys": b'{"a":{%s}}' % b",".join(b'"%d":0' % i for i in range(2_000_000)),
    "millions of strings": b'{"a":[%s]}' % b",".join([b'"xy"'] * 4_000_000),
    "a shape of huge integers": (
        b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}' % b",".join([b"9" * 4000] * 2000)
    ),
    "millions of brackets": b"[" * 4_000_000,
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors(tmp_path: Path, name: str) -> None:
    folder = model_of(tmp_path / "m", HEADERS[name])
    seconds, mib, raised = cost(lambda: ModelDir(folder))
    assert isinstance(raised, BadData | UnsupportedDtype)
    assert len(str(raised)) <= 500
    assert seconds < 2
    assert mib < 128


DOCUMENTS: dict[str, bytes] = {
    "an unknown key of 20 MiB": json.dumps({"é" * (10 * MIB): 0}, ensure_ascii=False).encode(),
    "millions of frames": (
        b'{"assets":[{"name":"a","sections":[{"zstd":{"frames":[%s]}}]}]}' % b",".join([b"300"] * 8_000_000)
    ),
    "a difference at the end": b'{"assets":[%s],"x":1.0}' % (b" " * (20 * MIB)),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_metadata(name: str) -> None:
    seconds, mib, raised = cost(lambda: md.decode_canonical(DOCUMENTS[name], md.Metadata, 0, "f"))
    assert isinstance(raised, BadMetadata)
    assert len(str(raised)) <= 500
    assert seconds < 2
    assert mib < 128


def test_a_difference_is_found_where_it_is() -> None:
    whole = bytes(range(256)) * 64
    for at in (0, 1, 4095, 4096, 4097, 9000, len(whole) - 1):
        other = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        assert md._first_difference(whole, other) == at
    assert md._first_difference(whole, whole[:5000]) == 5000
    assert md._first_difference(whole[:4096], whole) == 4096


def test_names_in_deep_folders() -> None:
    names = [f"{i:04d}/" + "/".join("a" * 250) for i in range(2_000)]
    seconds, mib, _ = cost(lambda: clashing_name(names))
    assert clashing_name(names) is None
    assert clashing_name([*names, "0100/a"]) == names[100]
    assert clashing_name(["0100/A", *names]) == names[100]
    assert seconds < 2
    assert mib < 32


def test_control_characters_of_both_blocks_are_unsafe() -> None:
    for code in range(0x100):
        is_control = code < 0x20 or 0x7F <= code <= 0x9F
        assert (unsafe_path(f"a{chr(code)}b") is not None) == (is_control or chr(code) in '\\:*?"<>|'), code


def test_a_long_text_is_cut_before_it_is_escaped() -> None:
    assert escape("\x85" * (20 * MIB)).count("\\x85") < 200
    for length in (0, 1, 98, 199, 200, 201, 202, 1000):
        assert len(escape("a" * length)) == min(length, 199 if length > 200 else length)
    assert escape("é" * 10) == "é" * 10


@pytest.mark.parametrize("number", ["-0", "[1, -0]", '{"a": -0}'])
def test_minus_zero_is_no_integer(number: str) -> None:
    """Other parsers of JSON refuse it where an unsigned number belongs, and so do we."""
    with pytest.raises(BadMetadata, match="-0 is not an integer"):
        parse(number.encode(), BadMetadata)


def test_what_only_looks_like_minus_zero_is_read() -> None:
    assert parse(b'{"a-0": [-1, 0, -0.5, "-0"]}', BadMetadata) == {"a-0": [-1, 0, -0.5, "-0"]}
