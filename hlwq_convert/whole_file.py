"""Write a small file so that it appears whole or not at all."""

from __future__ import annotations

import os

from hlwq_formats.atomic import AtomicFile


def write_whole(path: str | os.PathLike[str], content: bytes | memoryview, *, overwrite: bool) -> None:
    """Write `content` to `path`. Raises what AtomicFile raises: CannotCreate (73), IoFailure (74), Locked (75)."""
    file = AtomicFile(path, overwrite=overwrite)
    try:
        file.begin()
        file.write(0, content)
        file.sync(len(content))
        file.publish()
    finally:
        file.abandon()  # nothing to do after publish
