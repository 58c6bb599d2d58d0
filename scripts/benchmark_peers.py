"""Other ways to store the same weights, for the benchmark: each is what a user of that package would call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from hlwq_formats.dtypes import widen

Matrix = tuple[bytes, int]
"""The bytes of a bfloat16 matrix, and its columns."""


@dataclass(frozen=True)
class Peer:
    """One way: `run` handles all matrices, and is None when what `needs` names is not installed."""

    name: str
    needs: tuple[str, ...]
    threads: int = 1
    note: str = ""
    run: Callable[[], object] | None = None


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def make_peers(matrices: Sequence[Matrix], folder: Path) -> list[Peer]:
    """Every peer; `folder` is where those that write a file write it."""
    peers: list[Peer] = []
    # gguf-py codes 32 weights of a row together; it computes in NumPy, unlike llama.cpp itself
    gguf = ("Q5_0", "5.5 bits a weight, from bf16, in memory"), ("Q8_0", "8.5 bits a weight, from bf16, in memory")
    for kind, note in gguf:
        peer = Peer(f"gguf-py {kind}", ("gguf",), 1, note)
        peers.append(_with(peer, lambda kind=kind: _gguf(matrices, kind)))
    peer = Peer("bitsandbytes NF4", ("bitsandbytes", "torch"), 1, "4.5 bits a weight, blocks of 64, in memory")
    peers.append(_with(peer, lambda: _bitsandbytes(matrices)))
    file = folder / "peer.safetensors"
    needs = ("safetensors", "torch")
    peers.append(_with(Peer("safetensors save_file", needs, 1, "bf16, not synced"), lambda: _save(matrices, file)))
    note = "load_file only maps the file: each tensor is cloned, too"
    peers.append(_with(Peer("safetensors load_file", needs, 1, note), lambda: _load(matrices, file)))
    return peers


def _with(peer: Peer, make: Callable[[], tuple[Callable[[], object], int]]) -> Peer:
    if any(version_of(package) is None for package in peer.needs):
        return peer
    run, threads = make()
    return Peer(peer.name, peer.needs, threads, peer.note, run)


def _gguf(matrices: Sequence[Matrix], kind: str) -> tuple[Callable[[], object], int]:
    quants, kinds = import_module("gguf.quants"), import_module("gguf").GGMLQuantizationType

    def run() -> None:
        for raw, columns in matrices:
            quants.quantize(widen(raw, "BF16").reshape(-1, columns), kinds[kind])

    return run, 1


def _tensors(matrices: Sequence[Matrix]) -> list[Any]:
    torch = import_module("torch")
    arrays = [np.frombuffer(raw, "<i2").reshape(-1, columns).copy() for raw, columns in matrices]
    return [torch.from_numpy(array).view(torch.bfloat16) for array in arrays]


def _bitsandbytes(matrices: Sequence[Matrix]) -> tuple[Callable[[], object], int]:
    quantize = import_module("bitsandbytes.functional").quantize_4bit
    tensors = _tensors(matrices)

    def run() -> None:
        for tensor in tensors:
            quantize(tensor, blocksize=64, quant_type="nf4")

    return run, import_module("torch").get_num_threads()


def _save(matrices: Sequence[Matrix], file: Path) -> tuple[Callable[[], object], int]:
    save_file = import_module("safetensors.torch").save_file
    tensors = {f"tensor{i}": tensor for i, tensor in enumerate(_tensors(matrices))}

    def run() -> None:
        save_file(tensors, file)

    return run, 1


def _load(matrices: Sequence[Matrix], file: Path) -> tuple[Callable[[], object], int]:
    load_file = import_module("safetensors.torch").load_file
    _save(matrices, file)[0]()

    def run() -> object:
        return {name: tensor.clone() for name, tensor in load_file(file).items()}

    return run, import_module("torch").get_num_threads()
