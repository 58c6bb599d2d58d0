"""nn.Linear and nn.Embedding over a matrix that stays packed.

A module is changed in place, into a class that has the forward of ours before that of torch. What its own class
adds (a scaled embedding, say) goes on working, and code that reads `weight` gets the decoded matrix.
"""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from .packed import PackedMatrix

_CHUNK = 1 << 21
"""Weights that are decoded at once in a forward pass."""
_GPU_CHUNK = 1 << 26
"""The same on a GPU, which is idle between small pieces."""


class Rotation:
    """The last activation that was rotated: q, k and v, or gate and up, ask for the same one in a row."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[torch.Tensor], int, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
        """matrix.rotate(x). All matrices of a file have the same signs, so one serves for another."""
        if torch.compiler.is_compiling():  # the compiler finds equal expressions by itself
            return matrix.rotate(x)
        last = self._last
        if last is not None and last[0]() is x and last[1] == x._version:
            return last[2]
        rotated = matrix.rotate(x)
        self._last = weakref.ref(x), x._version, rotated
        return rotated

    def __reduce__(self) -> tuple[type[Rotation], tuple[()]]:
        return Rotation, ()  # a copy of the model starts with none


class _Packed(nn.Module):
    matrix: PackedMatrix

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix, decoded anew each time."""
        value = self.matrix.rows(0, self.matrix.shape[0], self.matrix.like.dtype)
        value._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves it as it is
        return value


class HlwqLinear(_Packed, nn.Linear):  # type: ignore[override]
    """nn.Linear whose rows are decoded some at a time; where they are whole blocks, in the rotated domain."""

    rotation: Rotation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        rows, matrix = self.matrix.rows, self.matrix
        if matrix.can_multiply(x):
            return matrix.multiply(self.rotation(x, matrix), self.bias, x.dtype)
        if matrix.whole_blocks and not matrix.on_gpu:
            x, rows = self.rotation(x, matrix), matrix.rotated_rows
        step = max(1, (_GPU_CHUNK if matrix.on_gpu else _CHUNK) // matrix.shape[1])
        starts = range(0, matrix.shape[0], step)
        parts = []
        for start in starts:
            stop = min(start + step, matrix.shape[0])
            bias = None if self.bias is None else self.bias[start:stop]
            parts.append(F.linear(x, rows(start, stop, x.dtype), bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class HlwqEmbedding(_Packed, nn.Embedding):  # type: ignore[override]
    """nn.Embedding that decodes the rows it is asked for."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(...) indices to (..., embedding_dim)."""
        return self.matrix.take(input.reshape(-1)).reshape(*input.shape, self.matrix.shape[1])


def can_pack(module: nn.Module) -> bool:
    """Whether `pack` knows the module."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Embedding) and module.max_norm is None)


def pack(module: nn.Module, matrix: PackedMatrix, rotation: Rotation) -> None:
    """Make a module of which `can_pack` is true work on `matrix`; its weight goes."""
    ours = HlwqLinear if isinstance(module, nn.Linear) else HlwqEmbedding
    own = type(module)
    del module._parameters["weight"]
    # its own forward first, then ours, then that of torch
    module.__class__ = ours if own in ours.__mro__ else type(f"Hlwq{own.__name__}", (own, ours), {})
    module.matrix = matrix
    if isinstance(module, HlwqLinear):
        module.rotation = rotation
    if own in ours.__mro__:  # transformers has nothing to compute; in a class of its own it may have
        module._is_hf_initialized = True  # type: ignore[assignment]
