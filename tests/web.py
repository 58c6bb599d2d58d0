"""A web server on loopback that answers ranges, counts requests, and can be told to misbehave."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message

Twist = Callable[["Handler"], bool]
"""Answers a request itself and returns True, or changes what the server holds and returns False."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        web = self.server
        web.requests.append((self.path, self.headers))
        if web.twist is not None and web.twist(self):
            return
        data = web.files.get(self.path.partition("?")[0])
        if data is None:
            self.answer(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        fresh = self.headers.get("If-Range", web.etag) == web.etag
        if asked is None or not fresh:
            self.answer(200, data)
        elif int(asked[1]) >= len(data):
            self.answer(416, range_=f"bytes */{len(data)}")
        else:
            start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
            self.answer(206, data[start:end], f"bytes {start}-{end - 1}/{len(data)}")

    def answer(self, status: int, body: bytes = b"", range_: str | None = None, **headers: str) -> None:
        self.send_response(status)
        fields = {"Content-Length": str(len(body)), "ETag": self.server.etag, "Content-Range": range_}
        for name, value in (fields | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Web(http.server.ThreadingHTTPServer):
    """`files` by path; `requests` are (path, headers) in the order they came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, Message]] = []
        self.twist: Twist | None = None
        self.etag: str | None = '"one"'
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that has seen enough hangs up


@contextmanager
def serve() -> Iterator[Web]:
    with Web() as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield web
        finally:
            web.shutdown()
            thread.join()
