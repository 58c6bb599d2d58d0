"""From a container to torch tensors, verified, one at a time or all."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from msgspec import UnsetType

from hlwq_formats import metadata as md
from hlwq_formats.dtypes import BIT_PATTERNS, WEIGHT_DTYPES
from hlwq_formats.errors import UnsupportedDtype, Usage
from hlwq_formats.file_set import open_set
from hlwq_formats.layout import numel
from hlwq_formats.reader import Reader

from ..decode import (
    CodeChunk,
    Piece,
    code_chunks,
    decode_tasks,
    pieces,
    read_raw,
    scalar_code,
    stored_bytes,
    trellis_code,
)
from ..parallel import call, default_workers, ordered_map
from .dequantize import TorchCode
from .gpu import TRELLIS_RUN, ScalarDecoder, TrellisDecoder, can_run_kernels

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

TAGS = {TORCH[tag]: tag for tag in WEIGHT_DTYPES}
"""The torch dtypes that the decoder rounds to by itself."""


_Wanted = tuple[md.StoredTensor, torch.dtype | None]

_GPU_CHUNK = 16 << 20
"""Weights that go to a GPU at once: enough to fill one."""


def load_state_dict(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    workers: int | None = None,
) -> dict[str, torch.Tensor]:
    """All tensors of a file by their source names; a matrix that is an alias shares the memory of what it
    equals.

    Every byte of the file is verified. With `dtype`, floating-point tensors come in it: quantized ones are
    rounded once, from the decoder's float32. Raises an HlwqError for a file that is damaged or hostile.
    """
    check_dtype(dtype)
    with open_set(path) as reader:
        reader.verify_shared()
        return dict(iter_reader(reader, list(reader.tensors), device, lambda _: dtype, workers, keep=True))


def iter_tensors(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    workers: int | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) in file order, holding no tensor itself but those that a later alias needs and the
    beginning of what comes next.

    Signs and assets are verified first, each tensor before it is yielded. `workers` is the number of threads
    that decode, by default one for each CPU that this process may use.
    """
    check_dtype(dtype)
    with open_set(path) as reader:
        reader.verify_shared()
        yield from iter_reader(reader, list(reader.tensors), device, lambda _: dtype, workers)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise Usage when weights cannot be wanted in this dtype."""
    if dtype is not None and not dtype.is_floating_point:
        raise Usage(f"dtype is {dtype}, expected a floating-point type")


def iter_reader(
    reader: Reader,
    names: Sequence[str],
    device: str | torch.device,
    dtype_of: Callable[[str], torch.dtype | None],
    workers: int | None = None,
    keep: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """iter_tensors for some tensors of an open file, each in the dtype that `dtype_of` its name wants.

    What is decoded once for two names is held until the second was yielded. Signs and assets are left unverified.
    With `keep`, for a caller who keeps all tensors, a GPU need not wait with others until one is taken.
    """
    workers = workers or default_workers()
    parts = [(reader.stored_tensor(name), dtype_of(name)) for name in names]
    users = Counter((tensor.name, dtype) for tensor, dtype in parts)
    first = dict.fromkeys((tensor.name, dtype) for tensor, dtype in parts)
    wanted = [(reader.stored_tensor(name), dtype) for name, dtype in first]
    for tensor, _ in wanted:
        _type_of(reader, tensor)  # an error names the first in the file, whatever is read first
    shared: dict[tuple[str, torch.dtype | None], torch.Tensor] = {}
    with ThreadPoolExecutor(workers, "hlwq") as pool:
        device = torch.device(device)
        if keep and device.type == "cuda":
            loaded = _load_largest_first(reader, wanted, pool, device)
        else:
            loaded = _load(reader, wanted, pool, 2 * workers, device)
        for name, (tensor, dtype) in zip(names, parts, strict=True):
            key = tensor.name, dtype
            users[key] -= 1
            if key in shared:
                value = shared[key] if users[key] else shared.pop(key)
                # matrices of equal bytes are tied; norms and biases only happen to be equal, and are trained apart
                yield name, value if len(tensor.shape) > 1 else value.clone()
                continue
            value = next(loaded)
            if users[key]:
                shared[key] = value
            yield name, value
            del value


def get_torch(reader: Reader, name: str, device: str | torch.device = "cpu") -> torch.Tensor:
    """One tensor of an open file, verified."""
    workers = default_workers()
    with ThreadPoolExecutor(workers, "hlwq") as pool:
        return next(_load(reader, [(reader.stored_tensor(name), None)], pool, 2 * workers, torch.device(device)))


def _load(
    reader: Reader,
    tensors: Sequence[_Wanted],
    pool: ThreadPoolExecutor,
    ahead: int,
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """The tensors in order, each when it is complete and verified, decoded in one stream over all of them."""
    for loaded in ordered_map(pool, ahead, call, _tasks(reader, tensors, device)):
        if loaded is not None:
            # here and not in a task of its own: another thread may still be decoding the end of the tensor
            yield loaded.tensor.to(loaded.dtype)


def _load_largest_first(
    reader: Reader, tensors: Sequence[_Wanted], pool: ThreadPoolExecutor, device: torch.device
) -> Iterator[torch.Tensor]:
    """The same when all are there: on a GPU what is ahead holds no more than its result. One thread has a tensor, so
    the last to end is to be a small one."""
    order = sorted(range(len(tensors)), key=lambda i: -stored_bytes(tensors[i][0]))
    loaded = _load(reader, [tensors[i] for i in order], pool, len(tensors), device)
    ready = dict(zip(order, loaded, strict=True))
    return (ready.pop(i) for i in range(len(tensors)))


@dataclass(frozen=True)
class _Loaded:
    """A tensor that is complete when all earlier tasks are done, and the dtype that was asked for."""

    tensor: torch.Tensor
    dtype: torch.dtype


def _tasks(reader: Reader, tensors: Sequence[_Wanted], device: torch.device) -> Iterator[Callable[[], _Loaded | None]]:
    """Tasks that fill each tensor, then one that returns it: made only when its digests have matched."""
    kernels = device.type == "cpu" or (device.type == "cuda" and can_run_kernels())
    for tensor, dtype in tensors:
        own = _type_of(reader, tensor)
        wanted = dtype if dtype is not None and own.is_floating_point else own
        if isinstance(tensor, md.RawTensor):
            yield partial(_load_raw, reader, tensor, own, wanted, device)
            continue
        # the kernels round to the dtypes of weights, torch to any other
        direct = wanted if wanted in TAGS or not kernels else torch.float32
        result = torch.empty(numel(tensor.shape), dtype=direct, device=device)
        if device.type == "cuda" and kernels:
            allocated = torch.cuda.current_stream(device).record_event()
            yield partial(_decode_on_gpu, reader, tensor, result, allocated, wanted)
            continue
        if device.type == "cpu":
            bits = result.view(torch.int32 if direct is torch.float32 else torch.int16).numpy()
            yield from decode_tasks(reader, tensor, TAGS[direct], bits.view(BIT_PATTERNS[TAGS[direct]]))
        else:
            yield from _device_tasks(reader, tensor, result)
        yield partial(_Loaded, result.reshape(tensor.shape), wanted)


def _type_of(reader: Reader, tensor: md.StoredTensor) -> torch.dtype:
    if tensor.dtype not in TORCH:
        raise UnsupportedDtype(f"torch has no type for {tensor.dtype}", file=reader.path, tensor=tensor.name)
    return TORCH[tensor.dtype]


def _load_raw(
    reader: Reader, tensor: md.RawTensor, own: torch.dtype, wanted: torch.dtype, device: torch.device
) -> _Loaded:
    raw = read_raw(reader, tensor)
    flat = torch.frombuffer(raw, dtype=torch.uint8).view(own) if raw else torch.empty(0, dtype=own)
    return _Loaded(flat.reshape(tensor.shape).to(device), wanted)


def _decode_on_gpu(
    reader: Reader, tensor: md.QuantizedTensor, result: torch.Tensor, allocated: torch.cuda.Event, wanted: torch.dtype
) -> _Loaded:
    """One tensor, read, verified and decoded by one thread, while others do the same with the next ones."""
    if isinstance(tensor, md.ScalarTensor):
        _decode_codes(reader, tensor, ScalarDecoder(scalar_code(reader, tensor), result, allocated))
    else:
        _decode_symbols(reader, tensor, TrellisDecoder(trellis_code(reader, tensor), result, allocated))
    return _Loaded(result.reshape(tensor.shape), wanted)


def _decode_codes(reader: Reader, tensor: md.ScalarTensor, on_gpu: ScalarDecoder) -> None:
    try:
        for chunk in code_chunks(reader, tensor, _GPU_CHUNK, on_gpu.claim):
            on_gpu.decode(chunk.scales, chunk.start)
    finally:  # nothing may write to the result when it is returned, or thrown away
        on_gpu.finish()


def _decode_symbols(reader: Reader, tensor: md.TrellisTensor, on_gpu: TrellisDecoder) -> None:
    lengths = tensor.sections[-1].chunks
    assert not isinstance(lengths, UnsetType)
    runs = [lengths[first : first + TRELLIS_RUN] for first in range(0, len(lengths), TRELLIS_RUN)]
    sizes = [sum(run) for run in runs]
    try:
        pieces = reader.iter_section_into("tensor", tensor.name, "symbols", sizes, on_gpu.claim)
        for number, (_, run) in enumerate(zip(pieces, runs, strict=True)):  # to its end, where it is verified
            on_gpu.decode(run, number * TRELLIS_RUN)
    finally:
        on_gpu.finish()
    bad = on_gpu.bad_chunk()
    if bad is not None:
        raise reader.bad_chunk(tensor, bad)


def _device_tasks(reader: Reader, tensor: md.QuantizedTensor, result: torch.Tensor) -> Iterator[Callable[[], None]]:
    """decode_tasks for a tensor on another device: scalar codes by torch's own operations there, others here."""
    if isinstance(tensor, md.TrellisTensor):
        tag = TAGS.get(result.dtype, "F32")
        for piece in pieces(reader, tensor, tag):
            yield partial(_decode_here, piece, tag, result[piece.start : piece.start + piece.count])
        return
    code = TorchCode(scalar_code(reader, tensor), result.device)

    def decode(chunk: CodeChunk) -> None:
        result[chunk.start : chunk.start + chunk.count] = code.dequantize(chunk)

    for chunk in code_chunks(reader, tensor):
        yield partial(decode, chunk)


def _decode_here(piece: Piece, tag: str, result: torch.Tensor) -> None:
    bits = np.empty(piece.count, BIT_PATTERNS[tag])
    piece.decode(bits)
    signed = torch.from_numpy(bits.view(f"i{bits.itemsize}"))
    result.copy_(signed.view(next(dtype for dtype, name in TAGS.items() if name == tag)))
