"""Names of files that come from strangers: only plain relative paths are let in."""

from __future__ import annotations

import re

_MAX_BYTES = 512
_FORBIDDEN = re.compile(r'[\\:*?"<>|\x00-\x1f\x7f-\x9f]')
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
        if _FORBIDDEN.search(part):
            return "the name holds a character that paths may not have"
        if part[-1] in ". " or part.split(".")[0].rstrip(" ").upper() in _DEVICES or len(part.encode()) > 255:
            return "the name is not usable on every system"
    return None


def clashing_name(names: list[str]) -> str | None:
    """A name that equals another but for the case of ASCII letters, or a folder of which is another."""
    lowered = [name.encode().lower() for name in names]  # of bytes: ASCII letters alone
    places = set(lowered)
    seen: set[bytes] = set()
    for name, low in zip(names, lowered, strict=True):
        if low in seen:
            return name
        seen.add(low)
        # looked up one by one: together the folders of deep names are many times larger than the names
        end = low.find(b"/")
        while end >= 0:
            if low[:end] in places:
                return name
            end = low.find(b"/", end + 1)
    return None
