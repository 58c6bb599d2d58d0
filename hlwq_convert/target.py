"""What a user asks of a file of variable rate: its size, bounds for some tensors, and which of them matter more."""

from __future__ import annotations

import math
import os
import re
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from hlwq_formats.errors import BadModelDir, Usage, escape
from hlwq_formats.files import InputFile
from hlwq_formats.strict_json import parse

LEAST_BPW, MOST_BPW = 1.5, 8.0
_UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_MAX_FILE = 64 << 20
_SENSITIVITIES = (1e-6, 1e6)

Rule = tuple[re.Pattern[str], float]


@dataclass(frozen=True)
class Wish:
    """What is asked for one tensor."""

    sensitivity: float
    least_bits: float
    most_bits: float


@dataclass(frozen=True)
class Target:
    """The size of a file, in bits a weight or in bytes, everything counted, and rules by tensor, the last that matches
    holding."""

    bpw: float | None
    size: int | None
    least: tuple[Rule, ...] = ()
    most: tuple[Rule, ...] = ()
    sensitivities: tuple[Rule, ...] = ()
    sensitivity_of: dict[str, float] = field(default_factory=dict)  # by name, before any rule
    sensitivity_file: str | None = None

    def bytes_for(self, weights: int) -> int:
        """The size of a file that holds so many weights."""
        return self.size if self.size is not None else int((self.bpw or 0) * weights / 8)

    def wish(self, name: str) -> Wish:
        """The rules for one tensor."""
        least, most = _last(self.least, name, 0.0), _last(self.most, name, math.inf)
        sensitivity = self.sensitivity_of.get(name) or _last(self.sensitivities, name, 1.0)
        return Wish(sensitivity, min(least, most), most)

    def __str__(self) -> str:
        """The options that say the same; of a file of sensitivities, its name."""
        words = ["--bpw", f"{self.bpw:g}"] if self.bpw is not None else ["--size", str(self.size)]
        for option, rules in (("--min-bits", self.least), ("--max-bits", self.most)):
            for pattern, bits in rules:
                words += [option, f"{pattern.pattern}={bits:g}"]
        if self.sensitivity_file is not None:
            words += ["--sensitivity", self.sensitivity_file]
        return shlex.join(words)


def _last(rules: Sequence[Rule], name: str, default: float) -> float:
    return next((value for pattern, value in reversed(rules) if pattern.search(name)), default)


def make_target(
    bpw: float | None,
    size: int | str | None,
    min_bits: Sequence[str] = (),
    max_bits: Sequence[str] = (),
    sensitivity: str | os.PathLike[str] | None = None,
) -> Target | None:
    """Combine the options of a variable rate; None when no size is asked for, which the other options need.

    Raises Usage for what cannot be meant, and what is wrong with the file of sensitivities.
    """
    if bpw is None and size is None:
        if min_bits or max_bits or sensitivity is not None:
            raise Usage("--min-bits, --max-bits and --sensitivity need a size", hint="add --bpw or --size")
        return None
    if bpw is not None and size is not None:
        raise Usage("--bpw and --size exclude each other")
    if bpw is not None and not LEAST_BPW <= bpw <= MOST_BPW:
        raise Usage(f"--bpw is {bpw:g}, expected {LEAST_BPW:g} to {MOST_BPW:g}")
    return Target(
        bpw,
        None if size is None else parse_size(size, "--size"),
        tuple(_parse_bound("--min-bits", rule) for rule in min_bits),
        tuple(_parse_bound("--max-bits", rule) for rule in max_bits),
        *(((), {}) if sensitivity is None else load_sensitivities(sensitivity)),
        sensitivity_file=None if sensitivity is None else escape(os.path.basename(os.fspath(sensitivity))),
    )


def parse_size(size: int | str, option: str) -> int:
    """Bytes of "16.2GB"; Usage, which names the option, for what is no size or none at all."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)", str(size))
    if match is None or match[2] not in _UNITS or not (count := int(float(match[1]) * _UNITS[match[2]])):
        raise Usage(f"{option} is {escape(str(size), 60)}, expected a number with {', '.join(u for u in _UNITS if u)}")
    return count


def _parse_bound(option: str, rule: str) -> Rule:
    pattern, separator, value = rule.rpartition("=")
    if not separator or not pattern or not re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,6})?", value):
        raise Usage(f"{option} {escape(rule)}: expected REGEX=BITS")
    if not 1 <= float(value) <= 16:
        raise Usage(f"{option} {escape(rule)}: bits are {value}, expected 1 to 16")
    return compile_pattern(pattern, f"{option} {escape(rule)}"), float(value)


def load_sensitivities(path: str | os.PathLike[str]) -> tuple[tuple[Rule, ...], dict[str, float]]:
    """The rules and the names of a JSON file {"tensors": {name: s}, "rules": {regular expression: s}}.

    s, relative to 1, is how much a squared error in the tensor matters. A rule holds where no name does; other keys are
    ignored.

    Raises BadModelDir (65) for a file that is not so, MissingInput (66) when it is not there.
    """
    name = os.fspath(path)

    def bad(problem: str) -> BadModelDir:
        return BadModelDir(problem, file=name)

    with InputFile(path) as file:
        if file.size > _MAX_FILE:
            raise bad(f"{file.size} bytes, at most {_MAX_FILE} are read")
        document = parse(file.read(0, file.size), bad)
    if not isinstance(document, dict) or not ({"tensors", "rules"} & document.keys()):
        raise bad('not a file of sensitivities: expected an object with "tensors" or "rules"')
    found: dict[str, dict[str, float]] = {}
    for key in ("rules", "tensors"):
        try:
            found[key] = msgspec.convert(document.get(key, {}), dict[str, float])
        except msgspec.ValidationError as error:
            raise bad(f"{key}: {escape(str(error))}") from None
        for text, value in found[key].items():
            if not _SENSITIVITIES[0] <= value <= _SENSITIVITIES[1]:
                low, high = _SENSITIVITIES
                raise bad(f'{key}: "{escape(text, 120)}" is {value}, expected {low} to {high}')
    rules = ((compile_pattern(text, f"{name}: {escape(text, 120)}"), s) for text, s in found["rules"].items())
    return tuple(rules), found["tensors"]


def compile_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """A regular expression of a user; Usage when it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # of an expression that will mean something else
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError, FutureWarning) as error:
        raise Usage(f"{where}: not a regular expression: {escape(str(error))}") from None
