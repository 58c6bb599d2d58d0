"""SHA-256 of bytes that come in pieces, one piece behind: reading or writing the next one takes place meanwhile."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

_FEW = 4 << 20  # bytes for which a thread is not worth while


class PipelinedDigest:
    """hashlib.sha256 of a stream. A piece must stay as it is until the second call after the one that took it: then it
    has been hashed."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._taken = 0
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def update(self, piece: bytes | memoryview) -> None:
        """Take the next piece."""
        self._taken += len(piece)
        if self._taken <= _FEW:
            self.add(piece)
            return
        self._wait()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "hlwq-hash")
        self._last = self._thread.submit(self._digest.update, piece)

    def add(self, piece: bytes | memoryview) -> None:
        """`update` that has hashed the piece when it returns."""
        self._wait()
        self._digest.update(piece)

    def hexdigest(self) -> str:
        """The digest of all pieces."""
        self._wait()
        if self._thread is not None:
            self._thread.shutdown(wait=False)
        return self._digest.hexdigest()

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()
            self._last = None
