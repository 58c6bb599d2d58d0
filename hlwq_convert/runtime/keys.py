"""Which tensors of a file make which weights of a model, settled from names and shapes before any byte is read.

transformers renames and joins what checkpoints hold (`bert.` prefixes, gamma and beta, experts one by one) while
it loads them. Here its own rules are run on tensors of the meta device, so every key that is missing, left over
or of another shape is known at once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from hlwq_formats.errors import NotThisModel, escape

_LISTED = 3


@dataclass
class Group:
    """Tensors that become one weight of the model, or several that a converter makes of them together."""

    target: str  # the weight, or the first of them
    sources: dict[str, str] = field(default_factory=dict)  # tensor of the file -> the converter's pattern, in order
    converter: WeightConverter | None = None

    def convert(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights by their keys; `tensors` holds every source."""
        if self.converter is None:
            return {self.target: tensors[next(iter(self.sources))]}
        for name, pattern in self.sources.items():
            self.converter.add_tensor(self.target, name, pattern, tensors[name])  # type: ignore[arg-type]
        converted = self.converter.convert(self.target, model=model, config=model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in converted.items()}

    def parts(self) -> list[list[str]] | None:
        """The tensors whose rows, joined, are each slice of the weight, where a converter only stacks them; all of it
        in one part where there is no converter. None for what a converter computes in another way."""
        if self.converter is None:
            return [list(self.sources)]
        match self.converter.operations:
            case [MergeModulelist(dim=0)] | [MergeModulelist(dim=0), Concatenate(dim=1)]:
                pass
            case _:
                return None
        patterns = [[n for n, p in self.sources.items() if p == pattern] for pattern in self.converter.source_patterns]
        return [list(names) for names in zip(*filter(None, patterns), strict=True)]


@dataclass(frozen=True)
class KeyPlan:
    """How a file fills a model."""

    groups: list[Group]
    tied: dict[str, str]  # weight without a tensor of its own -> weight whose memory it shares

    def names(self) -> set[str]:
        """The tensors of the file that the model uses."""
        return {name for group in self.groups for name in group.sources}


def plan_keys(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], equal: Mapping[str, str], path: str
) -> KeyPlan:
    """Match the tensors of a file, given as tensors of the meta device, to the weights of a model on it.

    `equal` maps a tensor to the earlier one whose bytes it has. Raises NotThisModel (65) with every key that is
    missing, unexpected, given twice or of another shape.
    """
    wanted: dict[str, torch.Tensor] = model.state_dict()
    groups, unexpected = _groups(model, tensors, wanted)
    problems = {"unexpected": unexpected}
    hits, holders = Counter[str](), {}
    for group in groups:
        if group.converter is None and len(group.sources) > 1:
            problems.setdefault("given twice", []).append(group.target)
            continue
        try:
            made = group.convert(model, tensors)
        except Exception as error:  # what its shapes bring about in an operation of transformers
            problems.setdefault("not convertible", []).append(f"{group.target}: {' '.join(str(error).split())}")
            continue
        for key, value in made.items():
            hits[key] += 1
            holders[key] = next(iter(group.sources)) if group.converter is None else None
            if key not in wanted:
                problems["unexpected"].append(key)
            elif value.shape != wanted[key].shape:
                shapes = f"{list(value.shape)} for {list(wanted[key].shape)}"
                problems.setdefault("of another shape", []).append(f"{key} {shapes}")
    problems["given twice"] = problems.get("given twice", []) + [key for key, n in hits.items() if n > 1]
    tied = _tied(model, hits, holders, equal)
    # a buffer may be left out where transformers computes it: a weight never, it would be random
    optional = _pattern(model._keys_to_ignore_on_load_missing)
    computed = {key for key, _ in model.named_buffers() if optional and optional.search(key)}
    problems["missing"] = [key for key in wanted if key not in hits and key not in tied and key not in computed]
    found = [_summary(what, keys) for what, keys in problems.items() if keys]
    if found:
        name = type(model).__name__
        raise NotThisModel(f"the tensors are not those of {name}: {'; '.join(sorted(found))}", file=path)
    return KeyPlan(groups, tied)


def _groups(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> tuple[list[Group], list[str]]:
    """Groups in the order in which transformers would make them, and the names that no weight wants."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    ignored = _pattern({*(model._keys_to_ignore_on_load_unexpected or ()), *_former_buffers(model)})
    groups: dict[str, Group] = {}
    unexpected = []
    for name in sorted(tensors, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, dict(wanted))
        if key not in wanted and name in wanted:
            key, pattern = name, None
        if key in wanted:
            if key not in groups:
                groups[key] = Group(key, converter=None if pattern is None else deepcopy(of_pattern[pattern]))
            groups[key].sources[name] = pattern or name
        elif not (ignored and ignored.search(key)):
            unexpected.append(name)
    return list(groups.values()), unexpected


def _former_buffers(model: PreTrainedModel) -> Iterator[str]:
    """Patterns of what older versions stored and newer ones compute, as transformers ignores them."""
    names = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in names):
        yield r"rotary_emb\.inv_freq"
    if any(name.endswith("position_ids") for name in names):
        yield r"(^|\.)position_ids$"


def _pattern(patterns: set[str] | list[str] | None) -> re.Pattern[str] | None:
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None


def _tied(
    model: PreTrainedModel, hits: Mapping[str, int], holders: Mapping[str, str | None], equal: Mapping[str, str]
) -> dict[str, str]:
    """What shares the memory of what.

    The model says which weights are one. The file may hold any of them, or several: those that are no equal
    tensors in the file then stay apart, as transformers does.
    """

    def origin(key: str) -> str | None:
        holder = holders[key]
        return None if holder is None else equal.get(holder, holder)

    families: dict[str, list[str]] = {}
    for member, source in model.all_tied_weights_keys.items():
        families.setdefault(source, [source]).append(member)
    tied = {}
    for family in families.values():
        present = [key for key in family if key in hits]
        for key in family if present else ():
            first = present[0]
            if key not in hits or (key != first and origin(key) is not None and origin(key) == origin(first)):
                tied[key] = first
    return tied


def _summary(what: str, keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return f"{len(keys)} {what}: {', '.join(escape(key, 100) for key in keys[:_LISTED])}{more}"
