"""From a container to torch tensors, verified, one at a time or all."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from hlwq_formats import metadata as md
from hlwq_formats.errors import UnsupportedDtype, Usage
from hlwq_formats.layout import numel
from hlwq_formats.reader import Reader

from ..decode import code_chunks, scalar_code
from .dequantize import TorchCode

TORCH: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
"""Tag -> torch dtype; the sub-byte types have none that stands for one element."""
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    TORCH["F8_E8M0"] = torch.float8_e8m0fnu


def load_state_dict(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """All tensors of a file by their source names; a matrix that is an alias shares the memory of what it
    equals.

    Every byte of the file is verified. With `dtype`, floating-point tensors come in it: quantized ones are
    rounded once, from the decoder's float32. Raises an HlwqError for a file that is damaged or hostile.
    """
    return dict(iter_tensors(path, device, dtype))


def iter_tensors(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) in file order, holding no tensor itself but those that a later alias needs.

    Signs and assets are verified first, each tensor before it is yielded.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise Usage(f"dtype is {dtype}, expected a floating-point type")
    with Reader(path) as reader:
        reader.verify_shared()
        wanted = {t.of for t in reader.metadata.tensors if isinstance(t, md.AliasTensor)}
        shared: dict[str, torch.Tensor] = {}
        for tensor in reader.metadata.tensors:
            if isinstance(tensor, md.AliasTensor):
                value = shared[tensor.of]
                # matrices of equal bytes are tied; norms and biases only happen to be equal, and are trained apart
                yield tensor.name, value if len(tensor.shape) > 1 else value.clone()
                continue
            value = _load(reader, tensor, torch.device(device), dtype)
            if tensor.name in wanted:
                shared[tensor.name] = value
            yield tensor.name, value
            del value


def get_torch(reader: Reader, name: str, device: str | torch.device = "cpu") -> torch.Tensor:
    """One tensor of an open file, verified."""
    return _load(reader, reader.stored_tensor(name), torch.device(device), None)


def _load(
    reader: Reader, tensor: md.RawTensor | md.ScalarTensor, device: torch.device, dtype: torch.dtype | None
) -> torch.Tensor:
    own = TORCH.get(tensor.dtype)
    if own is None:
        raise UnsupportedDtype(f"torch has no type for {tensor.dtype}", file=reader.path, tensor=tensor.name)
    wanted = dtype if dtype is not None and own.is_floating_point else own
    if isinstance(tensor, md.RawTensor):
        raw = bytearray().join(reader.raw_chunks(tensor))
        flat = torch.frombuffer(raw, dtype=torch.uint8).view(own) if raw else torch.empty(0, dtype=own)
        return flat.reshape(tensor.shape).to(device=device, dtype=wanted)
    result = torch.empty(numel(tensor.shape), dtype=wanted, device=device)
    code = TorchCode(scalar_code(reader, tensor), device)
    for chunk in code_chunks(reader, tensor):
        result[chunk.start : chunk.start + chunk.count] = code.dequantize(chunk)
    return result.reshape(tensor.shape)
