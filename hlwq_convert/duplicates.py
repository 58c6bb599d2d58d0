"""Find tensors of equal dtype, shape and bytes: tied weights that were stored twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable

from hlwq_formats.safetensors_dir import ModelDir, SourceTensor

from .source_digests import digest_tensor

_PROBE = 4096


def find_duplicates(model: ModelDir, tensors: Iterable[SourceTensor]) -> dict[str, str]:
    """Name of a duplicate -> name of the first tensor, in the given order, that equals it.

    Only tensors that agree in dtype, shape and their first and last 4 KiB are read whole.
    """
    groups = [list(tensors)]
    for key in (_kind, lambda t: _probe(model, t), lambda t: digest_tensor(model, t)):
        groups = [part for group in groups for part in _split(group, key)]
    return {twin.name: group[0].name for group in groups for twin in group[1:]}


def _split(group: list[SourceTensor], key: Callable[[SourceTensor], Hashable]) -> list[list[SourceTensor]]:
    """The parts of a group that agree in `key` and have at least two members."""
    parts: defaultdict[Hashable, list[SourceTensor]] = defaultdict(list)
    for tensor in group:
        parts[key(tensor)].append(tensor)
    return [part for part in parts.values() if len(part) > 1]


def _kind(tensor: SourceTensor) -> Hashable:
    return tensor.dtype, tensor.shape


def _probe(model: ModelDir, tensor: SourceTensor) -> Hashable:
    size = min(_PROBE, tensor.length)
    return model.read(tensor, 0, size), model.read(tensor, tensor.length - size, size)
