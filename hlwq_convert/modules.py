"""The tensors of a file by module and layer: what charts and heat maps show."""

from __future__ import annotations

import msgspec

from hlwq_formats.layout import numel

from .inspection import TensorInfo
from .report import natural_order

_LONGEST_NUMBER = 6  # digits of what is taken for a layer or an expert


class Cell(msgspec.Struct):
    """The tensors of one module in one layer. `bits` counts all stored bytes of the quantized ones, null when none
    is; `sqnr_db` is the lowest of theirs."""

    bits: float | None
    sqnr_db: float | None


class Module(msgspec.Struct):
    """Tensors whose names differ in numbers alone. `cells` are by layer, which is the first number of a name, and -1
    for names without one; `encoding` is that of its largest
    tensor, `worst` the tensor with the lowest SQNR."""

    name: str
    tensors: int
    weights: int
    bytes: int
    quantized: int
    encoding: str
    worst: str | None
    cells: dict[int, Cell]

    @property
    def sqnrs(self) -> list[float]:
        """The measured cells."""
        return [cell.sqnr_db for cell in self.cells.values() if cell.sqnr_db is not None]

    @property
    def bits(self) -> float | None:
        """Stored bits a weight over all tensors that hold weights."""
        return 8 * self.bytes / self.weights if self.weights else None


def split_name(name: str) -> tuple[str, int]:
    """("model.layers.*.mlp.up_proj.weight", 3) for "model.layers.3.mlp.up_proj.weight"; the layer is -1 when there is
    no number. Later numbers, of experts say, are stars as well."""
    layer = -1
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isascii() and part.isdigit() and len(part) <= _LONGEST_NUMBER:
            layer = int(part) if layer < 0 else layer
            parts[i] = "*"
    return ".".join(parts), layer


def by_module(tensors: list[TensorInfo]) -> list[Module]:
    """The modules in natural order of their names; aliases, which store nothing, are left out."""
    groups: dict[str, dict[int, list[TensorInfo]]] = {}
    for tensor in tensors:
        if tensor.encoding != "alias":
            name, layer = split_name(tensor.name)
            groups.setdefault(name, {}).setdefault(layer, []).append(tensor)
    return [_module(name, groups[name]) for name in sorted(groups, key=natural_order)]


def _module(name: str, layers: dict[int, list[TensorInfo]]) -> Module:
    everything = [tensor for tensors in layers.values() for tensor in tensors]
    measured = [(t.sqnr_db, t.name) for t in everything if t.sqnr_db is not None]
    return Module(
        name=name,
        tensors=len(everything),
        weights=sum(numel(t.shape) for t in everything),
        bytes=sum(t.bytes for t in everything),
        quantized=sum(t.encoding != "raw" for t in everything),
        encoding=max(everything, key=lambda t: t.bytes).encoding,
        worst=min(measured)[1] if measured else None,
        cells={layer: _cell(layers[layer]) for layer in sorted(layers)},
    )


def _cell(tensors: list[TensorInfo]) -> Cell:
    quantized = [t for t in tensors if t.encoding != "raw"]
    weights = sum(numel(t.shape) for t in quantized)
    return Cell(
        bits=8 * sum(t.bytes for t in quantized) / weights if weights else None,
        sqnr_db=min((t.sqnr_db for t in quantized if t.sqnr_db is not None), default=None),
    )
