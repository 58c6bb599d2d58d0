"""The GPU: whether there is one, its streams and pinned memory, and chunks of a tensor through its kernels.

A thread that works on chunks has a lane on each GPU: a stream of its own and pinned memory. While one lane copies,
the kernel of another runs; no bit depends on which is first.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from hlwq_formats.dtypes import ITEM_BITS
from hlwq_formats.errors import NoDevice, escape
from hlwq_formats.layout import BLOCK

from ..quantize import EncodedChunk, ScalarCode

_DEPTH = 2  # copies to the GPU that a lane may have under way


def can_run_kernels() -> bool:
    """Whether this torch sees an NVIDIA GPU and came with Triton."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def find_devices(device: str) -> list[torch.device]:
    """The GPUs that "cuda" (all) or "cuda:N" (one) stands for. Raises NoDevice (69)."""
    hint = "leave out --device to use the CPU"
    if not can_run_kernels():
        if torch.version.cuda is None:
            problem = f"torch {torch.__version__} is not built for CUDA"
        elif not torch.cuda.is_available():
            problem = "no CUDA device is visible"
        else:
            problem = "the package triton is missing"
        raise NoDevice(f"device {escape(device)}: {problem}", hint=hint)
    count, index = torch.cuda.device_count(), torch.device(device).index
    if index is not None and index >= count:
        raise NoDevice(f"device {escape(device)}: the last of the {count} CUDA devices is cuda:{count - 1}", hint=hint)
    return [torch.device("cuda", i) for i in (range(count) if index is None else [index])]


class _Lane:
    """What one thread works with on one GPU: a stream, and pinned buffers that it takes in turn."""

    def __init__(self, device: torch.device) -> None:
        self.stream: torch.cuda.Stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * _DEPTH
        self._free = [torch.cuda.Event() for _ in range(_DEPTH)]
        self._next = 0
        self.back = torch.empty(0, dtype=torch.uint8)

    def send(self, parts: list[NDArray[np.uint8]]) -> torch.Tensor:
        """A device copy of arrays of bytes one after the other, complete when the stream gets there."""
        size, turn = sum(len(part) for part in parts), self._next
        self._next = (turn + 1) % _DEPTH
        self._free[turn].synchronize()
        if len(self._buffers[turn]) < size:
            self._buffers[turn] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        place, start = self._buffers[turn].numpy(), 0
        for part in parts:
            place[start : start + len(part)] = part
            start += len(part)
        sent = self._buffers[turn][:size].to(self.stream.device, non_blocking=True)
        self._free[turn].record(self.stream)
        return sent

    def fetch(self, result: torch.Tensor) -> torch.Tensor:
        """A host copy of bytes that the stream is writing, good until the next call."""
        if len(self.back) < len(result):
            self.back = torch.empty(len(result), dtype=torch.uint8, pin_memory=True)
        fetched = self.back[: len(result)].copy_(result, non_blocking=True)
        self.stream.synchronize()
        return fetched


_of_thread = threading.local()


def _lane(device: torch.device) -> _Lane:
    lanes: dict[torch.device, _Lane] = _of_thread.__dict__.setdefault("lanes", {})
    if device not in lanes:
        lanes[device] = _Lane(device)
    return lanes[device]


def make_encoders(device: str) -> Callable[[ScalarCode], Callable[[bytes], EncodedChunk]]:
    """A function like kernels.encode.encoder whose encoders work on `device`, one GPU after another in turn."""
    turns = itertools.cycle(find_devices(device))
    lock = threading.Lock()

    def make(code: ScalarCode) -> Callable[[bytes], EncodedChunk]:
        with lock:
            mine = next(turns)
        return encoder(code, mine)

    return make


def encoder(code: ScalarCode, device: torch.device) -> Callable[[bytes], EncodedChunk]:
    """quantize.quantize for chunks of one tensor on a GPU, with the same bits."""
    from ..kernels.encode import encoder as encoder_on_cpu
    from ..kernels.encode import join
    from .launch import DeviceEncoder

    on_device, on_cpu = DeviceEncoder(code, device), encoder_on_cpu(code)
    block_bytes = BLOCK * ITEM_BITS[code.dtype] // 8

    def encode(raw: bytes) -> EncodedChunk:
        n_blocks = len(raw) // block_bytes
        if n_blocks == 0:
            return on_cpu(raw)
        lane = _lane(device)
        with torch.cuda.device(device), torch.cuda.stream(lane.stream):
            items = lane.send([np.frombuffer(raw, np.uint8, n_blocks * block_bytes)])
            result = torch.empty(on_device.result_bytes(n_blocks), dtype=torch.uint8, device=device)
            on_device.encode(items.view(torch.int32), n_blocks, result)
            chunk = EncodedChunk(*on_device.split_result(n_blocks, lane.fetch(result)))
        rest = raw[n_blocks * block_bytes :]
        return join(chunk, on_cpu(rest)) if rest else chunk  # the padded block, once a tensor

    return encode


class Decoder:
    """Decodes chunks of one tensor into memory of a GPU, on the stream of the thread that calls."""

    def __init__(self, code: ScalarCode, result: torch.Tensor, allocated: torch.cuda.Event) -> None:
        """`result`: (numel,) bfloat16, float16 or float32 on the GPU, free to be written after `allocated`."""
        from .launch import DeviceCode

        self._code = DeviceCode(code, result.device)
        self._result = result
        self._allocated = allocated

    def decode(self, packed: bytes, scales: NDArray[np.float16], start: int) -> None:
        """Begin to decode a run of blocks to `result` from its item `start`."""
        device, result = self._result.device, self._result[start : start + len(scales) * BLOCK]
        lane = _lane(device)
        whole = len(result) // BLOCK
        with torch.cuda.device(device), torch.cuda.stream(lane.stream):
            lane.stream.wait_event(self._allocated)
            sent = lane.send([np.frombuffer(packed, np.uint8), scales.view(np.uint8)])
            codes, halves = sent[: len(packed)].view(torch.int32), sent[len(packed) :].view(torch.float16)
            if whole:
                self._code.decode(codes, halves[:whole], result)
            if whole < len(scales):  # the padded block, once a tensor
                last = torch.empty(BLOCK, dtype=result.dtype, device=device)
                self._code.decode(codes[whole * 4 * self._code.bits :], halves[whole:], last)
                result[whole * BLOCK :].copy_(last[: len(result) - whole * BLOCK])

    def finish(self) -> None:
        """Wait until everything that this thread began is done."""
        _lane(self._result.device).stream.synchronize()
