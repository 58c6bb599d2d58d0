"""The container: what is written reads back, all damage is noticed, nothing is published by half."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import signal
import struct
import threading
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlwq_formats import errors
from hlwq_formats import metadata as md
from hlwq_formats.atomic import AtomicFile
from hlwq_formats.file_ops import OPS
from hlwq_formats.layout import MAGIC, decode_header
from hlwq_formats.reader import Reader
from hlwq_formats.writer import Writer

deterministic = settings(derandomize=True, database=None, deadline=None, max_examples=400)

SIGNS = bytes.fromhex("05ccfa00e7eefb6964d32d0171442923")
CODES = bytes(range(64))  # 2 blocks of 2-bit codes
LEVELS = struct.pack("<4f", -1.5, -0.5, 0.5, 1.5)
SCALES = struct.pack("<2e", 0.25, 0.0)
NORM = bytes(range(0xF1, 0xF7))
CONFIG = b'{"model_type": "none"}'
LICENSE = b"Do what you like. " * 20
DEAR = b"something dear"


def write_sections(writer: Writer) -> md.Metadata:
    """A scalar tensor of 200 weights, an alias of it, a raw tensor, two assets (one compressed) and signs."""
    signs = writer.write_section("signs", SIGNS)
    kinds: list[tuple[md.Kind, bytes]] = [("codes", CODES), ("levels", LEVELS), ("scales", SCALES)]
    coded = [writer.write_section(kind, data) for kind, data in kinds]
    raw = [writer.write_section("raw", NORM)]
    names = {"LICENSE": LICENSE, "config.json": CONFIG}
    assets = [md.Asset(name, [writer.write_section("asset", data, compress=True)]) for name, data in names.items()]
    return md.Metadata(
        tensors=[
            md.ScalarTensor(
                "embed", "BF16", [2, 100], "recipe", bits=2, block=128, exponent=-3,
                source_sha256="0" * 64, sections=coded,
            ),
            md.AliasTensor("head", "BF16", [2, 100], of="embed"),
            md.RawTensor("norm", "F16", [3], "too small", raw),
        ],
        assets=assets,
        signs=signs,
        recipe=md.Recipe("uniform", 2, "default", []),
        source=md.Source(None, None, [md.SourceFile("model.safetensors", 1234)]),
        split=None,
        tool=md.Tool("hlwq-convert", "0", "0"),
    )  # fmt: skip


def write(path: Path, *, overwrite: bool = False) -> None:
    with Writer(path, overwrite=overwrite) as writer:
        writer.finish(write_sections(writer))


def refused(path: Path) -> bool:
    """Whether reading and verifying the whole file says that it is bad or unsupported."""
    try:
        with Reader(path) as reader:
            reader.verify()
    except errors.HlwqError as error:
        assert isinstance(error, errors.BadData) or error.exit_status == 69, repr(error)
        return True
    return False


def with_crc(head: bytes) -> bytes:
    return head[:124] + struct.pack("<I", zlib.crc32(head[:124]))


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Fail instead of waiting for ever."""

    def late(*_: object) -> NoReturn:
        raise AssertionError(f"blocked for {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of the small container."""
    path = tmp_path_factory.mktemp("container") / "small.hlwq"
    write(path)
    return path.read_bytes()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.hlwq"


def only(folder: Path, *names: str) -> bool:
    return sorted(p.name for p in folder.iterdir()) == sorted(names)


# --- reading back ---------------------------------------------------------------------------------


def test_what_was_written_reads_back(out: Path) -> None:
    write(out)
    with Reader(out) as reader:
        reader.verify()
        embed, norm = reader.tensors["embed"], reader.tensors["norm"]
        assert isinstance(embed, md.ScalarTensor)
        assert isinstance(norm, md.RawTensor)
        assert list(reader.tensors) == ["embed", "head", "norm"]
        assert reader.stored_tensor("head") is embed
        assert reader.read_section("tensor", "embed", "codes") == CODES
        assert reader.levels(embed).tolist() == [-1.5, -0.5, 0.5, 1.5]
        assert [s.tolist() for s in reader.scale_chunks(embed, 1)] == [[0.25], [0.0]]
        assert b"".join(reader.raw_chunks(norm, 4)) == NORM
        assert {name: reader.read_asset(name) for name in reader.assets} == {"LICENSE": LICENSE, "config.json": CONFIG}
        assert reader.signs()[:8].tolist() == [-1, 1, -1, 1, 1, 1, 1, 1]  # 0x05, lowest bit first


def test_one_asset_is_compressed_and_one_is_not(content: bytes) -> None:
    assert LICENSE not in content
    assert CONFIG in content


def test_sections_lie_on_multiples_of_64(content: bytes) -> None:
    for data in (SIGNS, CODES, LEVELS, SCALES, NORM, CONFIG):
        assert content.index(data, 128) % 64 == 0


def test_the_same_content_gives_the_same_bytes(content: bytes, out: Path) -> None:
    write(out)
    assert out.read_bytes() == content


def test_only_the_output_remains(out: Path) -> None:
    write(out)
    assert only(out.parent, out.name)


def test_unknown_names_are_usage_errors(out: Path) -> None:
    write(out)
    with Reader(out) as reader:
        with pytest.raises(errors.Usage, match="no tensor of this name"):
            reader.stored_tensor("nope")
        with pytest.raises(errors.Usage, match="no asset"):
            reader.read_asset("nope")


def test_compatible_feature_bits_are_ignored(content: bytes, out: Path) -> None:
    out.write_bytes(with_crc(content[:24] + b"\xff" * 8 + content[32:128]) + content[128:])
    assert not refused(out)


# --- damage ---------------------------------------------------------------------------------------


def test_every_flipped_bit_is_noticed(content: bytes, out: Path) -> None:
    out.write_bytes(content)
    undetected = []
    with out.open("r+b", buffering=0) as file:
        for at, bit in itertools.product(range(len(content)), range(8)):
            os.pwrite(file.fileno(), bytes([content[at] ^ 1 << bit]), at)
            if not refused(out):
                undetected.append((at, bit))
            os.pwrite(file.fileno(), content[at : at + 1], at)
    assert undetected == []
    assert not refused(out)


def test_every_truncation_is_noticed(content: bytes, out: Path) -> None:
    out.write_bytes(content)
    undetected = []
    for length in reversed(range(len(content))):
        os.truncate(out, length)
        if not refused(out):
            undetected.append(length)
    assert undetected == []


def test_every_appended_byte_is_noticed(content: bytes, out: Path) -> None:
    for byte in range(256):
        out.write_bytes(content + bytes([byte]))
        assert refused(out)


@pytest.mark.parametrize("offset", [32, 40, 48, 56, 64])
def test_a_hostile_number_in_the_header_is_bad_data(content: bytes, out: Path, offset: int) -> None:
    (true,) = struct.unpack_from("<Q", content, offset)
    powers = [2**n + d for n in (0, 7, 12, 31, 32, 53, 63, 64) for d in (-1, 0, 1)]
    for value in {*powers, true - 64, true - 1, true + 1, true + 64, 2**64 - true} - {true}:
        if 0 <= value < 2**64:
            head = content[:offset] + struct.pack("<Q", value) + content[offset + 8 : 128]
            out.write_bytes(with_crc(head) + content[128:])
            with pytest.raises(errors.BadData):
                Reader(out)


@deterministic
@given(st.data())
def test_hostile_numbers_together_are_bad_data(content: bytes, data: st.DataObject) -> None:
    size = len(content)
    true = struct.unpack_from("<5Q", content, 32)
    near = st.sampled_from([*true, size, *(n + d for n in true for d in (-64, -1, 1, 64))])
    number = near | st.integers(0, 2**64 - 1) | st.sampled_from([2**64 - n for n in (1, 64, 128, size)])
    values = tuple(data.draw(number.filter(lambda n: 0 <= n < 2**64)) for _ in range(5))
    head = with_crc(content[:32] + struct.pack("<5Q", *values) + content[72:128])
    if values != true:
        with pytest.raises(errors.BadData):
            decode_header(head, size, "x.hlwq")


@pytest.mark.parametrize(("bit", "name"), [(3, "unknown"), (63, "unknown")])
def test_an_unknown_incompatible_feature_is_unsupported_and_named(
    content: bytes, out: Path, bit: int, name: str
) -> None:
    out.write_bytes(with_crc(content[:16] + struct.pack("<Q", 1 << bit) + content[24:128]) + content[128:])
    with pytest.raises(errors.UnsupportedFeature, match=rf"bit {bit} \({name}"):
        Reader(out)


@pytest.mark.parametrize(("major", "kind"), [(0, errors.BadHeader), (2, errors.UnsupportedVersion)])
def test_other_major_versions_are_not_read(content: bytes, out: Path, major: int, kind: type[errors.HlwqError]) -> None:
    out.write_bytes(with_crc(content[:8] + struct.pack("<H", major) + content[10:128]) + content[128:])
    with pytest.raises(kind):
        Reader(out)


def test_a_header_of_zeros_is_an_unfinished_conversion(content: bytes, out: Path) -> None:
    out.write_bytes(bytes(128) + content[128:])
    with pytest.raises(errors.Incomplete, match="did not finish"):
        Reader(out)


def test_a_file_that_shrinks_while_it_is_read_has_changed(content: bytes, out: Path) -> None:
    out.write_bytes(content)
    with Reader(out) as reader:
        os.truncate(out, 200)
        with pytest.raises(errors.SourceChanged):
            reader.verify()


# --- what is no container -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (b"\n  <html lang='en'>", "HTML page"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"PK\x03\x04\x14\0\0\0", "zip archive"),
        (struct.pack("<Q", 64) + b'{"__metadata__":{}}', "safetensors file"),
        (b"\x28\xb5\x2f\xfd\0\0", "zstd file"),
        (MAGIC.replace(b"\r\n", b"\n"), "text-mode transfer"),
        (MAGIC.replace(b"\n", b"\r\n"), "text-mode transfer"),
        (b"", "0 of 128"),
        (b"\x7fELF\x02\x01\x01\0", "7f 45 4c 46"),
    ],
)
@pytest.mark.parametrize("padding", [0, 500])
def test_other_formats_are_recognised(out: Path, head: bytes, what: str, padding: int) -> None:
    if not head and padding:
        what = "did not finish"  # 128 zeros and more are what an interrupted writer leaves
    out.write_bytes(head + bytes(padding))
    with pytest.raises(errors.BadData, match=what):
        Reader(out)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_dangling(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def make_link(path: Path) -> None:
    target = path.parent / "target"
    target.write_bytes(DEAR)
    path.symlink_to(target)


@pytest.mark.parametrize("make", [make_fifo, make_folder, make_dangling, Path.exists])
def test_what_is_no_regular_file_is_a_missing_input(out: Path, make: Callable[[Path], object]) -> None:
    make(out)
    with deadline(60), pytest.raises(errors.MissingInput):
        Reader(out)


def test_a_path_with_a_nul_is_a_missing_input() -> None:
    with pytest.raises(errors.MissingInput):
        Reader("a\0b")


# --- the output -----------------------------------------------------------------------------------


def test_a_second_writer_is_locked_out(out: Path, content: bytes) -> None:
    with Writer(out) as first:
        with pytest.raises(errors.Locked):
            Writer(out).__enter__()
        first.finish(write_sections(first))
    assert out.read_bytes() == content


def test_the_lock_ends_with_its_writer(out: Path) -> None:
    with Writer(out):
        pass
    write(out)
    assert not refused(out)


def test_a_stale_part_is_unlinked_and_not_truncated(tmp_path: Path, out: Path) -> None:
    dear = tmp_path / "dear"
    dear.write_bytes(DEAR)
    os.link(dear, f"{out}.part")
    write(out)
    assert dear.read_bytes() == DEAR
    assert only(tmp_path, "dear", out.name)


@pytest.mark.parametrize("make", [make_fifo, make_folder, make_link])
def test_a_part_that_is_no_regular_file_is_left_alone(out: Path, make: Callable[[Path], None]) -> None:
    part = Path(f"{out}.part")
    make(part)
    before = os.lstat(part)
    with deadline(60), pytest.raises(errors.CannotCreate):
        Writer(out).__enter__()
    assert os.path.samestat(os.lstat(part), before)
    if part.is_symlink():
        assert part.read_bytes() == DEAR


def test_an_existing_output_is_refused_and_untouched(out: Path) -> None:
    out.write_bytes(DEAR)
    with pytest.raises(errors.CannotCreate, match="exists already"):
        Writer(out).__enter__()
    assert out.read_bytes() == DEAR
    assert only(out.parent, out.name)


def test_an_output_that_appears_while_writing_is_untouched(out: Path) -> None:
    with Writer(out) as writer:
        metadata = write_sections(writer)
        out.write_bytes(DEAR)
        with pytest.raises(errors.CannotCreate, match="appeared"):
            writer.finish(metadata)
    assert out.read_bytes() == DEAR
    assert only(out.parent, out.name)


def test_overwrite_replaces_a_regular_file(out: Path, content: bytes) -> None:
    out.write_bytes(DEAR)
    write(out, overwrite=True)
    assert out.read_bytes() == content


def test_overwrite_keeps_the_old_file_until_the_end(out: Path) -> None:
    out.write_bytes(DEAR)
    with Writer(out, overwrite=True) as writer:
        write_sections(writer)
    assert out.read_bytes() == DEAR


@pytest.mark.parametrize("make", [make_fifo, make_folder, make_dangling, make_link])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_no_regular_file_is_refused(out: Path, make: Callable[[Path], None], overwrite: bool) -> None:
    make(out)
    before = os.lstat(out)
    with deadline(60), pytest.raises(errors.CannotCreate, match="not a regular file"):
        Writer(out, overwrite=overwrite).__enter__()
    assert os.path.samestat(os.lstat(out), before)
    assert not Path(f"{out}.part").exists()


def test_a_link_that_appears_while_overwriting_is_refused(out: Path) -> None:
    with Writer(out, overwrite=True) as writer:
        metadata = write_sections(writer)
        make_link(out)
        with pytest.raises(errors.CannotCreate, match="not a regular file"):
            writer.finish(metadata)
    assert out.is_symlink()
    assert out.read_bytes() == DEAR


@pytest.mark.parametrize("name", ["missing/out.hlwq", "file/out.hlwq", "a\0b", "n" * 300])
def test_an_impossible_place_cannot_be_created(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.CannotCreate):
        Writer(tmp_path / name).__enter__()
    assert only(tmp_path, "file")


def test_leaving_without_finish_leaves_nothing(out: Path) -> None:
    with Writer(out) as writer:
        writer.reserve(10_000)
        write_sections(writer)
        assert only(out.parent, f"{out.name}.part")
    assert only(out.parent)


def test_an_interrupt_leaves_nothing(out: Path) -> None:
    def interrupt(_: Reader) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Writer(out) as writer:
        writer.finish(write_sections(writer), verify=interrupt)
    assert only(out.parent)


def test_what_is_placed_takes_no_thread_to_hash(out: Path) -> None:
    """Sections of many tensors may be open at once; what is appended is hashed beside."""
    data = bytes(5 << 20)

    def hashing() -> int:
        return sum(thread.name.startswith("hlwq-hash") for thread in threading.enumerate())

    with Writer(out) as writer:
        placed, appended = (writer.open_section("asset", 2 * len(data)) for _ in range(2))
        for start in (len(data), 0):
            placed.place(start, data)
            placed.count(data)
        assert hashing() == 0
        appended.write(data)
        appended.write(data)
        assert hashing() == 1
        assert placed.done().sha256 == appended.done().sha256 == hashlib.sha256(2 * data).hexdigest()


def test_reserved_space_that_is_not_used_is_cut_off(out: Path, content: bytes) -> None:
    with Writer(out) as writer:
        writer.reserve(100_000)
        writer.finish(write_sections(writer))
    assert out.read_bytes() == content


def test_the_header_is_written_after_everything_was_checked(out: Path) -> None:
    heads = []
    with Writer(out) as writer:
        metadata = write_sections(writer)
        writer.finish(metadata, verify=lambda _: heads.append(Path(f"{out}.part").read_bytes()[:128]))
    assert heads == [bytes(128)]


def test_a_failed_check_publishes_nothing(out: Path) -> None:
    def fail(_: Reader) -> None:
        raise errors.SelfCheckFailed("not what was meant")

    with Writer(out) as writer, pytest.raises(errors.SelfCheckFailed):
        writer.finish(write_sections(writer), verify=fail)
    assert only(out.parent)


def damage_write(monkeypatch: pytest.MonkeyPatch, nth: int) -> list[int]:
    """Flip a bit in write `nth` of those behind the header; returns the places of these writes, to be filled."""
    honest = AtomicFile.write
    places: list[int] = []

    def damaged(self: AtomicFile, offset: int, data: bytes) -> None:
        if data and offset >= 128:
            places.append(offset)
            if len(places) == nth:
                data = bytes([data[0] ^ 1]) + data[1:]
        honest(self, offset, data)

    monkeypatch.setattr(AtomicFile, "write", damaged)
    return places


WRITES = 14  # 7 sections, the padding after each but the codes, the metadata


def test_the_number_of_writes_is_known(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = damage_write(monkeypatch, 0)
    write(out)
    assert len(places) == WRITES


@pytest.mark.parametrize("nth", range(1, WRITES + 1))
def test_a_damaged_write_publishes_nothing(out: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    damage_write(monkeypatch, nth)
    with Writer(out) as writer, pytest.raises(errors.SelfCheckFailed, match="nothing was published"):
        writer.finish(write_sections(writer))
    assert only(out.parent)


def test_a_damaged_header_publishes_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = AtomicFile.write

    def damaged(self: AtomicFile, offset: int, data: bytes) -> None:
        honest(self, offset, data[:-1] + b"\1" if any(data) and offset == 0 else data)

    monkeypatch.setattr(AtomicFile, "write", damaged)
    with Writer(out) as writer, pytest.raises(errors.SelfCheckFailed, match="header does not read back"):
        writer.finish(write_sections(writer))
    assert only(out.parent)


def test_sections_that_are_not_listed_are_a_bug(out: Path) -> None:
    with Writer(out) as writer:
        metadata = write_sections(writer)
        writer.write_section("asset", b"more")
        with pytest.raises(errors.Internal):
            writer.finish(metadata)
    assert only(out.parent)


def test_a_section_takes_exactly_its_length(out: Path) -> None:
    with Writer(out) as writer:
        section = writer.open_section("raw", 4)
        section.write(b"abc")
        with pytest.raises(errors.Internal, match="lacks 1 of 4"):
            section.done()
        with pytest.raises(errors.Internal, match="overflows"):
            section.write(b"de")


@pytest.mark.parametrize("flag", [True, False])
def test_renaming_refuses_to_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: bool) -> None:
    if not flag:  # a system whose rename has no such flag
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: types.SimpleNamespace())
        monkeypatch.setattr("sys.platform", "linux")
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"new")
    target.write_bytes(DEAR)
    with pytest.raises(FileExistsError):
        OPS.rename_new(str(source), str(target))
    assert (source.read_bytes(), target.read_bytes()) == (b"new", DEAR)
    target.unlink()
    OPS.rename_new(str(source), str(target))
    assert target.read_bytes() == b"new"
    assert only(tmp_path, "target")


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate"])
def test_a_full_disk_is_an_io_failure_with_figures(out: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full, raising=False)
    with pytest.raises(errors.IoFailure, match=r"needs \d+ bytes, \d+ more are free") as caught, Writer(out) as writer:
        writer.reserve(4321)
    assert caught.value.exit_status == 74
    assert ("4321" in str(caught.value)) == (call == "posix_fallocate")
    assert only(out.parent)


def test_a_write_that_comes_short_is_continued(out: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    write(out)
    assert out.read_bytes() == content


def test_a_failed_sync_publishes_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with Writer(out) as writer, pytest.raises(errors.IoFailure, match="Input/output error"):
        writer.finish(write_sections(writer))
    assert only(out.parent)


# --- messages -------------------------------------------------------------------------------------

hostile = st.text(st.sampled_from('a"\\\n\r\t\x1b\x00\x7f\x85\u2028\u202e\u2066\u200b\ufeff\ud800é漢😀'), max_size=300)


def is_plain_line(message: str) -> bool:
    return len(message) <= 500 and message.isprintable()


@deterministic
@given(hostile, hostile, hostile)
def test_messages_are_one_printable_line(file: str, tensor: str, hint: str) -> None:
    error = errors.BadTensor("out of order", file=file, tensor=tensor, section="codes", offset=64, hint=hint)
    assert is_plain_line(str(error))


@deterministic
@given(hostile, st.integers(8, 300))
def test_escaped_texts_are_printable_and_short(text: str, limit: int) -> None:
    shown = errors.escape(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit


@deterministic
@given(hostile, hostile)
def test_different_texts_look_different(a: str, b: str) -> None:
    assert (errors.escape(a, 10_000) == errors.escape(b, 10_000)) == (a == b)


def with_metadata(content: bytes, edit: Callable[[bytes], bytes]) -> bytes:
    """The container with another metadata document, all checksums repaired."""
    meta_off, meta_len = struct.unpack_from("<QQ", content, 32)
    document = edit(content[meta_off : meta_off + meta_len])
    digest = hashlib.sha256(document).digest()
    head = content[:40] + struct.pack("<Q", len(document)) + content[48:64]
    head += struct.pack("<Q", meta_off + len(document)) + digest + content[104:128]
    return with_crc(head) + content[128:meta_off] + document


@pytest.mark.parametrize("old", [b'"name":"norm"', b'"name":"LICENSE"', b'"of":"embed"', b'"dtype":"F16"'])
def test_names_from_a_hostile_file_are_escaped(content: bytes, out: Path, old: bytes) -> None:
    name = msgspec.json.encode("A\u202egnp.\u2066\x85\u2028" + "x/" * 200)
    out.write_bytes(with_metadata(content, lambda d: d.replace(old, old.split(b":")[0] + b":" + name)))
    with pytest.raises(errors.HlwqError) as caught:
        Reader(out)
    assert is_plain_line(str(caught.value))
    assert "\\u202e" in str(caught.value)


@pytest.mark.parametrize("key", ["\x1b[31m", "\u202e", "k" * 5000, "\n"])
def test_keys_from_a_hostile_file_are_escaped(content: bytes, out: Path, key: str) -> None:
    encoded = msgspec.json.encode({key: 1})[1:-1]
    out.write_bytes(with_metadata(content, lambda d: d[:-1] + b"," + encoded + b"}"))
    with pytest.raises(errors.BadMetadata) as caught:
        Reader(out)
    assert is_plain_line(str(caught.value))


def test_an_unknown_key_of_a_newer_minor_version_is_unsupported(content: bytes, out: Path) -> None:
    newer = with_metadata(content, lambda d: d[:-1] + b',"turbo":1}')
    out.write_bytes(with_crc(newer[:10] + struct.pack("<H", 3) + newer[12:128]) + newer[128:])
    with pytest.raises(errors.UnsupportedFeature, match="turbo"):
        Reader(out)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d + b" ",
        lambda d: d.replace(b":2,", b": 2,", 1),
        lambda d: d.replace(b'"norm"', b'"n\\u006frm"'),
        lambda d: d[:-1] + b',"split":null}',
        lambda d: d.replace(b'"bits":2,', b'"bits":2.0,', 1),
        lambda d: b"[" * 100_000,
        lambda d: d[:-1] + b"\xff}",
    ],
    ids=["space", "inner space", "escape", "twice", "float", "deep", "not UTF-8"],
)
def test_only_the_canonical_document_is_read(content: bytes, out: Path, edit: Callable[[bytes], bytes]) -> None:
    out.write_bytes(with_metadata(content, edit))
    with pytest.raises(errors.BadMetadata):
        Reader(out)


@pytest.mark.parametrize("name", ["\x1b]0;x\x07.hlwq", "\u202eqwlh.hlwq", "a\nb.hlwq", os.fsdecode(b"\xff.hlwq")])
def test_hostile_file_names_are_escaped(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for action in (Reader, lambda p: (p.mkdir(), Writer(p).__enter__())):
        with pytest.raises(errors.HlwqError) as caught:
            action(path)
        assert is_plain_line(str(caught.value))
