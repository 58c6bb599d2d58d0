"""From a model's tensors to the sections of one or several containers: looked at, read in pieces, each encoded once for
each container, and stored.

Where the length of every tensor is known beforehand, the threads that encode also write, to the place where it belongs,
and hash; several tensors are then under way, so that none waits for the digest of another. Else one thread writes what
the others encode, tensor by tensor.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby

from hlwq_formats.bitpack import unpack
from hlwq_formats.dtypes import ITEM_BITS
from hlwq_formats.errors import BadSafetensors
from hlwq_formats.safetensors_dir import ModelDir, SourceTensor
from hlwq_formats.sections import compress_codes

from .device import Device
from .entries import CannotDecode, Content, NotSmaller, Opened, Output, is_known, open_tensor
from .parallel import InOrder, begin_map, call, ordered_map, take_turns
from .quantize import CHUNK, EncodedChunk, ScalarCode
from .scalar import Effort
from .source_digests import digest_tensor
from .survey import Surveyed, survey

_RAW_PIECE = 4 << 20
_TOGETHER = 256 << 20
"""Bytes of a tensor that may be hashed on the way when it is surveyed: encoding waits for that."""


class Stopped(Exception):
    """The conversion ended while a tensor was looked at."""


@dataclass
class Run:
    """What the files share that are made in one pass over a model."""

    model: ModelDir
    pool: ThreadPoolExecutor
    workers: int
    effort: Effort
    nonfinite: str
    device: Device
    step: Callable[[int], None]
    stop: threading.Event = field(default_factory=threading.Event)  # set when no more is wanted


@dataclass(frozen=True, eq=False)
class Taken:
    """A tensor, the files that take it, what each of them makes of it, and the digest of its source, where it is not
    raw in all: nothing but its entry waits for that."""

    tensor: SourceTensor
    outputs: Sequence[Output]
    surveyed: list[Surveyed]
    digest: Future[str]


def write_tensors(run: Run, tensors: Sequence[tuple[SourceTensor, Sequence[Output]]]) -> Iterator[Taken]:
    """Store tensors in the given order, each in the files given with it, and yield those that are stored. The first
    are looked at before one is asked for."""

    items = ((tensor, outputs, _begin_digest(run, tensor, outputs)) for tensor, outputs in tensors)
    taken = begin_map(run.pool, 2 * run.workers + 2, partial(_look, run), items)
    known = all(is_known(o.choices[tensor.name], run.effort) for tensor, outputs in tensors for o in outputs)
    return (_store_in_place if known else _store_in_order)(run, taken)


def _begin_digest(run: Run, tensor: SourceTensor, outputs: Sequence[Output]) -> Future[str] | None:
    """Hash the source of a large tensor in a task of its own, before others are looked at; None for the rest."""
    if tensor.length <= _TOGETHER or all(output.choices[tensor.name].encoding == "raw" for output in outputs):
        return None
    size = run.device.piece * ITEM_BITS[tensor.dtype] // 8
    return run.pool.submit(digest_tensor, run.model, tensor, lambda _: _go_on(run), run.device.memory, size)


def _look(run: Run, item: tuple[SourceTensor, Sequence[Output], Future[str] | None]) -> Taken:
    tensor, outputs, begun = item
    choices = [output.choices[tensor.name] for output in outputs]
    digest, found = hashlib.sha256(), begun or Future()

    def see(piece: memoryview) -> None:
        _go_on(run)
        if begun is None:
            digest.update(piece)

    surveyed = survey(run.model, tensor, choices, run.effort, run.nonfinite, run.device, see)
    if begun is None:
        found.set_result(digest.hexdigest())
    return Taken(tensor, outputs, surveyed, found)


def _go_on(run: Run) -> None:
    if run.stop.is_set():
        raise Stopped


# --- by the threads that encode -----------------------------------------------------------------


class _Begun:
    """A tensor that is opened in each file, and what is still to come of it."""

    def __init__(self, of: Taken, piece: int) -> None:
        self.of = of
        self.opened = [open_tensor(*each, None) for each in zip(of.outputs, of.surveyed, strict=True)]
        self.places = list(_places(of, piece))
        self.left = len(self.places)
        self.in_order = InOrder(partial(_take, self.opened))

    def is_complete(self) -> bool:
        """Whether nothing is left to wait for."""
        return self.left == 0 and self.of.digest.done()


def _take(opened: list[Opened], contents: list[Content]) -> None:
    for each, content in zip(opened, contents, strict=True):
        each.take(content)


def _store_in_place(run: Run, taken: Iterable[Taken]) -> Iterator[Taken]:
    begun: deque[_Begun] = deque()

    def begin() -> Iterator[Iterator[Callable[[], tuple[_Begun, int]]]]:
        for of in taken:
            one = _Begun(of, run.device.piece)
            begun.append(one)
            yield iter([partial(_place_piece, run, one, number) for number in range(len(one.places))])

    # a digest keeps up with some four threads that encode
    tasks = take_turns(begin(), max(1, run.workers // 4))
    for one, number in ordered_map(run.pool, 2 * run.workers, call, tasks):
        one.left -= 1  # and it is taken: the pieces of a tensor are waited for in order
        run.step(one.places[number][1] * len(one.opened))
        while begun and begun[0].is_complete():
            yield _finish(begun.popleft())
    while begun:
        yield _finish(begun.popleft())


def _place_piece(run: Run, one: _Begun, number: int) -> tuple[_Begun, int]:
    piece = _read_piece(run, one.of, *one.places[number])
    for opened, content in zip(one.opened, piece.contents, strict=True):
        opened.place(piece.start, content)
    one.in_order.add(number, piece.contents)
    return one, number


def _finish(one: _Begun) -> Taken:
    source = one.of.digest.result()
    for output, opened in zip(one.of.outputs, one.opened, strict=True):
        output.tensors.append(opened.finish(source))
    return one.of


# --- by the thread that asks for it -------------------------------------------------------------


def _store_in_order(run: Run, taken: Iterable[Taken]) -> Iterator[Taken]:
    tasks = (partial(_read_piece, run, of, *place) for of in taken for place in _places(of, CHUNK))
    pieces = ordered_map(run.pool, 2 * run.workers, call, tasks)
    for of, group in groupby(pieces, key=lambda piece: piece.of):
        _write_tensor(run, of, group)
        yield of


def _write_tensor(run: Run, of: Taken, pieces: Iterator[Piece]) -> None:
    """Store one tensor in each file as chosen, or raw where it cannot be quantized."""
    positions = [output.writer.position for output in of.outputs]
    first = next(pieces)
    opened = [open_tensor(*each) for each in zip(of.outputs, of.surveyed, first.contents, strict=True)]
    for piece in chain([first], pieces):
        for each, content in zip(opened, piece.contents, strict=True):
            each.place(piece.start, content)
            each.take(content)
        run.step(piece.source_bytes * len(opened))
    for output, one, position, each in zip(of.outputs, of.surveyed, positions, opened, strict=True):
        try:
            output.tensors.append(each.finish(of.digest.result()))
        except (CannotDecode, NotSmaller) as error:
            output.writer.rewind(position)
            run.step(-of.tensor.length)
            plain = replace(one, packed=True)
            raw = Surveyed(of.tensor, f"quantized it would decode to {error}")
            again = replace(of, outputs=[output], surveyed=[plain if isinstance(error, NotSmaller) else raw])
            _write_tensor(run, again, (_read_piece(run, again, *place) for place in _places(again, CHUNK)))


# --- pieces -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """What one task made of a run of bytes of one tensor, for each of the files."""

    of: Taken
    start: int  # of that run in the tensor, in bytes
    source_bytes: int
    contents: list[Content]


def _places(of: Taken, piece: int) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of each piece of a tensor, at least one: `piece` weights, but for what is raw."""
    raw = all(one.code is None for one in of.surveyed)
    size = _RAW_PIECE if raw else piece * ITEM_BITS[of.tensor.dtype] // 8
    for start in range(0, max(of.tensor.length, 1), size):
        yield start, min(size, of.tensor.length - start)


def _read_piece(run: Run, of: Taken, start: int, length: int) -> Piece:
    if any(one.encode is None for one in of.surveyed):  # it is written as it is, and maybe later
        raw: bytes | memoryview = run.model.read(of.tensor, start, length)
    else:
        raw = run.device.memory(length)
        run.model.read_into(of.tensor, start, raw)
    if of.tensor.dtype == "BOOL" and max(raw, default=0) > 1:
        raise BadSafetensors(f"a boolean is {max(raw)}, expected 0 or 1", file=of.tensor.file, tensor=of.tensor.name)
    first = start * 8 // ITEM_BITS[of.tensor.dtype]
    return Piece(of, start, length, [_encode(one, raw, first) for one in of.surveyed])


def _encode(of: Surveyed, raw: bytes | memoryview, first: int) -> Content:
    """Encode weights from flat index `first`; codes of the best effort a second time, compressed."""
    if of.encode is None:
        assert isinstance(raw, bytes)
        return raw
    chunk = of.encode(raw, first)
    if isinstance(of.code, ScalarCode) and of.code.effort == "best" and not of.packed:
        assert isinstance(chunk, EncodedChunk)
        codes = unpack(chunk.codes, of.code.bits, 8 * len(chunk.codes) // of.code.bits)
        return replace(chunk, frame=compress_codes(codes))
    return chunk
