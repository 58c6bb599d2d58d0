"""Do signs before the rotation pay, and which size of block? Scalar codes and the trellis on real weights.

    python scripts/rotation.py [--only REGEX] [--json FILE]

On the layers of all-MiniLM-L6-v2; on every twelfth layer of SmolLM2-135M; and on synthetic matrices of 8,192 columns:
one in 256 of them six times as large, and weights with a mean of half their standard deviation. Scalar codes have a
scale of 16 bits for each block, searched as in hlwq_convert/scalar.py; the trellis has a byte for each row and takes
4.25 bits, ideal ones (scripts/trial_coding.py). The format has blocks of 128 alone: this is a measurement.
spec/decisions/0014 holds its results.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from adaptation import VARIANTS
from adaptation import code as trellis_code
from fidelity import shannon_gap
from trial_coding import (
    Coded,
    Encoder,
    Floats,
    Weights,
    code_model,
    load_weights,
    mean_squares,
    random_signs,
    rotate,
    rotate_back,
)

from hlwq_convert.codebook import count, fit_histogram, lloyd_max
from hlwq_convert.scalar import GAINS, nearest_level

BLOCKS = (64, 128, 256)
RATE = 4.25  # of the trellis
TOGETHER = 4096  # blocks that stay in the core's cache


def scalar_code(bits: int, signs: Floats, name: str, source: Floats) -> Coded:
    """A matrix in scalar codes of `bits` with a codebook of its own, and its bits."""
    coordinates = rotate(source.reshape(-1), signs)
    rms = np.sqrt(mean_squares(coordinates))[:, None]
    unit = coordinates / np.where(rms > 0, rms, np.float32(1))
    levels = fit_histogram(*count(unit), bits, lloyd_max)
    for first in range(0, len(unit), TOGETHER):
        unit[first : first + TOGETHER] = _nearest(unit[first : first + TOGETHER], levels)
    decoded = rotate_back(unit * rms, signs, source.size).reshape(source.shape)
    return decoded, bits * unit.size + 16.0 * len(unit) + 32 * len(levels)


def _nearest(blocks: Floats, levels: Floats) -> Floats:
    """What the best of all gains makes of each block of RMS 1."""
    best, captured = np.zeros_like(blocks), np.full(len(blocks), -1, np.float32)
    for gain in GAINS:
        chosen = levels[nearest_level(blocks / gain, levels)]
        product, energy = np.einsum("ij,ij->i", blocks, chosen), np.einsum("ij,ij->i", chosen, chosen)
        fitted = product / np.maximum(energy, np.float32(1e-30))
        better = fitted * product > captured
        captured[better] = (fitted * product)[better]
        best[better] = (fitted[:, None] * chosen)[better]
    return best


def scalar(bits: int, weights: Weights, names: list[str], signs: Floats) -> tuple[Weights, float, float]:
    """code_model with scalar codes."""
    return code_model(weights, names, partial(scalar_code, bits, signs))


def trellis(rate: float, weights: Weights, names: list[str], signs: Floats) -> tuple[Weights, float, float]:
    """code_model with 32 states and the step that gives this rate."""
    step = 3.4 * 2.0**-rate
    _, bits, _ = code_model(weights, names, partial(trellis_code, VARIANTS[0], step, 32, signs))
    return code_model(weights, names, partial(trellis_code, VARIANTS[0], step * 2.0 ** (bits - rate), 32, signs))


WAYS = {"scalar 4": partial(scalar, 4), "scalar 5": partial(scalar, 5), f"trellis {RATE:g}": partial(trellis, RATE)}


def synthetic(mean_of_all: float, factor: float) -> Weights:
    """One matrix from N(mean, 1), some columns of it times a factor."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((256, 8192), np.float32) + np.float32(mean_of_all)
    matrix[:, rng.integers(0, 8192, 32)] *= np.float32(factor)
    return {"w": torch.from_numpy(matrix)}


def made_by(script: str) -> Path:
    """The model that a script makes or has made."""
    command = [sys.executable, str(Path(__file__).with_name(script))]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


Measured = tuple[str, Weights, list[str], Encoder | None]


def models() -> Iterator[Measured]:
    """(name, all weights, names of those to code, a judge of outputs)."""
    folder = made_by("minilm.py")
    weights, names = load_weights(folder)
    yield "all-MiniLM-L6-v2, layers", weights, [name for name in names if ".layer." in name], Encoder(folder)
    weights, names = load_weights(made_by("smollm2.py"))
    some = [name for name in names if re.search(r"layers\.(0|12|24)\.", name)]
    yield "SmolLM2-135M, layers 0, 12 and 24", weights, some, None
    yield "256 x 8192, large columns", synthetic(0, 6), ["w"], None
    yield "256 x 8192, a mean", synthetic(0.5, 1), ["w"], None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2, help="sign vectors that are averaged")
    parser.add_argument("--only", default="", metavar="REGEX", help="only these models")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for model, weights, names, judge in models():
        if not re.search(options.only, model):
            continue
        print(f"\n{model}\n\n| | block | signs | bits | error of weights | dB above the bound | of the output |")
        print("|---|---|---|---|---|---|---|")
        for way, run in WAYS.items():
            for block in BLOCKS:
                for word, vectors in (
                    ("none", [np.ones(block, np.float32)]),
                    ("yes", [random_signs(block, seed) for seed in range(options.seeds)]),
                ):
                    found = []
                    for signs in vectors:
                        changed, bits, error = run(weights, names, signs)
                        found.append((bits, error, judge.error(changed) if judge else float("nan")))
                    bits, error, output = (mean(values) for values in zip(*found, strict=True))
                    shown = f"{output:.5f}" if judge else "-"
                    print(f"| {way} | {block} | {word} | {bits:.3f} | {error:.6f} | {shannon_gap(bits, error):.2f} | "
                          f"{shown} |", flush=True)  # fmt: skip
                    rows.append({"model": model, "code": way, "block": block, "signs": word, "found": found})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
