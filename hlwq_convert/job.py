"""What is to be converted and how: a model, and what becomes of each of its tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from hlwq_formats import metadata as md
from hlwq_formats.errors import BadModelDir, Usage
from hlwq_formats.layout import MAX_METADATA
from hlwq_formats.sections import zstd_version

from . import __version__
from .plan import Choice, placeholder, plan
from .recipe import make_recipe
from .scalar import Effort
from .source import Source, open_source
from .target import Target, make_target, parse_size

_MANY = 50_000


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
    recipe: str | None = None,
    sets: Sequence[str] = (),
    effort: Effort = "default",
    bpw: float | None = None,
    size: int | str | None = None,
    min_bits: Sequence[str] = (),
    max_bits: Sequence[str] = (),
    sensitivity: str | os.PathLike[str] | None = None,
    split_size: int | str | None = None,
    passthrough: bool = False,
    allow_extra: bool = False,
) -> Job:
    """Read the headers of a model and decide how each tensor is stored; reads no weights."""
    sets = [sets] if isinstance(sets, str) else list(sets)
    target = make_target(bpw, size, min_bits, max_bits, sensitivity)
    limit = None if split_size is None else parse_size(split_size, "--split-size")
    combined = make_recipe(bits, recipe, sets, effort, target)
    if passthrough and (bits is not None or recipe is not None or sets or target is not None):
        raise Usage("--passthrough keeps every tensor as it is: it takes no bits, size, --recipe or --set")
    source = open_source(src, passthrough=passthrough, allow_extra=allow_extra)
    if passthrough:
        combined = md.Recipe(name=None, bits=None, effort=effort, rules=[])
        choices = {tensor.name: Choice(None, "passthrough") for tensor in source.tensors}
    else:
        choices = plan(source.tensors, combined, len(sets))
    _check_metadata_fits(source, choices)
    return Job(source, combined, choices, list(source.model.warnings), target, limit)


def _check_metadata_fits(source: Source, choices: dict[str, Choice]) -> None:
    """Refuse now what could be refused only after hours: more tensors than the metadata can describe."""
    if len(source.tensors) < _MANY:
        return
    size = sum(len(md.encode(placeholder(tensor, choices[tensor.name]))) + 1 for tensor in source.tensors)
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
