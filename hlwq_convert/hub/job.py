"""A job file: which model is converted how, what it must reach, and where it is published."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import msgspec

from hlwq_formats.errors import Usage, escape
from hlwq_formats.files import InputFile

from ..recipe import builtin_recipes, make_recipe
from ..scalar import Effort
from ..target import make_target
from ..target import parse_size as parse_bytes
from .bundle import check_name
from .client import check_repo

_MAX_JOB = 1 << 20
_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model to convert: a repository, and a branch, tag or commit of it."""

    repo: str
    revision: str = "main"


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where to publish. In `tag`, {commit} stands for the first 12 digits of the base's commit."""

    repo: str
    branch: str = "main"
    tag: str | None = None
    private: bool = False


class Gates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file must reach to be published; those on its output need an evaluation."""

    min_cosine: float | None = None
    max_kl: float | None = None
    max_perplexity_ratio: float | None = None
    max_size: str | None = None

    @property
    def need_evaluation(self) -> bool:
        """Whether a gate is on the output of the model."""
        return self.max_kl is not None or self.max_perplexity_ratio is not None


class FileJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file: its name and the options of hlwq-convert that make it."""

    name: str
    bits: int | None = None
    bpw: float | None = None
    size: int | str | None = None
    split_size: int | str | None = None
    recipe: str | None = None
    set: list[str] = []
    effort: Effort = "default"
    gates: Gates = Gates()


class EvaluationJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What hlwq-eval reads: a text file (without one, its own) in windows of `ctx` tokens."""

    text: str | None = None
    ctx: int = 1024


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    base: Base
    target: Target
    file: list[FileJob]
    evaluation: EvaluationJob | None = None


def read_job(path: str | os.PathLike[str]) -> Job:
    """Read and check a job file; paths in it are from its folder. Raises Usage for all that cannot be meant."""
    with InputFile(path) as opened:
        text = opened.read(0, min(opened.size, _MAX_JOB))
    try:
        job = msgspec.convert(tomllib.loads(text.decode()), Job)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeError, RecursionError) as error:
        raise Usage(f"not a job: {escape(str(error))}", file=os.fspath(path)) from None
    check_repo(job.base.repo)
    check_repo(job.target.repo)
    if not job.file:
        raise Usage("no [[file]]: there is nothing to make", file=os.fspath(path))
    names = [check_name(file.name).lower() for file in job.file]
    if len(set(names)) != len(names):
        raise Usage("two [[file]] tables have the same name", file=os.fspath(path))
    folder = Path(path).parent
    files = []
    for file in job.file:
        if file.gates.need_evaluation and job.evaluation is None:
            raise Usage(f"{file.name}: its gates need an [evaluation]", file=os.fspath(path))
        if file.gates.max_size is not None:
            parse_size(file.gates.max_size)
        if file.split_size is not None:
            parse_bytes(file.split_size, f"{file.name}: split_size")
        recipe = file.recipe
        if recipe is not None and recipe not in builtin_recipes():
            recipe = os.fspath(folder / recipe)
        files.append(msgspec.structs.replace(file, recipe=recipe))
        make_recipe(file.bits, recipe, file.set, file.effort, make_target(file.bpw, file.size))
    evaluation = job.evaluation
    if evaluation is not None and evaluation.text is not None:
        evaluation = msgspec.structs.replace(evaluation, text=os.fspath(folder / evaluation.text))
    return msgspec.structs.replace(job, file=files, evaluation=evaluation)


def parse_size(text: str) -> int:
    """Bytes of "4.2GB": decimal units, as disks and the Hub count."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kMGT]?B?)", text)
    if match is None or match[2] not in _UNITS:
        raise Usage(f"{escape(text, 40)} is no size: expected a number and B, kB, MB, GB or TB")
    return round(float(match[1]) * _UNITS[match[2]])
