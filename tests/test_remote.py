"""Files on a web server: few requests, every byte checked, one line for everything that a server does wrong."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Run
from web import Handler, Web, serve

from hlwq_convert import remote
from hlwq_convert.inspection import inspect
from hlwq_convert.remote import HttpFile, Place, find
from hlwq_formats import metadata as md
from hlwq_formats.errors import (
    BadDigest,
    HlwqError,
    HubBusy,
    HubFailed,
    HubUnreadable,
    IoFailure,
    MissingInput,
    NotHlwq,
    SourceChanged,
    Usage,
    WrongSize,
)
from hlwq_formats.reader import Reader
from hlwq_formats.writer import Writer


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def web(converted: Path) -> Iterator[Web]:
    with serve() as server:
        server.files["/m.hlwq"] = converted.read_bytes()
        yield server


def write_report_of(size: int, path: Path) -> None:
    """A file without tensors whose report has `size` bytes."""
    with Writer(path) as writer:
        report = writer.write_section("asset", b'{"tensors":[]}'.ljust(size))
        metadata = md.Metadata(
            tensors=[],
            assets=[md.Asset(md.REPORT, [report])],
            signs=None,
            recipe=md.Recipe(None, None, "default", []),
            source=md.Source(None, None, []),
            split=None,
            tool=md.Tool("t", "1", "1"),
        )
        writer.finish(metadata)


# --- what is read -----------------------------------------------------------------------------------


def test_a_file_is_shown_after_two_requests(web: Web, converted: Path) -> None:
    local, found = inspect(converted), inspect(f"{web.url}/m.hlwq")
    assert found.file == f"{web.url}/m.hlwq"
    assert (found.tensors, found.summary, found.file_id) == (local.tensors, local.summary, local.file_id)
    assert len(web.requests) == 2


def test_only_header_and_end_are_fetched(web: Web, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_READ_BEHIND", 0)
    inspect(f"{web.url}/m.hlwq")
    ranges = [headers["Range"] for _, headers in web.requests]
    assert ranges[0] == "bytes=0-127"
    spans = sorted(tuple(map(int, r[6:].split("-"))) for r in ranges[1:])
    assert [a[1] + 1 for a in spans[:-1]] == [b[0] for b in spans[1:]]  # nothing twice
    assert spans[-1][1] == converted.stat().st_size - 1


def test_a_report_longer_than_what_is_read_behind_is_a_third_request(web: Web, tmp_path: Path) -> None:
    write_report_of(4000, tmp_path / "r.hlwq")
    web.files["/r.hlwq"] = (tmp_path / "r.hlwq").read_bytes()
    place = Place(f"{web.url}/r.hlwq")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "_READ_BEHIND", 1000)
        assert inspect(place.url).assets[0].name == md.REPORT
    assert len(web.requests) == 3


def test_what_is_too_much_to_fetch_is_not_fetched(web: Web) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "_MAX_END", 1000)
        with pytest.raises(Usage, match="over 1000 bytes of a remote file are not fetched"):
            inspect(f"{web.url}/m.hlwq")
    assert len(web.requests) == 1


def test_weights_are_not_read_remotely(web: Web, run_tool: Run) -> None:
    for option in (["--verify"], ["--against", "model"]):
        result = run_tool("inspect", f"{web.url}/m.hlwq", *option)
        assert result.returncode == 2
        assert "read all weights" in result.stderr and result.stderr.count("\n") == 1


def test_the_command_takes_a_url(web: Web, run_tool: Run, converted: Path) -> None:
    result = run_tool("inspect", f"{web.url}/m.hlwq?download=true&key=secret", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert document["file"] == f"{web.url}/m.hlwq"
    assert "secret" not in result.stdout
    assert web.requests[0][0] == "/m.hlwq?download=true&key=secret"


def test_damage_is_found_as_in_a_local_file(web: Web, converted: Path) -> None:
    data = bytearray(converted.read_bytes())
    data[-10] ^= 1
    web.files["/m.hlwq"] = bytes(data)
    with pytest.raises(BadDigest, match="the metadata is damaged"):
        inspect(f"{web.url}/m.hlwq")


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"", NotHlwq), (b"HLWQ", WrongSize), (b"<html>" + b" " * 500, NotHlwq), (b"HLWQ\r\n\x1a\n", WrongSize)],
)
def test_what_is_no_container_is_named(web: Web, content: bytes, error: type[HlwqError]) -> None:
    web.files["/m.hlwq"] = content
    with pytest.raises(error):
        inspect(f"{web.url}/m.hlwq")
    assert len(web.requests) == 1


def test_a_file_cut_by_its_server(web: Web, converted: Path) -> None:
    web.files["/m.hlwq"] = converted.read_bytes()[:-1]
    with pytest.raises(WrongSize, match="1 bytes missing"):
        inspect(f"{web.url}/m.hlwq")


def test_a_remote_file_is_compared_with_a_local_one(web: Web, run_tool: Run, converted: Path) -> None:
    result = run_tool("inspect", f"{web.url}/m.hlwq", converted)
    assert "the tensors of both files are the same" in result.stdout
    assert len(web.requests) == 2


def test_a_reader_closes_what_it_reads_from(converted: Path) -> None:
    class Bytes:
        name, closed, data = "memory", 0, converted.read_bytes()
        size = len(data)

        def read(self, offset: int, length: int) -> bytes:
            return self.data[offset : offset + length]

        def close(self) -> None:
            self.closed += 1

    source = Bytes()
    with Reader(source) as reader:
        reader.verify()
    assert source.closed == 1
    source.data = b"x" * source.size
    with pytest.raises(NotHlwq, match="memory: "):
        Reader(source)
    assert source.closed == 2


# --- where it is ------------------------------------------------------------------------------------


def test_hub_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "_hub_endpoint", lambda: "https://hub.test")
    monkeypatch.setattr(remote, "_hub_token", lambda: "hf_x")
    monkeypatch.chdir(tmp_path)
    assert find("org/repo/a b.hlwq") == Place("https://hub.test/org/repo/resolve/main/a%20b.hlwq", "hf_x", True)
    assert find("org/repo/in/x.hlwq") == Place("https://hub.test/org/repo/resolve/main/in/x.hlwq", "hf_x", True)
    assert find("org/repo@v1.0/x.hlwq") == Place("https://hub.test/org/repo/resolve/v1.0/x.hlwq", "hf_x", True)
    for local in ("x.hlwq", "org/x.hlwq", "/org/repo/x.hlwq", "./org/repo/x.hlwq", "org/repo/x.gguf", "a/../b/x.hlwq"):
        assert find(local) is None, local
    (tmp_path / "org" / "repo").mkdir(parents=True)
    assert find("org/repo/x.hlwq") is None  # a misspelt local name is not asked of the Hub


def test_the_token_goes_to_the_hub_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_hub_endpoint", lambda: "https://hub.test")
    monkeypatch.setattr(remote, "_hub_token", lambda: "hf_x")
    assert find("https://hub.test/a/b/resolve/main/x.hlwq") == Place(
        "https://hub.test/a/b/resolve/main/x.hlwq", "hf_x", True
    )
    for elsewhere in ("http://hub.test/x.hlwq", "https://hub.test:8443/x.hlwq", "https://other.test/x.hlwq"):
        assert find(elsewhere) == Place(elsewhere, None, False)


@pytest.mark.parametrize("url", ["https://", "http://[::1/x", "http://h:99999999/x", "https://u:pw@h/x.hlwq"])
def test_urls_that_cannot_be_used(url: str) -> None:
    with pytest.raises(Usage) as caught:
        find(url)
    assert "pw" not in str(caught.value)


def test_the_hub_by_huggingface_hub(web: Web, run_tool: Run, converted: Path) -> None:
    pytest.importorskip("huggingface_hub")
    web.files["/org/repo/resolve/main/m.hlwq"] = converted.read_bytes()
    env = {"HF_ENDPOINT": web.url, "HF_TOKEN": "hf_secret", "no_proxy": "127.0.0.1"}
    result = run_tool("inspect", "org/repo/m.hlwq", "--quiet", env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert [headers["Authorization"] for _, headers in web.requests] == ["Bearer hf_secret"] * 2


def test_the_hub_without_huggingface_hub(web: Web, monkeypatch: pytest.MonkeyPatch, converted: Path) -> None:
    web.files["/org/repo/resolve/main/m.hlwq"] = converted.read_bytes()
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    monkeypatch.setenv("HF_ENDPOINT", web.url + "/")
    assert inspect("org/repo/m.hlwq").weights == inspect(converted).weights
    assert [headers["Authorization"] for _, headers in web.requests] == [None, None]


# --- redirects --------------------------------------------------------------------------------------


def redirect_to(target: str) -> object:
    def twist(handler: Handler) -> bool:
        if handler.path.startswith("/go"):
            handler.answer(302, Location=target)
            return True
        return False

    return twist


def test_a_redirect_is_followed_once_and_the_token_stays(web: Web, converted: Path) -> None:
    with serve() as other:  # another port is another origin
        other.files["/cdn"] = converted.read_bytes()
        web.twist = redirect_to(f"{other.url}/cdn?signature=s")  # type: ignore[assignment]
        with Reader(HttpFile(Place(f"{web.url}/go", "hf_secret"))) as reader:
            assert len(reader.tensors) == 20
        assert len(web.requests) == 1
        assert web.requests[0][1]["Authorization"] == "Bearer hf_secret"
        assert [path for path, _ in other.requests] == ["/cdn?signature=s"] * 2
        assert [headers["Authorization"] for _, headers in other.requests] == [None, None]
        assert other.requests[0][1]["Range"] == "bytes=0-127"


def test_a_redirect_on_the_same_server_keeps_the_token(web: Web) -> None:
    web.twist = redirect_to("/m.hlwq")  # type: ignore[assignment]
    HttpFile(Place(f"{web.url}/go", "hf_secret"))
    assert [headers["Authorization"] for _, headers in web.requests] == ["Bearer hf_secret"] * 2


@pytest.mark.parametrize(
    ("target", "problem"),
    [("/go/on", "more than 5 redirects"), ("file:///etc/passwd", "no web address"), ("ftp://h/x", "no web address")],
)
def test_redirects_that_lead_nowhere(web: Web, target: str, problem: str) -> None:
    web.twist = redirect_to(target)  # type: ignore[assignment]
    with pytest.raises(IoFailure, match=problem):
        inspect(f"{web.url}/go")
    assert len(web.requests) <= 6


def test_a_redirect_does_not_leave_encryption(web: Web) -> None:
    file = HttpFile(Place(f"{web.url}/m.hlwq"))
    file._url = "https://hub.test/x"
    with pytest.raises(IoFailure, match=r"redirects to other.test without encryption"):
        file._redirect("http://other.test/x")


# --- servers that do it wrong -----------------------------------------------------------------------


def answers(status: int, body: bytes = b"", range_: str | None = None, **headers: str) -> object:
    def twist(handler: Handler) -> bool:
        handler.answer(status, body, range_, **headers)
        return True

    return twist


@pytest.mark.parametrize(
    ("twist", "error", "problem"),
    [
        (answers(200, b"x" * 500), IoFailure, "whole files only"),
        (answers(401), MissingInput, r"HTTP 401\)"),
        (answers(403), MissingInput, r"HTTP 403\)"),
        (answers(404), MissingInput, r"not there \(HTTP 404\)"),
        (answers(429), IoFailure, "HTTP 429; try again later"),
        (answers(503), IoFailure, "HTTP 503; try again later"),
        (answers(204), IoFailure, "HTTP 204"),
        (answers(302), IoFailure, "more than 5 redirects"),
        (answers(206, b"x" * 128), IoFailure, "Content-Range none"),
        (answers(206, b"x" * 128, "bytes 0-127/*"), IoFailure, "Content-Range bytes 0-127/"),
        (answers(206, b"x" * 128, "bytes 1-128/500"), IoFailure, "Content-Range bytes 1-128/500"),
        (answers(206, b"x" * 128, "bytes 0-499/500"), IoFailure, "Content-Range bytes 0-499/500"),
        (answers(206, b"x" * 128, "bytes 0-127/" + "9" * 19), IoFailure, "Content-Range"),
        (answers(206, b"x" * 128, "bytes 0-127/50"), IoFailure, "Content-Range bytes 0-127/50"),
        (answers(206, b"x" * 100, "bytes 0-127/500"), IoFailure, "promised 128 bytes and sent 100"),
        (answers(206, b"x" * 129, "bytes 0-127/500"), IoFailure, "promised 128 bytes and sent more"),
        (answers(206, b"x" * 9, "bytes 0-127/500", Content_Length="128"), IoFailure, "promised 128 bytes and sent 9"),
        (answers(206, b"x" * 128, "bytes 0-127/500", Content_Encoding="gzip"), IoFailure, "Content-Encoding gzip"),
        (answers(206, b"x" * 128, "bytes 0-127/500", Transfer_Encoding="chunked"), IoFailure, "broke off"),
        (answers(416), IoFailure, "HTTP 416"),
    ],
)
def test_one_line_for_each_wrong_answer(web: Web, twist: object, error: type[HlwqError], problem: str) -> None:
    web.twist = twist  # type: ignore[assignment]
    with pytest.raises(error, match=problem) as caught:
        inspect(f"{web.url}/m.hlwq")
    assert str(caught.value).startswith(f"{web.url}/m.hlwq: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "kind", "problem"),
    [
        (401, HubUnreadable, "hf auth login"),
        (404, HubUnreadable, r"not there \(HTTP 404\)"),
        (429, HubBusy, "asks for patience"),
        (503, HubFailed, "HTTP 503; try again later"),
    ],
)
def test_what_the_hub_answers_is_an_error_of_the_hub(
    web: Web, status: int, kind: type[HlwqError], problem: str
) -> None:
    web.twist = answers(status)  # type: ignore[assignment]
    with pytest.raises(kind, match=problem):
        HttpFile(Place(f"{web.url}/m.hlwq", None, True))


@pytest.mark.parametrize("etag", ['"one"', 'W/"one"', None])
@pytest.mark.parametrize("longer", [False, True])
def test_a_file_that_changes_between_requests(web: Web, etag: str | None, longer: bool) -> None:
    web.etag = etag

    def twist(handler: Handler) -> bool:
        if len(web.requests) == 2:
            web.etag = '"two"' if etag else None
            web.files["/m.hlwq"] += bytes(longer)
        return False

    web.twist = twist
    if etag is None and not longer:
        inspect(f"{web.url}/m.hlwq")  # nothing tells, and nothing differs
        return
    with pytest.raises(SourceChanged, match="changed on the server"):
        inspect(f"{web.url}/m.hlwq")
    assert web.requests[1][1]["If-Range"] == ('"one"' if etag == '"one"' else None)


def test_a_server_that_fails_later_is_not_a_changed_file(web: Web) -> None:
    web.twist = lambda handler: len(web.requests) == 2 and (handler.answer(503), True)[1]
    with pytest.raises(IoFailure, match="HTTP 503"):
        inspect(f"{web.url}/m.hlwq")


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        with pytest.raises(IoFailure, match=r"cannot ask 127.0.0.1: Connection refused"):
            inspect(f"http://127.0.0.1:{taken.getsockname()[1]}/m.hlwq")


def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_SILENCE", 0.2)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        with pytest.raises(IoFailure, match="timed out"):
            inspect(f"http://127.0.0.1:{deaf.getsockname()[1]}/m.hlwq")


def test_a_server_that_trickles(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PATIENCE", 0.0)
    with pytest.raises(IoFailure, match="of 128 bytes came in 0 s"):
        inspect(f"{web.url}/m.hlwq")


def test_a_server_that_does_not_speak_http() -> None:
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-x\x1b[31m\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(IoFailure, match=r"cannot ask 127.0.0.1") as caught:
            inspect(f"http://127.0.0.1:{listener.getsockname()[1]}/m.hlwq")
        thread.join()
        assert "\x1b" not in str(caught.value)
