"""What the types of the metadata cannot say: entries against each other, lengths against shapes (spec section 5)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from msgspec import UNSET

from . import metadata as md
from .dtypes import ITEM_BITS, WEIGHT_DTYPES, nbytes
from .errors import BadMetadata, BadTensor, UnsupportedFeature, escape
from .layout import BLOCK, MAX_NUMEL, numel, scalar_lengths
from .paths import clashing_name, unsafe_path


def validate(metadata: md.Metadata, file: str) -> None:
    """Check entries against each other and every length against the one derived from shape and bits."""
    if metadata.split is not None:
        raise BadMetadata("metadata: a split set without its feature bit", file=file)
    if metadata.signs is not None:
        _check_section(metadata.signs, "signs", md.SIGNS_LENGTH, file, None)
    stored: dict[str, md.RawTensor | md.ScalarTensor] = {}
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


def _check_tensor(tensor: md.Tensor, stored: dict[str, md.RawTensor | md.ScalarTensor], file: str) -> None:
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
        case md.ScalarTensor():
            if tensor.block != BLOCK:
                raise UnsupportedFeature(
                    f"blocks of {tensor.block}, this reader knows {BLOCK}", file=file, tensor=tensor.name
                )
            if tensor.dtype not in WEIGHT_DTYPES or n == 0:
                raise bad(f"{tensor.dtype} {tensor.shape} cannot have the encoding scalar")
            expected = scalar_lengths(n, tensor.bits)
    kinds = [section.kind for section in tensor.sections]
    if kinds != list(expected):
        raise bad(f"sections {kinds}, expected {list(expected)}")
    for section in tensor.sections:
        _check_section(section, section.kind, expected[section.kind], file, tensor.name)


def _check_section(section: md.Section, kind: str, length: int, file: str, tensor: str | None) -> None:
    if (section.kind, section.length, section.zstd) != (kind, length, UNSET):
        packed = "" if section.zstd is UNSET else ", compressed"
        raise BadTensor(
            f"{section.kind} section of {section.length} bytes{packed}; expected {kind} of {length} bytes",
            file=file,
            tensor=tensor,
        )


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
        if problem is None and section.kind != "asset":
            problem = f"a section of kind {section.kind}, expected asset"
        if problem is None and section.zstd is not UNSET:
            frames, size = section.zstd.frames, section.zstd.raw_length
            if len(frames) != -(-size // md.FRAME) or sum(frames) != section.length:
                problem = (
                    f"{len(frames)} frames of {sum(frames)} bytes for {size} raw bytes in {section.length} stored ones"
                )
        total += md.raw_length(section)
        if problem is None and (md.raw_length(section) > md.MAX_ASSET or total > md.MAX_ASSETS_TOTAL):
            problem = f"over the limit of {md.MAX_ASSET} bytes, or {md.MAX_ASSETS_TOTAL} for all assets"
        if problem is not None:
            raise BadMetadata(f'asset "{escape(asset.name, 120)}": {problem}', file=file)
