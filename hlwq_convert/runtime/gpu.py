"""The GPU: whether there is one, its streams and pinned memory, and chunks of a tensor through its kernels.

A thread that works on chunks has a lane on each GPU: a stream of its own and pinned memory. While one lane copies,
the kernel of another runs; no bit depends on which is first.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from hlwq_formats import rans
from hlwq_formats.dtypes import ITEM_BITS
from hlwq_formats.errors import NoDevice, escape
from hlwq_formats.layout import BLOCK

from ..device import Encode, MakeEncoder
from ..quantize import EncodedChunk, ScalarCode
from ..trellis import TrellisCode

if TYPE_CHECKING:
    from .launch import DeviceEncoder, Room

TRELLIS_RUN = 64
"""Chunks of a trellis that are decoded at once: each takes a warp some milliseconds."""

_DEPTH = 2  # buffers of a lane: one is read to while what is in the other is hashed and copied


def can_run_kernels() -> bool:
    """Whether this torch sees an NVIDIA GPU and came with Triton."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def sign_words(signs: NDArray[np.float32]) -> list[int]:
    """(128,) signs as four signed 32-bit words of sign bits."""
    bits: list[int] = np.packbits(signs < 0, bitorder="little").view("<i4").tolist()
    return bits


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


def pinned(size: int) -> memoryview:
    """Memory from which a GPU copies while the thread goes on."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().data


class _Lane:
    """What one thread works with on one GPU: a stream, and pinned buffers that it takes in turn."""

    def __init__(self, device: torch.device) -> None:
        self.stream: torch.cuda.Stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * _DEPTH
        self._free = [torch.cuda.Event() for _ in range(_DEPTH)]
        self._next = 0
        self._claimed = self._buffers[0]
        self._back = torch.empty(0, dtype=torch.uint8)
        self._room: Room | None = None

    def claim(self, size: int) -> NDArray[np.uint8]:
        """Pinned memory of so many bytes, to be filled and sent: what it held before has been copied."""
        self._free[self._next].synchronize()
        if len(self._buffers[self._next]) < size:
            self._buffers[self._next] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._claimed = self._buffers[self._next][:size]
        return self._claimed.numpy()

    def send(self) -> torch.Tensor:
        """A device copy of what was claimed last, complete when the stream gets there."""
        sent = self._claimed.to(self.stream.device, non_blocking=True)
        self._free[self._next].record(self.stream)
        self._next = (self._next + 1) % _DEPTH
        return sent

    def fetch(self, result: torch.Tensor) -> NDArray[np.uint8]:
        """A host copy of bytes that the stream is writing, good until the next call."""
        if self._back.shape != result.shape:
            self._back = torch.empty(len(result), dtype=torch.uint8, pin_memory=True)
        self._back.copy_(result, non_blocking=True)
        self.stream.synchronize()
        return self._back.numpy()

    def room(self, encoder: DeviceEncoder, n_blocks: int) -> Room:
        """Where to encode so many blocks: mostly that of the last call. Every call of torch lets go of the interpreter
        and has to wait, with many threads, to get it back."""
        if self._room is None or not encoder.fits(self._room, n_blocks):
            self._room = encoder.room(n_blocks)
        return self._room


_of_thread = threading.local()


def _lane(device: torch.device) -> _Lane:
    lanes: dict[torch.device, _Lane] = _of_thread.__dict__.setdefault("lanes", {})
    if device not in lanes:
        lanes[device] = _Lane(device)
    return lanes[device]


def make_encoders(device: str) -> MakeEncoder:
    """What makes encoders that work on `device`, one GPU after another in turn."""
    turns = itertools.cycle(find_devices(device))
    lock = threading.Lock()

    def make(code: ScalarCode | TrellisCode) -> Encode:
        with lock:
            mine = next(turns)
        if isinstance(code, TrellisCode):
            return trellis_encoder(code, mine)
        encode = encoder(code, mine)
        return lambda raw, start: encode(raw)

    return make


def encoder(code: ScalarCode, device: torch.device) -> Callable[[bytes | memoryview], EncodedChunk]:
    """quantize.quantize for chunks of one tensor on a GPU, with the same bits; fastest from `pinned` memory."""
    from ..kernels.encode import encoder as encoder_on_cpu
    from ..kernels.encode import join
    from .launch import DeviceEncoder

    on_device, on_cpu = DeviceEncoder(code, device), encoder_on_cpu(code)
    block_bytes = BLOCK * ITEM_BITS[code.dtype] // 8

    def encode(raw: bytes | memoryview) -> EncodedChunk:
        n_blocks = len(raw) // block_bytes
        if n_blocks == 0:
            return on_cpu(raw)
        whole = memoryview(raw)[: n_blocks * block_bytes]
        lane = _lane(device)
        with torch.cuda.stream(lane.stream):  # and its GPU
            room = lane.room(on_device, n_blocks)
            source = torch.frombuffer(bytearray(whole) if whole.readonly else whole, dtype=torch.int32)
            room.items.copy_(source, non_blocking=True)
            on_device.encode(room.items, room.parts)
            chunk = EncodedChunk(*on_device.split_result(n_blocks, lane.fetch(room.result)))
        rest = raw[n_blocks * block_bytes :]
        return join(chunk, on_cpu(rest)) if rest else chunk  # the padded block, once a tensor

    return encode


def trellis_encoder(code: TrellisCode, device: torch.device) -> Encode:
    """trellis.quantize for chunks of one tensor with the same bits: a GPU finds the indices, the CPU codes them."""
    from ..kernels.trellis import encoder as encoder_on_cpu
    from .launch_trellis import DeviceSearch

    on_device = DeviceSearch(code, device)

    def find(raw: bytes | memoryview, start: int) -> NDArray[np.int32]:
        n_blocks = -(-len(raw) * 8 // (ITEM_BITS[code.dtype] * BLOCK))
        lane = _lane(device)
        with torch.cuda.device(device), torch.cuda.stream(lane.stream):
            claimed = lane.claim(n_blocks * BLOCK * ITEM_BITS[code.dtype] // 8)
            claimed[: len(raw)] = np.frombuffer(raw, np.uint8)
            claimed[len(raw) :] = 0
            indices = on_device.find(lane.send().view(torch.int32), start, n_blocks)
            return lane.fetch(indices[: n_blocks * BLOCK].view(torch.uint8)).view(np.int32)

    return encoder_on_cpu(code, find)


class _TensorDecoder:
    """Decodes runs of one tensor into memory of a GPU, on the stream of the thread that calls."""

    def __init__(self, result: torch.Tensor, allocated: torch.cuda.Event) -> None:
        """`result`: (numel,) bfloat16, float16 or float32 on the GPU, free to be written after `allocated`."""
        self._result = result
        self._last = torch.empty(BLOCK, dtype=result.dtype, device=result.device)  # a block that is cut short
        self._lane = _lane(result.device)
        self._lane.stream.wait_event(allocated)
        self._lane.stream.wait_stream(torch.cuda.current_stream(result.device))

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        with torch.cuda.device(self._result.device), torch.cuda.stream(self._lane.stream):
            yield

    def finish(self) -> None:
        """Wait until everything that this thread began is done."""
        self._lane.stream.synchronize()


class ScalarDecoder(_TensorDecoder):
    """For scalar codes."""

    def __init__(self, code: ScalarCode, result: torch.Tensor, allocated: torch.cuda.Event) -> None:
        from .launch import DeviceCode

        self._code = DeviceCode(code, result.device)
        super().__init__(result, allocated)

    def claim(self, size: int) -> memoryview:
        """Memory for the packed codes of a run, to be read to before `decode`."""
        self._claimed = self._lane.claim(size + size // (8 * self._code.bits))
        return self._claimed.data[:size]

    def decode(self, scales: NDArray[np.float16], start: int) -> None:
        """Begin to decode the blocks whose codes were read, to `result` from its item `start`."""
        size = 2 * len(scales)
        self._claimed[-size:] = scales.view(np.uint8)
        result = self._result[start : start + len(scales) * BLOCK]
        whole = len(result) // BLOCK
        with self._on_stream():
            sent = self._lane.send()
            codes, halves = sent[:-size].view(torch.int32), sent[-size:].view(torch.float16)
            if whole:
                self._code.decode(codes, halves[:whole], result)
            if whole < len(scales):  # the padded block, once a tensor
                self._code.decode(codes[whole * 4 * self._code.bits :], halves[whole:], self._last)
                result[whole * BLOCK :].copy_(self._last[: len(result) - whole * BLOCK])


class TrellisDecoder(_TensorDecoder):
    """For the indices of a trellis."""

    def __init__(self, code: TrellisCode, result: torch.Tensor, allocated: torch.cuda.Event) -> None:
        from .launch_trellis import DeviceTrellis

        self._code = DeviceTrellis.of(code, result.device)
        self._good: list[torch.Tensor] = []
        super().__init__(result, allocated)

    def claim(self, size: int) -> memoryview:
        """Memory for a run of chunks, to be read to before `decode`."""
        self._claimed, self._size = self._lane.claim(-(-size // 16) * 16 + 8 * (TRELLIS_RUN + 1)), size
        return self._claimed.data[:size]

    def decode(self, lengths: Sequence[int], first_chunk: int) -> None:
        """Begin to decode the chunks that were read, of so many bytes each, TRELLIS_RUN at most."""
        places = self._claimed[-8 * (len(lengths) + 1) :].view(np.int64)
        places[0] = 0
        np.cumsum(lengths, out=places[1:])
        places //= 2
        start = first_chunk * rans.CHUNK
        result = self._result[start : start + len(lengths) * rans.CHUNK]
        with self._on_stream():
            sent = self._lane.send()
            words, on_device = sent[: self._size].view(torch.int16), sent[-8 * (len(lengths) + 1) :].view(torch.int64)
            self._good.append(self._code.decode(words, on_device, first_chunk, result, self._last))
            if len(result) % BLOCK:
                result[len(result) // BLOCK * BLOCK :].copy_(self._last[: len(result) % BLOCK])

    def bad_chunk(self) -> int | None:
        """The number of the first chunk that is not what an encoder writes, when all is finished."""
        bad = (torch.cat(self._good) == 0).nonzero()
        return int(bad[0]) if len(bad) else None
