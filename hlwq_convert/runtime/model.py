"""From one file to a model of transformers and its tokenizer: nothing else on disk, no network, no code of others."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from hlwq_formats import metadata as md
from hlwq_formats.errors import NotAvailable, NotThisModel, Usage, escape
from hlwq_formats.file_set import open_set
from hlwq_formats.layout import numel
from hlwq_formats.reader import Reader

from .architecture import model_class, read_config, set_generation_config
from .int4 import can_be_int4, int4_bytes, int4_config, to_int4
from .keys import Group, KeyPlan, plan_keys
from .load import TORCH, check_dtype, iter_reader
from .memory import check_memory
from .modules import HlwqExperts, Rotation, can_pack, pack
from .packed import Packed, packed_bytes, read_packed
from .packed_trellis import can_decode_on, not_here
from .tokenizer import read_tokenizer

Weights = Literal["dense", "packed", "int4"]

Parts = list[list[md.StoredTensor]]
"""What makes a weight that stays packed, as in Group.parts."""


def load_model(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    weights: Weights = "dense",
    code: str | os.PathLike[str] | None = None,
    workers: int | None = None,
) -> tuple[PreTrainedModel, Any]:
    """The model in evaluation mode, and its tokenizer (None when the file carries none).

    `dtype` is that of floating-point weights, by default what the config says or else that of the file's first;
    quantized ones are rounded to it once, from the decoder's float32. `code` is a folder with the Python files of
    an architecture that transformers does not have: they are run.

    Every byte of the file is verified, and every weight of the model comes from the file exactly once. Memory: the
    model and one tensor more; where transformers joins tensors (experts), those of one such weight more.
    """
    if weights not in ("dense", "packed", "int4"):
        raise Usage(f'weights is {escape(str(weights))}, expected "dense", "packed" or "int4"')
    check_dtype(dtype)
    device = torch.device(device)
    folder = None if code is None else Path(code)
    with open_set(path) as reader:
        reader.verify_shared()
        config = read_config(reader, folder)
        tokenizer = read_tokenizer(reader, config, folder)
        model = _build(reader, config, folder, dtype or _own_dtype(reader, config))
        entries = reader.metadata.tensors
        plan = plan_keys(
            model,
            {t.name: torch.empty(t.shape, dtype=_torch_dtype(t), device="meta") for t in entries},
            {t.name: t.of for t in entries if isinstance(t, md.AliasTensor)},
            reader.path,
        )
        int4 = int4_config(device, model.dtype) if weights == "int4" else None
        packed = _packable(reader, model, plan) if weights == "packed" else {}
        if not can_decode_on(device) and any(isinstance(tensor, md.TrellisTensor) for tensor in _tensors(packed)):
            raise not_here(device, reader.path)
        check_memory(_needed_bytes(reader, model, plan, packed, int4, device), device, reader.path, weights)
        _pack(reader, model, packed, device)
        _fill(reader, model, plan, packed, int4, device, workers)
        _finish(reader, model, plan, packed, device)
        set_generation_config(reader, model)
    return model.eval(), tokenizer


def _own_dtype(reader: Reader, config: PreTrainedConfig) -> torch.dtype:
    """What a model is in when nobody says: the dtype of its config, or of the file's first floating-point tensor."""
    if isinstance(config.dtype, torch.dtype) and config.dtype.is_floating_point:
        return config.dtype
    tags = (tensor.dtype for tensor in reader.metadata.tensors if tensor.dtype in ("F16", "BF16", "F32", "F64"))
    return TORCH[next(tags, "F32")]


def _torch_dtype(tensor: md.Tensor) -> torch.dtype:
    return TORCH.get(tensor.dtype, torch.uint8)  # for one that torch lacks the loader raises its own error


def _build(reader: Reader, config: PreTrainedConfig, code: Path | None, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, its tied weights still apart."""
    for key, value in config.to_dict().items():
        if re.fullmatch(r"(num|n)_(\w+_)?layers?", key) and isinstance(value, int) and value > len(reader.tensors):
            raise NotThisModel(
                f"config.json: {key} is {value}, the file has {len(reader.tensors)} tensors", file=reader.path
            )
    architecture = model_class(reader, config, code)
    try:
        with torch.device("meta"), init.no_tie_weights(), init.meta_device_safe_creation_ops():
            model: PreTrainedModel = architecture._from_config(config, dtype=dtype)
            return model
    except ImportError as error:
        problem = f"{architecture.__name__} needs a package: {escape(str(error).strip().splitlines()[0])}"
        raise NotAvailable(problem, file=reader.path) from error
    except Exception as error:  # whatever the values of a stranger's config bring about in a class of transformers
        problem = f"{architecture.__name__}: {type(error).__name__}: {' '.join(str(error).split())}"
        raise NotThisModel(f"config.json: {escape(problem, 300)}", file=reader.path) from error


def _dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The dtype of each weight: the model keeps some in float32 whatever it is asked for."""
    kept = {re.compile(k.replace("*", ".*")): dtype for k, dtype in model._get_dtype_plan(model.dtype).items()}
    return {
        key: next((dtype for pattern, dtype in kept.items() if pattern.search(key)), value.dtype)
        for key, value in model.state_dict().items()
    }


def _packable(reader: Reader, model: PreTrainedModel, plan: KeyPlan) -> dict[str, Parts]:
    """The weights that can stay packed, and what makes each: those that are tensors of the file as they are, or
    stacks of them, and that only modules of a known kind use."""
    packed: dict[str, Parts] = {}
    for group in plan.groups:
        users = [group.target, *(key for key, source in plan.tied.items() if source == group.target)]
        names = group.parts()
        if names is None or group.target in plan.tied or not all(can_pack(*_place(model, key)) for key in users):
            continue
        parts = [[reader.stored_tensor(name) for name in part] for part in names]
        if all(packed_bytes(tensor) is not None for part in parts for tensor in part):
            packed |= dict.fromkeys(users, parts)
    return packed


def _tensors(packed: dict[str, Parts]) -> list[md.StoredTensor]:
    """The tensors of the file that stay packed, each once."""
    return list({tensor.name: tensor for parts in packed.values() for part in parts for tensor in part}.values())


def _needed_bytes(
    reader: Reader, model: PreTrainedModel, plan: KeyPlan, packed: dict[str, Parts], int4: Any, device: torch.device
) -> int:
    """The model, and what is in memory beside it while the largest weight is made."""
    dtypes = _dtypes(model)
    needed = sum(packed_bytes(tensor) or 0 for tensor in _tensors(packed))
    for key, value in model.state_dict().items():
        if key not in plan.tied and key not in packed:
            is_int4 = int4 is not None and _becomes_int4(model, plan, key)
            needed += int4_bytes(value.numel()) if is_int4 else value.numel() * dtypes[key].itemsize
    beside = [_group_bytes(reader, group, dtypes[group.target]) for group in plan.groups if group.target not in packed]
    if device.type == "cuda":  # where those of a trellis are decoded whole, to be checked and in each step
        trellises = (tensor for tensor in _tensors(packed) if isinstance(tensor, md.TrellisTensor))
        beside += [numel(tensor.shape) * model.dtype.itemsize for tensor in trellises]
    return needed + max(beside, default=0)


def _group_bytes(reader: Reader, group: Group, dtype: torch.dtype) -> int:
    return sum(numel(reader.tensors[name].shape) * dtype.itemsize for name in group.sources)


def _becomes_int4(model: PreTrainedModel, plan: KeyPlan, key: str) -> bool:
    """Whether this is the weight of a linear layer for torchao: one that nothing else shares."""
    module, name = _place(model, key)
    return name == "weight" and can_be_int4(module) and key not in plan.tied and key not in plan.tied.values()


def _pack(reader: Reader, model: PreTrainedModel, packed: dict[str, Parts], device: torch.device) -> None:
    """Put what stays packed in its place, each tensor of the file once."""
    matrices: dict[str, Packed] = {}
    rotation = Rotation()
    for tensor in _tensors(packed):
        matrices[tensor.name] = read_packed(reader, tensor, model.dtype, device)
    for key, parts in packed.items():
        pack(*_place(model, key), [[matrices[tensor.name] for tensor in part] for part in parts], rotation)
    if any(isinstance(module, HlwqExperts) for module in model.modules()):
        model.set_experts_implementation("eager")  # the one that takes an expert at a time


def _fill(
    reader: Reader, model: PreTrainedModel, plan: KeyPlan, packed: dict[str, Parts], int4: Any,
    device: torch.device, workers: int | None,
) -> None:  # fmt: skip
    """Give every other weight that the file holds its tensors, each group when its last one has been read."""
    dtypes = _dtypes(model)
    group_of = {name: group for group in plan.groups for name in group.sources if group.target not in packed}
    names = [name for name in reader.tensors if name in group_of]
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    keep = int4 is None  # of those that become int4 the dense ones must not all be there at once
    for name, value in iter_reader(reader, names, device, lambda name: dtypes[group_of[name].target], workers, keep):
        group = group_of[name]
        arrived = waiting.setdefault(group.target, {})
        arrived[name] = value
        del value
        if len(arrived) < len(group.sources):
            continue
        del waiting[group.target]
        made = group.convert(model, arrived)
        del arrived
        for key in [key for key in made if key not in plan.tied]:
            set_weight(model, key, made.pop(key).to(dtypes[key]))
            if int4 is not None and _becomes_int4(model, plan, key):
                to_int4(_place(model, key)[0], int4)
    for name in reader.tensors.keys() - plan.names():
        reader.verify_tensor(reader.tensors[name])  # no model wants it, but it is part of the file


def _place(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The module that holds a weight, and the weight's name in it."""
    module_name, _, name = key.rpartition(".")
    return model.get_submodule(module_name), name


def set_weight(model: nn.Module, key: str, value: torch.Tensor) -> None:
    """Put a parameter or a buffer in the place of the one that has this key."""
    module, name = _place(model, key)
    if name in module._parameters and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=value.is_floating_point())
    value._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves it as it is
    setattr(module, name, value)


def _finish(
    reader: Reader, model: PreTrainedModel, plan: KeyPlan, packed: dict[str, Parts], device: torch.device
) -> None:
    """Tie what is tied, and let transformers compute the buffers that no file holds."""
    for key, source in plan.tied.items():
        if key not in packed:
            set_weight(model, key, getattr(*_place(model, source)))
    for member, source in list(model.all_tied_weights_keys.items()):
        if member not in plan.tied and source not in plan.tied:
            del model.all_tied_weights_keys[member]  # the file has both, and they differ
    for key, value in list(model.named_buffers()):
        if value.is_meta:  # not a number until it is computed, so that one which nothing computes is seen
            module, name = _place(model, key)
            setattr(
                module, name, torch.full_like(value, float("nan") if value.is_floating_point() else 0, device=device)
            )
    model.initialize_weights()
    for key, value in model.named_buffers():
        if value.is_floating_point() and bool(value.isnan().any()):
            raise NotThisModel(f"nothing computes the buffer {escape(key, 120)}", file=reader.path)
