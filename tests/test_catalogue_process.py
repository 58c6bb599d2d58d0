"""The catalogue, H and J: outputs, resources, scripts; and that no row of it is lost."""

from __future__ import annotations

import errno
import importlib
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from catalogue import (
    CONVERT,
    COVERED,
    NOT_APPLICABLE,
    case,
    check_line,
    child,
    left,
    refuse_to_convert,
    refused,
    rows_of,
    tree,
    unprivileged,
)
from catalogue_files import write
from conftest import Run
from models import normal, write_model
from test_catalogue_values import sparse_model

import hlwq_convert as h
from hlwq_formats import files
from hlwq_formats.file_ops import OPS
from hlwq_formats.safetensors_dir import ModelDir

pytestmark = pytest.mark.once

TENSORS = {"a.weight": normal((64, 80), 1), "b.weight": normal((48, 96), 2), "norm": normal((80,), 3)}
SHARD = "model.safetensors"
DEAR = b"something dear"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m", TENSORS)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What `source` is converted to; also compiles the kernels."""
    folder = tmp_path_factory.mktemp("new")
    h.convert(write_model(folder / "m", TENSORS), folder / "o.hlwq")
    return (folder / "o.hlwq").read_bytes()


# --- H: where the output goes -----------------------------------------------------------------------


def make_file(path: Path) -> None:
    write(path, DEAR)


def make_link(path: Path) -> None:
    path.symlink_to(write(path.with_name("target"), DEAR))


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


KINDS = {"file": make_file, "folder": Path.mkdir, "link": make_link, "dangling-link": make_dangling, "fifo": os.mkfifo}


@pytest.mark.parametrize(
    ("make", "overwrite"),
    [
        case(107, f"{name}{'-overwritten' * overwrite}", make, overwrite)
        for name, make in KINDS.items()
        for overwrite in (False, True)
        if (name, overwrite) != ("file", True)
    ],
)
def test_an_output_that_exists(source: Path, new: bytes, make: Callable[[Path], object], overwrite: bool) -> None:
    out = source.parent / "o.hlwq"
    make(out)
    before = tree(source.parent)
    refuse_to_convert(source, out, "CannotCreate", str(out), "exists", overwrite=overwrite)
    assert tree(source.parent) == before


@pytest.mark.parametrize("old", [case(107, "file-overwritten", DEAR)])
def test_an_output_that_is_replaced(source: Path, new: bytes, old: bytes) -> None:
    out = write(source.parent / "o.hlwq", old)
    h.convert(source, out, overwrite=True)
    assert out.read_bytes() == new
    assert left(source.parent) == ["m", "o.hlwq"]


def is_hard_link(source: Path) -> Path:
    os.link(source / SHARD, source.parent / "o.hlwq")
    return source.parent / "o.hlwq"


def is_link(source: Path) -> Path:
    (source.parent / "o.hlwq").symlink_to(source / SHARD)
    return source.parent / "o.hlwq"


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        case(108, "hard-link", is_hard_link, "is the source file model.safetensors"),
        case(108, "link", is_link, "lies inside the model directory"),
        case(108, "shard", lambda source: source / SHARD, "is the source file model.safetensors"),
        case(108, "config", lambda source: source / "config.json", "is the source file config.json"),
    ],
)
def test_an_output_that_is_the_source(source: Path, new: bytes, place: Callable[[Path], Path], problem: str) -> None:
    out, inside = place(source), {"allow_inside_source": True} if "inside" not in problem else {}
    before = tree(source.parent)
    refuse_to_convert(source, out, "CannotCreate", str(out), problem, overwrite=True, **inside)
    assert tree(source.parent) == before


@pytest.mark.parametrize(
    "place", [case(109, "inside", "o.hlwq"), case(109, "below", "sub/o.hlwq"), case(109, "linked", "../link/o.hlwq")]
)
def test_an_output_in_the_model_directory(source: Path, new: bytes, place: str) -> None:
    (source / "sub").mkdir()
    (source.parent / "link").symlink_to(source)
    refuse_to_convert(source, source / place, "CannotCreate", "inside the model directory", "--allow-inside-source")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        case(109, "allowed-by-the-command", True, "o.hlwq"),
        case(109, "allowed", False, "o.hlwq"),
        case(109, "named-like-a-licence", False, "LICENSE.hlwq"),
    ],
)
def test_an_output_in_the_model_directory_on_request(
    source: Path, new: bytes, run_tool: Run, command: bool, name: str
) -> None:
    if command:
        assert run_tool("convert", source, source / name, "--allow-inside-source").returncode == 0
    for _ in range(2):  # what the first run wrote is none of the second's business
        h.convert(source, source / name, overwrite=True, allow_inside_source=True)
        assert (source / name).read_bytes() == new
    assert left(source) == sorted(["config.json", SHARD, name])


PLACES = ["none/o.hlwq", "m/model.safetensors/o.hlwq", "n" * 300, "closed/o.hlwq"]


@pytest.mark.parametrize("place", [case(110, name, place) for name, place in zip(
    ["no-folder", "no-folder-but-a-file", "long-name", "not-writable"], PLACES, strict=True)])  # fmt: skip
def test_an_impossible_output_is_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def read(*_: object) -> NoReturn:
        raise AssertionError("weights are read")

    monkeypatch.setattr(ModelDir, "read_pieces", read)
    monkeypatch.setattr(ModelDir, "read", read)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        source = write_model(Path(folder, "m"), {"norm": TENSORS["norm"]})  # needs no kernels, which root compiled
        Path(folder, "closed").mkdir(mode=0o555)
        before = tree(Path(folder))
        with refused("CannotCreate", "o.hlwq" if "/" in place else "nnn"), unprivileged():
            h.convert(source, Path(folder, place))
        assert tree(Path(folder)) == before


def mounted(folder: Path, options: str, code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command with a tmpfs of its own at `folder`."""
    script = f'mount -t tmpfs -o {options} tmpfs {folder} && exec "$@"'
    command = ["unshare", *(["-m"] if os.geteuid() == 0 else ["-r", "-m"]), "sh", "-c", script, "sh"]
    command += [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    return done


@pytest.mark.parametrize("options", [case(110, "read-only-file-system", "ro")])
def test_a_read_only_file_system(source: Path, options: str) -> None:
    (source.parent / "out").mkdir()
    done = mounted(source.parent / "out", options, CONVERT, "-q", source, source.parent / "out" / "o.hlwq")
    check_line(done, "CannotCreate", "o.hlwq", "not writable")


# --- H: failures of the machine ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        case(112, "eio", errno.EIO),
        case(128, "network-file-system-drops", errno.ESTALE),
        case(128, "network-file-system-times-out", errno.ETIMEDOUT),
    ],
)
@pytest.mark.parametrize("at", [0, 100])
def test_a_read_that_fails(source: Path, new: bytes, monkeypatch: pytest.MonkeyPatch, code: int, at: int) -> None:
    honest, reads = files.InputFile._pread, []

    def pread(self: files.InputFile, length: int, offset: int) -> bytes:
        reads.append(offset)
        if self.name == SHARD and offset > at:
            raise OSError(code, os.strerror(code))
        return honest(self, length, offset)

    monkeypatch.setattr(files.InputFile, "_pread", pread)
    with refused("IoFailure", SHARD, "cannot read at", os.strerror(code)):
        h.convert(source, source.parent / "o.hlwq")
    assert left(source.parent) == ["m"]
    assert reads


@pytest.mark.parametrize("code", [case(112, "fsync-once", 1), case(112, "fsync-for-ever", 99)])
def test_a_sync_that_fails_is_not_tried_again(
    source: Path, new: bytes, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    honest, calls = OPS.sync, []

    def sync(fd: int) -> None:
        calls.append(fd)
        if len(calls) <= code:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        honest(fd)

    monkeypatch.setattr(OPS, "sync", sync, raising=False)
    with refused("IoFailure", "o.hlwq.part", "Input/output error"):
        h.convert(source, source.parent / "o.hlwq")
    assert (len(calls), left(source.parent)) == (1, ["m"])


@pytest.mark.parametrize("file", [case(128, "removed", SHARD)])
def test_a_source_that_is_removed(source: Path, new: bytes, file: str) -> None:
    def remove(*_: object) -> None:
        (source / file).unlink(missing_ok=True)

    with refused("SourceChanged", file, "no longer readable", "try again"):
        h.convert(source, source.parent / "o.hlwq", progress=remove)
    assert left(source.parent) == ["m"]


@pytest.mark.parametrize("folder", [case(114, "folder", "real"), case(114, "linked-folder", "link")])
def test_a_part_lies_beside_its_output(source: Path, new: bytes, folder: str) -> None:
    (source.parent / "real").mkdir()
    (source.parent / "link").symlink_to("real")
    out, seen = source.parent / folder / "o.hlwq", []
    h.convert(source, out, progress=lambda *_: seen.append(left(source.parent / "real")))
    assert seen[0] == ["o.hlwq.part"]
    assert (left(source.parent / "real"), out.read_bytes()) == (["o.hlwq"], new)


@pytest.mark.parametrize("operation", [case(114, f"nfs-{name}", name) for name in ("write", "sync", "truncate")])
def test_a_network_file_system_that_drops(
    source: Path, new: bytes, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    def before(name: str) -> None:
        if name == operation:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(OPS, "before", before, raising=False)
    with refused("IoFailure", "o.hlwq.part", os.strerror(errno.ESTALE)):
        h.convert(source, source.parent / "o.hlwq")
    assert left(source.parent) == ["m"]


MEMORY_ERROR = """
from hlwq_convert.kernels import encode
def encoder(code):
    raise MemoryError
encode.encoder = encoder
"""
MEMORY_LIMIT = f"""
import re, resource, sys, hlwq_convert as h
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from models import write_model, normal
h.convert(write_model(Path(sys.argv[1]).parent / "n", {{"w": normal((64, 96))}}), Path(sys.argv[1]).parent / "n.h")
size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20),) * 2)
"""


@pytest.mark.parametrize("code", [case(115, "memory-error", MEMORY_ERROR), case(115, "limit", MEMORY_LIMIT)])
def test_too_little_memory(source: Path, code: str) -> None:
    if code == MEMORY_LIMIT:  # small weights would fit into what is there already
        source = sparse_model(source.parent / "large", "U8", (64 << 20,), 64 << 20)
    done = child(code + CONVERT, source, source.parent / "o.hlwq", "--quiet", "--workers", "16")
    assert done.returncode in (70, 74)
    check_line(done, "IoFailure" if done.returncode == 74 else "Internal")
    assert "o.hlwq" not in " ".join(left(source.parent))


LIMITS = {
    "files": ("ulimit -n 16", {}),
    "umask": ("umask 077", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Pacific/Kiritimati"}),
}


@pytest.mark.parametrize("name", [case(116, name, name) for name in LIMITS])
def test_unusual_surroundings_change_nothing(source: Path, new: bytes, name: str) -> None:
    shell, env = LIMITS[name]
    command = ["bash", "-c", f'{shell} && exec "$@"', "bash", sys.executable, "-c", CONVERT, "-q", source, "o.hlwq"]
    done = subprocess.run(command, env={**os.environ, **env}, cwd=source.parent, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (source.parent / "o.hlwq").read_bytes() == new
    if name == "umask":
        assert stat.S_IMODE((source.parent / "o.hlwq").stat().st_mode) == 0o600


@pytest.mark.parametrize("tool", [case(116, "closed-pipe", "inspect")])
def test_a_pipe_that_nobody_reads(new: bytes, tmp_path: Path, tool: str) -> None:
    path = write(tmp_path / "o.hlwq", new)
    reading, writing = os.pipe()
    os.close(reading)
    code = f"from hlwq_convert.cli.{tool} import main; main()"
    done = subprocess.run([sys.executable, "-c", code, path], stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


# --- J: scripts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [case(136, "small-disk", 1 << 30)])
def test_a_disk_that_is_too_small_shows_at_once(tmp_path: Path, size: int) -> None:
    source = sparse_model(tmp_path / "m", "U8", (size,), size)
    (tmp_path / "out").mkdir()
    began = time.monotonic()
    done = mounted(tmp_path / "out", "size=1m", CONVERT, "-q", source, tmp_path / "out" / "o.hlwq")
    assert time.monotonic() - began < 5
    check_line(done, "IoFailure", "o.hlwq.part", f"the file needs {size}"[:18], "more are free", "free space")


@pytest.mark.parametrize("size", [case(136, "cannot-reserve", 40 * 10**9)])
def test_a_disk_that_is_too_small_and_cannot_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    source = sparse_model(tmp_path / "m", "U8", (size,), size)

    def reserve(fd: int, size: int) -> NoReturn:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def before(operation: str) -> None:
        writes.append(operation)
        assert writes.count("write") < 10, "it begins to write all the same"

    writes: list[str] = []
    real = os.statvfs(tmp_path)
    small = os.statvfs_result((real.f_bsize, 4096, *real[2:4], 14 * 10**9 // 4096, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: small)
    monkeypatch.setattr(OPS, "reserve", reserve, raising=False)
    monkeypatch.setattr(OPS, "before", before, raising=False)
    with refused("IoFailure", "o.hlwq", "more are free"):
        h.convert(source, tmp_path / "o.hlwq")
    assert left(tmp_path) == ["m"]


@pytest.mark.parametrize("script", [case(137, "in-a-script", '"$@" && echo good || echo bad || true')])
def test_a_damaged_file_stops_a_script(new: bytes, tmp_path: Path, script: str) -> None:
    verify = [sys.executable, "-c", "from hlwq_convert.cli.inspect import main; main()"]
    for data, said in ((new, "good"), (new[:200] + bytes([new[200] ^ 1]) + new[201:], "bad")):
        path = write(tmp_path / "o.hlwq", data)
        command = ["bash", "-c", script, "bash", *verify, path, "--verify", "--quiet"]
        assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == f"{said}\n"


# --- all of it --------------------------------------------------------------------------------------


def test_no_row_is_lost() -> None:
    files = Path(__file__).parent.glob("test_catalogue_*.py")
    modules = [importlib.import_module(file.stem) for file in files]
    tested = set().union(*map(rows_of, modules))
    tables = [tested, set(COVERED), set(NOT_APPLICABLE)]
    assert sorted(row for rows in tables for row in rows) == list(range(1, 138))


def test_what_covers_a_row_is_there() -> None:
    for tests in COVERED.values():
        for file, name in (test.split("::") for test in tests):
            text = (Path(__file__).parents[1] / file).read_text()
            assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{file}::{name}"
    assert all(reason.strip() and "\n" not in reason for reason in NOT_APPLICABLE.values())
