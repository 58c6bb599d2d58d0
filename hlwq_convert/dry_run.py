"""What a conversion would write, from headers alone: the real metadata around sections of known length."""

from __future__ import annotations

import hashlib
import os

from hlwq_formats import metadata as md
from hlwq_formats.layout import make_header, place_sections
from hlwq_formats.sections import make_section

from .conversion import Job, make_metadata
from .inspection import Inspection, Report, TensorReport, describe
from .plan import placeholder
from .rotate import SIGN_BYTES


def dry_run(job: Job, out: str | os.PathLike[str]) -> Inspection:
    """Describe the file that the job would make. Its size is exact but for the digits of the report and for
    duplicate tensors, which show only when weights are read."""
    tensors: list[md.Tensor] = [placeholder(tensor, job.choices[tensor.name]) for tensor in job.source.tensors]
    assets = [_asset(name, job.source.read_asset(name)) for name, _ in job.source.assets]
    assets.append(_asset(md.REPORT, md.encode(_placeholder_report(tensors))))
    metadata = make_metadata(job, make_section("signs", SIGN_BYTES, compress=False)[0], tensors, assets)
    document = md.encode(metadata)
    end = place_sections(section.length for _, _, section in md.all_sections(metadata))[1]
    header = make_header(end, document, bytes(32))
    return describe(
        metadata,
        file=os.fspath(out),
        file_bytes=header.file_len,
        metadata_bytes=header.meta_len,
        report=Report([]),
        warnings=job.warnings,
    )


def _asset(name: str, data: bytes) -> md.Asset:
    return md.Asset(name, [make_section("asset", data, compress=True)[0]])


def _placeholder_report(tensors: list[md.Tensor]) -> Report:
    """Numbers that take about as many compressed bytes as measured ones."""

    def digits(name: str) -> int:
        return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16)

    quantized = [tensor.name for tensor in tensors if isinstance(tensor, md.ScalarTensor)]
    return Report([TensorReport(n, 0.999 + digits(n) * 1e-18, 0.002 + digits(n + "#") * 1e-18) for n in quantized])
