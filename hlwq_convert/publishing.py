"""Give finished files their names: whole files together, split sets one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from hlwq_formats.cut import remove_replaced
from hlwq_formats.reader import Reader
from hlwq_formats.writer import Writers

from .assembly import Made, Progress, stepper
from .inspection import Inspection, inspect_reader, printable
from .sizing import total_bytes


def publish(made: Sequence[Made], writers: Writers, progress: Progress | None, *, overwrite: bool) -> list[Inspection]:
    """Publish what was made and return what is in it. Files that are to be split are cut first; each set appears when
    it is cut, and everything else at once, at the end."""

    def announce() -> None:
        if progress is not None:
            progress("publishing", 0, 0)

    found = [one.inspection if len(one.parts) == 1 else _publish_set(one, announce, progress) for one in made]
    whole = [one.writer for one in made if len(one.parts) == 1]
    if whole:
        announce()
        writers.publish(whole)
    for one in made:
        if one.planning.job.split_size is not None and overwrite:
            remove_replaced(one.planning.path, one.parts)
    return [
        msgspec.structs.replace(each, file=printable(one.planning.path), warnings=one.planning.job.warnings)
        for one, each in zip(made, found, strict=True)
    ]


def _publish_set(made: Made, announce: Callable[[], None], progress: Progress | None) -> Inspection:
    found: list[Inspection] = []

    def look(reader: Reader) -> None:
        found.append(inspect_reader(reader))  # here: nothing may fail after the set is published
        announce()

    made.writer.publish_parts(made.metadata, made.parts, look, stepper(progress, "splitting", total_bytes(made.parts)))
    return found[0]
