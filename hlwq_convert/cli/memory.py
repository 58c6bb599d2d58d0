"""How the commands want memory handled; a library must not decide that for its caller."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 32 << 20  # glibc takes no more


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next chunk of the same size.

    By default it gives buffers of this size back to the system, and each chunk pays again for every page of its
    own: a tenth of the time of a conversion, for a few MiB. Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
