"""How much the divergence of the model's output suffers from the error of each tensor, and what follows for bits.

docs/evaluation.md has the derivation. In short: with a_t the divergence for each unit of the relative squared error
of tensor t, and n_t its weights, the divergence at a fixed number of bits is least when the relative squared error of
t is proportional to n_t / a_t. The weight s_t = a_t / n_t, up to a common factor, says so to an encoder, which scales
the step of t by 1 / sqrt(s_t).
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from hlwq_formats.errors import CannotCreate, escape
from hlwq_formats.files import InputFile
from hlwq_formats.strict_json import parse

from ..whole_file import write_whole

_LARGEST = 8.0
"""|log2 s| is kept under this: 4 bits more or fewer than the mean."""

_MAX_DOCUMENT = 64 << 20


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the noise of one tensor did: its weights, its relative squared error, the mean divergence in nats."""

    weights: int
    rel_mse: float
    kl: float


class Sensitivity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The document: `tensors` is what an encoder takes, the rest says where it came from."""

    version: int
    tensors: dict[str, float]
    predicted: list[str]  # those of `tensors` that were not measured
    gain: float  # divergence at these weights over that at one error for all, at equal bits, as the model says
    settings: dict[str, str]  # what the measurements depend on
    measured: dict[str, Measured]


def measuring_order(weights: Mapping[str, int]) -> list[str]:
    """The tensors with most weights first; of equal ones, those that lie far apart in depth."""
    by_type = defaultdict(list)
    for name in weights:
        by_type[_module_type(name)].append(name)
    spread = {}
    for names in by_type.values():
        for rank, name in enumerate(sorted(names, key=_depth)):
            spread[name] = _van_der_corput(rank)
    return sorted(weights, key=lambda name: (-weights[name], spread[name], name))


def summarise(weights: Mapping[str, int], measured: Mapping[str, Measured], settings: dict[str, str]) -> Sensitivity:
    """The document for these tensors, `weights` being their numbers of weights: what is not measured is predicted."""
    known = {
        name: math.log2(m.kl / m.rel_mse / m.weights) for name, m in measured.items() if m.kl > 0 and m.rel_mse > 0
    }
    logs = _predict(list(weights), known) if known else dict.fromkeys(weights, 0.0)
    logs = _centre(logs, weights)
    logs = _centre({name: min(max(log, -_LARGEST), _LARGEST) for name, log in logs.items()}, weights)
    tensors = {name: 2**log for name, log in sorted(logs.items())}
    total = sum(weights.values())
    gain = total / sum(weights[name] * s for name, s in tensors.items()) if total else 1.0
    predicted = sorted(name for name in weights if name not in measured)
    return Sensitivity(1, tensors, predicted, gain, settings, dict(sorted(measured.items())))


def _centre(logs: dict[str, float], weights: Mapping[str, int]) -> dict[str, float]:
    """Shift so that the mean over all weights is 0: the geometric mean of s is 1, and the mean width stays."""
    total = sum(weights.values())
    mean = sum(weights[name] * log for name, log in logs.items()) / total if total else 0.0
    return {name: log - mean for name, log in logs.items()}


def _predict(names: Sequence[str], known: Mapping[str, float]) -> dict[str, float]:
    """Each unknown log from those of its module type: linear between depths, constant outside; the median of all where
    its type has none."""
    by_type: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for name, log in known.items():
        by_type[_module_type(name)].append((_depth(name), log))
    median = float(np.median(list(known.values())))
    logs = {}
    for name in names:
        points = sorted(by_type.get(_module_type(name), []))
        if name in known:
            logs[name] = known[name]
        elif points:
            logs[name] = float(np.interp(_depth(name), [depth for depth, _ in points], [log for _, log in points]))
        else:
            logs[name] = median
    return logs


def _module_type(name: str) -> str:
    """The name without numbers: equal for the same part of every layer and expert."""
    return re.sub(r"\d+", "*", name)


def _depth(name: str) -> int:
    found = re.search(r"\d+", name)
    return int(found[0]) if found else 0


def _van_der_corput(number: int) -> float:
    """The binary digits of a number mirrored at the point: 0, 1/2, 1/4, 3/4, 1/8, ..."""
    result, weight = 0.0, 0.5
    while number:
        result += weight * (number & 1)
        number >>= 1
        weight /= 2
    return result


def write_sensitivity(path: str | os.PathLike[str], document: Sensitivity) -> None:
    """Write the document, whole or not at all, in place of an earlier one."""
    content = msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"
    write_whole(path, content, overwrite=True)


def continue_sensitivity(path: str | os.PathLike[str], settings: dict[str, str]) -> dict[str, Measured]:
    """What an earlier run with the same settings has measured; nothing where there is no such file.

    CannotCreate (73) for a file that is no measurement, or another one.
    """

    def refuse(problem: str) -> CannotCreate:
        return CannotCreate(problem, file=os.fspath(path), hint="choose another output or pass --overwrite")

    if not os.path.exists(path):
        return {}
    with InputFile(path) as file:
        content = parse(file.read(0, min(file.size, _MAX_DOCUMENT)), lambda problem: refuse(f"exists, {problem}"))
    try:
        document = msgspec.convert(content, Sensitivity)
    except msgspec.ValidationError as error:
        raise refuse(f"exists and holds no sensitivities: {escape(str(error))}") from None
    if document.settings != settings:
        other = min(key for key in {*settings, *document.settings} if settings.get(key) != document.settings.get(key))
        raise refuse(f"holds another measurement: its {escape(other, 40)} differs")
    if not all(0 <= m.kl < math.inf and 0 <= m.rel_mse < math.inf for m in document.measured.values()):
        raise refuse("exists and holds impossible numbers")
    return document.measured
