"""Names of files that come from strangers: only plain relative paths are let in."""

from __future__ import annotations

import unicodedata

_MAX_BYTES = 512
_DEVICES = {
    "CON",
    "PRN",
    "AUX",
    "NUL",
    "CONIN$",
    "CONOUT$",
    *(device + n for device in ("COM", "LPT") for n in "0123456789¹²³"),
}


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


def clashing_name(names: list[str]) -> str | None:
    """A name that equals another but for the case of ASCII letters, or that is also the folder of another."""
    lowered = [name.encode().lower() for name in names]  # of bytes: ASCII letters alone
    folders = {b"/".join(parts[:i]) for name in lowered for parts in [name.split(b"/")] for i in range(1, len(parts))}
    seen: set[bytes] = set()
    for name, low in zip(names, lowered, strict=True):
        if low in seen or low in folders:
            return name
        seen.add(low)
    return None
