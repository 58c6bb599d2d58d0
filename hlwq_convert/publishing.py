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

    sets = [one for one in made if len(one.parts) > 1]
    whole = [one.writer for one in made if len(one.parts) == 1]
    found = {one.planning.path: one.inspection for one in made}
    try:
        for one in sets:
            # an interrupt while a set is cut leaves those before it, and nothing half-done
            last = one is sets[-1] and not whole
            found[one.planning.path] = _publish_set(one, announce if last else None, progress)
        if whole:
            announce()
            writers.publish(whole)
    finally:  # also when another failed: what was replaced must not stay beside what replaces it
        for one in made:
            if one.writer.published and one.planning.job.split_size is not None and overwrite:
                remove_replaced(one.planning.path, one.parts)
    inspections = []
    for one in made:
        inspection, job = found[one.planning.path], one.planning.job
        warnings = [*job.warnings, *inspection.warnings]
        inspections.append(msgspec.structs.replace(inspection, file=printable(one.planning.path), warnings=warnings))
    return inspections


def _publish_set(made: Made, announce: Callable[[], None] | None, progress: Progress | None) -> Inspection:
    found: list[Inspection] = []

    def look(reader: Reader) -> None:
        found.append(inspect_reader(reader))  # here: nothing may fail after the set is published
        if announce is not None:
            announce()

    made.writer.publish_parts(made.metadata, made.parts, look, stepper(progress, "splitting", total_bytes(made.parts)))
    return found[0]
