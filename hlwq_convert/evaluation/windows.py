"""Which tokens of a text are predicted: windows of one length, spread evenly over it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from hlwq_formats.errors import Usage
from hlwq_formats.files import InputFile

TEXT = "jargon-4.4.7.txt"
_MAX_TEXT = 64 << 20


def read_text(path: str | None) -> str:
    """A UTF-8 text; without a path, the one that comes with this package.

    Raises Usage for what is no text or over 64 MiB, MissingInput for what is not there.
    """
    if path is None:
        return (resources.files("hlwq_convert.evaluation") / "text" / TEXT).read_text("utf-8")
    with InputFile(path) as file:
        if file.size > _MAX_TEXT:
            raise Usage(f"{file.size} bytes, at most {_MAX_TEXT} are read", file=path, hint="give an excerpt")
        try:
            return file.read(0, file.size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise Usage(f"not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}", file=path) from None


def cut_windows(tokens: Sequence[int], first: int | None, ctx: int, count: int) -> NDArray[np.int64]:
    """(count, ctx) tokens from `count` places spread evenly over the text, none of them in two windows.

    Each window begins with the token `first`, where the tokenizer puts one before a text; it is not predicted, nor
    is the first token of a window without it. A text for fewer windows gives as many as it has. Usage where that is 0.
    """
    length = ctx if first is None else ctx - 1
    available = len(tokens) // length
    if available == 0:
        raise Usage(
            f"the text has {len(tokens)} tokens, one window takes {length}",
            hint="give a longer --text or a lower --ctx",
        )
    count = min(count, available)
    places = [i * available // count * length for i in range(count)]
    windows = np.array([tokens[place : place + length] for place in places], np.int64)
    return windows if first is None else np.insert(windows, 0, first, axis=1)
