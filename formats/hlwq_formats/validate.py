"""What the types of the metadata cannot say: entries against each other, lengths against shapes (spec section 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from msgspec import UNSET

from . import metadata as md
from .dtypes import ITEM_BITS, WEIGHT_DTYPES, nbytes
from .errors import BadMetadata, BadTensor, UnsupportedFeature, escape
from .layout import BLOCK, INCOMPAT_NAMES, MAX_NUMEL, count_blocks, numel, scalar_lengths, trellis_lengths
from .paths import clashing_name, unsafe_path
from .rans import MAX_CHUNK_BYTES, MAX_FREQUENCIES
from .sections import MAX_CODES_FRAME


def validate(metadata: md.Metadata, incompat: int, file: str) -> None:
    """Check entries against the feature bits and each other, and every length against the one derived from shape and
    bits."""
    if wrong := incompat ^ md.incompat_of(metadata):
        names = [name for bit, name in INCOMPAT_NAMES.items() if wrong >> bit & 1]
        raise BadMetadata(f"metadata: the header's feature bits do not fit it: {', '.join(names)}", file=file)
    split = metadata.split
    if split is not None and split.index >= split.count:
        raise BadMetadata(f"metadata: it is part {split.index + 1} of {split.count}", file=file)
    if split is not None and split.index > 0 and metadata.assets:
        raise BadMetadata(f"metadata: part {split.index + 1} of a set has assets, expected in part 1", file=file)
    if metadata.signs is not None:
        _check_section(metadata.signs, "signs", md.SIGNS_LENGTH, file, None)
    stored: dict[str, md.StoredTensor] = {}
    previous = b""
    for tensor in metadata.tensors:
        name = tensor.name.encode()
        if len(name) > md.MAX_NAME_BYTES:
            raise BadTensor(f"name of {len(name)} bytes, at most {md.MAX_NAME_BYTES}", file=file, tensor=tensor.name)
        if name <= previous:
            problem = "appears twice" if name == previous else "is out of order"
            raise BadTensor(f"{problem}: tensors are sorted by the bytes of their names", file=file, tensor=tensor.name)
        previous = name
        _check_tensor(tensor, stored, file)
        if not isinstance(tensor, md.AliasTensor):
            stored[tensor.name] = tensor
    _check_assets(metadata.assets, file)


def _check_tensor(tensor: md.Tensor, stored: dict[str, md.StoredTensor], file: str) -> None:
    def bad(problem: str) -> BadTensor:
        return BadTensor(problem, file=file, tensor=tensor.name)

    if tensor.dtype not in ITEM_BITS:
        raise UnsupportedFeature(f"unknown dtype {escape(tensor.dtype, 40)}", file=file, tensor=tensor.name)
    if numel([max(d, 1) for d in tensor.shape]) > MAX_NUMEL:
        raise bad(f"shape {tensor.shape} has 2**53 elements or more")
    n = numel(tensor.shape)
    match tensor:
        case md.AliasTensor():
            target = stored.get(tensor.of)
            if target is None:
                raise bad(f'alias of "{escape(tensor.of, 120)}", which is not an earlier stored tensor')
            if (target.dtype, target.shape) != (tensor.dtype, tensor.shape):
                raise bad(
                    f"{tensor.dtype} {tensor.shape} is an alias of "
                    f'"{escape(tensor.of, 120)}", which is {target.dtype} {target.shape}'
                )
            return
        case md.RawTensor():
            size = nbytes(tensor.dtype, n)
            if size is None:
                raise bad(f"{n} elements of {tensor.dtype} do not fill whole bytes")
            expected: Mapping[Any, int] = {"raw": size}
        case md.ScalarTensor() | md.TrellisTensor():
            if tensor.block != BLOCK:
                raise UnsupportedFeature(
                    f"blocks of {tensor.block}, this reader knows {BLOCK}", file=file, tensor=tensor.name
                )
            if tensor.dtype not in WEIGHT_DTYPES or n == 0:
                raise bad(f"{tensor.dtype} {tensor.shape} cannot be quantized")
            if isinstance(tensor, md.TrellisTensor):
                _check_trellis(tensor, n, bad, file)
                return
            expected = scalar_lengths(n, tensor.bits)
    kinds = [section.kind for section in tensor.sections]
    if kinds != list(expected):
        raise bad(f"sections {kinds}, expected {list(expected)}")
    for section in tensor.sections:
        if section.kind == "codes" and section.zstd_codes is not UNSET:
            _check_coded(section, section.zstd_codes, n, expected["codes"], bad)
        else:
            _check_section(section, section.kind, expected[section.kind], file, tensor.name)


def _check_coded(
    section: md.Section, packing: md.Zstd, n: int, packed_length: int, bad: Callable[[str], BadTensor]
) -> None:
    frames, n_codes = packing.frames, count_blocks(n) * BLOCK
    if packing.raw_length != packed_length or (section.zstd, section.chunks) != (UNSET, UNSET):
        raise bad(f"compressed codes of {packing.raw_length} packed bytes, expected {packed_length}")
    if len(frames) != -(-n_codes // md.FRAME) or sum(frames) != section.length:
        raise bad(f"{len(frames)} frames of {sum(frames)} bytes for {n_codes} codes in {section.length} stored ones")
    if (longest := max(frames)) > MAX_CODES_FRAME:
        raise bad(f"a frame of {longest} bytes, expected at most {MAX_CODES_FRAME}")


def _check_trellis(tensor: md.TrellisTensor, n: int, bad: Callable[[str], BadTensor], file: str) -> None:
    if n % tensor.row:
        raise bad(f"rows of {tensor.row} elements do not fill {n}")
    kinds = [section.kind for section in tensor.sections]
    if kinds != ["scales", "frequencies", "symbols"]:
        raise bad(f"sections {kinds}, expected scales, frequencies and symbols")
    scales, frequencies, symbols = tensor.sections
    scales_length, n_chunks = trellis_lengths(n, tensor.row)
    for section in (scales, frequencies):
        if (section.chunks, section.zstd_codes) != (UNSET, UNSET):
            raise bad(f"{section.kind}: it is in chunks or compressed as codes")
        if (problem := _bad_frames(section)) is not None:
            raise bad(f"{section.kind}: {problem}")
    if (found := md.raw_length(scales)) != scales_length:
        raise bad(f"scales of {found} bytes, expected {scales_length}")
    if (found := md.raw_length(frequencies)) not in range(4, 2 * MAX_FREQUENCIES + 1, 2):
        raise bad(f"frequencies of {found} bytes, expected 4 to {2 * MAX_FREQUENCIES} and even")
    chunks = [] if symbols.chunks is UNSET else symbols.chunks
    if md.packing_of(symbols) is not UNSET or len(chunks) != n_chunks or sum(chunks) != symbols.length:
        raise bad(f"{len(chunks)} chunks of {sum(chunks)} bytes in {symbols.length} stored ones, expected {n_chunks}")
    if (longest := max(chunks)) > MAX_CHUNK_BYTES or any(length % 2 for length in chunks):
        raise bad(f"a chunk of {longest} bytes, expected whole words and at most {MAX_CHUNK_BYTES}")


def _check_section(section: md.Section, kind: str, length: int, file: str, tensor: str | None) -> None:
    plain = (md.packing_of(section), section.chunks) == (UNSET, UNSET)
    if not plain or (section.kind, section.length) != (kind, length):
        packed = "" if plain else ", compressed"
        raise BadTensor(
            f"{section.kind} section of {section.length} bytes{packed}; expected {kind} of {length} bytes",
            file=file,
            tensor=tensor,
        )


def _bad_frames(section: md.Section) -> str | None:
    """What is wrong with the list of frames of a compressed section, if anything."""
    if section.zstd is UNSET:
        return None
    frames, size = section.zstd.frames, section.zstd.raw_length
    if len(frames) == -(-size // md.FRAME) and sum(frames) == section.length:
        return None
    return f"{len(frames)} frames of {sum(frames)} bytes for {size} raw bytes in {section.length} stored ones"


def _check_assets(assets: list[md.Asset], file: str) -> None:
    order = [(asset.name == md.REPORT, asset.name.encode()) for asset in assets]
    if any(a >= b for a, b in pairwise(order)):
        raise BadMetadata(f"assets are not sorted by name with {md.REPORT} last, or one appears twice", file=file)
    clash = clashing_name([asset.name for asset in assets])
    if clash is not None:
        raise BadMetadata(
            f'asset "{escape(clash, 120)}": another asset needs the same place on some systems', file=file
        )
    total = 0
    for asset in assets:
        section = asset.sections[0]
        problem = unsafe_path(asset.name)
        if problem is None and (section.kind, section.chunks, section.zstd_codes) != ("asset", UNSET, UNSET):
            problem = f"a section of kind {section.kind}, in chunks or compressed as codes, expected asset"
        if problem is None:
            problem = _bad_frames(section)
        total += md.raw_length(section)
        if problem is None and (md.raw_length(section) > md.MAX_ASSET or total > md.MAX_ASSETS_TOTAL):
            problem = f"over the limit of {md.MAX_ASSET} bytes, or {md.MAX_ASSETS_TOTAL} for all assets"
        if problem is not None:
            raise BadMetadata(f'asset "{escape(asset.name, 120)}": {problem}', file=file)
