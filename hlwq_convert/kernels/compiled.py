"""Compile kernels, and keep the machine code in a folder of ours.

numba's own cache looks at the file of a function and not at what it calls or the constants it was compiled
with, and refuses to work where no folder is writable. Ours is named by a digest of everything that goes into
a kernel, and without a writable folder every process compiles for itself.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import config

from hlwq_formats import rans

_PACKAGE = Path(__file__).parent
_CONSTANTS = (_PACKAGE.parent / "scalar.py", _PACKAGE.parent / "trellis.py", Path(rans.__file__))
_SOURCES = (*sorted(_PACKAGE.glob("*.py")), *_CONSTANTS)


def _cache_folder() -> str | None:
    """A writable folder for the machine code of these sources, or None."""
    base = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    try:
        digest = hashlib.sha256(b"".join(source.read_bytes() for source in _SOURCES)).hexdigest()[:16]
        folder = os.path.join(base, "hlwq", f"kernels-{digest}")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if hasattr(os, "getuid") and os.stat(folder).st_uid != os.getuid():
            return None  # machine code that another user wrote is not for us to run
        with tempfile.TemporaryFile(dir=folder) as probe:  # a full disk is as good as none
            probe.write(bytes(1 << 20))
            probe.flush()
    except OSError:
        return None
    return folder


CACHE_FOLDER = _cache_folder()


def is_code_kept() -> bool:
    """Whether an earlier process has left machine code of these sources."""
    try:
        return CACHE_FOLDER is not None and any(Path(CACHE_FOLDER).rglob("*.nbi"))
    except OSError:  # the process has lost its rights since it was started
        return False


def kernel(function: Callable[..., Any]) -> Any:
    """Compile for any argument types, without the GIL; from the cache when it is there.

    Nothing here may use fastmath or parallel: both change the order of float additions.
    """
    before = config.CACHE_DIR
    config.CACHE_DIR = CACHE_FOLDER or ""
    try:
        return numba.njit(function, nogil=True, error_model="numpy", cache=CACHE_FOLDER is not None)
    finally:
        config.CACHE_DIR = before


def part(function: Callable[..., Any]) -> Any:
    """A function that becomes part of the kernels that call it."""
    return numba.njit(function, forceinline=True, error_model="numpy")
