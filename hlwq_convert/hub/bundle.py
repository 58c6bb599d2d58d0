"""What a push consists of: verified containers, the files that describe their model, a report and the card."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hlwq_formats import metadata as md
from hlwq_formats.errors import BadEvaluation, Usage, escape
from hlwq_formats.file_set import open_set, place_of
from hlwq_formats.files import InputFile

from ..inspection import inspect_reader
from ..verification import check_symbols
from .card import Container, front_matter, license_warning, make_card
from .client import check_repo
from .download import is_asset
from .evaluation import Evaluation, of_content

CARD = "README.md"
SUFFIX = ".hlwq"
_PIECE = 4 << 20
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,90}\.hlwq", re.ASCII)


@dataclass(frozen=True)
class Item:
    """One file of a push: its place in the repository, its bytes or where they are, and their SHA-256."""

    path: str
    content: Path | bytes
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """All files of a push; `containers` in the order of their names."""

    repo: str
    containers: list[Container]
    items: list[Item]
    warnings: list[str]

    @property
    def beside(self) -> list[Item]:
        """The files of the model itself: all but containers, report and card."""
        return [item for item in self.items if not item.path.endswith(SUFFIX) and item.path not in (CARD, md.REPORT)]


def make_bundle(files: Sequence[str | os.PathLike[str]], repo: str, evaluations: list[Evaluation]) -> Bundle:
    """Verify every byte of the containers and put together what is pushed with them. A split set may be given by its
    folder, by any of its parts or by several.

    Raises Usage for names that a repository cannot have and for containers of different models, BadEvaluation for
    one of another file, and what Reader raises.
    """
    check_repo(repo)
    sources = _find(files)
    names = sorted(sources)
    containers, items = [], []
    beside: dict[str, bytes] | None = None
    readme = b""
    for name in names:
        with open_set(sources[name][0]) as reader:
            reader.verify(check_symbols)
            inspection = msgspec.structs.replace(inspect_reader(reader), file=name)
            assets = {name: reader.read_asset(name) for name in reader.assets if is_asset(name)}
        containers.append(Container(name, inspection, of_content(evaluations, inspection.content_id)))
        items += [Item(path.name, path, hash_file(path)) for path in sources[name]]
        readme = assets.pop(CARD, b"")
        if beside is not None and assets != beside:
            differ = sorted(n for n in {*assets, *beside} if assets.get(n) != beside.get(n))
            raise Usage(f"{names[0]} and {name} are of different models: {escape(differ[0])} differs")
        beside = assets
    for evaluation in evaluations:
        if not any(container.evaluation == evaluation for container in containers):
            raise BadEvaluation(f"an evaluation of none of these files, but of content {evaluation.content_id[:16]}...")
    base = front_matter(readme)
    report = msgspec.json.encode({"files": [container.inspection for container in containers]})
    texts = {**(beside or {}), md.REPORT: report, CARD: make_card(repo, containers, base).encode()}
    items += [Item(name, data, hashlib.sha256(data).hexdigest()) for name, data in sorted(texts.items())]
    warning = license_warning(base)
    return Bundle(repo, containers, items, [warning] if warning else [])


def _find(files: Sequence[str | os.PathLike[str]]) -> dict[str, list[Path]]:
    """The files of each container by its name."""
    found: dict[str, list[Path]] = {}
    for file in files:
        if not os.path.isdir(file):
            check_name(os.path.basename(file))
        with open_set(file) as reader:
            paths = [Path(part.path) for part in reader.parts]
        place = place_of(paths[0].name) if len(paths) > 1 else None
        name = place[0] if place else check_name(paths[0].name)
        if place and [path.resolve() for path in found.get(name, [])] == [path.resolve() for path in paths]:
            continue
        if name.lower() in {other.lower() for other in found}:
            raise Usage("two of the files have the same name")
        found[name] = paths
    return found


def check_name(name: str) -> str:
    """The name, when a repository can have a container of it; else Usage."""
    if not _NAME.fullmatch(name):
        raise Usage(f"{escape(name)}: a published file has a plain name of letters, digits, - and _ in {SUFFIX}")
    return name


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with InputFile(path) as file:
        for start in range(0, file.size, _PIECE):
            digest.update(file.read(start, min(_PIECE, file.size - start)))
    return digest.hexdigest()
