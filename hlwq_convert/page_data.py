"""What the page of an inspection draws, as data: totals, sizes by module, heat maps, and the columns of its table."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from .codebook import REACH
from .histograms import Histogram
from .inspection import Inspection, TensorInfo
from .listing import choose
from .modules import Module, by_module
from .report import default_width, number

_MAP_ROWS, _MAP_COLUMNS = 80, 400
_SIZES = 14  # modules with a bar of their own
_LISTED = 200  # rules, files and assets
_NARROW = {"sqnr": 1.0, "bits": 0.5}  # dB and bits: smaller differences are not drawn large


def shown(text: str) -> str:
    """A text of the file with what cannot be seen as escapes; unlike in a terminal, backslashes stay as they are."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def page_data(inspection: Inspection, histograms: list[Histogram]) -> dict[str, Any]:
    """The data of the page. Every text of the file is made printable here."""
    modules = by_module(inspection.tensors)
    return {
        "title": shown(os.path.basename(inspection.file.rstrip("/")) or inspection.file),
        "origin": _origin(inspection),
        "warnings": [shown(warning) for warning in inspection.warnings],
        "file_bytes": inspection.file_bytes,
        "weights": inspection.weights,
        "bpw": inspection.bpw,
        "summary": inspection.summary,
        "sizes": _sizes(inspection, modules),
        "maps": _maps(modules),
        "reach": REACH,
        "rotation": _ROTATION if histograms else _NO_ROTATION,
        "histograms": [msgspec.structs.replace(one, name=shown(one.name)) for one in histograms],
        **_tensors(choose(inspection.tensors, "name")),
        "provenance": _provenance(inspection),
        "lists": _lists(inspection),
    }


_ROTATION = (
    "Coordinates of the weights before and after the Walsh-Hadamard rotation of their blocks, against the normal "
    "distribution, with the levels that codes stand for. Shown is the worst tensor of each module."
)
_NO_ROTATION = (
    "Shown when the weights are at hand: hlwq-inspect FILE --against MODEL_DIR --html PAGE draws the coordinates of "
    "the worst tensor of each module before and after the rotation."
)


def _origin(inspection: Inspection) -> str:
    source, tool = inspection.metadata.source, inspection.metadata.tool
    origin = f"{source.repo}@{(source.revision or '')[:12]}" if source.repo else f"{len(source.files)} local files"
    return shown(f"From {origin}, by {tool.name} {tool.version}; format {inspection.format_version}")


def _sizes(inspection: Inspection, modules: list[Module]) -> list[dict[str, Any]]:
    """The largest modules, the rest of them together, and what is no tensor, largest first."""
    stems = {_stem(m) for m in modules if -1 not in m.cells}
    modules = sorted(modules, key=lambda m: -m.bytes)
    rows: list[dict[str, Any]] = [
        {
            "name": shown(m.name),
            "label": shown(_label(m) if len(stems) == 1 and -1 not in m.cells else m.name),
            "bytes": m.bytes,
            "bits": m.bits,
            "part": m.encoding,
        }
        for m in modules[:_SIZES]
    ]
    other = {kind: inspection.summary.bytes_by_encoding[kind] for kind in ("assets", "metadata")}
    rows += [
        {"name": kind, "label": kind, "bytes": size, "bits": None, "part": kind} for kind, size in other.items() if size
    ]
    if rest := modules[_SIZES:]:
        label = f"{len(rest)} smaller modules"
        rows.append({"name": label, "label": label, "bytes": sum(m.bytes for m in rest), "bits": None, "part": "other"})
    return sorted(rows, key=lambda row: -row["bytes"])


def _stem(module: Module) -> str:
    """What stands before the layer."""
    return module.name.partition("*")[0]


def _label(module: Module) -> str:
    """What stands after the layer, without the last word that most names end in."""
    return module.name.removeprefix(_stem(module) + "*").lstrip(".").removesuffix(".weight") or module.name


def _maps(modules: list[Module]) -> dict[str, Any]:
    """Both heat maps: modules with a layer and a quantized tensor, as many as can be looked at."""
    layered = [m for m in modules if m.quantized and -1 not in m.cells]
    drawn = layered[:_MAP_ROWS]
    layers = sorted({layer for m in drawn for layer in m.cells})
    cells = [cell for m in drawn for cell in m.cells.values()]
    notes = ["Modules down, layers across. Stronger is worse for SQNR, and more for bits; grey is raw or not measured."]
    if any(m.tensors > len(m.cells) for m in drawn):
        notes.append("A cell of several tensors shows the worst.")
    if len(layered) > len(drawn):
        notes.append(f"{len(layered) - len(drawn)} more modules are in the table below.")
    if len(layers) > _MAP_COLUMNS:
        notes.append(f"Layers from {layers[_MAP_COLUMNS]} on are in the table below.")
    return {
        "layers": layers[:_MAP_COLUMNS],
        "rows": _map_rows(drawn, layers[:_MAP_COLUMNS]),
        "sqnr": _limits([cell.sqnr_db for cell in cells], "sqnr"),
        "bits": _limits([cell.bits for cell in cells], "bits"),
        "note": " ".join(notes),
        "rest": shown(_outside([m for m in modules if m.quantized and -1 in m.cells])),
    }


def _map_rows(modules: list[Module], layers: list[int]) -> list[dict[str, Any]]:
    """A row of cells, [bits, SQNR] or null, for each module; where there are several stacks of layers, a heading before
    each, which has no cells."""
    rows: list[dict[str, Any]] = []
    stems = [_stem(m) for m in modules]
    for module, stem, before in zip(modules, stems, [None, *stems], strict=False):
        if len(set(stems)) > 1 and stem != before:
            rows.append({"label": shown(stem.rstrip(".")) or "layers", "cells": None})
        found = [module.cells.get(layer) for layer in layers]
        cells = [cell and [cell.bits, cell.sqnr_db] for cell in found]
        rows.append({"name": shown(module.name), "label": shown(_label(module)), "cells": cells})
    return rows


def _outside(modules: list[Module]) -> str:
    """A sentence on quantized tensors that belong to no layer."""
    if not modules:
        return ""
    parts = [f"{m.name} {number(m.bits, '.2f')} bits, {number(min(m.sqnrs, default=None), '.2f')} dB" for m in modules]
    more = f"; and {len(parts) - 8} more" if len(parts) > 8 else ""
    return f"Outside the layers: {'; '.join(parts[:8])}{more}."


def _limits(values: list[float | None], kind: str) -> tuple[float, float] | None:
    found = [value for value in values if value is not None]
    if not found:
        return None
    low, high = min(found), max(found)
    spare = max(0.0, _NARROW[kind] - (high - low)) / 2
    return low - spare, high + spare


def _tensors(tensors: list[TensorInfo]) -> dict[str, Any]:
    """Columns, in natural order of names; texts that repeat are numbers of a list."""
    texts: dict[str, list[str]] = {}
    columns: dict[str, list[Any]] = {
        "name": [shown(t.name) for t in tensors],
        "bits": [_rounded(t.bpw, 4) for t in tensors],
        "bytes": [t.bytes for t in tensors],
        "cosine": [_rounded(t.cosine, 7) for t in tensors],
        "sqnr": [_rounded(t.sqnr_db, 4) for t in tensors],
    }
    repeated = {
        "shape": ["x".join(map(str, t.shape)) or "0-d" for t in tensors],
        "dtype": [t.dtype for t in tensors],
        "encoding": [t.encoding if t.bits is None else f"{t.encoding} {t.bits}" for t in tensors],
        "reason": [shown(t.reason) for t in tensors],
    }
    for column, values in repeated.items():
        places = {text: i for i, text in enumerate(dict.fromkeys(values))}
        texts[column] = list(places)
        columns[column] = [places[value] for value in values]
    return {"tensors": columns, "texts": texts}


def _provenance(inspection: Inspection) -> list[tuple[str, str]]:
    source, recipe, tool = inspection.metadata.source, inspection.metadata.recipe, inspection.metadata.tool
    rows = [
        ("Source", f"{source.repo}, revision {source.revision}" if source.repo else "local files"),
        ("Recipe", f"{recipe.name or 'none by name'}; default {default_width(recipe)}, effort {recipe.effort}"),
        ("Tool", f"{tool.name} {tool.version}, zstd {tool.zstd}"),
        ("Format", inspection.format_version),
        ("File id", inspection.file_id or "–"),
        ("Content id", inspection.content_id or "–"),
    ]
    return [(term, shown(text)) for term, text in rows]


def _lists(inspection: Inspection) -> list[dict[str, Any]]:
    rules = inspection.metadata.recipe.rules
    lists: list[tuple[str, list[tuple[str, Any]]]] = [
        ("Rules of the recipe", [(r.match, "raw" if r.bits is None else f"{r.bits} bits") for r in rules]),
        ("Files of the source", [(file.name, file.length) for file in inspection.metadata.source.files]),
        ("Parts, bytes", [(part.name, part.bytes) for part in (inspection.split.parts if inspection.split else [])]),
        ("Files that travel along, stored bytes", [(asset.name, asset.bytes) for asset in inspection.assets]),
    ]
    return [
        {
            "title": title,
            "rows": [(shown(name), value) for name, value in rows[:_LISTED]],
            "hidden": max(0, len(rows) - _LISTED),
        }
        for title, rows in lists
        if rows
    ]


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
