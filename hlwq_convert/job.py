"""What is to be converted and how: a model, and what becomes of each of its tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

from hlwq_formats import metadata as md
from hlwq_formats.errors import BadModelDir, Usage
from hlwq_formats.layout import MAX_METADATA
from hlwq_formats.sections import zstd_version

from . import __version__
from .ladder import Rung
from .plan import Choice, placeholder, plan
from .recipe import make_recipe
from .scalar import Effort
from .source import Source, open_source
from .target import Target, make_target, parse_size

_MANY = 50_000
_CODED = 150  # bytes that the entry of compressed codes takes more, but for large tensors


class Options(TypedDict, total=False):
    """How a model is converted, but for the size: what `prepare` takes and `convert` passes on."""

    recipe: str | None  # "uniform", "mixed" or a file
    sets: Sequence[str]  # "REGEX=BITS" or "REGEX=raw"
    effort: Effort
    min_bits: Sequence[str]  # "REGEX=BITS", with a size
    max_bits: Sequence[str]
    sensitivity: str | os.PathLike[str] | None  # a file, with a size
    split_size: int | str | None  # bytes, or such as "20GB"
    passthrough: bool
    allow_extra: bool


@dataclass(frozen=True)
class Job:
    """A model and what is to become of each of its tensors. A file of over `split_size` bytes is to be split."""

    source: Source
    recipe: md.Recipe
    choices: dict[str, Choice]
    warnings: list[str]
    target: Target | None = None
    split_size: int | None = None


def prepare(
    src: str | os.PathLike[str],
    bits: int | None = None,
    *,
    bpw: float | None = None,
    size: int | str | None = None,
    **options: Unpack[Options],
) -> Job:
    """Read the headers of a model and decide how each tensor is stored; reads no weights."""
    return prepare_all(src, [Rung(bits, bpw, size)], **options)[0]


def prepare_all(
    src: str | os.PathLike[str],
    rungs: Sequence[Rung],
    *,
    recipe: str | None = None,
    sets: Sequence[str] = (),
    effort: Effort = "default",
    min_bits: Sequence[str] = (),
    max_bits: Sequence[str] = (),
    sensitivity: str | os.PathLike[str] | None = None,
    split_size: int | str | None = None,
    passthrough: bool = False,
    allow_extra: bool = False,
) -> list[Job]:
    """`prepare` for each rung of a ladder: the jobs share their source, and differ in nothing but the size.

    Raises Usage when two of them would make the same file.
    """
    sets = [sets] if isinstance(sets, str) else list(sets)
    limit = None if split_size is None else parse_size(split_size, "--split-size")
    recipes, targets = list[md.Recipe](), list[Target | None]()
    for rung in rungs:
        targets.append(make_target(rung.bpw, rung.size, min_bits, max_bits, sensitivity))
        recipes.append(make_recipe(rung.bits, recipe, sets, effort, targets[-1]))
        if recipes[-1] in recipes[:-1]:
            raise Usage(f"{rung.label} is asked for twice")
        if passthrough and (rung != Rung() or recipe is not None or sets):
            raise Usage("--passthrough keeps every tensor as it is: it takes no bits, size, --recipe or --set")
    source = open_source(src, passthrough=passthrough, allow_extra=allow_extra)
    if passthrough:
        recipes = [md.Recipe(name=None, bits=None, effort=effort, rules=[])]
        choices = [{tensor.name: Choice(None, "passthrough") for tensor in source.tensors}]
    else:
        choices = [plan(source.tensors, combined, len(sets)) for combined in recipes]
    for chosen in choices:
        _check_metadata_fits(source, chosen, _CODED if effort == "best" else 0)
    return [
        Job(source, combined, chosen, list(source.model.warnings), target, limit)
        for combined, chosen, target in zip(recipes, choices, targets, strict=True)
    ]


def _check_metadata_fits(source: Source, choices: dict[str, Choice], more: int) -> None:
    """Refuse now what could be refused only after hours: more tensors than the metadata can describe, `more` bytes
    each than a placeholder takes."""
    if len(source.tensors) < _MANY:
        return
    size = sum(len(md.encode(placeholder(tensor, choices[tensor.name]))) + 1 + more for tensor in source.tensors)
    if size > MAX_METADATA - _MANY:
        raise BadModelDir(
            f"{len(source.tensors)} tensors need about {size} bytes of metadata, a file can hold {MAX_METADATA}",
            file=str(source.model.path),
            hint="convert parts of the model on their own",
        )


def make_metadata(job: Job, signs: md.Section, tensors: list[md.Tensor], assets: list[md.Asset]) -> md.Metadata:
    """The document of a conversion."""
    tool = md.Tool("hlwq-convert", __version__, zstd_version())
    return md.Metadata(tensors, assets, signs, job.recipe, job.source.provenance, None, tool)
