"""Where weights are encoded: on the CPU or on GPUs, with the same bits, and the memory that pieces are read to."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

from hlwq_formats.errors import NoDevice, Usage, escape
from hlwq_formats.files import Memory, new_memory

from .quantize import CHUNK, EncodedChunk, ScalarCode
from .trellis import EncodedIndices, TrellisCode

Encode = Callable[[bytes | memoryview, int], EncodedChunk | EncodedIndices]
"""Encode source bytes, given the flat index of their first weight; they are not looked at any more afterwards."""

MakeEncoder = Callable[[ScalarCode | TrellisCode], Encode]
"""What encodes the chunks of a tensor on the CPU or on another device, with the same bits."""


@dataclass(frozen=True)
class Device:
    """What encodes, and how it likes to get weights. What is read to `memory` holds until the thread asks again."""

    make_encoder: MakeEncoder
    memory: Memory
    piece: int  # weights at once, a multiple of CHUNK


def choose_device(device: str, workers: int) -> Device:
    """What encodes on "cpu", "cuda" or "cuda:N". Raises NoDevice (69) where there is none.

    What Python does for a piece is done by one thread at a time, for all of them: it is to be short beside the
    encoding, which many threads, and GPUs, make short.
    """
    if device == "cpu":
        return Device(_on_cpu, memory_of_threads(new_memory), CHUNK * (4 if workers >= 8 else 1))
    if re.fullmatch(r"cuda(:\d{1,3})?", device) is None:
        raise Usage(f"device is {escape(device)}, expected cpu, cuda or cuda:N")
    try:
        from .runtime.gpu import make_encoders, pinned
    except ImportError:
        raise NoDevice(
            f"device {device} needs torch", hint="install hlwq-convert[torch] or leave out --device"
        ) from None
    return Device(make_encoders(device), memory_of_threads(pinned), 8 * CHUNK)


def memory_of_threads(allocate: Memory) -> Memory:
    """Memory that each thread uses again and again: new memory takes as long as reading to it."""
    own = threading.local()

    def memory(size: int) -> memoryview:
        held: memoryview | None = getattr(own, "held", None)
        if held is None or len(held) < size:
            held = own.held = allocate(size)
        return held[:size]

    return memory


def _on_cpu(code: ScalarCode | TrellisCode) -> Encode:
    # not before something is encoded: numba takes time and memory
    from .kernels.encode import encoder
    from .kernels.trellis import encoder as trellis_encoder

    if isinstance(code, TrellisCode):
        return trellis_encoder(code)
    encode = encoder(code)
    return lambda raw, start: encode(raw)
