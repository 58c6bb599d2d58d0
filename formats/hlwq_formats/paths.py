"""Names of files that come from strangers: only plain relative paths are let in."""

from __future__ import annotations

import unicodedata

_MAX_BYTES = 512
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(device + n for device in ("COM", "LPT") for n in "0123456789¹²³")}


def unsafe_path(name: str) -> str | None:
    """Why `name` is no plain relative path on both POSIX and Windows, or None when it is one."""
    try:
        too_long = len(name.encode()) > _MAX_BYTES
    except UnicodeEncodeError:
        return "the name is not valid Unicode"
    if too_long:
        return "the name is too long"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return "the name is not a plain relative path"
        if any(char in '\\:*?"<>|' or unicodedata.category(char) == "Cc" for char in part):
            return "the name holds a character that paths may not have"
        if part[-1] in ". " or part.split(".")[0].rstrip(" ").upper() in _DEVICES or len(part.encode()) > 255:
            return "the name is not usable on every system"
    return None
