"""nn.Linear, nn.Embedding and fused experts over matrices that stay packed.

A module is changed in place, into a class that has the forward of ours before that of torch. What its own class
adds (a scaled embedding, say) goes on working, and code that reads `weight` gets the decoded matrix. A module of
experts stays as it is: its weights become objects of which it takes one expert after the other.
"""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from .packed import Packed, PackedMatrix


class Rotation:
    """The last activation that was rotated: q, k and v, or gate and up, ask for the same one in a row."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[torch.Tensor], int, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
        """matrix.rotate(x). All matrices of a file have the same signs, so one serves for another."""
        # the compiler finds equal expressions by itself; tensors of inference_mode do not say that they were changed
        if torch.compiler.is_compiling() or x.is_inference():
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
    matrix: Packed

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
        if isinstance(matrix, PackedMatrix):
            if matrix.can_multiply(x):
                return matrix.multiply(self.rotation(x, matrix), self.bias, x.dtype)
            if matrix.whole_blocks and not matrix.on_gpu:
                x, rows = self.rotation(x, matrix), matrix.rotated_rows
        parts = []
        for start in range(0, matrix.shape[0], matrix.step):
            stop = min(start + matrix.step, matrix.shape[0])
            bias = None if self.bias is None else self.bias[start:stop]
            parts.append(F.linear(x, rows(start, stop, x.dtype), bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class HlwqEmbedding(_Packed, nn.Embedding):  # type: ignore[override]
    """nn.Embedding that decodes the rows it is asked for."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(...) indices to (..., embedding_dim)."""
        if input.device.type == "cpu" and input.numel() and not torch.compiler.is_compiling():
            lowest, highest = (int(value) for value in input.aminmax())
            if lowest < 0 or highest >= self.matrix.shape[0]:
                raise IndexError(f"tokens {lowest} to {highest}, expected 0 to {self.matrix.shape[0] - 1}")
        return self.matrix.take(input.reshape(-1)).reshape(*input.shape, self.matrix.shape[1])


class HlwqExperts(nn.Module):
    """What stands for the (experts, rows, columns) weight of a module of fused experts.

    Each of `parts` holds as many experts as any other: matrices whose rows, joined, are theirs.
    """

    def __init__(self, parts: list[list[Packed]], experts: int) -> None:
        super().__init__()
        self.matrices = nn.ModuleList(matrix for matrices in parts for matrix in matrices)
        self.parts = parts
        self.experts_in_part = experts // len(parts)

    def __getitem__(self, expert: int | torch.Tensor) -> torch.Tensor:
        """(rows, columns) of one expert, decoded."""
        part, place = divmod(int(expert), self.experts_in_part)
        found = []
        for matrix in self.parts[part]:
            count = matrix.shape[0] // self.experts_in_part
            found.append(matrix.rows(place * count, (place + 1) * count, matrix.like.dtype))
        return found[0] if len(found) == 1 else torch.cat(found)


def can_pack(module: nn.Module, name: str) -> bool:
    """Whether `pack` knows what to do with this weight of the module."""
    if hasattr(module, "_apply_gate"):  # fused experts, of which transformers has several implementations
        weight = module._parameters.get(name)
        return weight is not None and weight.ndim == 3
    known = isinstance(module, nn.Linear) or (isinstance(module, nn.Embedding) and module.max_norm is None)
    return known and name == "weight"


def pack(module: nn.Module, name: str, parts: list[list[Packed]], rotation: Rotation) -> None:
    """Make a weight for which `can_pack` is true one that stays packed: one matrix, or those of HlwqExperts."""
    weight = module._parameters.pop(name)
    if weight is not None and weight.ndim == 3:
        setattr(module, name, HlwqExperts(parts, weight.shape[0]))
        module._is_hf_initialized = True  # type: ignore[assignment]  # transformers has nothing to compute
        return
    ((matrix,),) = parts
    ours = HlwqLinear if isinstance(module, nn.Linear) else HlwqEmbedding
    own = type(module)
    # its own forward first, then ours, then that of torch
    module.__class__ = ours if own in ours.__mro__ else type(f"Hlwq{own.__name__}", (own, ours), {})
    module.matrix = matrix
    if isinstance(module, HlwqLinear):
        module.rotation = rotation
    if own in ours.__mro__:  # transformers has nothing to compute; in a class of its own it may have
        module._is_hf_initialized = True  # type: ignore[assignment]
