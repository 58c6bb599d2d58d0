"""The catalogue, C and D: tensors, sections and compressed frames."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from catalogue import STATUS, case, check_line, check_measured, measure
from catalogue_files import (
    BLOBS,
    CHECKED,
    DOCUMENT,
    GOOD,
    INF,
    NAN,
    TB,
    A,
    B,
    C,
    also,
    bad,
    check_bad_files,
    claimed,
    coded,
    cut,
    edited,
    header_of,
    levels,
    packed,
    paddings,
    section,
    sparse_container,
    swap,
    tensor_named,
    third_raw,
    value,
    write,
)
from conftest import Run
from vector_parts import (
    CODES,
    FLAGS,
    LEVELS,
    PACKED,
    PLAIN,
    SCALAR,
    SCALES,
    SIGNS,
    SIZE,
    STARTS,
    ZSTD_MAGIC,
    empty,
    flip,
    layout,
    put,
)
from vector_parts import zstd_frame as frame

import hlwq_convert as h
from hlwq_formats.reader import Reader

T, IN_TURN = 'tensor "t": ', bytes(range(8)) * 32

TENSORS = [
    bad(34, "twice", value("tensors.1.name", "a"), "BadTensor", A, "appears twice"),
    bad(35, "empty-long-or-control", (tensor_named(new) for new in
        ("", "c" * 513, "c\x1b[31m", "c\r", "c\n::error::", "c\0", "c\x7f")), "BadMetadata", "$.tensors[2].name"),
    bad(35, "over-512-bytes", tensor_named("é" * 300), "BadTensor", "name of 600 bytes, at most 512", 'tensor "éé'),
    bad(36, "rank-9", value("tensors.2.shape", [3] + [1] * 8), "BadMetadata", "length <= 8"),
    bad(36, "rank-200", value("tensors.2.shape", [1] * 200), "BadMetadata", "length <= 8"),
    bad(36, "negative", value("tensors.2.shape", [-1]), "BadMetadata", "$.tensors[2].shape"),
    bad(36, "nothing-times-2-to-the-63", value("tensors.2.shape", [0, 2**63]), "BadMetadata", "$.tensors[2].shape"),
    bad(37, "2-to-the-53", (value("tensors.2.shape", new) for new in
        ([2**27, 2**26], [2**32, 2**32], [2**40, 0, 2**40], [2**52] * 8)), "BadTensor", C, "2**53 elements"),
    bad(37, "more-than-the-file", value("tensors.2.shape", [TB]), "BadTensor", C, f"expected raw of {TB} bytes"),
    bad(38, "section-past-the-end", edited(third_raw(shape=[10**6], sections=claimed(10**6))), "BadLayout",
        "the sections of the metadata end at byte", "the header says"),
    bad(38, "length-that-wraps", edited(third_raw(shape=[2**53 - 1], sections=claimed(2**53 - 1))), "BadLayout",
        "the sections of the metadata end at byte 90071992547"),
    bad(38, "data-elsewhere", (layout(DOCUMENT, BLOBS, data_off=new) for new in (0, 64, 129, 192, 2**63)), "BadHeader",
        "data offset"),
    bad(39, "each-byte-of-padding", (flip(GOOD, at) for at in paddings()), "BadLayout", "padding at byte"),
    bad(39, "hole", [layout(DOCUMENT, BLOBS, gap=bytes(n)) for n in (8, 64)], "BadLayout", "does not follow data"),
    bad(39, "unlisted-section", layout(DOCUMENT, [*BLOBS, b"more"]), "BadLayout", "end at byte"),
    bad(39, "shared-section", edited(also(3, name="d")), "BadLayout", "end at byte"),
    bad(39, "out-of-order", value("tensors.0.name", "bb"), "BadTensor", B, "out of order"),
    bad(40, "kinds", [edited(swap), edited(cut(LEVELS)), edited(cut(SCALES)), edited(cut(CODES)),
                      value("tensors.0.sections", []),
                      edited(lambda p: p.tensors[SCALAR]["sections"].append(claimed(0)[0]))],
        "BadTensor", A, "expected ['codes', 'levels', 'scales']"),
    bad(41, "raw-length", value("tensors.2.sections.0.length", 4), "BadTensor", C, "4 bytes; expected raw of 3 bytes"),
    bad(41, "codes-length", section(CODES, bytes(33)), "BadTensor", A, "33 bytes; expected codes of 32"),
    bad(41, "decompressed-length", [packed(frame(SIZE), SIZE - 1), packed(frame(SIZE), SIZE + 1)], "BadFrames",
        'asset "d.txt"', "states 4096 bytes"),
    bad(41, "frame-lengths", value("assets.1.sections.0.zstd.frames", [12]), "BadMetadata", "d.txt", "frames of 12"),
    bad(42, "bits", (value("tensors.0.bits", new) for new in (0, 1, 9, 255)), "BadMetadata", "$.tensors[0].bits"),
    bad(42, "block-0", value("tensors.0.block", 0), "BadMetadata", "$.tensors[0].block"),
    *(bad(42, f"block-{n}", value("tensors.0.block", n), "UnsupportedFeature", A, f"blocks of {n}") for n in
      (1, 96, 256, 2**31)),
    bad(43, "number-of-scales", [section(SCALES, bytes(n)) for n in (0, 4)], "BadTensor", A, "scales of 2 bytes"),
    bad(44, "number-of-levels", (section(LEVELS, bytes(4 * n)) for n in (0, 1, 3, 5, 8)), "BadTensor", A,
        "expected levels of 16 bytes"),
    bad(44, "values", (section(LEVELS, levels(*new)) for new in
        ((-2, -1, 1, NAN), (-2, NAN, 1, 2), (-2, -1, 1, INF), (-INF, -1, 1, 2), (-2, -1, 1, 65505), (-2, 1, -1, 2),
         (-2, 1, 1, 2), (2, 1, -1, -2), (-2, -0.0, 0.0, 2))), "BadValues", A + "levels@0x100: ", "strictly increasing"),
    *(bad(45, f"compressed-{code}", coded(frame(256, IN_TURN[:at] + bytes([code]) + IN_TURN[at + 1 :])), "BadFrames",
          T + "codes@0x80: ", f"holds the code {code}, expected less than 8") for code, at in ((8, 0), (255, 255))),
    *(bad(47, f"scale-{bits:04x}", section(SCALES, struct.pack("<H", bits)), "BadValues", A + "scales@0x140: ",
          f"scale 0 is {bits:#06x}") for bits in (0x7E00, 0x7C00, 0xFC00, 0xAC00, 0x8000, 0x8001)),
    bad(48, "dtype", value("tensors.2.dtype", "F128"), "UnsupportedFeature", C, "unknown dtype F128"),
    bad(48, "length", section(FLAGS, b"\1\0"), "BadTensor", C, "raw section of 2 bytes; expected raw of 3"),
    bad(48, "boolean-2", section(FLAGS, b"\1\2\0"), "BadValues", C + "raw@0x180: ", "a boolean is 2, expected 0 or 1"),
    *(bad(49, name, value("tensors.1.of", of), "BadTensor", B, f'alias of "{of}"') for name, of in
      (("missing", "x"), ("self", "b"), ("later", "c"))),
    bad(49, "chain", edited(also(2, name="bb", of="b")), "BadTensor", 'tensor "bb"', 'alias of "b"'),
    bad(49, "cycle", edited(put("tensors.1.of", "bb"), also(2, name="bb", of="b")), "BadTensor", B, 'alias of "bb"'),
    bad(49, "shape", value("tensors.1.shape", [10, 10]), "BadTensor", B, "F32 [10, 10] is an alias", "is F32 [100]"),
    bad(49, "dtype", value("tensors.1.dtype", "I32"), "BadTensor", B, "I32 [100] is an alias", "is F32 [100]"),
    *(bad(50, name, flip(GOOD, STARTS[index]), "BadDigest", where, "SHA-256 is ", "expected ") for name, index, where in
      (("signs", SIGNS, "signs@0x80: "), ("codes", CODES, A + "codes@0xc0: "), ("levels", LEVELS, A + "levels@0x100: "),
       ("scales", SCALES, A + "scales@0x140: "), ("raw", FLAGS, C + "raw@0x180: "),
       ("asset", PLAIN, 'asset "c.json"@0x1c0: '), ("packed", PACKED, 'asset "d.txt"@0x200: '))),
    bad(51, "zeros", value("tensors.0.sections.0.sha256", "0" * 64), "BadDigest", A, "expected 0000000000000000"),
    bad(51, "length", (value("tensors.0.sections.0.sha256", new) for new in ("", "a" * 63, "a" * 65, "A" * 64)),
        "BadMetadata", "$.tensors[0].sections[0].sha256"),
]  # fmt: skip

FRAMES = [
    *(bad(55, f"states-{size}", packed(header_of(b"\xe0", struct.pack("<Q", size))), "BadFrames", "asset", "d.txt",
          f"states {size} bytes", f"expected {SIZE} bytes") for size in (2**40, 2**34, SIZE + 1, SIZE - 1, 0)),
    bad(55, "holds-more-or-less", [packed(frame(SIZE + 1, header=frame(SIZE)[:9])),
                                   packed(frame(SIZE - 1, header=frame(SIZE)[:9]))], "BadFrames", "frame 0 of"),
    *(bad(55, f"codes-state-{size}", coded(header_of(b"\xe0", struct.pack("<Q", size))), "BadFrames", T + "codes@0x80:",
          f"states {size} bytes", "expected 256 bytes") for size in (2**40, 257, 96, 0)),
    bad(56, "ratio", (packed(ZSTD_MAGIC + rest, 1 << 20) for rest in (b"", b"\xa0\0\0\x10\0", b"\xa0\0\0\x10\0\1\0\0")),
        "BadFrames", "frame 0 of"),
    bad(57, "compressed-codes", value("tensors.0.sections.0.zstd", {
        "frames": [32], "raw_length": 32, "raw_sha256": "0" * 64}), "BadTensor", A, "compressed; expected codes of 32"),
    bad(58, "more-than-the-frame-of-codes", (coded(new) for new in (
        frame(256, IN_TURN) + ZSTD_MAGIC + b"\x20\0\1\0\0", b"\x50\x2a\x4d\x18\0\0\0\0" + frame(256, IN_TURN),
        frame(256, IN_TURN) + b"\0", frame(256, IN_TURN)[4:])), "BadFrames", T, "frame 0 of"),
    bad(58, "more-than-the-frame", (packed(new) for new in (
        frame(SIZE) + ZSTD_MAGIC + b"\x20\0\1\0\0", b"\x50\x2a\x4d\x18\0\0\0\0" + frame(SIZE), frame(SIZE) + b"\0",
        frame(SIZE)[4:], header_of(b"\xa1\x07", struct.pack("<I", SIZE)))), "BadFrames", 'asset "d.txt"', "frame 0 of"),
    bad(59, "cut-codes", [coded(frame(256, IN_TURN)[:n]) for n in (1, 4, 6, 9, 12, 100, 267)], "BadFrames", T),
    bad(59, "cut", [packed(frame(SIZE)[:n]) for n in (4, 6, 9, 11, 12)] + [packed(CHECKED[:-4]), packed(CHECKED[:-1])],
        "BadFrames", 'asset "d.txt"', "frame 0 of"),
    bad(60, "window-2-to-the-31", packed(header_of(b"\x80\xa8", struct.pack("<I", SIZE))), "BadFrames", "2147483648",
        "a window of at most 8388608"),
    bad(61, "plain-but-packed", section(FLAGS, frame(3)), "BadTensor", C, f"{len(frame(3))} bytes; expected raw of 3"),
    bad(61, "packed-but-plain", packed(b"a" * 13), "BadFrames", 'asset "d.txt"', "does not start with the zstd magic"),
    bad(61, "unknown-codec", value("assets.1.sections.0.lz4", {}), "BadMetadata", "unknown field `lz4`"),
    bad(61, "codec-of-1.3", value("assets.1.sections.0.lz4", {}, minor=3), "UnsupportedFeature", "format 1.3", "lz4"),
    bad(62, "compressed-nothing", [packed(frame(0), 0), value("assets.1.sections.0.zstd.frames", [])], "BadMetadata"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "error", "parts"), [*TENSORS, *FRAMES])
def test_a_bad_file_is_refused(tmp_path: Path, files: list[bytes], error: str, parts: tuple[str, ...]) -> None:
    check_bad_files(tmp_path, files, error, parts)


def raws(path: Path, *names: str) -> Path:
    parts = empty()
    for name in sorted(names, key=str.encode):
        parts.raw(name, "U8", [1], b"x")
    return write(path, parts.build())


@pytest.mark.parametrize(
    "names",
    [
        case(34, "normalisation", ("caf\u00e9.weight", "cafe\u0301.weight")),
        case(34, "case", ("a.Weight", "a.weight")),
    ],
)
def test_names_that_look_alike_are_mentioned(tmp_path: Path, names: tuple[str, str]) -> None:
    path = raws(tmp_path / "m.hlwq", *names, "other")
    with Reader(path) as reader:
        reader.verify()
    warnings = h.inspect(path).warnings
    assert len(warnings) == 1
    assert all(name in warnings[0] for name in names)


HOSTILE = ("../up", "/etc/x", "C:\\x", "CON", "a\u202eb", "\u2066c", "\x9bd", "[red]e[/red]", "z" * 512)


@pytest.mark.parametrize(
    "names", [case(35, "names-like-paths", HOSTILE), case(35, "workflow-command", ("::error::f",))]
)
def test_names_are_printed_and_never_used(tmp_path: Path, run_tool: Run, names: tuple[str, ...]) -> None:
    path = raws(tmp_path / "m.hlwq", *names)
    with h.open(path) as file:
        assert [file.get_tensor(name).tobytes() for name in names] == [b"x"] * len(names)
    result = run_tool("inspect", path, "--verify")
    assert (result.returncode, result.stderr) == (0, "")
    assert all(line.isprintable() and not line.strip().startswith("::") for line in result.stdout.splitlines())
    for name in names:
        shown = name.lstrip(":").replace("\\", "\\\\").encode("ascii", "backslashreplace").decode()
        assert shown[:60] in result.stdout
    assert os.listdir(tmp_path) == ["m.hlwq"]


@pytest.mark.parametrize("name", [case(35, "longest-line", "\u202e" * 170)])
def test_the_whole_line_has_500_characters(tmp_path: Path, run_tool: Run, name: str) -> None:
    folder = tmp_path / ("f" * 200)
    folder.mkdir()
    parts = empty()
    parts.raw(name, "U8", [1] * 8, b"x")
    parts.alias(name + "x", "U8", [2**45] + [1] * 7, name)
    result = run_tool("inspect", write(folder / "m.hlwq", parts.build()))
    check_line(result, "BadTensor", "is an alias of")


@pytest.mark.parametrize("shape", [case(36, "rank-0", [])])
def test_a_tensor_without_dimensions(tmp_path: Path, shape: list[int]) -> None:
    parts = empty()
    parts.raw("s", "F32", shape, struct.pack("<f", 1.5))
    with h.open(write(tmp_path / "m.hlwq", parts.build())) as file:
        assert file.get_tensor("s").shape == ()
        assert file.get_tensor("s") == 1.5


@pytest.mark.parametrize("bits", [case(47, f"scale-{bits:04x}", bits) for bits in (0, 1, 0x3FF, 0x7BFF)])
def test_zero_and_subnormal_scales_are_good(tmp_path: Path, bits: int) -> None:
    scale = struct.unpack("<e", struct.pack("<H", bits))[0]
    with h.open(write(tmp_path / "m.hlwq", section(SCALES, struct.pack("<H", bits)))) as file:
        file.reader.verify()
        values = file.get_tensor("a")
    with h.open(write(tmp_path / "one.hlwq", section(SCALES, struct.pack("<e", 1)))) as file:
        assert values.tolist() == (scale * file.get_tensor("a").astype(float)).tolist()


@pytest.mark.parametrize(
    ("damaged", "parts", "good"),
    [
        case(50, "raw-and-asset", [FLAGS, PLAIN], [C, 'asset "c.json": '], "2 of 3"),
        case(50, "codes-and-raw", [CODES, FLAGS], [A, C], "0 of 3"),
        case(50, "offset", [FLAGS], [f"raw@{STARTS[FLAGS]:#x}: "], "2 of 3"),
    ],
)
def test_the_command_names_what_is_damaged_and_counts_what_is_good(
    tmp_path: Path, run_tool: Run, damaged: list[int], parts: list[str], good: str
) -> None:
    data = GOOD
    for index in damaged:
        data = flip(data, STARTS[index])
    path = write(tmp_path / "m.hlwq", data)
    result = run_tool("inspect", path, "--verify")
    check_line(result, "BadDigest", str(path), *parts, f"{good} tensors are good")
    if CODES not in damaged:
        with h.open(path) as file:
            assert file.get_tensor("a").shape == (100,)


# --- compression, time and memory -------------------------------------------------------------------


@pytest.mark.parametrize("inner", [case(63, "bomb-in-an-asset", frame(1 << 30))])
def test_an_asset_is_decompressed_once(tmp_path: Path, inner: bytes) -> None:
    parts = empty()
    parts.asset("d.txt", inner, [zstandard.ZstdCompressor().compress(inner)])
    with Reader(write(tmp_path / "m.hlwq", parts.build())) as reader:
        assert reader.read_asset("d.txt") == inner


BOMBS: dict[str, tuple[Callable[[], bytes], str, str, str]] = {
    "stated": (lambda: packed(frame(1 << 30)), "BadFrames", "d.txt", f"states {1 << 30} bytes"),
    "unstated": (lambda: packed(ZSTD_MAGIC + b"\0\x38" + frame(1 << 30)[9:]), "BadFrames", "d.txt", "it states "),
    "understated": (lambda: packed(frame(1 << 30, header=frame(SIZE)[:9])), "BadFrames", "d.txt", "frame 0 of"),
    "unlimited": (lambda: packed(frame(1 << 30), 1 << 30), "BadMetadata", "d.txt", "1 frames of"),
    "promised": (lambda: promised(1024), "BadMetadata", "d.txt", "over the limit of 67108864 bytes"),
    "codes": (lambda: coded(frame(1 << 30)), "BadFrames", T, f"states {1 << 30} bytes"),
    "codes-understated": (lambda: coded(frame(1 << 30, header=frame(256)[:9])), "BadFrames", T, "frame 0 of"),
}


@pytest.mark.parametrize("names", [case(54, "gib-in-32-kb", list(BOMBS))])
def test_a_bomb_takes_no_memory(tmp_path: Path, names: list[str]) -> None:
    paths = [write(tmp_path / f"{name}.hlwq", BOMBS[name][0]()) for name in names]
    for path, name, result in zip(paths, names, measure("verify(path)", *paths), strict=True):
        _, error, where, part = BOMBS[name]
        check_measured(result, error, str(path), where, part, memory=16 << 20)


def promised(mebibytes: int) -> bytes:
    """An asset whose frames hold what they should, more than an asset may."""
    parts = empty()
    parts.asset("d.txt", b"", [frame(1 << 20)] * mebibytes)
    parts.document["assets"][0]["sections"][0]["zstd"]["raw_length"] = mebibytes << 20
    return parts.build()


@pytest.mark.parametrize("action", [case(57, "inspect", "h.inspect(path)"), case(57, "open", "h.open(path).keys()")])
def test_a_tensor_of_1_tb_may_be_looked_at(tmp_path: Path, action: str) -> None:
    (result,) = measure(action, sparse_container(tmp_path / "m.hlwq", TB))
    check_measured(result, None, memory=8 << 20)


@pytest.mark.parametrize("bits", [case(57, "load-raw", None), case(57, "load-quantized", 2)])
def test_a_tensor_larger_than_the_memory_is_refused(tmp_path: Path, bits: int | None) -> None:
    path = sparse_container(tmp_path / "m.hlwq", 1 << 40, bits)
    (result,) = measure("[limit(256 << 20), h.open(path).get_tensor('a')]", path)
    assert result.error is not None
    assert STATUS[result.error] == 65
    check_measured(result, result.error, 'tensor "a"', "bytes")
