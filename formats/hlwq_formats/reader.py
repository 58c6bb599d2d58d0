"""Open a container and read verified bytes out of it (spec section 8).

Opening reads the header and the metadata and checks all that follows from them. Every other byte is
checked when it is read: a section is returned only after its SHA-256 matched, together with the padding
before it, so a caller who reads all sections has verified the whole file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, repeat
from types import TracebackType
from typing import TypeVar

import numpy as np
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from . import bitpack, rans
from . import metadata as md
from .digest import PipelinedDigest
from .errors import BadDigest, BadFrames, BadLayout, BadValues, Usage, escape
from .files import ByteSource, InputFile, Memory
from .layout import (
    BLOCK,
    HEADER_LEN,
    Header,
    check_not_incomplete,
    count_blocks,
    decode_header,
    numel,
    place_sections,
)
from .sections import decompress_codes, unpack_section
from .validate import validate

CHUNK = 4 << 20
MAX_LEVEL = 65504.0
MAX_ROW_SCALE = 248  # times 128: the bits of infinity as a float16

_Piece = TypeVar("_Piece", bytes, memoryview)
_Error = TypeVar("_Error", BadFrames, BadValues)

SymbolCheck = Callable[["Reader", md.TrellisTensor, NDArray[np.uint16]], None]
"""Decode the symbols of a tensor, whose frequencies are given, and raise what is wrong with them."""

Pack = Callable[[NDArray[np.uint8], int], bytes]
"""bitpack.pack, or what does the same for whole blocks faster."""


class Reader:
    """An open container. Safe to use from several threads; close it or use it in a `with`.

    `source` is the path of a regular file, or whatever else gives bytes by position: it is closed with the reader.
    `header` stands in for the first 128 bytes of a file whose header is not written yet: the writer
    checks its work through this class before it commits. `pipelined` is for one thread that reads: another hashes what
    it has read.
    """

    def __init__(
        self, source: str | os.PathLike[str] | ByteSource, *, header: bytes | None = None, pipelined: bool = True
    ) -> None:
        self._new_digest = PipelinedDigest if pipelined else hashlib.sha256
        self._file = InputFile(source) if isinstance(source, str | os.PathLike) else source
        try:
            self._open(header)
        except BaseException:
            self._file.close()
            raise

    def _open(self, header: bytes | None) -> None:
        size, name = self._file.size, self._file.name
        if header is None:
            header = self._file.read(0, min(size, HEADER_LEN))
            check_not_incomplete(header, name)
        self.path = name
        self.header: Header = decode_header(header, size, name)
        self.file_id = hashlib.sha256(header).hexdigest()
        document = self._file.read(self.header.meta_off, self.header.meta_len)
        if hashlib.sha256(document).digest() != self.header.meta_sha256:
            raise BadDigest("the metadata is damaged: its SHA-256 is not the one in the header", file=name)
        self.metadata = md.decode_canonical(document, md.Metadata, self.header.minor, name)
        validate(self.metadata, self.header.incompat, name)
        self.tensors: dict[str, md.Tensor] = {t.name: t for t in self.metadata.tensors}
        self.assets: dict[str, md.Asset] = {a.name: a for a in self.metadata.assets}

        placed = list(md.all_sections(self.metadata))
        self._sections = [section for _, _, section in placed]
        self._index = {(kind, owner, s.kind): i for i, (kind, owner, s) in enumerate(placed)}
        self._offsets, end = place_sections(s.length for s in self._sections)
        if end != HEADER_LEN + self.header.data_len:
            raise BadLayout(
                f"the sections of the metadata end at byte {end}, the header says {HEADER_LEN + self.header.data_len}",
                file=name,
            )
        self._check_padding(end, self._file.read(end, self.header.meta_off - end))

    @property
    def parts(self) -> list[Reader]:
        """The files that it reads: itself; all parts of a set, for the reader of one (file_set.py)."""
        return [self]

    @property
    def content_id(self) -> str:
        """SHA-256 over what the tensors hold: files with equal ids decode alike, whatever else they hold."""
        return md.content_id(self.metadata)

    def stored_tensor(self, name: str) -> md.StoredTensor:
        """The entry of a tensor, an alias followed to the tensor that holds its bytes; Usage when unknown."""
        tensor = self.tensors.get(name)
        if isinstance(tensor, md.AliasTensor):
            tensor = self.tensors[tensor.of]
        if tensor is None or isinstance(tensor, md.AliasTensor):
            raise Usage("the file holds no tensor of this name", file=self.path, tensor=name)
        return tensor

    # --- bytes ---------------------------------------------------------------------------------

    def iter_section(
        self, kind: str, owner: str, section_kind: md.Kind, chunk: int | Sequence[int] = CHUNK
    ) -> Iterator[bytes]:
        """Yield the stored bytes in pieces of `chunk` bytes (the last shorter), or of the lengths listed, hashing on
        the way.

        Bytes are verified only once the iterator is exhausted: raises BadDigest then, and the caller must
        throw away what it made of them.
        """
        holder = self._holder(kind, owner)
        yield from holder._pieces(kind, owner, section_kind, chunk, holder._file.read)

    def iter_section_into(
        self,
        kind: str,
        owner: str,
        section_kind: md.Kind,
        chunk: int | Sequence[int],
        into: Memory,
    ) -> Iterator[memoryview]:
        """The same, each piece read to the writable memory that `into` gives for so many bytes. A piece is still being
        hashed when it is yielded, but no longer when memory is asked for the second time after it."""

        holder = self._holder(kind, owner)
        file = holder._file

        def read(offset: int, length: int) -> memoryview:
            piece = into(length)
            if isinstance(file, InputFile):
                file.read_into(offset, piece)
            else:
                piece[:] = file.read(offset, length)
            return piece

        yield from holder._pieces(kind, owner, section_kind, chunk, read)

    def _holder(self, kind: str, owner: str) -> Reader:
        """The reader of the file that holds the sections of an owner: itself, but for a set (file_set.py)."""
        return self

    def _pieces(
        self,
        kind: str,
        owner: str,
        section_kind: md.Kind,
        chunk: int | Sequence[int],
        read: Callable[[int, int], _Piece],
    ) -> Iterator[_Piece]:
        i = self._index[kind, owner, section_kind]
        section, offset = self._sections[i], self._offsets[i]
        gap_start = self._offsets[i - 1] + self._sections[i - 1].length if i else HEADER_LEN
        self._check_padding(gap_start, self._file.read(gap_start, offset - gap_start))
        digest, end = self._new_digest(), offset + section.length
        for size in repeat(chunk) if isinstance(chunk, int) else chunk:
            if offset == end:
                break
            piece = read(offset, min(size, end - offset))
            offset += len(piece)
            digest.update(piece)
            yield piece
        found = digest.hexdigest()
        if found != section.sha256:
            raise BadDigest(
                f"SHA-256 is {found[:16]}..., expected {section.sha256[:16]}...: the file is damaged",
                file=self.path,
                tensor=owner if kind == "tensor" else None,
                section=f'asset "{escape(owner, 120)}"' if kind == "asset" else section_kind,
                offset=self._offsets[i],
                hint="fetch the file again",
            )

    def read_section(self, kind: str, owner: str, section_kind: md.Kind) -> bytes:
        """The raw (decompressed) bytes of a section, verified."""
        holder = self._holder(kind, owner)
        section = holder._sections[holder._index[kind, owner, section_kind]]
        if section.zstd_codes is not UNSET:
            tensor = self.tensors[owner]
            assert isinstance(tensor, md.ScalarTensor)
            return b"".join(self.code_chunks(tensor))
        stored = b"".join(self.iter_section(kind, owner, section_kind))
        return unpack_section(section, stored, holder.path, f'{section_kind} "{escape(owner, 120)}"')

    def read_asset(self, name: str) -> bytes:
        """The content of an asset; Usage when there is none of this name."""
        if name not in self.assets:
            raise Usage(f'the file holds no asset "{escape(name)}"', file=self.path)
        return self.read_section("asset", name, "asset")

    def _check_padding(self, start: int, padding: bytes) -> None:
        if any(padding):
            at = start + next(i for i, byte in enumerate(padding) if byte)
            raise BadLayout(f"padding at byte {at} is not zero: the file is damaged", file=self.path)

    # --- arrays --------------------------------------------------------------------------------

    def signs(self) -> NDArray[np.float32]:
        """(128,) float32 of 1 and -1 that every block is multiplied by; all 1 when the file has none."""
        if self.metadata.signs is None:
            return np.ones(8 * md.SIGNS_LENGTH, np.float32)
        bits = np.frombuffer(self.read_section("signs", "", "signs"), np.uint8)
        return 1 - 2 * np.unpackbits(bits, bitorder="little").astype(np.float32)

    def code_chunks(self, tensor: md.ScalarTensor, chunk: int = md.FRAME) -> Iterator[bytes]:
        """The packed codes, `chunk` of them at a time, a multiple of 2**20; verified only at exhaustion as in
        `iter_section`."""
        packing = tensor.sections[0].zstd_codes
        if packing is UNSET:
            yield from self.iter_section("tensor", tensor.name, "codes", chunk * tensor.bits // 8)
            return
        frames = enumerate(self.iter_section("tensor", tensor.name, "codes", packing.frames))
        digest = hashlib.sha256()
        while group := list(islice(frames, chunk // md.FRAME)):
            packed = b"".join(self.repack(tensor, number, frame) for number, frame in group)
            digest.update(packed)
            yield packed
        self.check_packed(tensor, digest.hexdigest())

    def repack(self, tensor: md.ScalarTensor, number: int, frame: bytes, pack: Pack = bitpack.pack) -> bytes:
        """The packed codes of frame `number` of compressed ones; BadFrames where it does not hold them."""
        n_codes = count_blocks(numel(tensor.shape)) * BLOCK
        try:
            codes = decompress_codes(frame, min(md.FRAME, n_codes - number * md.FRAME), tensor.bits)
        except ValueError as error:
            raise self._bad_frames(tensor, "codes", f"frame {number} of {len(frame)} bytes: {error}") from None
        return pack(codes, tensor.bits)

    def check_packed(self, tensor: md.ScalarTensor, found: str) -> None:
        """Raise BadDigest unless this is the SHA-256 of the packed codes, which are stored compressed."""
        if found != (expected := md.raw_sha256(tensor.sections[0])):
            problem = f"the packed codes have the SHA-256 {found[:16]}..., expected {expected[:16]}..."
            holder = self._holder("tensor", tensor.name)
            raise BadDigest(problem, file=holder.path, tensor=tensor.name, section="codes")

    def levels(self, tensor: md.ScalarTensor) -> NDArray[np.float32]:
        """(2**bits,) float32 codebook: finite, at most 65504 in magnitude, strictly increasing."""
        levels = np.frombuffer(self.read_section("tensor", tensor.name, "levels"), "<f4")
        with np.errstate(invalid="ignore"):  # NaN compares false, which is what we want
            good = bool((np.abs(levels) <= MAX_LEVEL).all() and (levels[1:] > levels[:-1]).all())
        if not good:
            raise self._bad_values(tensor, "levels", "levels must be finite, within 65504 and strictly increasing")
        return levels

    def scale_chunks(self, tensor: md.ScalarTensor, chunk: int) -> Iterator[NDArray[np.float16]]:
        """Yield the scales, (n_blocks,) float16 in all, `chunk` at a time. Verified only at exhaustion: digest
        first, then that each is zero or positive and finite."""
        problem, start = None, 0
        for piece in self.iter_section("tensor", tensor.name, "scales", 2 * chunk):
            bits = np.frombuffer(piece, "<u2")
            if problem is None and bits.max() >= 0x7C00:  # infinity, NaN and all with the sign bit, -0 included
                first = int(np.argmax(bits >= 0x7C00))
                problem = f"scale {start + first} is {bits[first]:#06x}: negative, infinite or not a number"
            start += len(bits)
            yield bits.view("<f2")
        if problem is not None:
            raise self._bad_values(tensor, "scales", problem)

    def row_scales(self, tensor: md.TrellisTensor) -> NDArray[np.uint8]:
        """(n_rows,) scales of a trellis tensor: each the upper byte of a finite float16 without its sign."""
        scales = np.frombuffer(self.read_section("tensor", tensor.name, "scales"), np.uint8)
        if scales.max() >= MAX_ROW_SCALE:
            first = int(np.argmax(scales >= MAX_ROW_SCALE))
            problem = f"scale {first} is {scales[first]}, expected less than {MAX_ROW_SCALE}"
            raise self._bad_values(tensor, "scales", problem)
        return scales

    def frequencies(self, tensor: md.TrellisTensor) -> NDArray[np.uint16]:
        """The frequencies of the magnitudes 0, 1, ... of the indices of a trellis tensor."""
        pairs = np.frombuffer(self.read_section("tensor", tensor.name, "frequencies"), "<u2")
        try:
            rans.make_tables(pairs)
        except ValueError as error:
            raise self._bad_values(tensor, "frequencies", str(error)) from None
        return pairs

    def symbol_chunks(self, tensor: md.TrellisTensor, group: int = 1) -> Iterator[list[bytes]]:
        """The chunks of the indices of a trellis tensor, `group` at a time, verified only at exhaustion as in
        `iter_section`. What is in them is not looked at here."""
        lengths = tensor.sections[-1].chunks
        assert not isinstance(lengths, UnsetType)
        pieces = self.iter_section("tensor", tensor.name, "symbols", lengths)
        while batch := list(islice(pieces, group)):
            yield batch

    def bad_chunk(self, tensor: md.TrellisTensor, number: int) -> BadFrames:
        """The error for a chunk of symbols that does not decode; raises BadDigest when that is no wonder."""
        return self._bad_frames(tensor, "symbols", f"chunk {number} of the symbols is none that an encoder writes")

    def _bad_frames(self, tensor: md.QuantizedTensor, kind: md.Kind, problem: str) -> BadFrames:
        for _ in self.iter_section("tensor", tensor.name, kind):
            pass
        return self._bad(BadFrames, tensor, kind, problem)

    def _bad_values(self, tensor: md.Tensor, kind: md.Kind, problem: str) -> BadValues:
        return self._bad(BadValues, tensor, kind, problem)

    def _bad(self, error: type[_Error], tensor: md.Tensor, kind: md.Kind, problem: str) -> _Error:
        holder = self._holder("tensor", tensor.name)
        offset = holder._offsets[holder._index["tensor", tensor.name, kind]]
        return error(problem, file=holder.path, tensor=tensor.name, section=kind, offset=offset)

    def raw_chunks(self, tensor: md.RawTensor, chunk: int = CHUNK) -> Iterator[bytes]:
        """The source bytes of a raw tensor in pieces, verified only at exhaustion as in `iter_section`."""
        largest = 0
        for piece in self.iter_section("tensor", tensor.name, "raw", chunk):
            if tensor.dtype == "BOOL":
                largest = max(largest, *piece)
            yield piece
        if largest > 1:  # looked at after the digest: damage is not a writer's fault
            raise self._bad_values(tensor, "raw", f"a boolean is {largest}, expected 0 or 1")

    # --- the whole file --------------------------------------------------------------------------

    def verify_shared(self) -> None:
        """Check every byte that belongs to no tensor: signs and assets."""
        if self.metadata.signs is not None:
            self.signs()
        for name in self.assets:
            self.read_asset(name)

    def verify_tensor(self, tensor: md.Tensor, check_symbols: SymbolCheck | None = None) -> None:
        """Check every byte and value of one tensor; an alias has none of its own. Only symbols are decoded, by
        `check_symbols` where that is given: what is here takes a second for a million of them."""
        if isinstance(tensor, md.RawTensor):
            for _ in self.raw_chunks(tensor):
                pass
        elif isinstance(tensor, md.ScalarTensor):
            for _ in self.code_chunks(tensor):
                pass
            self.levels(tensor)
            for _ in self.scale_chunks(tensor, CHUNK):
                pass
        elif isinstance(tensor, md.TrellisTensor):
            self.row_scales(tensor)
            (check_symbols or Reader._check_symbols)(self, tensor, self.frequencies(tensor))

    def _check_symbols(self, tensor: md.TrellisTensor, pairs: NDArray[np.uint16]) -> None:
        tables, left = rans.make_tables(pairs), count_blocks(numel(tensor.shape)) * BLOCK
        for number, (chunk,) in enumerate(self.symbol_chunks(tensor)):
            try:
                rans.decode(chunk, min(left, rans.CHUNK), tables, tensor.states)
            except rans.BadStream:
                raise self.bad_chunk(tensor, number) from None
            left -= rans.CHUNK

    def verify(self, check_symbols: SymbolCheck | None = None) -> None:
        """Check every byte of the file; `check_symbols` as in `verify_tensor`."""
        self.verify_shared()
        for tensor in self.metadata.tensors:
            self.verify_tensor(tensor, check_symbols)

    def close(self) -> None:
        """Close the file; twice is once."""
        self._file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
