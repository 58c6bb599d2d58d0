"""Several sizes of one model: the rungs of a ladder, and the names of their files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple


class Rung(NamedTuple):
    """What decides the size of one file: at most one of the three, none for the default."""

    bits: int | None = None
    bpw: float | None = None
    size: int | str | None = None

    @property
    def label(self) -> str:
        """What the name of the file says: 4bit, 4.25bpw, 16.2GB, or 17000B for a size without a unit."""
        if self.bits is not None:
            return f"{self.bits}bit"
        if self.bpw is not None:
            return f"{self.bpw:g}bpw"
        size = str(self.size).replace(" ", "")
        return f"{size}B" if size[-1:].isdigit() else size


def make_rungs(bits: Sequence[int] = (), bpw: Sequence[float] = (), size: Sequence[int | str] = ()) -> list[Rung]:
    """One rung for each value, in the given order; without any, the default alone. Values of several kinds exclude each
    other, and are refused when the rungs are prepared."""
    return [Rung(b, p, s) for b in bits or (None,) for p in bpw or (None,) for s in size or (None,)]


def path_of(out: str | os.PathLike[str], rung: Rung) -> str:
    """The file of a rung: OUT with the label before .hlwq, or at its end."""
    path = os.fspath(out)
    stem = path.removesuffix(".hlwq")
    return f"{stem}-{rung.label}{path[len(stem) :]}"
