"""The catalogue, A and B: what is no container, headers, and metadata."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from catalogue import (
    MEMORY,
    METADATA_MEMORY,
    alarm,
    case,
    check_measured,
    measure,
    refused,
    tree,
    unprivileged,
    write_sparse,
)
from catalogue_files import (
    BLOBS,
    DOCUMENT,
    GOOD,
    META_LEN,
    META_OFF,
    A,
    archive,
    bad,
    big_endian,
    check_bad_files,
    flipped,
    keys,
    text,
    value,
    without_key,
    write,
    wrong_integers,
)
from conftest import Run
from vector_parts import CODES, STARTS, base, canonical, empty, flip, layout, make_header

import hlwq_convert as h
from hlwq_formats.reader import Reader

HEADERS = [
    *(bad(1, f"{n:03d}-bytes", GOOD[:n], "WrongSize", f"too short, {n} of 128") for n in (1, 7, 8, 127)),
    bad(1, "every-length", (GOOD[:n] for n in range(1, 128)), "WrongSize", "too short, ", " of 128 header bytes"),
    bad(1, "nothing", b"", "NotHlwq", "too short, 0 of 128"),
    bad(2, "git-lfs-pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "NotHlwq",
        "Git LFS pointer", "run `git lfs pull`"),
    bad(2, "html-page", b"<!DOCTYPE html><html><title>404</title></html>", "NotHlwq", "HTML page"),
    bad(2, "gguf", b"GGUF\x03\0\0\0" + bytes(200), "NotHlwq", "GGUF"),
    bad(2, "zip", archive(), "NotHlwq", "zip archive"),
    bad(2, "safetensors", struct.pack("<Q", 64) + b'{"__metadata__":{}}'.ljust(64), "NotHlwq", "safetensors file"),
    bad(2, "something-else", b"\x7fELF" + bytes(200), "NotHlwq", "7f 45 4c 46", "expected 48 4c 57 51"),
    bad(3, "crlf-became-lf", GOOD.replace(b"\r\n", b"\n"), "NotHlwq", "text-mode transfer damage"),
    bad(3, "lf-became-crlf", GOOD.replace(b"\n", b"\r\n"), "NotHlwq", "text-mode transfer damage"),
    bad(3, "top-bits-stripped", bytes(byte & 127 for byte in GOOD), "BadHeader", "text-mode transfer damage"),
    bad(4, "version-0", base().build(major=0), "BadHeader", "version 0"),
    bad(4, "version-2", base().build(major=2), "UnsupportedVersion", "needs a reader for 2.x", "reads 1.x"),
    bad(4, "version-65535", base().build(major=65535, minor=65535), "UnsupportedVersion", "reader for 65535.x"),
    *(bad(5, f"bit-{i:02d}", base().build(incompat=1 << i), "UnsupportedFeature", f"bit {i} (")
      for i in range(3, 64)),
    bad(5, "bit-00", base().build(incompat=1), "BadMetadata", "feature bits do not fit it: framed compression"),
    bad(5, "bit-01", base().build(incompat=2), "BadMetadata", "feature bits do not fit it: trellis"),
    bad(5, "bit-02", base().build(incompat=4), "BadMetadata", "feature bits do not fit it: split set"),
    bad(5, "all-bits", base().build(incompat=2**64 - 1), "UnsupportedFeature", "3 (unknown)", "and 53 more"),
    bad(7, "each-reserved-byte", (base().build(reserved=bytes(i) + b"\1") for i in range(20)), "BadHeader", "not zero"),
    bad(8, "each-bit-of-the-magic", (flipped(GOOD, bit) for bit in range(64)), "NotHlwq"),
    bad(8, "each-other-bit", (flipped(GOOD, bit) for bit in range(64, 1024)), "BadHeader", "header checksum is"),
    bad(9, "big-endian", big_endian(), "BadHeader", "endianness"),
    bad(11, "wraps", layout(DOCUMENT, BLOBS, meta_len=2**64 - META_OFF), "BadLayout", f"metadata at {META_OFF} of"),
    bad(11, "in-the-header", layout(DOCUMENT, BLOBS, meta_off=64), "BadLayout", "metadata at 64 of"),
    bad(11, "in-the-data", layout(DOCUMENT, BLOBS, meta_off=META_OFF - 64), "BadLayout", f"at {META_OFF - 64} of"),
    bad(11, "past-the-end", layout(DOCUMENT, BLOBS, meta_off=1 << 30), "BadLayout", "metadata at 1073741824 of"),
    bad(11, "too-long", layout(DOCUMENT, BLOBS, meta_len=META_LEN + 1), "BadLayout", f"of {META_LEN + 1} bytes"),
    bad(13, "one-byte-less", GOOD[:-1], "WrongSize", f"has {len(GOOD) - 1}: 1 bytes missing", f"says {len(GOOD)}"),
    bad(13, "one-byte-more", GOOD + b"\0", "WrongSize", f"has {len(GOOD) + 1}: 1 bytes too many at the end"),
    bad(13, "64-zeros-more", GOOD + bytes(64), "WrongSize", "64 bytes too many at the end"),
    bad(13, "polyglot", GOOD + archive(), "WrongSize", f"{len(archive())} bytes too many at the end"),
    bad(18, "no-header-yet", [bytes(128) + GOOD[128:], bytes(128), bytes(70_000)], "Incomplete", "did not finish",
        "convert the model again"),
]  # fmt: skip

JSON = [
    bad(21, "not-utf-8", [layout(DOCUMENT.replace(b'"a"', b'"\xff"'), BLOBS),
                          layout(DOCUMENT.replace(b'"a"', b'"\xc1\xa1"'), BLOBS)], "BadMetadata"),
    bad(21, "utf-16-utf-32-and-marks", [layout(DOCUMENT.decode().encode(code), BLOBS) for code in
                                        ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be")], "BadMetadata"),
    bad(23, "no-numbers", (text(old, old.rstrip("01248") + new) for old in ('"block":128', '"exponent":0')
                           for new in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999")), "BadMetadata"),
    bad(24, "no-integers", wrong_integers(), "BadMetadata"),
    bad(25, "deep", [layout(b"[" * 100_000, BLOBS), layout(b'{"a":' * 100_000, BLOBS),
                     text('"rules":[]', '"rules":' + "[" * 100_000),
                     text('"rules":[]', '"rules":' + "[" * 100_000 + "]" * 100_000)], "BadMetadata"),
    bad(28, "surrogates-and-nul", [text('"a"', new) for new in ('"\\ud800"', '"\udc00"', '"\\u0000"', '"a\0"')],
        "BadMetadata"),
    bad(29, "no-object", (layout(new, BLOBS) for new in (b"[]", b"1", b'"x"', b"null", b"true", b"")), "BadMetadata"),
    bad(29, "each-key-missing", (without_key(*place) for name, *place in keys() if name != "zstd"), "BadMetadata"),
    bad(29, "unknown-key-in-each-object", (layout(DOCUMENT[: m.start()] + b',"x_zzz":1' + DOCUMENT[m.start() :], BLOBS)
                                           for m in re.finditer(b"}", DOCUMENT)), "BadMetadata", "`x_zzz`"),
    bad(30, "other-spellings", [
        layout(json.dumps(base().document, separators=(",", ":")).encode(), BLOBS),
        layout(json.dumps(base().document, sort_keys=True).encode(), BLOBS), layout(DOCUMENT + b"\n", BLOBS),
        text('"a"', '"\\u0061"'), text("vector", "v\\/"), text('"split":null', '"split" :null')],
        "BadMetadata", "not canonical"),
    bad(30, "float", text('"block":128', '"block":128.0'), "BadMetadata"),
    bad(31, "rehashed", [value("tensors.0.bits", 3), value("tensors.0.shape", [129]), value("tensors.2.shape", [4])],
        "BadTensor", "; expected "),
    bad(33, "magic-names", [text('"split":null', f'"split":null,"{key}":{new}') for new in ('"x"', "{}", "null")
                            for key in ("__proto__", "__class__", "__dict__", "__init__", "constructor")],
        "BadMetadata", "unknown field"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "error", "parts"), [*HEADERS, *JSON])
def test_a_bad_file_is_refused(tmp_path: Path, files: list[bytes], error: str, parts: tuple[str, ...]) -> None:
    check_bad_files(tmp_path, files, error, parts)


@pytest.mark.parametrize("at_least", [case(22, "each-key", 26)])
def test_a_duplicate_key_is_refused(tmp_path: Path, at_least: int) -> None:
    seen = set()
    for key, start, end in keys():
        data = layout(DOCUMENT[:end] + b"," + DOCUMENT[start:end] + DOCUMENT[end:], BLOBS)
        with refused("BadMetadata", f'metadata: key "{key}" appears twice'):
            Reader(write(tmp_path / "bad.hlwq", data))
        seen.add(key)
    assert len(seen) >= at_least


@pytest.mark.parametrize("bit", [case(6, f"bit-{bit}", bit) for bit in (0, 1, 17, 63)])
def test_a_compatible_feature_is_only_mentioned(tmp_path: Path, run_tool: Run, bit: int) -> None:
    path = write(tmp_path / "m.hlwq", base().build(compat=1 << bit))
    (warning,) = h.inspect(path).warnings
    assert f"{1 << bit:#x}" in warning
    if bit == 17:
        path = write(path, empty().build(compat=1 << bit))
        result = run_tool("inspect", path, "--verify")
        assert (result.returncode, result.stderr) == (0, f"hlwq: warning: {warning}\n")


# --- what is no file, or changes --------------------------------------------------------------------


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def make_unreadable(path: Path) -> None:
    write(path, GOOD).chmod(0)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        case(19, "absent", lambda path: None, "cannot open: No such file"),
        case(19, "folder", Path.mkdir, "not a regular file"),
        case(19, "fifo", os.mkfifo, "not a regular file"),
        case(19, "socket", make_socket, "cannot open: "),
        case(19, "device", lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        case(19, "dangling-link", lambda path: path.symlink_to("nowhere"), "cannot open: No such file"),
        case(19, "link-to-itself", lambda path: path.symlink_to(path.name), "cannot open: Too many levels"),
        case(19, "unreadable", make_unreadable, "cannot open: Permission denied"),
    ],
)
def test_what_is_no_readable_file_is_missing(make: Callable[[Path], object], problem: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder, "m.hlwq")
        make(path)
        before = tree(Path(folder))
        with alarm(10), refused("MissingInput", str(path), problem), unprivileged():
            Reader(path)
        assert tree(Path(folder)) == before


def shrink(path: Path) -> None:
    os.truncate(path, 200)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(flip(GOOD, STARTS[CODES] + 5))


def replace(path: Path) -> None:
    write(path.with_name("other"), flip(GOOD, STARTS[CODES])).rename(path)


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        case(20, "shrinks", shrink, "SourceChanged", ("are gone: the file was cut while it was read",)),
        case(20, "rewritten", rewrite, "BadDigest", (A + "codes@0xc0: ",)),
        case(20, "replaced", replace, None, ()),
    ],
)
def test_a_file_that_changes_after_it_was_verified(
    tmp_path: Path, change: Callable[[Path], None], error: str | None, parts: tuple[str, ...]
) -> None:
    path = write(tmp_path / "m.hlwq", GOOD)
    with h.open(path) as file:
        file.reader.verify()
        expected = file.get_tensor("a").tolist()
        change(path)
        if error is None:  # the file that was verified is still the one that is open
            assert file.get_tensor("a").tolist() == expected
            return
        with refused(error, str(path), *parts):
            file.get_tensor("a")


# --- time and memory --------------------------------------------------------------------------------

NUMBERS = (0, 1, 2**31, 2**32 - 1, 2**32 + 1, 2**63, 2**64 - 1)
VERIFY = "verify(path)"


FIELDS = {
    "meta_off": "BadLayout", "meta_len": "BadLayout", "data_off": "BadHeader", "data_len": "BadLayout",
    "file_len": "WrongSize",
}  # fmt: skip


@pytest.mark.parametrize("fields", [case(10, "each-number-in-each-field", FIELDS)])
def test_a_wrong_number_in_the_header_allocates_nothing(tmp_path: Path, fields: dict[str, str]) -> None:
    for field in fields:
        (tmp_path / field).mkdir()
    wrong = [(field, number) for field in fields for number in NUMBERS]
    paths = [write(tmp_path / field / f"{i}.hlwq", base().build(**{field: n})) for i, (field, n) in enumerate(wrong)]
    for path, (field, number), result in zip(paths, wrong, measure(VERIFY, *paths), strict=True):
        check_measured(result, fields[field], str(path), f" {number}", memory=8 << 20)


@pytest.mark.parametrize("length", [case(12, "one-over-the-limit", (64 << 20) + 1), case(12, "1-tb", 10**12)])
def test_metadata_over_the_limit_is_not_read(tmp_path: Path, length: int) -> None:
    head = make_header(
        magic=GOOD[:8], major=1, header_len=128, data_off=128, meta_off=128, meta_len=length, file_len=128 + length
    )
    path = write_sparse(tmp_path / "m.hlwq", 128 + length, (0, head))
    (result,) = measure(VERIFY, path)
    check_measured(result, "BadLayout", str(path), f"metadata of {length} bytes, at most 67108864", memory=8 << 20)


EMPTY = canonical(empty().document)
SECTION = b'{"kind":"raw","length":0,"sha256":"' + b"0" * 64 + b'"}'
TENSOR = b'{"dtype":"U8","encoding":"raw","name":"a","reason":"","sections":[%b],"shape":[0]}'
ALIASED = b'{"dtype":"","encoding":"alias","name":"%05x","of":"0","shape":[]}'
LARGEST, MANY = 64 << 20, "more elements than any real one"


def tensors(content: bytes) -> bytes:
    return EMPTY.replace(b'"tensors":[]', b'"tensors":[' + content + b"]")


def aliases(count: int) -> bytes:
    return tensors(b",".join(ALIASED % i for i in range(count)))


def with_string(before: bytes, after: bytes) -> bytes:
    return EMPTY.replace(before + after, before + b"x" * (LARGEST - len(EMPTY) - 4) + after)


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "error", "part", "memory"),
    [
        case(26, "arrays", lambda: b"[" + b"[]," * (LARGEST // 3 - 1) + b"[]]", "BadMetadata", MANY, 200 << 20),
        case(26, "arrays-for-tensors", lambda: tensors(b"[]," * (21 << 20) + b"[]"), "BadMetadata", MANY, 200 << 20),
        case(26, "sections", lambda: tensors(TENSOR % b",".join([SECTION] * 650_000)), "BadTensor", "sections [",
             METADATA_MEMORY),
        case(27, "string", lambda: with_string(b'"zstd":"', b'none"'), "BadMetadata", "$.tool.zstd", MEMORY),
        case(27, "key", lambda: with_string(b'"', b'assets"'), "BadMetadata", "unknown field `xxx", MEMORY),
        case(27, "spaces", lambda: b" " * LARGEST, "BadMetadata", "truncated", MEMORY),
        case(32, "200001-tensors", lambda: aliases(200_001), "BadMetadata", "200001 tensors, at most 200000", MEMORY),
        case(52, "1000000-tensors", lambda: aliases(1_000_000), "BadMetadata", "1000000 tensors, at", MEMORY),
    ],
)  # fmt: skip
def test_large_metadata(tmp_path: Path, make: Callable[[], bytes], error: str, part: str, memory: int) -> None:
    document = make()
    assert len(document) <= LARGEST
    path = write(tmp_path / "m.hlwq", layout(document, []))
    (result,) = measure(VERIFY, path)
    path.unlink()
    check_measured(result, error, str(path), part, memory=memory)
