"""Inspections for the tests of the HTML report, some of which no converter would write."""

from __future__ import annotations

from hlwq_convert.inspection import Inspection, Place, Provenance, Summary, TensorInfo
from hlwq_formats import metadata as md

EVIL = "</script><img src=x onerror=window.pwned=1><!--<script>\u2028\u202e\"'`${window.pwned=1}{{data}}&lt;"


def inspection(tensors: list[TensorInfo], text: str = "t") -> Inspection:
    """A file of these tensors; every other text of it is `text`."""
    sizes = {kind: sum(t.bytes for t in tensors if t.encoding == kind) for kind in ("scalar", "trellis", "raw")}
    sizes |= {"shared": 0, "assets": 7, "metadata": 100, "header": 128, "padding": 0}
    measured = [t.sqnr_db for t in tensors if t.sqnr_db is not None]
    mean = sum(measured) / len(measured) if measured else None
    summary = Summary(len(tensors), 0, 0, 0, 0.998 if measured else None, 0.999, mean, sizes)
    provenance = Provenance(
        md.Source(text, text, [md.SourceFile(text, 5)]),
        md.Recipe(text, 5, text, [md.Rule(text, None), md.Rule(text, 4)]),
        md.Tool(text, text, text),
    )
    total, weights = sum(sizes.values()), 576 * 576 * len(tensors)
    bpw = 8 * total / weights if weights else None
    assets = [Place(text, 7)]
    return Inspection(
        text, "1.0", "f" * 64, "c" * 64, total, weights, bpw, provenance, assets, tensors, summary, [text]
    )


def quantized(name: str, sqnr: float | None = 27.0, reason: str = "default") -> TensorInfo:
    size = 212672
    bpw = 8 * size / 576**2
    return TensorInfo(name, [576, 576], "BF16", "scalar", 5, bpw, size, reason, 0.999, sqnr, 0.002)


def many(layers: int = 60, experts: int = 333) -> Inspection:
    """A model of 59,940 matrices of experts."""
    modules = ("down_proj", "gate_proj", "up_proj")
    return inspection(
        [
            quantized(f"model.layers.{i}.mlp.experts.{j}.{m}.weight", 26 + (i * 7 + j * 13 + k) % 97 / 97)
            for i in range(layers)
            for j in range(experts)
            for k, m in enumerate(modules)
        ]
    )
