"""Which tensors each part of a split set holds, and the documents of the parts (spec section 8.1)."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import msgspec

from . import metadata as md
from .layout import DATA_OFFSET, Header, align, make_header, place_sections


def header_of(metadata: md.Metadata) -> Header:
    """The header of the file with this document."""
    document = md.encode(metadata)
    end = place_sections(section.length for _, _, section in md.all_sections(metadata))[1]
    return make_header(end, document, hashlib.sha256(document).digest(), md.incompat_of(metadata))


def plan_parts(metadata: md.Metadata, limit: int | None) -> list[md.Metadata]:
    """The documents of the parts into which a file is cut so that none has over `limit` bytes; its own where it is not
    that long, or cannot be cut.

    A part takes whole tensors, in the order of the file and with their aliases, as many as fit. One that is too long
    for any has a part of its own, which is longer. The assets are in the first part.
    """
    if limit is None or header_of(metadata).file_len <= limit:
        return [metadata]
    bare = msgspec.structs.replace(
        metadata, tensors=[], assets=[], split=md.Split(md.NO_SET, md.MAX_PARTS, md.MAX_PARTS, limit)
    )
    groups = _group(metadata, bare, limit)
    if len(groups) == 1:
        return [metadata]
    documents = [
        msgspec.structs.replace(
            bare,
            tensors=sorted(group, key=lambda tensor: tensor.name.encode()),
            assets=metadata.assets if index == 0 else [],
            split=md.Split(md.NO_SET, index, len(groups), limit),
        )
        for index, group in enumerate(groups)
    ]
    name = md.set_id(documents)
    for document in documents:
        assert document.split is not None
        document.split.set = name
    return documents


def _group(metadata: md.Metadata, bare: md.Metadata, limit: int) -> list[list[md.Tensor]]:
    """The tensors of each part; `bare` is the document of one without any, in as many bytes as it can have."""
    aliases: dict[str, list[md.Tensor]] = defaultdict(list)
    for tensor in metadata.tensors:
        if isinstance(tensor, md.AliasTensor):
            aliases[tensor.of].append(tensor)
    start = place_sections([metadata.signs.length] if metadata.signs is not None else [])[1]
    carried = sum(align(asset.sections[0].length) for asset in metadata.assets)
    text = len(md.encode(msgspec.structs.replace(bare, assets=metadata.assets)))
    groups, end = [list[md.Tensor]()], start
    for tensor in metadata.tensors:
        if isinstance(tensor, md.AliasTensor):
            continue
        group = [tensor, *aliases[tensor.name]]
        stored = place_sections(section.length for section in tensor.sections)[1] - DATA_OFFSET
        entries = sum(len(md.encode(one)) + 1 for one in group)
        if align(align(end) + stored) + carried + text + entries > limit and (groups[-1] or carried):
            groups.append([])
            end, carried, text = start, 0, len(md.encode(bare))
        groups[-1] += group
        end, text = align(end) + stored, text + entries
    return groups
