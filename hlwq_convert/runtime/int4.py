"""Weights as torchao keeps them at 4 bits: a second, coarser quantization, for kernels that need it.

It adds its own error to that of the file (docs/runtime.md has figures): it is for speed, never for quality.
"""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import torch
from torch import nn

from hlwq_formats.errors import NotAvailable, escape

GROUP = 128
"""Weights that share one scale and one zero point."""


def int4_bytes(weights: int) -> int:
    """Bytes of so many weights: 4 bits each, and a bf16 scale and zero point for each group."""
    return weights // 2 + weights // GROUP * 4


def can_be_int4(module: nn.Module) -> bool:
    """Whether torchao has a 4-bit form for it: a plain nn.Linear whose rows are whole groups."""
    return type(module) is nn.Linear and module.in_features % GROUP == 0


def int4_config(device: torch.device, dtype: torch.dtype) -> Any:
    """What to give to `to_int4` on this device. Raises NotAvailable (69) unless a small module converts and runs."""
    try:
        with _quiet():
            config = _config(device)
            module = nn.Linear(GROUP, 64, device=device, dtype=dtype)
            to_int4(module, config)
            module(torch.zeros(1, GROUP, device=device, dtype=dtype))
    except Exception as error:  # torchao says in many ways that a kernel is not there
        problem = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
        raise NotAvailable(
            f'weights="int4" needs torchao, with kernels for {device.type} and {dtype}: {escape(problem, 160)}',
            hint='pip install torchao, or use weights="packed"',
        ) from error
    return config


def to_int4(module: nn.Module, config: Any) -> None:
    """Replace the weight of an nn.Linear by its 4-bit form."""
    from torchao.quantization import quantize_

    quantize_(module, config)
    module._is_hf_initialized = True  # type: ignore[assignment]  # transformers leaves it as it is


def _config(device: torch.device) -> Any:
    """Each device has a layout of its own: "tile_packed_to_4d" is that of the kernels inside torch for CUDA."""
    if device.type == "cpu":
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=GROUP)
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")


@contextlib.contextmanager
def _quiet() -> Any:
    """torchao reports at import each library of its own that it does not find."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
