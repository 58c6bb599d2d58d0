"""A container on a web server or the Hugging Face Hub, read by HTTP ranges (RFC 9110, section 14).

Only its beginning and its end are fetched: the header, then the metadata with some bytes before them, which mostly
hold the report; so two requests, or three. Everything read is checked by the Reader as if it came from a disk.
"""

from __future__ import annotations

import http.client
import os
import re
import threading
import time
import urllib.request
from dataclasses import dataclass, replace
from email.message import Message
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from hlwq_formats.errors import (
    HlwqError,
    HubBusy,
    HubFailed,
    HubUnreadable,
    IoFailure,
    MissingInput,
    SourceChanged,
    Usage,
    escape,
)
from hlwq_formats.file_set import join_parts, open_set
from hlwq_formats.layout import HEADER_LEN, MAX_METADATA
from hlwq_formats.reader import Reader

_READ_BEHIND = 256 << 10
_MAX_END = MAX_METADATA + (8 << 20)  # the metadata at its limit and a report; that of 60,000 tensors has 1.5 MB
_MAX_REDIRECTS = 5
_SILENCE, _PATIENCE = 30.0, 300.0  # seconds without a byte, and for one answer
_FETCH_FIRST = "fetch the whole file and inspect the copy"


@dataclass(frozen=True)
class Place:
    """Where a remote file is; `token` goes to the origin of `url` and to no other."""

    url: str
    token: str | None = None
    on_hub: bool = False


def find(where: str) -> Place | None:
    """The place that `where` stands for, None for a path of this machine.

    A URL, or ORG/REPO[@REVISION]/FILE.hlwq on the Hub where no such folder is here. Endpoint and token are those of
    huggingface_hub; where that is not installed, HF_ENDPOINT and none. Raises Usage (2) for a URL that cannot be used.
    """
    if where.startswith(("http://", "https://")):
        on_hub = _origin(where) == _origin(_hub_endpoint())
        return Place(where, _hub_token() if on_hub else None, on_hub)
    part = r"[A-Za-z0-9_][^/@]*"
    match = re.fullmatch(rf"({part}/{part})(?:@([^/@]+))?/((?:{part}/)*{part}\.hlwq)", where)
    if match is None or os.path.isdir(os.path.dirname(where)):
        return None
    repo, revision, file = match[1], match[2] or "main", match[3]
    url = f"{_hub_endpoint()}/{quote(repo)}/resolve/{quote(revision, safe='')}/{quote(file)}"
    return Place(url, _hub_token(), True)


def open_reader(where: str | os.PathLike[str]) -> Reader:
    """A reader of a local file, or of the header, metadata and report of a remote one (see `find`); or of a split set,
    by any part of it."""
    place = find(where) if isinstance(where, str) else None
    if place is None:
        return open_set(where)
    before, after = urlsplit(place.url), urlsplit(place.url).path.rpartition("/")

    def open_other(name: str) -> Reader:
        path = f"{after[0]}/{quote(name)}"
        return Reader(HttpFile(replace(place, url=urlunsplit(before._replace(path=path)))))

    return join_parts(Reader(HttpFile(place)), unquote(after[2]), open_other)


def _hub_endpoint() -> str:
    try:
        from huggingface_hub import constants
    except ImportError:
        return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return constants.ENDPOINT


def _hub_token() -> str | None:
    try:
        from huggingface_hub import get_token
    except ImportError:
        return None
    return get_token()


def _origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port; Usage when the URL has none, or a password."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or parts.scheme not in ("http", "https"):
        raise Usage(f"not a URL: {escape(url)}", hint="expected https://HOST/PATH")
    if parts.username is not None or parts.password is not None:
        raise Usage(f"a URL with a name or a password, for {escape(host)}", hint="leave them out")
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80)


def _shown(url: str) -> str:
    """A URL without its query, where signatures and keys are."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))


class HttpFile:
    """The first bytes of a remote file and the last ones, as far back as was asked for: a ByteSource.

    The end is fetched once and kept, so reading backwards from it costs a request only for what lies before.
    Raises MissingInput (66) when the server has no such file for us, SourceChanged (75) when it is not the one of the
    first request, IoFailure (74) for everything else that a server or the way there can do wrong. Of the Hub they are
    HubUnreadable and HubFailed, and HubBusy (75) when it asks for patience.
    """

    def __init__(self, place: Place) -> None:
        self._url, self._token_origin = place.url, _origin(place.url)
        self._token, self._on_hub = place.token, place.on_hub
        self._unreadable = HubUnreadable if place.on_hub else MissingInput
        self._failed = HubFailed if place.on_hub else IoFailure
        self.name = _shown(place.url)
        self.size = -1  # until the first answer
        self._lock = threading.Lock()
        self._opener = urllib.request.OpenerDirector()  # without handlers for redirects, errors, files and FTP
        for handler in (urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()):
            self._opener.add_handler(handler)
        self._version: str | None = None  # ETag, or where there is none the date
        self._head = self._fetch(0, HEADER_LEN)
        self._end = b""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; Usage (2) for what lies too far from the end."""
        with self._lock:
            if offset + length <= len(self._head):
                return self._head[offset : offset + length]
            end_start = self.size - len(self._end)
            if offset < end_start:
                start = offset if self._end else max(0, offset - _READ_BEHIND)
                if self.size - start > _MAX_END:
                    raise Usage(
                        f"over {_MAX_END} bytes of a remote file are not fetched", file=self.name, hint=_FETCH_FIRST
                    )
                self._end = self._fetch(start, end_start) + self._end
                end_start = start
            return self._end[offset - end_start : offset - end_start + length]

    def close(self) -> None:
        """Nothing is open between requests."""

    def _fetch(self, start: int, end: int) -> bytes:
        """The bytes of a range, in one request and its redirects. The first one also learns the size."""
        first = self.size < 0
        with self._get(start, end) as response:
            version = response.headers.get("ETag") or response.headers.get("Last-Modified")
            if first:
                self._version = version
            elif response.status in (200, 206, 416):
                self._check_unchanged(version, response.headers)
            if first and response.status == 416 and response.headers.get("Content-Range", "").strip() == "bytes */0":
                self.size = 0
                return b""
            self._check_status(response.status)
            stated = response.headers.get("Content-Range", "")
            match = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", stated.strip())
            size = int(match[3]) if match and first else self.size
            end = min(end, size)
            if match is None or tuple(map(int, match.groups())) != (start, end - 1, size):
                raise self._failure(
                    f"the server answers bytes {start} to {end - 1} with Content-Range {escape(stated or 'none', 60)}"
                )
            if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
                raise self._failure(f"the server answers with Content-Encoding {escape(encoding, 60)}")
            body = self._read_body(response, end - start)
        self.size = size
        return body

    def _read_body(self, response: http.client.HTTPResponse, length: int) -> bytes:
        began, body = time.monotonic(), bytearray()
        try:
            while piece := response.read1(min(1 << 16, length + 1 - len(body))):
                body += piece
                if time.monotonic() - began > _PATIENCE:
                    raise self._failure(f"{len(body)} of {length} bytes came in {_PATIENCE:.0f} s")
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(f"the answer broke off after {len(body)} of {length} bytes: {_reason(error)}") from None
        if len(body) != length:
            found = "more" if len(body) > length else str(len(body))
            raise self._failure(f"the server promised {length} bytes and sent {found}")
        return bytes(body)

    def _get(self, start: int, end: int) -> http.client.HTTPResponse:
        """Ask for a range, following redirects; the last address is kept for the next request."""
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._ask(start, end)
            if response.status not in (301, 302, 303, 307, 308):
                return response
            response.close()
            self._redirect(response.headers.get("Location", ""))
        raise self._failure(f"more than {_MAX_REDIRECTS} redirects")

    def _redirect(self, location: str) -> None:
        target = urljoin(self._url, location)
        try:
            scheme, host, _ = _origin(target)
        except Usage:
            raise self._failure("the server redirects to what is no web address") from None
        if scheme == "http" and self._url.startswith("https:"):
            raise self._failure(f"the server redirects to {escape(host)} without encryption")
        self._url = target

    def _ask(self, start: int, end: int) -> http.client.HTTPResponse:
        parts = urlsplit(self._url)
        path, query = (quote(text, safe="/%:@!$&'()*+,;=~?") for text in (parts.path, parts.query))
        request = urllib.request.Request(urlunsplit((parts.scheme, parts.netloc, path, query, "")))
        request.add_header("Range", f"bytes={start}-{end - 1}")
        request.add_header("Accept-Encoding", "identity")
        request.add_header("User-Agent", "hlwq-inspect")
        if self._version is not None and self._version.startswith('"'):  # a strong ETag
            request.add_header("If-Range", self._version)
        if self._token is not None and _origin(self._url) == self._token_origin:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            response: http.client.HTTPResponse = self._opener.open(request, timeout=_SILENCE)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._failure(f"cannot ask {escape(parts.hostname or '')}: {_reason(error)}") from None
        return response

    def _check_unchanged(self, version: str | None, headers: Message) -> None:
        if version != self._version or headers.get("Content-Range", "").rpartition("/")[2] != str(self.size):
            raise SourceChanged("the file changed on the server while it was read", file=self.name, hint="try again")

    def _check_status(self, status: int) -> None:
        if status == 206:
            return
        if status == 200:
            raise self._failure("the server sends whole files only, no ranges", _FETCH_FIRST)
        if status in (401, 403):
            hint = (
                "check the name, and log in: `hf auth login` (needs huggingface_hub), or HF_TOKEN"
                if self._on_hub
                else _FETCH_FIRST
            )
            raise self._unreadable(f"the server does not let us read it (HTTP {status})", file=self.name, hint=hint)
        if status in (404, 410):
            raise self._unreadable(f"not there (HTTP {status})", file=self.name)
        if status == 429 and self._on_hub:
            raise HubBusy("the Hub asks for patience (429)", file=self.name, hint="try again later")
        raise self._failure(f"the server answers HTTP {status}", "try again later" if status >= 429 else None)

    def _failure(self, problem: str, hint: str | None = None) -> HlwqError:
        return self._failed(problem, file=self.name, hint=hint)


def _reason(error: Exception) -> str:
    """What went wrong on the way, in a few words."""
    inner = getattr(error, "reason", error)  # URLError wraps the real one
    return escape(getattr(inner, "strerror", None) or str(inner) or type(inner).__name__, 120)
