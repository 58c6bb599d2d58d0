"""What scripts/rotation.py and scripts/adaptation.py share: codes that nobody could store yet, to measure what they
would give. Bits are those of an ideal entropy coder, with the two tables that a trellis has."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fidelity import SENTENCES
from numpy.typing import NDArray
from safetensors.torch import load_file

from hlwq_convert.frequencies import cost, count_magnitudes
from hlwq_convert.job import prepare
from hlwq_convert.kernels.trellis import search_segments
from hlwq_convert.parallel import default_workers
from hlwq_formats.rans import SEGMENT

Floats = NDArray[np.float32]
Weights = dict[str, torch.Tensor]


def load_weights(model_dir: Path) -> tuple[Weights, list[str]]:
    """All tensors of a model, and the names of those that a variable rate quantizes."""
    weights: Weights = {}
    for shard in sorted(model_dir.glob("*.safetensors")):
        weights.update(load_file(shard))
    return weights, [name for name, choice in prepare(model_dir, bpw=4.5).choices.items() if choice.step is not None]


def hadamard(size: int) -> Floats:
    """The orthonormal Sylvester matrix: (size, size)."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(math.sqrt(size))


def random_signs(size: int, seed: int) -> Floats:
    """(size,) float32 of 1 and -1."""
    return np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), size)


def rotate(weights: Floats, signs: Floats) -> Floats:
    """(n, block) coordinates of flat weights, padded with zeros to whole blocks of len(signs)."""
    return (_whole(weights, len(signs)) * signs) @ hadamard(len(signs))


def rotate_back(coordinates: Floats, signs: Floats, count: int) -> Floats:
    """The first `count` weights of what `rotate` gave."""
    return ((coordinates @ hadamard(len(signs))) * signs).reshape(-1)[:count]


def search(steps: Floats, states: int) -> NDArray[np.int32]:
    """Indices of the trellis for (n,) coordinates in steps: (n,)."""
    return search_segments(_whole(steps, SEGMENT), np.float32(1), states).reshape(-1)[: len(steps)]


def _whole(values: Floats, size: int) -> Floats:
    """(n, size), padded with zeros."""
    return np.pad(values, (0, -len(values) % size)).reshape(-1, size)


def mean_squares(values: Floats) -> Floats:
    """Of each row of (n, m): (n,)."""
    return np.einsum("ij,ij->i", values, values) / np.float32(values.shape[1])


def energy(values: Floats) -> float:
    """Sum of squares."""
    return float(np.vdot(values, values))


def fit_gain(steps: Floats, indices: NDArray[np.int32]) -> float:
    """The least-squares factor between indices and what they stand for."""
    values = indices.astype(np.float32)
    return float(np.vdot(steps, values)) / energy(values) if values.any() else 1.0


def entropy(indices: NDArray[np.int32]) -> float:
    """Bits of indices with tables of their own, and of the tables as they are stored, uncompressed."""
    counts = count_magnitudes(indices)
    return cost(counts) + 16 * len(counts)


def entropy_of_bytes(values: NDArray[np.integer[Any]]) -> float:
    """Bits of side information, by its order-0 entropy."""
    counts = np.unique(values, return_counts=True)[1].astype(np.float64)
    return float((counts * np.log2(counts.sum() / counts)).sum())


Coded = tuple[Floats, float]
"""Decoded weights, and bits."""


def code_model(
    weights: Weights, names: list[str], code: Callable[[str, Floats], Coded]
) -> tuple[Weights, float, float]:
    """(all weights with those of `names` coded, their bits a weight, their relative squared error)."""

    def one(name: str) -> tuple[torch.Tensor, float, float, float]:
        source = weights[name].float().numpy()
        decoded, bits = code(name, source)
        return torch.from_numpy(decoded), bits, energy(decoded - source), energy(source)

    with ThreadPoolExecutor(default_workers()) as pool:
        found = list(pool.map(one, names))
    total = sum(weights[name].numel() for name in names)
    changed = weights | {name: one[0] for name, one in zip(names, found, strict=True)}
    return changed, sum(one[1] for one in found) / total, sum(one[2] for one in found) / sum(one[3] for one in found)


class Encoder:
    """The last hidden states of an encoder on fixed sentences."""

    def __init__(self, model_dir: Path) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        self._model = transformers.AutoModel.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        self._batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
        self._exact = self._run()

    def _run(self) -> NDArray[np.float64]:
        with torch.no_grad():
            hidden = self._model.eval()(**self._batch).last_hidden_state
        return np.asarray(hidden[self._batch["attention_mask"].bool()].double().numpy())

    def error(self, weights: Weights) -> float:
        """Relative squared error with these weights."""
        self._model.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False)
        return float(((self._run() - self._exact) ** 2).sum() / (self._exact**2).sum())
