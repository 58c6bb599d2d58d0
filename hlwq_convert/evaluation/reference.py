"""What the source predicts, kept so that each file is compared with it without two models in memory.

Of each prediction the `TOP_K` most likely tokens are kept, the probability of all others as one, and `SAMPLES` of
these others, drawn by their probability. The first two alone give a lower bound of the divergence (merging outcomes
can only lower it, by the log sum inequality); the samples give an unbiased estimate of what is missing, which is never
negative. docs/evaluation.md has how close that comes on a real model.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from hlwq_formats.errors import HlwqError

from .. import __version__
from ..whole_file import write_whole

TOP_K = 256
SAMPLES = 256
KEPT_BYTES = 2 << 30
"""The folder of references is kept under this size; the oldest go first."""

_SUFFIX = ".reference"
_DIGEST = 32


@dataclass(frozen=True)
class Reference:
    """Predictions of the source: an entry for each predicted token, (windows, tokens, ...)."""

    top: NDArray[np.int32]  # (windows, tokens, k) the most likely tokens, best first
    log_p: NDArray[np.float32]  # (windows, tokens, k) their ln probability
    log_rest: NDArray[np.float32]  # (windows, tokens) ln of the probability of all others; -inf if there are none
    sample: NDArray[np.int32]  # (windows, tokens, m) tokens drawn from the others, with replacement
    log_s: NDArray[np.float32]  # (windows, tokens, m) their ln probability
    nll: NDArray[np.float64]  # (windows, tokens) -ln of the probability given to the token that came

    @property
    def rest(self) -> float:
        """Mean probability that is not in the top."""
        return float(np.exp(self.log_rest.astype(np.float64)).mean())


def reference_key(**parts: object) -> str:
    """The name of a reference: a digest of everything that its numbers depend on."""
    own = {"top_k": TOP_K, "samples": SAMPLES, "version": __version__}
    return hashlib.sha256(msgspec.json.encode(parts | own, order="sorted")).hexdigest()


def cache_folder() -> Path:
    """Where references are kept; whatever lies there may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "hlwq" / "references"


def load_reference(key: str) -> tuple[Reference, Path] | None:
    """The reference of this name and its file, None where there is none or where it is damaged."""
    path = cache_folder() / f"{key}{_SUFFIX}"
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body = memoryview(content)[_DIGEST:]
    if hashlib.sha256(body).digest() != content[:_DIGEST]:
        return None
    with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
        return Reference(**arrays), path


def store_reference(key: str, reference: Reference) -> Path | None:
    """Keep a reference, and return its file; None where the folder does not take it, which is no failure."""
    folder = cache_folder()
    stream = io.BytesIO(bytes(_DIGEST))
    stream.seek(_DIGEST)
    np.savez(stream, **vars(reference))
    content = stream.getbuffer()
    content[:_DIGEST] = hashlib.sha256(content[_DIGEST:]).digest()
    path = folder / f"{key}{_SUFFIX}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_room(folder, KEPT_BYTES - len(content))
        write_whole(path, content, overwrite=True)
    except (OSError, HlwqError):
        return None
    return path


def _make_room(folder: Path, allowed: int) -> None:
    """Delete the oldest references until the others take at most `allowed` bytes."""
    files = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
    total = sum(path.stat().st_size for path in files)
    for path in files:
        if total <= allowed:
            break
        total -= path.stat().st_size
        with contextlib.suppress(OSError):
            path.unlink()
