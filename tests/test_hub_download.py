"""hlwq-convert of a Hub id, through the real client and over HTTP."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from hub_client import hub, model_files, run
from hub_server import Hub
from models import small_tensors, write_model

import hlwq_convert as h
from hlwq_convert.hub.client import parse_id
from hlwq_convert.hub.download import download, fetch, local_model, resolve
from hlwq_formats.errors import HubMoved, Usage

__all__ = ["hub"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ("org/name", None)),
        ("org/name.5-x@main", ("org/name.5-x", "main")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("name", None),
        ("./org/name", None),
        ("/org/name", None),
        ("../name", None),
        ("a/b/c", None),
        ("org/name@", None),
        ("org/name@a b", None),
        ("org/-name", None),
        ("org/na\nme", None),
    ],
)
def test_what_is_an_id(text: str, expected: tuple[str, str | None] | None) -> None:
    assert parse_id(text) == expected


def test_convert_by_id(hub: Hub, model: Path, converted: Path, tmp_path: Path) -> None:
    repo = hub.add("org/tiny", model_files(model))
    repo.refs["refs/heads/dev"] = repo.refs["refs/heads/main"]
    repo.commit({}, "refs/heads/main")
    out = tmp_path / "out.hlwq"
    done = run("convert", "org/tiny@dev", out)
    assert (done.returncode, done.stderr) == (0, "hlwq: fetching org/tiny@dev ...\n")
    found, local = h.inspect(out), h.inspect(converted)
    assert found.content_id == local.content_id
    assert (found.metadata.source.repo, found.metadata.source.revision) == ("org/tiny", repo.refs["refs/heads/dev"])
    assert found.metadata.source.files == local.metadata.source.files
    fetched = {path.rpartition("/")[2] for path in hub.paths("GET") if "/resolve/" in path}
    wanted = {path.name for path in model.iterdir()} | {"README.md"}
    assert fetched == wanted
    hub.seen.clear()  # all is in the cache now, and the same bytes come from it without the Hub
    again = run("convert", "org/tiny@dev", tmp_path / "again.hlwq", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert hub.seen == [] and (tmp_path / "again.hlwq").read_bytes() == out.read_bytes()


def test_a_model_without_an_index(hub: Hub, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", small_tensors())
    hub.add("org/one", {path.name: path.read_bytes() for path in folder.iterdir()})
    assert h.convert(fetch("org/one"), tmp_path / "o.hlwq").weights == 186_336


def test_a_folder_wins_over_an_id(hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny").symlink_to(model)
    assert local_model("org/tiny", lambda *_: None) == "org/tiny"
    assert hub.seen == []


@pytest.mark.parametrize(
    ("text", "gated", "expected"),
    [
        ("org/none", False, "org/none: no such folder here, and on the Hub: no such repository"),
        ("org/tiny@v9", False, "org/tiny: no such folder here, and on the Hub: no such revision"),
        ("org/tiny", True, "org/tiny: no such folder here, and on the Hub: gated"),
        ("no-such-folder", False, "no-such-folder: no such directory"),
    ],
)
def test_what_cannot_be_read(hub: Hub, model: Path, tmp_path: Path, text: str, gated: bool, expected: str) -> None:
    hub.add("org/tiny", model_files(model), gated=gated)
    done = run("convert", text, tmp_path / "o.hlwq", "--quiet")
    assert done.returncode == 66
    assert done.stderr.count("\n") == 1 and f"]: {expected}" in done.stderr
    assert not list(tmp_path.glob("o.hlwq*"))


@pytest.mark.parametrize(("how", "status"), [(500, 74), (429, 75), ("cut", 74)])
def test_a_hub_that_fails(hub: Hub, model: Path, tmp_path: Path, how: int | str, status: int) -> None:
    hub.add("org/tiny", model_files(model))
    hub.fail("GET", "/api/models/org/tiny/revision", how, times=9)
    done = run("convert", "org/tiny", tmp_path / "o.hlwq", "-q")
    assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
    assert "org/tiny: " in done.stderr


def test_a_full_disk(hub: Hub, model: Path, tmp_path: Path) -> None:
    """No file may get larger than 50 kB, as on a disk that is full: one line, and no output."""
    hub.add("org/tiny", model_files(model))
    limited = f"ulimit -f 50; exec {shlex.quote(sys.executable)} -c 'from hlwq_convert.cli.convert import main; main()'"
    command = ["bash", "-c", f'{limited} "$@"', "bash", "org/tiny", str(tmp_path / "o.hlwq"), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (74, 1), done.stderr
    assert "File too large" in done.stderr and not list(tmp_path.glob("o.hlwq*"))


def test_offline_without_the_model(hub: Hub, tmp_path: Path) -> None:
    done = run("convert", "org/tiny", tmp_path / "o.hlwq", "-q", HF_HUB_OFFLINE="1")
    assert done.returncode == 66 and done.stderr.count("\n") == 1
    assert "not in the cache, and HF_HUB_OFFLINE is set" in done.stderr


def test_a_branch_that_moves_meanwhile(hub: Hub, model: Path) -> None:
    repo = hub.add("org/tiny", model_files(model))
    seen = resolve("org/tiny")
    repo.commit({**repo.main, "config.json": b"{}"}, "refs/heads/main")
    with pytest.raises(HubMoved, match="main moved while it was read"):
        download(seen)


def test_no_model_in_the_repository(hub: Hub) -> None:
    hub.add("org/data", {"data.csv": b"1"})
    with pytest.raises(h.HlwqError, match="holds no file that a conversion could read"):
        fetch("org/data")


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Usage, match=r'the Hub needs huggingface_hub; pip install "hlwq-convert\[hub\]"'):
        fetch("org/tiny")


def test_the_version_of_the_client_is_one_we_promise() -> None:
    assert (1, 31) <= tuple(map(int, huggingface_hub.__version__.split(".")[:2])) < (3, 0)
