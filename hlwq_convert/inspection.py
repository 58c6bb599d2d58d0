"""What is in a file: header, metadata and report as one document, without reading weights."""

from __future__ import annotations

import math
import os
import unicodedata

import msgspec

from hlwq_formats import metadata as md
from hlwq_formats.dtypes import ITEM_BITS
from hlwq_formats.errors import BadData, BadMetadata, escape
from hlwq_formats.layout import HEADER_LEN, MAJOR, numel
from hlwq_formats.reader import Reader

from .metrics import sqnr_db

QUANTIZED = ("scalar", "trellis")
_ENTRY_LIMIT = 4096  # bytes of the report for each tensor: a name and two numbers take less


class TensorReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The error of one quantized tensor, measured on its decoded weights while converting; null for a tensor of
    zeros, which there is nothing to be close to. For a trellis, also what its indices take at least (frequencies.cost),
    in whole bytes."""

    name: str
    cosine: float | None
    rel_mse: float | None
    entropy_bytes: int | None = None


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The asset report.json: one entry for each quantized tensor, in file order."""

    tensors: list[TensorReport]


class Place(msgspec.Struct, frozen=True):
    """An asset and its stored bytes."""

    name: str
    bytes: int


class TensorInfo(msgspec.Struct, frozen=True):
    """One tensor; `bytes` are its sections without padding, `bits` the width of fixed-rate codes; the errors are null
    where nothing was measured.

    `entropy_bytes` are what the indices of a trellis take at least when each is coded by itself, with the best static
    table for even ones and the best for odd ones, in which m and -m are equally frequent: the order-0 entropy of the
    indices that are stored, the padding of the last block among them. `coder_loss` is the part that their symbols and
    frequencies take beyond, 0.01 for 1 %: tables, escapes, the states of the lanes, and rounding.
    """

    name: str
    shape: list[int]
    dtype: str
    encoding: str
    bits: int | None
    bpw: float | None
    bytes: int
    reason: str
    cosine: float | None = None
    sqnr_db: float | None = None
    rel_mse: float | None = None
    entropy_bytes: int | None = None
    coder_loss: float | None = None


class Summary(msgspec.Struct, frozen=True):
    """Totals over a file; `bytes_by_encoding` sums to its size. `unreported` counts quantized tensors without an
    entry in the report. `coder_loss` is that of all tensors whose entropy is known, as a part of it, and
    `coder_loss_bpw` in bits for each of their weights."""

    quantized: int
    raw: int
    aliased: int
    unreported: int
    cosine_min: float | None
    cosine_mean: float | None
    sqnr_db_mean: float | None
    bytes_by_encoding: dict[str, int]
    coder_loss: float | None = None
    coder_loss_bpw: float | None = None


class SplitInfo(msgspec.Struct, frozen=True):
    """The files of a split set and their bytes; `size` is the most that a file was to have."""

    size: int
    parts: list[Place]


class Provenance(msgspec.Struct, frozen=True):
    """Where the file comes from."""

    source: md.Source
    recipe: md.Recipe
    tool: md.Tool


class Inspection(msgspec.Struct, frozen=True):
    """Everything that hlwq-inspect shows; its JSON is read by other tools, so its names stay."""

    file: str
    format_version: str
    file_id: str | None
    content_id: str | None
    file_bytes: int
    weights: int
    bpw: float | None
    metadata: Provenance
    assets: list[Place]
    tensors: list[TensorInfo]
    summary: Summary
    warnings: list[str]
    split: SplitInfo | None = None


def printable(path: str) -> str:
    """A path as Unicode: a name on disk may be none."""
    return path.encode("utf-8", "backslashreplace").decode()


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Read header, metadata and report of a file or a split set: a path, or a URL or ORG/REPO/FILE.hlwq (see
    remote.find)."""
    from .remote import open_reader  # and with it the standard library's HTTP client

    with open_reader(path) as reader:
        return inspect_reader(reader)


def inspect_reader(reader: Reader) -> Inspection:
    """As `inspect`, for a file that is open already."""
    return _inspect(reader, _read_report(reader), [])


def inspect_damaged(reader: Reader) -> Inspection:
    """As `inspect_reader`, without the report where that is damaged."""
    try:
        return inspect_reader(reader)
    except BadData as error:
        return _inspect(reader, Report([]), [f"the report cannot be read: {error.problem}"])


def _inspect(reader: Reader, report: Report, warnings: list[str]) -> Inspection:
    if reader.header.compat:
        warnings.append(f"compatible feature bits {reader.header.compat:#x} are unknown to this version and ignored")
    return describe(
        reader.metadata,
        file=reader.path,
        minor=reader.header.minor,
        file_bytes=reader.header.file_len,
        metadata_bytes=reader.header.meta_len,
        file_id=reader.file_id,
        content_id=reader.content_id,
        report=report,
        warnings=warnings,
        split=describe_split(
            reader.parts[0].metadata.split,
            [Place(printable(os.path.basename(part.path)), part.header.file_len) for part in reader.parts],
        ),
    )


def describe_split(split: md.Split | None, parts: list[Place]) -> SplitInfo | None:
    """What an inspection says of the files of a set, nothing for one that is whole."""
    return None if split is None else SplitInfo(split.size, parts)


def _read_report(reader: Reader) -> Report:
    """The report of a file, empty when it has none. It is a stranger's: of a size that its tensors explain, in
    their order, its numbers in range."""
    if md.REPORT not in reader.assets:
        return Report([])
    tensors = [t for t in reader.metadata.tensors if isinstance(t, md.QuantizedTensor)]
    size, limit = md.raw_length(reader.assets[md.REPORT].sections[0]), _ENTRY_LIMIT * (len(tensors) + 1)
    if size > limit:
        raise BadMetadata(f"{md.REPORT} of {size} bytes, at most {limit} for {len(tensors)} tensors", file=reader.path)
    try:
        report = msgspec.json.decode(reader.read_asset(md.REPORT), type=Report)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadMetadata(f"{md.REPORT}: {escape(str(error))}", file=reader.path) from None
    if [entry.name for entry in report.tensors] != [tensor.name for tensor in tensors]:
        raise BadMetadata(f"{md.REPORT} does not list the quantized tensors in their order", file=reader.path)
    for entry, tensor in zip(report.tensors, tensors, strict=True):
        cosine, rel_mse = entry.cosine, entry.rel_mse
        possible = -1 <= (cosine or 0) <= 1 and 0 <= (rel_mse or 0) < math.inf
        possible &= 0 <= (entry.entropy_bytes or 0) <= _coded_bytes(tensor)
        if (cosine is None) != (rel_mse is None) or not possible:
            raise BadMetadata(f"{md.REPORT} holds impossible numbers", file=reader.path, tensor=entry.name)
    return report


def describe(
    metadata: md.Metadata,
    *,
    file: str,
    file_bytes: int,
    metadata_bytes: int,
    report: Report,
    minor: int = 0,
    file_id: str | None = None,
    content_id: str | None = None,
    warnings: list[str] | None = None,
    split: SplitInfo | None = None,
) -> Inspection:
    """Put a document and a report together; pure."""
    errors = {entry.name: entry for entry in report.tensors}
    warnings = [*(warnings or []), *_lookalikes([tensor.name for tensor in metadata.tensors])]
    tensors = [_describe_tensor(tensor, errors.get(tensor.name)) for tensor in metadata.tensors]
    files = 1 if split is None else len(split.parts)
    by_encoding = {
        "scalar": sum(t.bytes for t in tensors if t.encoding == "scalar"),
        "trellis": sum(t.bytes for t in tensors if t.encoding == "trellis"),
        "raw": sum(t.bytes for t in tensors if t.encoding == "raw"),
        "shared": files * metadata.signs.length if metadata.signs is not None else 0,
        "assets": sum(asset.sections[0].length for asset in metadata.assets),
        "metadata": metadata_bytes,
        "header": files * HEADER_LEN,
    }
    by_encoding["padding"] = file_bytes - sum(by_encoding.values())
    weights = sum(numel(t.shape) for t in tensors if t.encoding != "alias")
    cosines = [t.cosine for t in tensors if t.cosine is not None]
    sqnrs = [t.sqnr_db for t in tensors if t.sqnr_db is not None]
    coded = [t for t in metadata.tensors if (entry := errors.get(t.name)) and entry.entropy_bytes is not None]
    loss, loss_bpw = _loss_of_all(coded, sum(t.entropy_bytes or 0 for t in tensors))
    summary = Summary(
        quantized=sum(t.encoding in QUANTIZED for t in tensors),
        raw=sum(t.encoding == "raw" for t in tensors),
        aliased=sum(t.encoding == "alias" for t in tensors),
        unreported=sum(t.encoding in QUANTIZED and t.name not in errors for t in tensors),
        cosine_min=min(cosines, default=None),
        cosine_mean=sum(cosines) / len(cosines) if cosines else None,
        sqnr_db_mean=sum(sqnrs) / len(sqnrs) if sqnrs else None,
        bytes_by_encoding=by_encoding,
        coder_loss=loss,
        coder_loss_bpw=loss_bpw,
    )
    return Inspection(
        file=printable(file),
        format_version=f"{MAJOR}.{minor}",
        file_id=file_id,
        content_id=content_id,
        file_bytes=file_bytes,
        weights=weights,
        bpw=8 * file_bytes / weights if weights else None,
        metadata=Provenance(metadata.source, metadata.recipe, metadata.tool),
        assets=[Place(asset.name, asset.sections[0].length) for asset in metadata.assets],
        tensors=tensors,
        summary=summary,
        warnings=warnings,
        split=split,
    )


def _coded_bytes(tensor: md.Tensor) -> int:
    """Stored bytes that the entropy of indices is compared with: symbols and their frequencies."""
    if isinstance(tensor, md.AliasTensor):
        return 0
    return sum(section.length for section in tensor.sections if section.kind in ("symbols", "frequencies"))


def _loss_of_all(tensors: list[md.Tensor], entropy: int) -> tuple[float | None, float | None]:
    """What the coder loses on tensors whose indices take `entropy` bytes at least: as a part of them, and in bits a
    weight."""
    if not entropy:
        return None, None
    over = sum(map(_coded_bytes, tensors)) - entropy
    return over / entropy, 8 * over / sum(numel(t.shape) for t in tensors)


def _lookalikes(names: list[str]) -> list[str]:
    """A warning for names that a person, or another program, could take for each other."""
    seen: dict[str, str] = {}
    for name in names:
        plain = unicodedata.normalize("NFC", name).casefold()
        if (other := seen.setdefault(plain, name)) != name:
            return [f'the names "{escape(other)}" and "{escape(name)}" look alike']
    return []


def _describe_tensor(tensor: md.Tensor, error: TensorReport | None) -> TensorInfo:
    n = numel(tensor.shape)
    bits: int | None
    match tensor:
        case md.AliasTensor():
            return TensorInfo(tensor.name, tensor.shape, tensor.dtype, "alias", None, None, 0, f"equals {tensor.of}")
        case md.RawTensor():
            encoding, bits = "raw", ITEM_BITS[tensor.dtype]
        case md.ScalarTensor():
            encoding, bits = "scalar", tensor.bits
        case md.TrellisTensor():
            encoding, bits = "trellis", None
    stored = sum(section.length for section in tensor.sections)
    entropy = error.entropy_bytes if error else None
    return TensorInfo(
        tensor.name, tensor.shape, tensor.dtype, encoding, bits, 8 * stored / n if n else None, stored, tensor.reason,
        cosine=error.cosine if error else None,
        sqnr_db=sqnr_db(error.rel_mse) if error and error.rel_mse is not None else None,
        rel_mse=error.rel_mse if error else None,
        entropy_bytes=entropy,
        coder_loss=_coded_bytes(tensor) / entropy - 1 if entropy else None,
    )  # fmt: skip
