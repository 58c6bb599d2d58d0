"""From surveyed tensors to the sections of one or several containers: chunks are read once, encoded in parallel for
each container, in one stream over all tensors, and stored in file order: where the length of every tensor is known
beforehand, by the threads that encode them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby

from hlwq_formats.bitpack import unpack
from hlwq_formats.dtypes import ITEM_BITS
from hlwq_formats.errors import BadSafetensors
from hlwq_formats.safetensors_dir import ModelDir, SourceTensor
from hlwq_formats.sections import compress_codes

from .entries import CannotDecode, Content, NotSmaller, Opened, Output, is_known, open_tensor
from .parallel import call, ordered_map
from .quantize import CHUNK, EncodedChunk, ScalarCode
from .scalar import Effort
from .survey import MakeEncoder, Surveyed, survey

_RAW_PIECE = 4 << 20


@dataclass
class Run:
    """What the files share that are made in one pass over a model."""

    model: ModelDir
    pool: ThreadPoolExecutor
    workers: int
    effort: Effort
    nonfinite: str
    make_encoder: MakeEncoder
    step: Callable[[int], None]
    stop: threading.Event = field(default_factory=threading.Event)  # set when no more is wanted


@dataclass(frozen=True, eq=False)
class Taken:
    """A tensor, the files that take it, and what each of them makes of it."""

    tensor: SourceTensor
    outputs: Sequence[Output]
    surveyed: list[Surveyed]
    opened: list[Opened] = field(default_factory=list)  # in each file, where a piece is placed as it is made


@dataclass(frozen=True)
class Piece:
    """What one task made of a run of bytes of one tensor, for each of the files: placed where that is opened."""

    of: Taken
    first: int  # flat index of its first weight
    source_bytes: int
    contents: list[Content]


def write_tensors(run: Run, tensors: Sequence[tuple[SourceTensor, Sequence[Output]]]) -> Iterator[Taken]:
    """Store tensors in the given order, each in the files given with it, and yield those that are stored."""

    def look(item: tuple[SourceTensor, Sequence[Output]]) -> Taken:
        tensor, outputs = item
        choices = [output.choices[tensor.name] for output in outputs]
        surveyed = survey(run.model, tensor, choices, run.effort, run.nonfinite, run.stop, run.make_encoder)
        return Taken(tensor, outputs, surveyed)

    in_place = all(is_known(o.choices[tensor.name], run.effort) for tensor, outputs in tensors for o in outputs)
    taken = ordered_map(run.pool, 2 * run.workers + 2, look, tensors)
    pieces = ordered_map(run.pool, 2 * run.workers, call, _tasks(run, taken, in_place))
    for of, group in groupby(pieces, key=lambda piece: piece.of):
        _write_tensor(run, of, group)
        yield of


def _tasks(run: Run, taken: Iterable[Taken], in_place: bool) -> Iterator[Callable[[], Piece]]:
    """Tasks that each encode a piece of a tensor, and place it with `in_place`."""
    for of in taken:
        if in_place:
            opened = [open_tensor(*each, None) for each in zip(of.outputs, of.surveyed, strict=True)]
            of = replace(of, opened=opened)
        for place in _places(of):
            yield partial(_read_piece, run.model, of, *place)


def _places(of: Taken) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of each piece of a tensor, at least one."""
    raw = all(one.code is None for one in of.surveyed)
    size = _RAW_PIECE if raw else CHUNK * ITEM_BITS[of.tensor.dtype] // 8
    for start in range(0, max(of.tensor.length, 1), size):
        yield start, min(size, of.tensor.length - start)


def _read_piece(model: ModelDir, of: Taken, start: int, length: int) -> Piece:
    raw = model.read(of.tensor, start, length)
    if of.tensor.dtype == "BOOL" and max(raw, default=0) > 1:
        raise BadSafetensors(f"a boolean is {max(raw)}, expected 0 or 1", file=of.tensor.file, tensor=of.tensor.name)
    first = start * 8 // ITEM_BITS[of.tensor.dtype]
    contents = [_encode(one, raw, first) for one in of.surveyed]
    for opened, content in zip(of.opened, contents, strict=False):
        opened.place(first, content)
    return Piece(of, first, length, contents)


def _encode(of: Surveyed, raw: bytes, first: int) -> Content:
    """Encode weights from flat index `first`; codes of the best effort a second time, compressed."""
    if of.encode is None:
        return raw
    chunk = of.encode(raw, first)
    if isinstance(of.code, ScalarCode) and of.code.effort == "best" and not of.packed:
        assert isinstance(chunk, EncodedChunk)
        codes = unpack(chunk.codes, of.code.bits, 8 * len(chunk.codes) // of.code.bits)
        return replace(chunk, frame=compress_codes(codes))
    return chunk


def _write_tensor(run: Run, of: Taken, pieces: Iterable[Piece]) -> None:
    """Store one tensor in each file as chosen, or raw where it cannot be quantized."""
    pieces, positions = iter(pieces), [output.writer.position for output in of.outputs]
    opened = of.opened
    if not opened:
        first = next(pieces)
        pieces = chain([first], pieces)
        opened = [open_tensor(*each) for each in zip(of.outputs, of.surveyed, first.contents, strict=True)]
    for piece in pieces:
        for each, content in zip(opened, piece.contents, strict=True):
            if not of.opened:
                each.place(piece.first, content)
            each.take(content)
        run.step(piece.source_bytes * len(opened))
    for output, one, position, each in zip(of.outputs, of.surveyed, positions, opened, strict=True):
        try:
            output.tensors.append(each.finish())
        except (CannotDecode, NotSmaller) as error:  # never where another tensor may be opened already
            output.writer.rewind(position)
            run.step(-of.tensor.length)
            plain = replace(one, packed=True)
            raw = Surveyed(of.tensor, f"quantized it would decode to {error}")
            taken = Taken(of.tensor, [output], [plain if isinstance(error, NotSmaller) else raw])
            _write_tensor(run, taken, (_read_piece(run.model, taken, *place) for place in _places(taken)))
